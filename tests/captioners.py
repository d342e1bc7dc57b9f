"""Captioners as small as can be, random, with a vocabulary of some words, saved as they come from the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece
from transformers import (
    BertTokenizerFast,  # pyright: ignore[reportAttributeAccessIssue]
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    BlipTextConfig,
    BlipVisionConfig,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]")
WORDS = ("a", "red", "blue", "house", "cat", "dog", "tree", "under", "yellow", "sun", "with", "near", "photo", "of")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} : {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)
SIDE = 32
"""Pixels of what the model sees."""


def save_tiny_blip(folder: Path, seed: int = 0) -> Path:
    """Returns `folder`."""
    torch.manual_seed(seed)
    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}
    begin, end, pad = (vocabulary[word] for word in ("[DEC]", "[SEP]", "[PAD]"))
    text = BlipTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        encoder_hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=begin,
        eos_token_id=end,
        sep_token_id=end,
        pad_token_id=pad,
        projection_dim=16,
        initializer_range=1.0,
    )
    vision = BlipVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=8,
        projection_dim=16,
        initializer_range=1.0,
    )
    config = BlipConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)
    BlipForConditionalGeneration(config).eval().save_pretrained(folder)
    processor = BlipProcessor(BlipImageProcessor(size={"height": SIDE, "width": SIDE}), _tokenizer(vocabulary))
    processor.save_pretrained(folder)
    return folder


def save_tiny_llava(folder: Path, seed: int = 0) -> Path:
    """A model that chats, of the kind of LLaVA. Returns `folder`."""
    torch.manual_seed(seed)
    vocabulary = {word: number for number, word in enumerate((*SPECIAL, "<image>", "user", ":", *WORDS))}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_words(vocabulary),
        pad_token="[PAD]",
        bos_token="[CLS]",
        eos_token="[SEP]",
        unk_token="[UNK]",
        additional_special_tokens=["<image>"],
        model_input_names=["input_ids", "attention_mask"],
    )
    sizes: Any = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, image_size=SIDE, patch_size=8, projection_dim=16)
    text = LlamaConfig(
        **sizes,
        vocab_size=len(vocabulary),
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=vocabulary["[PAD]"],
        bos_token_id=vocabulary["[CLS]"],
        eos_token_id=vocabulary["[SEP]"],
        initializer_range=1.0,
    )
    config = LlavaConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_index=vocabulary["<image>"],
        image_seq_length=(SIDE // 8) ** 2,
    )
    LlavaForConditionalGeneration(config).eval().save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    LlavaProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return folder


def _tokenizer(vocabulary: dict[str, int]) -> BertTokenizerFast:
    return BertTokenizerFast(tokenizer_object=_words(vocabulary), model_max_length=64, bos_token="[DEC]")


def _words(vocabulary: dict[str, int]) -> Tokenizer:
    """Words in lower case, `[CLS]` before and `[SEP]` behind, as BERT has them."""
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    return tokenizer

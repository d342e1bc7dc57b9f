"""Tokenizer and text encoder of the sample base, and the reading lessons that stand in for CLIP's pre-training."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from samples.captions import COLOURS, OTHER_STYLE_WORDS, STYLE_WORDS, random_caption, random_scene
from samples.drawing import GROUNDS, KINDS, SKY_KINDS, TIMES, Scene, Setting
from samples.training import MixedPrecisionTrainer, learning_rate_factor, process_rank, training_steps

TEXT_WIDTH = 128
MAX_TOKENS = 77
CORPUS_SIZE = 6_000
BATCH_SIZE = 24  # per process
LEARNING_RATE = 1e-3
FLAT_UNTIL = 0.5
START, END = "<|startoftext|>", "<|endoftext|>"
CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # CLIP's own splitting rule

Question = tuple[str, tuple[str, ...]]
QUESTIONS: tuple[Question, ...] = (
    ("kind", KINDS),
    ("colour", ("", *COLOURS)),
    ("second kind", ("", *KINDS, *SKY_KINDS)),
    ("second colour", ("", *COLOURS)),
    ("background", ("", *COLOURS)),
    ("ground", ("", *GROUNDS)),
    ("time", ("", *TIMES)),
    ("size", ("", "small", "large")),
    ("side", ("", "left", "right")),
    ("style", ("", *STYLE_WORDS, *OTHER_STYLE_WORDS)),
)
"""What a caption may say and the possible answers; the empty answer is "it does not say"."""


def new_tokenizer(seed: int) -> CLIPTokenizer:
    """A byte-pair tokenizer of CLIP's kind, trained on captions; it can spell any text."""
    rng = random.Random(seed)
    corpus = [lesson(rng)[0] for _ in range(CORPUS_SIZE)]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    split = pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=2000, min_frequency=4, end_of_word_suffix="</w>"))
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    symbols = [*alphabet, *(f"{symbol}</w>" for symbol in alphabet), *("".join(pair) for pair in merges), START, END]
    vocabulary = {symbol: i for i, symbol in enumerate(dict.fromkeys(symbols))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """int64 (N, 77), as the pipeline makes them."""
    batch = tokenizer(captions, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    return batch.input_ids


def lesson(rng: random.Random) -> tuple[str, list[int]]:
    """A random caption, in a quarter of all cases with a style, and the indices of its answers to `QUESTIONS`."""
    scene = random_scene(rng)
    caption = random_caption(scene, rng)
    style = rng.choice((*STYLE_WORDS, *OTHER_STYLE_WORDS)) if rng.random() < 0.25 else ""
    said = answers(scene, caption) | {"style": style}
    suffix = f", {style} style" if style else ""
    return caption + suffix, [choices.index(said[name]) for name, choices in QUESTIONS]


def answers(scene: Scene, caption: str) -> dict[str, str]:
    """What the caption, which was made for this scene, really says of it."""
    first, second = scene.things[0], scene.things[1] if len(scene.things) > 1 else None
    words = caption.replace(",", "").split()
    said = dict.fromkeys((name for name, _ in QUESTIONS), "")
    said["kind"] = first.kind
    said["colour"] = first.colour if f"{first.colour} {first.kind}" in caption else ""
    if second:
        said |= {"second kind": second.kind, "second colour": second.colour}
    if isinstance(scene.background, Setting):
        has_place = scene.background.ground in words
        said |= {"ground": scene.background.ground, "time": scene.background.time} if has_place else {}
    elif f"{scene.background} background" in caption:
        said["background"] = scene.background
    said["size"] = next((word for word in ("small", "large") if word in words), "")
    said["side"] = next((word for word in ("left", "right") if word in words), "")
    return said


class Readers(nn.Module):
    """One linear classifier for each question; they are thrown away after the training."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(TEXT_WIDTH, len(choices)) for _, choices in QUESTIONS)

    def forward(self, hidden: Tensor, labels: Tensor, ends: Tensor, generator: torch.Generator) -> Tensor:
        """Summed cross-entropy of the answers read at the end token and at a random position after it.

        hidden: (B, 77, C). labels: (B, questions). ends: (B,), position of the first end token.
        """
        rows = torch.arange(len(hidden))
        later = (ends + 1 + (torch.rand(len(ends), generator=generator) * (MAX_TOKENS - 1 - ends)).long()).clamp(
            max=MAX_TOKENS - 1
        )
        states = torch.cat([hidden[rows, ends], hidden[rows, later]])
        losses = [
            functional.cross_entropy(head(states).float(), labels[:, i].repeat(2)) for i, head in enumerate(self.heads)
        ]
        return torch.stack(losses).sum()

    @torch.no_grad()
    def accuracy(self, hidden: Tensor, labels: Tensor, ends: Tensor) -> Tensor:
        """Share of right answers at the end token for each question."""
        states = hidden[torch.arange(len(hidden)), ends]
        given = torch.stack([head(states).argmax(dim=1) for head in self.heads], dim=1)
        return (given == labels).float().mean(dim=0)


def lesson_batch(tokenizer: CLIPTokenizer, rng: random.Random, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids (B, 77), labels (B, questions), end positions (B,)."""
    captions, labels = zip(*(lesson(rng) for _ in range(size)), strict=True)
    ids = token_ids(tokenizer, list(captions))
    return ids, torch.tensor(labels), (ids == tokenizer.eos_token_id).int().argmax(dim=1)


def pretrain_text_encoder(
    encoder: CLIPTextModel, readers: Readers, tokenizer: CLIPTokenizer, budget_s: float, checkpoint: Path, seed: int
) -> Tensor:
    """Teach the encoder to read captions; returns the accuracy for each question on new captions.

    A UNet trained with an untrained text encoder did not learn to follow its prompts in any time we could afford.
    """
    rng = random.Random(seed + process_rank())
    generator = torch.Generator().manual_seed(seed + process_rank())
    trainer = MixedPrecisionTrainer({"encoder": encoder, "readers": readers}, LEARNING_RATE, checkpoint)
    for share in training_steps(trainer, budget_s, "text"):
        ids, labels, ends = lesson_batch(tokenizer, rng, BATCH_SIZE)
        loss = readers(encoder(ids).last_hidden_state, labels, ends, generator)
        trainer.step(loss, learning_rate_factor(share, FLAT_UNTIL))
    trainer.finish()
    ids, labels, ends = lesson_batch(tokenizer, rng, 500)
    with torch.no_grad():
        return readers.accuracy(encoder(ids).last_hidden_state, labels, ends)

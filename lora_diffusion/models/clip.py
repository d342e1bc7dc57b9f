"""Captions to CLIP hidden states: chunks of 77 tokens, clip skip."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lora_diffusion.models.base import weights_id
from lora_diffusion.models.errors import ModelError
from lora_diffusion.models.libraries import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

TextEncoder = CLIPTextModel | CLIPTextModelWithProjection
_COUNTED_AT_ONCE = 256  # captions; the tokenizer keeps some kilobytes of each until it is done

Weights = tuple[tuple[str, nn.Parameter], ...]


def token_counts(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> list[int]:
    """Tokens of each caption, without the begin and end marks."""
    parts = (captions[i : i + _COUNTED_AT_ONCE] for i in range(0, len(captions), _COUNTED_AT_ONCE))
    return [len(ids) for part in parts for ids in _token_ids(tokenizer, part)]


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str], *, length: int, chunks: int | None) -> Tensor:
    """Token ids (B, chunks, length + 2): each chunk is begin, up to `length` tokens, end, then the padding token.

    chunks: per caption; what does not fit is cut. None is as many as the longest caption needs, at least one.
    """
    tokens = _token_ids(tokenizer, captions)
    if chunks is None:
        chunks = max(1, max(-(-len(ids) // length) for ids in tokens))
    rows = []
    for ids in tokens:
        for start in range(0, chunks * length, length):
            marked = [tokenizer.bos_token_id, *ids[start : start + length], tokenizer.eos_token_id]
            rows.append(marked + [tokenizer.pad_token_id] * (length + 2 - len(marked)))
    return torch.tensor(rows).reshape(len(captions), chunks, length + 2)


def encode(text_encoder: CLIPTextModel, ids: Tensor, clip_skip: int = 1) -> Tensor:
    """Hidden states (B, chunks · length, D) of token ids (B, chunks, length).

    Chunks are encoded apart and joined whole, begin and end marks included, as A1111 and ComfyUI do. Above
    clip_skip 1, the output of an earlier layer goes through the final layer norm.
    """
    check_clip_skip(text_encoder, clip_skip)
    rows = _chunk_rows(text_encoder, ids)
    if clip_skip == 1:
        hidden = text_encoder(rows)[0]
    else:
        # transformers 4 has a `text_model` level, transformers 5 has not.
        final_layer_norm = getattr(text_encoder, "text_model", text_encoder).final_layer_norm
        hidden = final_layer_norm(text_encoder(rows, output_hidden_states=True).hidden_states[-clip_skip])
    return _joined(hidden, len(ids))


def encode_penultimate(text_encoder: CLIPTextModel, ids: Tensor) -> Tensor:
    """Like `encode`, but the last layer but one as it is, without the final layer norm."""
    return _joined(text_encoder(_chunk_rows(text_encoder, ids), output_hidden_states=True).hidden_states[-2], len(ids))


def encode_penultimate_and_pooled(text_encoder: CLIPTextModelWithProjection, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Like `encode_penultimate`, and the projected state (B, P) of the end mark of each caption's first chunk."""
    output = text_encoder(_chunk_rows(text_encoder, ids), output_hidden_states=True)
    pooled = output.text_embeds.reshape(*ids.shape[:2], -1)[:, 0]  # (B · chunks, P) → (B, P)
    return _joined(output.hidden_states[-2], len(ids)), pooled


def check_clip_skip(text_encoder: CLIPTextModel, clip_skip: int) -> None:
    num_layers = text_encoder.config.num_hidden_layers
    if not 1 <= clip_skip <= num_layers:
        raise ModelError(
            f"clip_skip is {clip_skip}, but this text encoder has {num_layers} layers. "
            f"Use 1 (the last layer) to {num_layers}."
        )


def named_weights(text_encoder: TextEncoder) -> Weights:
    """The encoder's own parameters, by names that do not depend on the version of transformers."""
    return tuple((name.removeprefix("text_model."), weight) for name, weight in text_encoder.named_parameters())


def encoder_id(weights: Weights, text_encoder: TextEncoder, tokenizer: CLIPTokenizer) -> str:
    """A hash of everything that decides what `text_encoder` makes of a caption. weights: its `named_weights`."""
    config = text_encoder.config
    vocabulary = sorted(tokenizer.get_vocab().items())
    settings = (config.hidden_act, config.num_attention_heads, config.layer_norm_eps, vocabulary)
    return weights_id("clip", weights, *settings, tokenizer.pad_token_id, config.eos_token_id)


def _chunk_rows(text_encoder: TextEncoder, ids: Tensor) -> Tensor:
    return ids.reshape(-1, ids.shape[-1]).to(text_encoder.device)  # (B, chunks, length) → (B · chunks, length)


def _joined(hidden: Tensor, num_captions: int) -> Tensor:
    return hidden.reshape(num_captions, -1, hidden.shape[-1])  # (B · chunks, length, D) → (B, chunks · length, D)


def _token_ids(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> list[list[int]]:
    if not captions:
        return []
    # verbose=False: the tokenizer warns above 77 tokens, which chunks are there for.
    return tokenizer(list(captions), add_special_tokens=False, truncation=False, verbose=False)["input_ids"]

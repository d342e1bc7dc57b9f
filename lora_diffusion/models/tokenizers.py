"""CLIP's tokenizer: from a folder, or found for a checkpoint file that has none."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download

from lora_diffusion.models.errors import ModelError
from lora_diffusion.models.libraries import CLIPTokenizer

HUB_IDS = (
    "openai/clip-vit-large-patch14",
    "stabilityai/stable-diffusion-xl-base-1.0",
    "stabilityai/stable-diffusion-2-1",
    "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
)
"""Repositories with the vocabulary that all families share. The first is downloaded if none is in the hub's cache."""

_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def read_tokenizer(folder: Path, padding: str | None = None) -> CLIPTokenizer:
    """The tokenizer in `folder`. padding: the token that fills captions up, instead of its own."""
    if not _is_tokenizer(folder):
        raise ModelError(f"{folder / 'vocab.json'} is missing. Copy or download the model again.")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{folder}: the tokenizer cannot be read ({error}). Get the folder again.") from error
    if padding is not None:
        tokenizer.pad_token = padding
    return tokenizer


def find_tokenizer(checkpoint: Path, configs: Path | None) -> Path:
    """The folder of a tokenizer for a single-file checkpoint: in `configs`, beside the file, or from the hub.

    All families use one vocabulary, so any CLIP tokenizer will do. Raises ModelError that says where it was looked for.
    """
    local = [] if configs is None else [configs / "tokenizer", configs / "tokenizer_2"]
    local.append(checkpoint.parent / "tokenizer")
    for folder in local:
        if _is_tokenizer(folder):
            return folder
    for repo in HUB_IDS:
        if (folder := _from_hub(repo, local_files_only=True)) is not None:
            return folder
    if (folder := _from_hub(HUB_IDS[0], local_files_only=False)) is not None:
        return folder
    places = ", ".join(str(folder) for folder in local)
    raise ModelError(
        f"{checkpoint}: a checkpoint file holds no tokenizer, and none was found: not in {places}, not in the Hugging "
        f"Face cache, and {HUB_IDS[0]} cannot be downloaded. Either set model.configs to a diffusers folder that has "
        f"one, or put vocab.json and merges.txt of any CLIP tokenizer into {checkpoint.parent / 'tokenizer'}."
    )


def _is_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").exists() or (folder / "vocab.json").exists()


def _from_hub(repo: str, *, local_files_only: bool) -> Path | None:
    """The folder of the tokenizer in a hub repository, or None if it cannot be had."""
    patterns = [prefix + name for prefix in ("", "tokenizer/") for name in _FILES]
    try:
        # A short timeout, so that an offline machine is told so at once.
        root = Path(snapshot_download(repo, allow_patterns=patterns, local_files_only=local_files_only, etag_timeout=3))
    except (OSError, ValueError):  # huggingface_hub's errors derive from these
        return None
    return next((folder for folder in (root / "tokenizer", root) if _is_tokenizer(folder)), None)

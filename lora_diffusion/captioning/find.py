"""Which folder a captioner's name means, and which captioners are at hand. No torch, and nothing is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lora_diffusion.captioning.errors import CaptionerError
from lora_diffusion.container import PICKLE_SUFFIXES, ContainerError, conversion_command, read_header, weight_files
from lora_diffusion.models.hub import cached_folder, cached_repos, hub_folder, is_hub_id

HUB_FILES = ("*.json", "*.txt", "*.jinja", "*.model", "model.safetensors", "model-*-of-*.safetensors")
EXAMPLE = "Salesforce/blip-image-captioning-large"

_TOKENIZERS = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
"""One of them; without any transformers 5 makes a tokenizer that knows no word."""
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def find_captioner(name: str) -> Path:
    """The local folder that `name` means, a path or a hub id; what the cache lacks of a hub id is downloaded.

    Raises CaptionerError (ModelError, ContainerError) if there is none, or its files are not whole or are pickles.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if folder.exists():
            raise CaptionerError(f"{name}: a captioner is a folder with config.json and model.safetensors, not a file.")
        if not is_hub_name(name, Path()):
            raise CaptionerError(
                f"{name}: there is no such folder (looked in {Path.cwd()}). Give the folder of an image-to-text model "
                f"of transformers, or a hub id such as {EXAMPLE}."
            )
        if cached := cached_folder(name):
            with suppress(CaptionerError, ContainerError):  # as of what an interrupted download lacks
                check_folder(cached)
                return cached
        folder = hub_folder(name, HUB_FILES)
    check_folder(folder)
    return folder


def is_hub_name(name: str, root: Path) -> bool:
    """Whether `name` means a repository of the hub, and not a path from `root`."""
    return is_hub_id(name) and not (root / name).parent.exists()


def check_folder(folder: Path) -> None:
    """Raises CaptionerError if this is no captioner, and ContainerError if its weights are not whole."""
    if (folder / "model_index.json").exists():
        raise CaptionerError(f"{folder}: this is a base that draws pictures. A captioner is a model such as {EXAMPLE}.")
    config = _config(folder)
    if not config:
        raise CaptionerError(
            f"{folder / 'config.json'} is missing or damaged, so this is not a model of transformers. Copy or "
            "download it again."
        )
    if not _describes_pictures(config):
        raise CaptionerError(
            f"{folder}: {_kind(config)} describes no pictures. Give an image-to-text model such as {EXAMPLE}."
        )
    if not _has_weights(folder):
        pickle = next((path for path in sorted(folder.glob("*")) if path.suffix in PICKLE_SUFFIXES), None)
        if pickle is None:
            raise CaptionerError(f"{folder / _WEIGHTS[0]} is missing. Copy or download the model again.")
        raise CaptionerError(
            f"{folder}: only {pickle.name}, a pickle, which can run code and is not opened. Get the .safetensors "
            f"version, or convert it:\n{conversion_command(pickle, folder / _WEIGHTS[0])}"
        )
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise CaptionerError(f"{folder / _TOKENIZERS[0]} is missing. Copy or download the model again.")
    for path in weight_files(folder, "model"):
        read_header(path)


def captioners(models: Path) -> list[str]:
    """Names for `find_captioner` of what is at hand: folders in `models`, then the hub's cache."""
    local = sorted(models.iterdir()) if models.is_dir() else []
    found = [str(folder) for folder in local if _is_captioner(folder)]
    cached = ((name, cached_folder(name)) for name in cached_repos())
    return found + [name for name, folder in cached if folder and _is_captioner(folder)]


def _is_captioner(folder: Path) -> bool:
    """By its config and the names of its files."""
    return _has_weights(folder) and not (folder / "model_index.json").exists() and _describes_pictures(_config(folder))


def _describes_pictures(config: Mapping[str, Any]) -> bool:
    """Whether it has eyes and writes: BLIP for questions or search, CLIP and language models do not both."""
    classes = config.get("architectures")
    writes = isinstance(classes, list) and any(
        str(name).endswith(("ForConditionalGeneration", "ForCausalLM", "ForVision2Text", "EncoderDecoderModel"))
        for name in classes
    )
    return writes and any(key in config for key in ("vision_config", "encoder"))


def _kind(config: Mapping[str, Any]) -> str:
    classes = config.get("architectures")
    return str(classes[0]) if isinstance(classes, list) and classes else str(config.get("model_type", "this model"))


def _has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _WEIGHTS)


def _config(folder: Path) -> dict[str, Any]:
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}

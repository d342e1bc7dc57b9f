"""Models of the Hugging Face hub: names, and their files on this machine. No torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from lora_diffusion.models.errors import ModelError


def is_hub_id(text: str) -> bool:
    """Whether it has the form of one, "owner/name"."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", text) is not None


def hub_folder(repo: str, patterns: Sequence[str]) -> Path:
    """The local copy of a hub repository's files, downloaded as needed; offline, only what is cached."""
    from huggingface_hub import snapshot_download

    try:
        # A short timeout, so that an offline machine is told so at once.
        return Path(snapshot_download(repo, allow_patterns=list(patterns), etag_timeout=3))
    except (OSError, ValueError) as error:  # huggingface_hub's errors derive from these
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{repo}: not a local path, and it cannot be had from the Hugging Face hub ({reason}). Check the spelling "
            "and the connection, or download it elsewhere and give the folder's path."
        ) from error


def cached_folder(repo: str) -> Path | None:
    """The newest local copy of a hub repository, as far as it was downloaded. Asks nobody."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, "config.json")
    return Path(found).parent if isinstance(found, str) else None


def cached_repos() -> list[str]:
    """Names of all models in the hub's cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folders = sorted(Path(HF_HUB_CACHE).glob("models--*--*"))
    names = (folder.name.removeprefix("models--").replace("--", "/") for folder in folders)
    return [name for name in names if is_hub_id(name)]

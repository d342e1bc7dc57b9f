"""What there is to know about the adapters of a library without loading them, for clients to choose from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_diffusion.container import read_header
from lora_diffusion.errors import UserError
from lora_diffusion.formats.layout import layout_of
from lora_diffusion.formats.metadata import frequent_tags
from lora_diffusion.generation.library import HASH_KEY
from lora_diffusion.generation.request import check_file_name, without_halves

_NUM_TAGS = 8


class Catalogue:
    """Reads each file's header once, and again when the file has changed."""

    def __init__(self) -> None:
        self._read: dict[tuple[Path, int, int], dict[str, Any]] = {}

    def list(self, paths: Mapping[str, Path]) -> list[dict[str, Any]]:
        """One entry per name, sorted. A file that cannot be used has an `error` and no more."""
        return [self._entry(name, path) for name, path in sorted(paths.items())]

    def _entry(self, name: str, path: Path) -> dict[str, Any]:
        try:
            check_file_name(path)
            status = path.stat()
            key = (path, status.st_size, status.st_mtime_ns)
            if key not in self._read:
                self._read[key] = _describe(path)
            return {"name": name, "file": path.name, "bytes": status.st_size} | self._read[key]
        except (UserError, OSError) as error:
            reason = without_halves(str(error)).replace(without_halves(str(path.parent)), "").lstrip("/\\")
            return {"name": name, "file": without_halves(path.name), "error": reason}


def _describe(path: Path) -> dict[str, Any]:
    header = read_header(path)
    layout = layout_of(path, header)
    geometries = layout.geometries.values()
    ranks = Counter(geometry.rank for geometry in geometries)
    return {
        "family": layout.family,
        "kind": Counter(geometry.name for geometry in geometries).most_common(1)[0][0],
        "rank": ranks.most_common(1)[0][0],
        "triggers": [without_halves(word) for word in trigger_words(header.metadata)],
        "hash": without_halves(header.metadata.get(HASH_KEY, "")),
    }


def trigger_words(metadata: Mapping[str, str]) -> list[str]:
    """What to write in a prompt: the phrase that the file names, else the tags that its captions had most often."""
    phrase = metadata.get("modelspec.trigger_phrase", "").strip()
    if phrase:
        return [phrase[:200]]
    return frequent_tags(metadata, _NUM_TAGS)

"""Adapter files by name: found in folders, loaded when a request needs them, dropped when memory is short."""

from __future__ import annotations

import difflib
import logging
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_diffusion.errors import UserError
from lora_diffusion.formats.adapter_file import AdapterFile
from lora_diffusion.generation.engine import Engine
from lora_diffusion.generation.request import adapter_name, check_file_name

logger = logging.getLogger(__name__)

HASH_KEY = "sshs_model_hash"
_SUFFIX = ".safetensors"

Stamp = tuple[int, int]
"""A file's size and time of change in nanoseconds: another stamp is another file."""


@dataclass(frozen=True)
class _InMemory:
    stamp: Stamp
    path: Path
    hash: str
    notes: tuple[str, ...]


class AdapterLibrary:
    """What an engine can draw with. Files are known by name only, and loaded and unloaded as requests need them.

    Belongs to the thread that draws; only `paths` may be read from others.
    """

    def __init__(self, engine: Engine, folders: Sequence[Path], *, budget_bytes: int) -> None:
        """budget_bytes: memory for adapters' weights; those that one batch needs together are held in any case."""
        self._engine = engine
        self._folders = tuple(folders)
        self._budget_bytes = budget_bytes
        self._held: OrderedDict[str, _InMemory] = OrderedDict()  # least recently used first
        self._told: set[tuple[Path, Stamp]] = set()
        self.paths: dict[str, Path] = {}
        self.refresh()

    def refresh(self) -> None:
        """Look for files again. Names are file names without the ending; where two are alike, the later is numbered."""
        self.paths = dict(_named(path for folder in self._folders for path in _files(folder)))

    def check(self, names: Collection[str]) -> None:
        """Raises UserError for a name that no file has, or one whose file name is not UTF-8."""
        for name in names:
            if name not in self.paths:
                near = difflib.get_close_matches(name, self.paths, n=1)
                hint = f"Did you mean {near[0]!r}? " if near else ""
                raise UserError(f"There is no adapter {name!r}. {hint}The library has {len(self.paths)}.")
            check_file_name(self.paths[name])

    def need(self, names: Collection[str]) -> None:
        """Have these adapters loaded, read again if their files changed; those used longest ago make room.

        Raises UserError or AdapterFileError for a name or file that cannot be used.
        """
        self.check(names)
        for name in names:
            path = self.paths[name]
            stamp = _stamp(path)
            held = self._held.get(name)
            if held and (held.stamp, held.path) != (stamp, path):
                self._drop(name)
                held = None
            if held is None:
                file = AdapterFile.read(path)
                notes = self._engine.load_adapter(name, file)
                self._held[name] = _InMemory(stamp, path, file.metadata.get(HASH_KEY, ""), notes)
                self._tell(path, stamp, notes)
            self._held.move_to_end(name)
        self._make_room(names)

    def hashes(self) -> dict[str, str]:
        """Name → `sshs_model_hash` of the loaded adapters that have one."""
        return {name: held.hash for name, held in self._held.items() if held.hash}

    def notes(self, names: Collection[str]) -> list[str]:
        """What a user of these loaded adapters should know, as `Engine.load_adapter` returns it."""
        return [f"{name}: {note}" for name in names for note in self._held[name].notes]

    def _tell(self, path: Path, stamp: Stamp, notes: Sequence[str]) -> None:
        """Once per file, however often it is loaded."""
        if (path, stamp) not in self._told:
            self._told.add((path, stamp))
            for note in notes:
                logger.warning("%s: %s", path, note)

    def _make_room(self, needed: Collection[str]) -> None:
        sizes = self._engine.adapter_bytes
        total = sum(sizes[name] for name in self._held)
        for name in [name for name in self._held if name not in needed]:
            if total <= self._budget_bytes:
                return
            total -= sizes[name]
            self._drop(name)

    def _drop(self, name: str) -> None:
        del self._held[name]
        self._engine.unload_adapter(name)
        logger.debug("adapter %s unloaded", name)


def _files(folder: Path) -> Iterator[Path]:
    """Adapter files in a folder and those below it, in a fixed order; links that lead out of it are left out."""
    root = folder.resolve()
    for path in sorted(root.rglob(f"*{_SUFFIX}")):
        is_hidden = any(step.startswith(".") for step in path.relative_to(root).parts)
        if not is_hidden and path.is_file() and path.resolve().is_relative_to(root):
            yield path


def _named(paths: Iterator[Path]) -> Iterator[tuple[str, Path]]:
    taken: set[str] = set()
    for path in paths:
        name = stem = adapter_name(path.name.removesuffix(_SUFFIX))
        number = 2
        while name in taken:
            name, number = f"{stem} {number}", number + 1
        taken.add(name)
        yield name, path


def _stamp(path: Path) -> Stamp:
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"{path.name}: cannot be read ({error.strerror}). Refresh the list of adapters.") from error
    return status.st_size, status.st_mtime_ns

"""What was found out about files, kept for as long as they stay as they are. No torch."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Set
from pathlib import Path
from typing import Any, NamedTuple

from lora_diffusion.files import write_bytes_atomically

logger = logging.getLogger(__name__)

SETTLED_NS = 2 * 10**9
"""Nothing is kept about a file that changed less than this before it was read: it could change again within the same
tick of the file system's clock and look the same. The coarsest clock, FAT's, ticks every two seconds."""


class Stamp(NamedTuple):
    """What shows that a file was written, replaced or moved.

    Programs can set `modified_ns` back, but not `changed_ns`, which the system sets at every change (on Windows it is
    the time of creation).
    """

    size: int
    modified_ns: int
    changed_ns: int
    inode: int


def stamp_of(path: str | Path) -> Stamp:
    """The stamp of a file, links followed. Take it before reading the file. Raises OSError."""
    status = os.stat(path)
    return Stamp(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


class FileFacts:
    """Facts (JSON values) by file name, each with the stamp of the file that it was read from.

    On disk it is one file; damaged, of another version or missing, it is empty, and everything is read again.
    """

    def __init__(self, path: Path | None, version: str, *, is_kept: bool = True) -> None:
        """path: None keeps nothing on disk. version: changes with whatever else the facts depend on.
        is_kept: whether `save` writes.
        """
        self._path = path
        self._is_kept = is_kept
        self._version = version
        self._entries = _load(path, version) if path is not None else {}
        self._fresh: dict[str, list[Any]] = {}

    def get(self, name: str, stamp: Stamp) -> Any | None:
        """The fact about the file, None if there is none or the file is not the one it was read from."""
        entry = self._entries.get(name)
        return entry[1] if entry is not None and entry[0] == list(stamp) else None

    def put(self, name: str, stamp: Stamp, fact: Any) -> None:
        """Keep `fact`, which was read after the stamp was taken, unless the file is too new to be sure of it."""
        if time.time_ns() - max(stamp.modified_ns, stamp.changed_ns) >= SETTLED_NS:
            self._fresh[name] = [list(stamp), fact]

    def save(self, *, only: Set[str] | None = None) -> None:
        """Write what is new to disk, beside what others have written since. only: names to keep, else all."""
        has_news = bool(self._fresh) or (only is not None and not self._entries.keys() <= only)
        if self._path is None or not self._is_kept or not has_news:
            return
        entries = _load(self._path, self._version) | self._fresh
        if only is not None:
            entries = {name: entry for name, entry in entries.items() if name in only}
        body = json.dumps({"version": self._version, "files": entries}, separators=(",", ":")).encode()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes_atomically(self._path, _checksum(body) + b"\n" + body)
        except OSError as error:
            logger.info("%s cannot be written (%s); the next start reads these files again", self._path, error.strerror)
        self._entries, self._fresh = entries, {}


def _load(path: Path, version: str) -> dict[str, list[Any]]:
    try:
        checksum, _, body = path.read_bytes().partition(b"\n")
        if checksum != _checksum(body):
            return {}
        stored = json.loads(body)
        return stored["files"] if stored["version"] == version else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _checksum(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest().encode()

"""Files that are either the old ones or the new ones, whatever interrupts the writing."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CHUNK_BYTES = 1 << 20


@contextmanager
def replacement_of(path: Path, *, is_new: bool = False) -> Iterator[Path]:
    """An empty file to write to, which takes the place of `path` at the end of the block.

    A reader sees the old content or the new, also after a crash or power loss; if the block raises, the old stays. The
    temporary file lies in the same folder, so a full disk leaves the old file untouched. A new file's permissions are
    those any program would give it (by umask); an existing file keeps its own.
    is_new: raise FileExistsError at the end if `path` is there by then, whoever has made it meanwhile.
    Raises OSError, with no temporary file left behind, if the disk is full or the folder cannot be written.
    """
    path = Path(os.path.realpath(path))  # a link is followed, not replaced
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")  # short: a name has 255 bytes at most
    temporary = Path(name)
    try:
        try:
            yield temporary
            os.fsync(handle)
        finally:
            os.close(handle)
        temporary.chmod(_mode_for(path))
        (_move_to_new if is_new else Path.replace)(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_bytes_atomically(path: Path, data: bytes, *, is_new: bool = False) -> None:
    """Replace `path` with `data` as `replacement_of` does."""
    with replacement_of(path, is_new=is_new) as temporary:
        temporary.write_bytes(data)


def write_text_atomically(path: Path, text: str) -> None:
    """Replace `path` with `text` in UTF-8; line ends are written as they are."""
    write_bytes_atomically(path, text.encode("utf-8"))


def write_json_atomically(path: Path, value: object) -> None:
    """Replace `path` with `value` as indented JSON. Raises ValueError for NaN and infinities, which JSON lacks."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_text_atomically(path, text + "\n")


def sha256_of(path: Path) -> str:
    """The file's sha256 in hex, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(CHUNK_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def last_bytes(path: Path, count: int) -> bytes:
    """The end of a file, at most `count` bytes of it; nothing if it is not there."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - count))
            return file.read(count)
    except OSError:
        return b""


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power loss. Does nothing where folders cannot be opened (Windows)."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _move_to_new(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a disk without hard links: the name is taken by an empty file for a moment
        path.open("xb").close()
        temporary.replace(path)
    else:
        temporary.unlink()


def _mode_for(path: Path) -> int:
    """Permissions for a file that will replace `path`; `mkstemp` alone would hide it from everyone else."""
    try:
        return path.stat().st_mode & 0o7777
    except FileNotFoundError:
        return 0o666 & ~_umask()


def _umask() -> int:
    """The process's umask. The only portable way to read it is to set it, and other threads see that for a moment."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    mask = os.umask(0o022)
    os.umask(mask)
    return mask

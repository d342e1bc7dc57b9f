"""What lies in a data set's folder, found without opening a file. Links that leave the folder are not followed."""

from __future__ import annotations

import errno
import os
import stat
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path

from lora_diffusion.data.errors import DataError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"})
CAPTION_SUFFIXES = (".txt", ".caption")
METADATA_NAME = "metadata.jsonl"

_UNREAD_SUFFIXES = frozenset({".heic", ".heif", ".jxl", ".jp2", ".psd", ".svg", ".ico", ".tga", ".raw", ".dng", ".cr2"})
_PICTURE_SUFFIXES = IMAGE_SUFFIXES | _UNREAD_SUFFIXES
_IGNORED_NAMES = frozenset({"thumbs.db", "desktop.ini", "__macosx"})
_IGNORED_SUFFIXES = (".tmp", ".part", ".crdownload", "~")


@dataclass(frozen=True)
class LeftOut:
    """A file that is not trained on, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Listing:
    """The regular files of a data set's folder by what they are for, each tuple sorted by path."""

    images: tuple[Path, ...]
    captions: tuple[Path, ...]
    metadata: tuple[Path, ...]
    left_out: tuple[LeftOut, ...]


def list_folder(root: Path) -> Listing:
    """Every picture and caption file in `root` and its subfolders. Hidden and temporary files are ignored.

    Left out with a reason: links to folders, links that are broken or lead out of `root`, pipes and devices, folders
    named like a picture, names that are not UTF-8, picture formats that are not read. Raises DataError when `root`
    is not a readable folder.
    """
    if not root.is_dir():
        problem = "is not a folder" if root.exists() else "does not exist"
        raise DataError(f"{root}: the data set folder {problem}. Check [[dataset]] path.")
    files: list[Path] = []
    left_out: list[LeftOut] = []
    for path, reason in _walk(root, root.resolve()):
        if reason is None:
            files.append(path)
        else:
            left_out.append(LeftOut(path, reason))
    files.sort(key=lambda path: relative_name(path, root))
    return Listing(
        images=tuple(path for path in files if is_image_name(path)),
        captions=tuple(path for path in files if _suffix(path.name) in CAPTION_SUFFIXES),
        metadata=tuple(path for path in files if path.name == METADATA_NAME),
        left_out=tuple(left_out),
    )


def find_files(root: Path, limit: int) -> Iterator[Path]:
    """The files of `list_folder` one by one, for who needs only the first ones. Looks at `limit` files at most."""
    return (path for path, reason in islice(_walk(root, root.resolve()), limit) if reason is None)


def relative_name(path: Path, root: Path) -> str:
    """The path below `root` with forward slashes, accents composed: the same text on every system."""
    return unicodedata.normalize("NFC", name_below(path, root))


def name_below(path: Path, root: Path) -> str:
    """The path below `root` with forward slashes, letter for letter. Ten times faster than `Path.relative_to`."""
    return os.fspath(path)[_prefix_length(root) :].replace(os.sep, "/")


@lru_cache(maxsize=64)
def _prefix_length(root: Path) -> int:
    return len(os.fspath(root / "x")) - 1


def is_image_name(path: Path) -> bool:
    """Whether the file's name promises a picture, readable or not."""
    return _suffix(path.name) in _PICTURE_SUFFIXES


def _walk(folder: Path, real_root: Path) -> Iterator[tuple[Path, str | None]]:
    """(path, None) for a file to look at, (path, reason) for one to leave out."""
    try:
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        if folder.resolve() == real_root:
            raise DataError(f"{folder}: the data set folder cannot be read ({error.strerror}).") from None
        yield folder, f"the folder cannot be read ({error.strerror})"
        return
    for entry in found:
        path = folder / entry.name
        if _is_ignored(entry.name):
            continue
        if not _is_utf8(entry.name):
            yield path, "the name is not valid UTF-8; rename it"
        elif entry.is_dir(follow_symlinks=False) and not is_image_name(path):
            yield from _walk(path, real_root)
        else:
            yield path, _why_not(entry, path, real_root)


def _is_ignored(name: str) -> bool:
    lower = name.lower()
    return name.startswith(".") or lower in _IGNORED_NAMES or lower.endswith(_IGNORED_SUFFIXES)


def _why_not(entry: os.DirEntry[str], path: Path, real_root: Path) -> str | None:
    """Why this entry cannot be used, judged by its name and kind alone."""
    if entry.is_symlink() and (reason := _why_not_follow(path, real_root)):
        return reason
    if not entry.is_file():  # which the folder's listing tells without a look at the file
        return f"{_kind_of(entry.stat().st_mode)}, not a file"
    suffix = _suffix(entry.name)
    if suffix in _UNREAD_SUFFIXES:
        return f"{suffix} pictures are not read; convert it to PNG or JPEG"
    if suffix not in IMAGE_SUFFIXES and suffix not in CAPTION_SUFFIXES and entry.name != METADATA_NAME:
        return "neither a picture nor a caption by its name"
    return None


def _why_not_follow(link: Path, real_root: Path) -> str | None:
    try:
        target = link.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop, before Python 3.13
        loops = isinstance(error, RuntimeError) or error.errno == errno.ELOOP
        return "a link that leads in a circle" if loops else "a link whose target does not exist"
    if not target.is_relative_to(real_root):
        return "a link that leads out of the data set folder; copy the file instead"
    return "a link to a folder; only files may be links" if target.is_dir() else None


def _kind_of(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _is_utf8(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True

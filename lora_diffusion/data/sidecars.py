"""Which caption belongs to which picture: text files beside it, or lines of a metadata.jsonl. No torch."""

from __future__ import annotations

import json
import posixpath
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_diffusion.data.captions import CaptionError, cannot_be_read, check_text, decode_text, one_line, read_caption
from lora_diffusion.data.errors import DataError
from lora_diffusion.data.listing import CAPTION_SUFFIXES, Listing, relative_name
from lora_diffusion.files import write_bytes_atomically

MAX_CAPTION_CHARACTERS = 20_000
"""What is kept of a caption. Text encoders read some hundred tokens; tokenizing a megabyte takes seconds."""

_FILE_KEYS = ("file_name", "image_path")
_CAPTION_KEYS = ("text", "caption")


@dataclass(frozen=True)
class Note:
    """Something about a file that a person should know, though it is used. `kind` is a few words to count by."""

    path: Path
    kind: str
    message: str


class CaptionIndex:
    """The captions of one data set folder. A text file wins over a metadata line, `.txt` over `.caption`."""

    def __init__(self, root: Path, listing: Listing) -> None:
        self._root = root
        self._sidecars: dict[str, list[Path]] = {}
        for path in listing.captions:
            self._sidecars.setdefault(_stem(relative_name(path, root)), []).append(path)
        self._metadata: dict[str, tuple[Path, str]] = {}
        self.notes: list[Note] = []
        for path in listing.metadata:
            self._read_metadata(path)
        self._note_orphans(listing)

    def find(self, image: Path) -> tuple[str | None, list[Note]]:
        """The picture's own caption, or None when it has none or a blank one. Raises CaptionError."""
        name = relative_name(image, self._root)
        notes: list[Note] = []
        sidecars = self._ranked(name)
        line = self._metadata.get(name)
        if sidecars:
            caption, source = read_caption(sidecars[0]), sidecars[0].name
            others = [path.name for path in sidecars[1:]]
            if line and line[1] and line[1] != caption:
                others.append(f"its line in {line[0].name}")
            if others:
                notes.append(Note(image, "several caption files", f"{source} is used, not {' or '.join(others)}"))
        elif line:
            caption, source = line[1], line[0].name
        else:
            return None, notes
        if not caption:
            notes.append(Note(image, "empty caption file", f"its caption in {source} is empty"))
            return None, notes
        if len(caption) > MAX_CAPTION_CHARACTERS:
            message = f"{len(caption):,} characters, of which the first {MAX_CAPTION_CHARACTERS:,} are used"
            notes.append(Note(image, "caption cut", message))
        return caption[:MAX_CAPTION_CHARACTERS], notes

    def file_of(self, image: Path) -> Path:
        """The text file that the picture's caption is read from, else the `.txt` beside it, there or not."""
        sidecars = self._ranked(relative_name(image, self._root))
        return sidecars[0] if sidecars else image.with_suffix(CAPTION_SUFFIXES[0])

    def _ranked(self, name: str) -> list[Path]:
        return sorted(self._sidecars.get(_stem(name), ()), key=_suffix_rank)

    def _note_orphans(self, listing: Listing) -> None:
        """Captions without a picture, and metadata lines that name no file. Pictures left out count as there."""
        seen = [*listing.images, *(item.path for item in listing.left_out)]
        names = {relative_name(path, self._root) for path in seen}
        stems = set(map(_stem, names))
        for stem, paths in self._sidecars.items():
            if stem not in stems:
                self.notes += [Note(path, "caption without image", "no picture has this name") for path in paths]
        for name, (path, _) in self._metadata.items():
            if name not in names:
                self.notes.append(Note(path, "caption without image", f"it names {name}, which is not there"))

    def _read_metadata(self, path: Path) -> None:
        folder = path.parent.relative_to(self._root).as_posix()
        try:
            text = decode_text(path.read_bytes(), str(path))
        except OSError as error:
            raise DataError(cannot_be_read(path, error)) from error
        for number, line in enumerate(text.split("\n"), start=1):  # JSON's texts may hold other breaks, as U+2028
            if not line.strip():
                continue
            where = f"{path} line {number}"
            name, caption = _read_line(line, where)
            key = unicodedata.normalize("NFC", posixpath.normpath(posixpath.join(folder, name)))
            if key.startswith(("../", "/")):
                raise DataError(f"{where}: {name!r} lies outside the data set folder. Use a path below {path.parent}.")
            if key in self._metadata:
                self.notes.append(Note(path, "caption given twice", f"line {number} names {name} again and wins"))
            self._metadata[key] = (path, caption)


def check_caption_file(path: Path, root: Path) -> None:
    """Raises CaptionError unless `path` is a caption file, there or not, inside the data set's folder `root`."""
    real = path.resolve()
    if path.suffix.lower() not in CAPTION_SUFFIXES or not real.is_relative_to(root.resolve()):
        raise CaptionError(f"{path.name} leads out of the data set's folder and is not written to.")
    if real.suffix.lower() not in CAPTION_SUFFIXES or (path.exists() and not path.is_file()):
        raise CaptionError(f"{path.name} is not a file of text and is not written to.")


def write_caption(path: Path, text: str) -> None:
    """Replace the caption in a text file, at once and whole. text: one line. Raises OSError."""
    write_bytes_atomically(path, f"{text}\n".encode())


def _read_line(line: str, where: str) -> tuple[str, str]:
    """(file name, caption or "") of one line of metadata.jsonl."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not a line of JSON ({error}).") from None
    name = _first_text(entry, _FILE_KEYS, where)
    if not name:
        raise DataError(f"{where}: no file name. Each line is an object with the key file_name (or image_path).")
    caption = one_line(_first_text(entry, _CAPTION_KEYS, where))
    tags = one_line(_first_text(entry, ("tags",), where))
    return name.replace("\\", "/"), ", ".join(part for part in (caption, tags) if part)


def _first_text(entry: object, keys: Sequence[str], where: str) -> str:
    if not isinstance(entry, dict):
        raise DataError(
            f'{where}: not a JSON object. Each line looks like {{"file_name": "a.png", "text": "a red house"}}.'
        )
    for key in keys:
        value = entry.get(key)
        if value is None:
            continue
        if not isinstance(value, str):
            raise DataError(f"{where}: {key} is {type(value).__name__}, not text.")
        check_text(value, f"{where}, {key}")
        if value.strip():
            return value
    return ""


def _stem(name: str) -> str:
    return posixpath.splitext(name)[0]


def _suffix_rank(path: Path) -> int:
    return CAPTION_SUFFIXES.index(path.suffix.lower())

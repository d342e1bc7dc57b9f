"""A folder of pictures with their captions: read, filtered, edited. Pictures are never written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lora_diffusion.data.captions import CaptionError, one_line, read_caption
from lora_diffusion.data.listing import CAPTION_SUFFIXES, is_image_name, list_folder, relative_name
from lora_diffusion.data.sidecars import MAX_CAPTION_CHARACTERS, CaptionIndex, check_caption_file
from lora_diffusion.errors import UserError
from lora_diffusion.files import write_bytes_atomically
from webui.services.caption_text import Change, style_of
from webui.services.journal import FileChange, Journal, Step


class SetError(UserError):
    """A data set cannot be read or changed as asked."""


@dataclass(frozen=True)
class Picture:
    """name: path below the set's folder. caption: None where there is none. problem: why the caption is unreadable."""

    name: str
    path: Path
    caption: str | None
    problem: str = ""


@dataclass
class PictureSet:
    """What a folder held when it was read last, and what was done to it since.

    left_out, orphans: (name below the folder, reason).
    """

    root: Path
    journal: Journal
    pictures: dict[str, Picture] = field(default_factory=dict)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    orphans: list[tuple[str, str]] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)
    _files: dict[str, Path] = field(default_factory=dict)
    _has_metadata: bool = False

    def read(self) -> None:
        """Look into the folder anew. Raises UserError when it cannot be read."""
        listing = list_folder(self.root)
        captions = CaptionIndex(self.root, listing)
        self.pictures, self.notes = {}, {}
        self._has_metadata = bool(listing.metadata)
        ranked = sorted(listing.captions, key=lambda path: CAPTION_SUFFIXES.index(path.suffix.lower()), reverse=True)
        self._files = {_stem(path, self.root): path for path in ranked}  # the first of CAPTION_SUFFIXES wins
        for path in listing.images:
            name = relative_name(path, self.root)
            try:
                caption, notes = captions.find(path)
                self.pictures[name] = Picture(name, path, caption)
                if notes:
                    self.notes[name] = "; ".join(note.message for note in notes)
            except (CaptionError, OSError) as error:
                self.pictures[name] = Picture(name, path, None, _without(str(error), self.root))
        self.left_out = [
            (_shown(item.path, self.root), item.reason) for item in listing.left_out if is_image_name(item.path)
        ]
        self.orphans = [(_shown(note.path, self.root), note.message) for note in captions.notes]

    def picture(self, name: str) -> Picture:
        """Raises SetError for a picture that is not in the set."""
        if name not in self.pictures:
            raise SetError(f"There is no picture {name!r} in this data set; it may have been moved. Reload the page.")
        return self.pictures[name]

    def captions(self, names: Iterable[str]) -> dict[str, str | None]:
        """Picture → caption, without pictures whose caption file cannot be read."""
        chosen = (self.picture(name) for name in names)
        return {picture.name: picture.caption for picture in chosen if not picture.problem}

    def edit(self, name: str, before: str | None, text: str) -> list[str]:
        """Give one picture a caption; the names of all that have it now, as some share a file.

        before: what the caption was for whoever wrote the new one. Raises SetError when it is something else by now.
        """
        self._refresh([name])
        picture = self.picture(name)
        if picture.problem:
            raise SetError(f"The caption file cannot be read, so it is not written over. {picture.problem}")
        text = one_line(text)
        if text == (picture.caption or ""):
            return []
        if (picture.caption or "") != (before or ""):
            raise SetError("The caption was changed elsewhere in the meantime. This is what it is now.")
        return self.write([Change(name, picture.caption, text)], "edit", merges=True)

    def write(self, changes: Sequence[Change], what: str, *, merges: bool = False) -> list[str]:
        """Write captions to the text files beside the pictures; the names of all pictures that it concerns.

        Nothing is written when one of the captions is not allowed or a file leads out of the folder.
        """
        files: dict[Path, FileChange] = {}
        for change in changes:
            if len(change.after) > MAX_CAPTION_CHARACTERS or "\0" in change.after:
                raise SetError(f"{change.name}: a caption has at most {MAX_CAPTION_CHARACTERS:,} characters.")
            path = self._caption_file(self.picture(change.name).path)
            files[path] = FileChange(path.relative_to(self.root).as_posix(), _content(path), _file_of(change.after))
        self.journal.add(what, files.values(), merges=merges)
        for path, change in files.items():
            write_bytes_atomically(path, change.after or b"")
        return self._refresh(self._sharing(files))

    def write_unless_changed(self, changes: Sequence[Change], what: str) -> tuple[list[str], list[str]]:
        """Write captions whose `before` still holds; (names of all pictures that it concerns, pictures left alone)."""
        self._refresh([change.name for change in changes])
        pictures = {change.name: self.picture(change.name) for change in changes}
        kept = [
            change
            for change in changes
            if not pictures[change.name].problem and (pictures[change.name].caption or "") == (change.before or "")
        ]
        kept = [Change(change.name, change.before, one_line(change.after)) for change in kept]
        left = sorted(pictures.keys() - {change.name for change in kept})
        return self.write(kept, what) if kept else [], left

    def note_written(self, changes: Sequence[Change], what: str) -> int:
        """Write down captions that another process wrote, so that they can be undone; how many are still there."""
        files = [(self._caption_file(self.pictures[c.name].path), c) for c in changes if c.name in self.pictures]
        written = [
            FileChange(path.relative_to(self.root).as_posix(), _file_of(change.before), _file_of(change.after))
            for path, change in files
            if _content(path) == _file_of(change.after)
        ]
        if written:
            self.journal.add(what, written)
        return len(written)

    def undo(self) -> tuple[Step, list[str]]:
        """Take the last change back; (what it was, files that were changed elsewhere and left alone)."""
        step, left = self.journal.undo(self._put)
        self.read()
        return step, left

    def redo(self) -> tuple[Step, list[str]]:
        """Do what was undone last again."""
        step, left = self.journal.redo(self._put)
        self.read()
        return step, left

    def _put(self, change: FileChange) -> bool:
        """Bring a caption file to `change.after`, unless it holds neither the old nor the new text."""
        path = self.root / change.file
        try:
            self._check(path)
        except SetError:
            return False
        now = _content(path)
        if now == change.after:
            return True
        if now != change.before or not path.parent.is_dir():
            return False
        if change.after is None:
            path.unlink()
        else:
            write_bytes_atomically(path, change.after)
        return True

    def _caption_file(self, image: Path) -> Path:
        """The file that the picture's caption is read from, else the `.txt` beside it."""
        path = self._files.get(_stem(image, self.root)) or image.with_suffix(CAPTION_SUFFIXES[0])
        self._check(path)
        return path

    def _check(self, path: Path) -> None:
        """Raises SetError unless `path` is a caption file, there or not, inside the folder."""
        try:
            check_caption_file(path, self.root)
        except CaptionError as error:
            raise SetError(str(error)) from None

    def _sharing(self, files: Iterable[Path]) -> list[str]:
        stems = {_stem(path, self.root) for path in files}
        return [name for name, picture in self.pictures.items() if _stem(picture.path, self.root) in stems]

    def _refresh(self, names: Sequence[str]) -> list[str]:
        """Read the captions of these pictures again."""
        if self._has_metadata:
            self.read()
            return [name for name in names if name in self.pictures]
        for name in names:
            picture = self.picture(name)
            try:
                file = self._caption_file(picture.path)
                caption = read_caption(file)[:MAX_CAPTION_CHARACTERS] or None if file.is_file() else None
                self.pictures[name] = Picture(name, picture.path, caption)
            except (UserError, OSError) as error:
                self.pictures[name] = Picture(name, picture.path, None, _without(str(error), self.root))
        return list(names)


def majority_style(captions: Iterable[str]) -> str:
    """What most captions are: "tags" or "sentence"."""
    styles = [style_of(caption) for caption in captions]
    return "tags" if styles.count("tags") > styles.count("sentence") else "sentence"


def tags_or_words(captions: Mapping[str, str]) -> str:
    """By what captions are counted unless someone chooses: "tags" or "words"."""
    return "tags" if majority_style(captions.values()) == "tags" else "words"


def _stem(path: Path, root: Path) -> str:
    return relative_name(path.with_suffix(""), root)


def _shown(path: Path, root: Path) -> str:
    return relative_name(path, root).encode("utf-8", "backslashreplace").decode("utf-8")


def _without(message: str, root: Path) -> str:
    """`message` with paths that start at the data set's folder."""
    return message.replace(f"{root}/", "")


def _file_of(caption: str | None) -> bytes | None:
    """What a caption file holds. None: there is none."""
    return None if caption is None else f"{caption}\n".encode()


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None

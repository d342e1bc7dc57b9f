"""Pictures and captions that arrive from the browser, in pieces, for a new folder below data/."""

from __future__ import annotations

import base64
import binascii
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from lora_diffusion.data.captions import decode_text
from lora_diffusion.data.images import ImageError, check_image, read_bytes
from lora_diffusion.data.listing import CAPTION_SUFFIXES, IMAGE_SUFFIXES
from lora_diffusion.errors import UserError

MAX_FILES = 5_000
MAX_FILE_BYTES = 100_000_000
MAX_PIECE_BYTES = 8_000_000
MIN_FREE_BYTES = 1_000_000_000
MAX_NAME_BYTES = 200

_SET_NAME = re.compile(r"[^\W_][\w .-]{0,79}")
_PART = ".part"


class UploadError(UserError):
    """A file is not taken in, and why."""


@dataclass(frozen=True)
class Uploads:
    """folder: where data sets are made."""

    folder: Path

    def make_set(self, name: str) -> Path:
        """A new folder. Raises UploadError where there is one or the name is not one."""
        name = name.strip()
        if not _SET_NAME.fullmatch(name) or name.endswith("."):
            raise UploadError("Name the data set with letters, digits, spaces, dots, dashes and underscores.")
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / name
        if path.exists() or path.is_symlink():
            raise UploadError(f"There is a folder {name!r} already. Choose another name.")
        path.mkdir()
        return path

    def add(self, folder: Path, name: str, piece: str, offset: int, *, is_last: bool) -> str:
        """Take one piece (base64) of a file; the name that the file has got. Raises UploadError.

        A file appears under its name only when it is there whole and is what its name says.
        """
        name = self._checked_name(name)
        path = folder / name
        part = folder / f".{name}{_PART}"
        try:
            data = base64.b64decode(piece, validate=True)
        except (binascii.Error, ValueError):
            raise UploadError(f"{name}: a piece arrived damaged. Try again.") from None
        if len(data) > MAX_PIECE_BYTES or offset + len(data) > MAX_FILE_BYTES:
            raise UploadError(f"{name}: files of at most {MAX_FILE_BYTES // 1_000_000} MB are taken.")
        if shutil.disk_usage(folder).free < MIN_FREE_BYTES:
            raise UploadError("The disk is nearly full.")
        if path.exists() or path.is_symlink():
            raise UploadError(f"{name}: there is a file of this name already.")
        if offset == 0 and sum(1 for _ in folder.iterdir()) >= MAX_FILES:
            raise UploadError(f"A folder takes {MAX_FILES:,} files.")
        if offset != (part.stat().st_size if offset and part.is_file() else 0):
            raise UploadError(f"{name}: a piece is missing. Try again.")
        with part.open("ab" if offset else "wb") as file:
            file.write(data)
        if is_last:
            try:
                _check_content(part, path.suffix.lower(), name)
            except UserError:
                part.unlink(missing_ok=True)
                raise
            part.replace(path)
        return name

    def _checked_name(self, name: str) -> str:
        """The last part of a name, if it is one that data sets hold."""
        name = re.split(r"[/\\]", name)[-1]
        if Path(name).suffix.lower() not in IMAGE_SUFFIXES | set(CAPTION_SUFFIXES):
            raise UploadError(f"{name!r} is neither a picture nor a caption (.txt).")
        if not name.isprintable() or name.startswith(".") or len(name.encode()) > MAX_NAME_BYTES or ":" in name:
            raise UploadError("A file name is hidden, too long, or holds characters that cannot be shown.")
        return name


def _check_content(part: Path, suffix: str, name: str) -> None:
    if suffix in CAPTION_SUFFIXES:
        if part.stat().st_size > 1_000_000:
            raise UploadError(f"{name}: too long for a caption.")
        decode_text(part.read_bytes(), name)
        return
    try:
        check_image(read_bytes(part))
    except ImageError as error:
        raise UploadError(f"{name}: {error}") from None

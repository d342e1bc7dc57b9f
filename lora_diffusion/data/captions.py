"""Captions: read them without guessing, vary them while training. No torch."""

from __future__ import annotations

import codecs
import os
import random
import re
import unicodedata
from dataclasses import dataclass, replace
from pathlib import Path

from lora_diffusion.data.errors import DataError

MAX_CAPTION_BYTES = 4 * 2**20
"""A larger file is not a caption; the longest caption that a text encoder can use has some thousand bytes."""

_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_SURROGATE = re.compile("[\ud800-\udfff]")


class CaptionError(DataError):
    """A caption file cannot be read as text."""


@dataclass(frozen=True)
class CaptionOptions:
    """How a caption varies from draw to draw.

    prefix, suffix: joined to the caption, with a space where words would touch, before tags are told apart: with
        `shuffle`, `keep_tokens` must count the prefix's tags if they shall stay in front.
    shuffle: put the tags after the first `keep_tokens` in a random order.
    tag_dropout: probability in [0, 1] of leaving out each tag after the first `keep_tokens`.
    dropout: probability in [0, 1] of an empty caption.
    """

    prefix: str = ""
    suffix: str = ""
    shuffle: bool = False
    keep_tokens: int = 0
    separator: str = ","
    tag_dropout: float = 0.0
    dropout: float = 0.0

    def without_chance(self) -> CaptionOptions:
        """The same prefix and suffix with nothing left to chance."""
        return replace(self, shuffle=False, tag_dropout=0.0, dropout=0.0)


def vary_caption(caption: str, options: CaptionOptions, rng: random.Random) -> str:
    """The caption of one draw. Without shuffling and dropout it is `prefix caption suffix`, letter for letter.

    The order of steps is sd-scripts': prefix and suffix, whole-caption dropout, shuffling, tag dropout.
    """
    caption = joined(joined(options.prefix, caption), options.suffix)
    if options.dropout > 0 and rng.random() < options.dropout:
        return ""
    if not options.shuffle and options.tag_dropout <= 0:
        return caption
    tags = [tag for tag in (part.strip() for part in caption.split(options.separator)) if tag]
    kept, flexible = tags[: options.keep_tokens], tags[options.keep_tokens :]
    if options.shuffle:
        rng.shuffle(flexible)
    if options.tag_dropout > 0:
        flexible = [tag for tag in flexible if rng.random() >= options.tag_dropout]
    return f"{options.separator.strip()} ".join(kept + flexible)


def joined(left: str, right: str) -> str:
    """The two texts with a space between, unless one is empty or there is white space or a comma already."""
    touches = left and right and not left[-1].isspace() and not right[0].isspace() and right[0] not in ",.;:!?"
    return f"{left} {right}" if touches else left + right


def read_caption(path: Path) -> str:
    """The text of a caption file on one line: lines are joined by a space, the ends are stripped.

    UTF-8 with or without a byte order mark, or UTF-16 with one. Raises CaptionError, naming the first bad byte, for
    anything else: a guessed encoding would train wrong words. Also for a file that cannot be read.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            if (size := os.fstat(file.fileno()).st_size) > MAX_CAPTION_BYTES:
                raise CaptionError(f"{path}: {size:,} bytes are too many for a caption (limit {MAX_CAPTION_BYTES:,}).")
            data = file.read()
    except OSError as error:
        raise CaptionError(cannot_be_read(path, error)) from error
    return one_line(decode_text(data, str(path)))


def cannot_be_read(path: Path, error: OSError) -> str:
    """What to tell of a file of captions that the system does not let us read."""
    return f"{path}: cannot be read ({error.strerror or error}). Mend its permissions, or copy it anew."


def one_line(text: str) -> str:
    """`text` with its lines joined by a space; letters with accents are composed (NFC), as tokenizers do."""
    lines = (line.strip() for line in text.splitlines())
    return unicodedata.normalize("NFC", " ".join(line for line in lines if line))


def decode_text(data: bytes, where: str) -> str:
    """Decode UTF-8, or UTF-16 with a byte order mark. `where` starts the message of the CaptionError."""
    encoding = "utf-16" if data.startswith(_UTF16_MARKS) else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        offset = error.start + (3 if encoding == "utf-8-sig" and data.startswith(codecs.BOM_UTF8) else 0)
        raise CaptionError(
            f"{where}: byte {offset} is not {encoding.removesuffix('-sig').upper()} text ({error.reason}). "
            "Save the file as UTF-8."
        ) from None
    check_text(text, where)
    return text


def check_text(text: str, where: str) -> None:
    """Raise CaptionError for characters that no caption holds: NUL and halves of surrogate pairs."""
    if (offset := text.find("\0")) >= 0:
        raise CaptionError(
            f"{where}: character {offset} is NUL. This looks like UTF-16 without a byte order mark, or like no text "
            "at all. Save the file as UTF-8."
        )
    if half := _SURROGATE.search(text):
        raise CaptionError(
            f"{where}: character {half.start()} is half of a surrogate pair. Write the text anew as UTF-8."
        )


def printable(text: str) -> str:
    """`text` for a terminal or a log: control, direction and undecodable characters are shown as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)

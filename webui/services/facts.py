"""What is true of each picture of a data set: size, damage, rotation, twins. Found in the background, remembered."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import monotonic
from typing import Any

from PIL import Image

from lora_diffusion.data.images import FORMATS, ImageError, check_image, decode_image, read_bytes
from lora_diffusion.files import write_json_atomically

logger = logging.getLogger(__name__)

ORIENTATION_TAG = 0x0112
ALPHA_MODES = frozenset({"RGBA", "LA", "PA", "La", "RGBa"})
SAVED_EVERY_S = 10.0
VERSION = 2
"""Of the remembered facts; older ones are found anew."""


@dataclass(frozen=True)
class Facts:
    """About one picture file.

    width, height: upright, 0 while unknown. problem: why it cannot be read. content: sha256, "" until it was read
    whole. likeness: perceptual hash in hex.
    """

    width: int = 0
    height: int = 0
    problem: str = ""
    is_rotated: bool = False
    has_alpha: bool = False
    is_animated: bool = False
    content: str = ""
    likeness: str = ""


@dataclass
class Look:
    """Looks at the pictures of one data set in a thread of its own. `facts` and `pairs` may be read at any time.

    pairs: (picture, picture that looks almost the same), known when `is_done`.
    """

    memory: Path
    facts: dict[str, Facts] = field(default_factory=dict)
    pairs: list[tuple[str, str]] = field(default_factory=list)
    done: int = 0
    total: int = 0
    is_done: bool = False
    has_sizes: bool = False
    _thread: threading.Thread | None = None
    _again: Sequence[tuple[str, Path]] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self, pictures: Sequence[tuple[str, Path]]) -> None:
        """Look at these (name, path), unless it is known already. A running look is followed by a new one."""
        with self._lock:
            self._again = list(pictures)
            if self._thread is None:
                self.is_done = False
                self._thread = threading.Thread(target=self._work, name="look at pictures", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        while True:
            with self._lock:
                pictures, self._again = self._again, None
                if pictures is None:
                    self.is_done, self._thread = True, None
                    return
            try:
                self._look(pictures)
            except Exception:
                logger.exception("looking at the pictures of a data set ended early")

    def _look(self, pictures: Sequence[tuple[str, Path]]) -> None:
        known = _remembered(self.memory)
        marks = {name: _mark(path) for name, path in pictures}
        fresh = {name: known[name][1] for name, mark in marks.items() if name in known and known[name][0] == mark}
        self.done, self.total, self.has_sizes = 0, len(pictures), False
        self.facts = dict(fresh)
        for name, path in pictures:
            if name not in fresh:
                self.facts[name] = look_at_header(path)
        self.has_sizes = True
        saved = monotonic()
        has_news = False
        for name, path in pictures:
            if not fresh.get(name, Facts()).content and not fresh.get(name, Facts()).problem:
                self.facts[name] = look_closely(path, self.facts[name])
                has_news = True
            self.done += 1
            if has_news and monotonic() - saved > SAVED_EVERY_S:
                _remember(self.memory, marks, self.facts)
                saved = monotonic()
        if has_news:
            _remember(self.memory, marks, self.facts)
        self.pairs = near_pairs(self.facts)


def look_at_header(path: Path) -> Facts:
    """Size and kind, without decoding a pixel."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            # Pillow turns a TIFF by itself: its size is that of the upright picture.
            orientation = 1 if image.format == "TIFF" else image.getexif().get(ORIENTATION_TAG, 1)
            width, height = image.size
            is_turned = isinstance(orientation, int) and 5 <= orientation <= 8
            return Facts(
                width=height if is_turned else width,
                height=width if is_turned else height,
                is_rotated=isinstance(orientation, int) and 2 <= orientation <= 8,
                has_alpha=image.mode in ALPHA_MODES or "transparency" in image.info,
            )
    except Exception:  # Pillow's readers raise nearly anything on damaged files; `look_closely` finds the words
        return Facts()


def look_closely(path: Path, facts: Facts) -> Facts:
    """Read every byte: is the file whole, what are its content and its likeness?"""
    from lora_diffusion.data.duplicates import perceptual_hash  # imagehash takes a second

    try:
        data = read_bytes(path)
        header = check_image(data)
        likeness = perceptual_hash(decode_image(data))
    except ImageError as error:
        return replace(facts, problem=str(error), width=0, height=0)
    return replace(
        facts,
        width=header.size.width,
        height=header.size.height,
        is_rotated=header.orientation != 1,
        is_animated=header.is_animated,
        content=hashlib.sha256(data).hexdigest(),
        likeness=f"{int(''.join('1' if bit else '0' for bit in likeness), 2):064x}",
    )


def near_pairs(facts: Mapping[str, Facts]) -> list[tuple[str, str]]:
    """Pictures with different bytes that look the same: each of them in one pair at least, not in all."""
    import numpy as np

    from lora_diffusion.data.duplicates import close_pairs

    names = [name for name, fact in facts.items() if fact.likeness]
    hashes = [
        np.unpackbits(np.frombuffer(bytes.fromhex(facts[name].likeness), np.uint8)).astype(np.bool_) for name in names
    ]
    pairs: list[tuple[str, str]] = []
    seen: set[str] = set()
    for i, j in close_pairs(hashes):
        pair = (names[i], names[j])
        if not seen.issuperset(pair) and facts[pair[0]].content != facts[pair[1]].content:
            pairs.append(pair)
            seen.update(pair)
    return pairs


def twins(facts: Mapping[str, Facts]) -> list[tuple[str, str]]:
    """(picture, earlier picture with the same bytes)."""
    first: dict[str, str] = {}
    pairs: list[tuple[str, str]] = []
    for name, fact in facts.items():
        if fact.content and first.setdefault(fact.content, name) != name:
            pairs.append((name, first[fact.content]))
    return pairs


def _mark(path: Path) -> str:
    try:
        status = path.stat()
    except OSError:
        return ""
    return f"{status.st_mtime_ns}-{status.st_size}"


def _remembered(memory: Path) -> dict[str, tuple[str, Facts]]:
    try:
        stored: dict[str, Any] = json.loads(memory.read_text(encoding="utf-8"))
        if stored["version"] != VERSION:
            return {}
        return {name: (mark, Facts(**fact)) for name, (mark, fact) in stored["pictures"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _remember(memory: Path, marks: Mapping[str, str], facts: Mapping[str, Facts]) -> None:
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        pictures = {name: (marks[name], asdict(fact)) for name, fact in facts.items() if fact.content or fact.problem}
        write_json_atomically(memory, {"version": VERSION, "pictures": pictures})
    except OSError:
        logger.warning("what was found out about the pictures could not be remembered", exc_info=True)

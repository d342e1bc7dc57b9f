"""Captions as text: tags, changes to many at once, what differs, what is counted. Nothing here touches a file."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lora_diffusion.data.captions import one_line
from lora_diffusion.data.sidecars import MAX_CAPTION_CHARACTERS
from lora_diffusion.errors import UserError
from webui.services.regex_guard import replace_in_all

MAX_TEXT = 2_000
MAX_TAG_WORDS = 4
"""Captions whose parts between commas have on average at most this many words are taken for lists of tags."""

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


class EditError(UserError):
    """A change of captions that makes no sense."""


@dataclass(frozen=True)
class Edit:
    """A change to make to captions.

    kind: a key of EDITS. text: the tag, the prefix or what to find. to: what replaces it. at_end: where a tag is
    added. is_regex, ignore_case: how `replace` reads `text`.
    """

    kind: str
    text: str = ""
    to: str = ""
    at_end: bool = True
    is_regex: bool = False
    ignore_case: bool = False


@dataclass(frozen=True)
class Change:
    """What an edit does to one caption. before: None where there was none."""

    name: str
    before: str | None
    after: str

    def pieces(self) -> list[tuple[str, str]]:
        """("=", "-" or "+", text) whose texts are, in order, both captions at once, split at words."""
        return diff(self.before or "", self.after)


def split_tags(caption: str) -> list[str]:
    return [tag for part in caption.split(",") if (tag := part.strip())]


def join_tags(tags: Iterable[str]) -> str:
    return ", ".join(tags)


def style_of(caption: str) -> str:
    """Its kind: "tags", "sentence", or "" for a caption too short to tell."""
    tags = split_tags(caption)
    words = len(_WORD.findall(caption))
    if words <= 2 and len(tags) <= 1:
        return ""
    return "tags" if len(tags) >= 3 and words <= MAX_TAG_WORDS * len(tags) else "sentence"


def histogram(captions: Iterable[str], by: str) -> list[tuple[str, int]]:
    """(tag or word, number of captions it is in), the most frequent first. by: "tags" or "words"."""
    counts: Counter[str] = Counter()
    for caption in captions:
        counts.update(terms(caption, by))
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def terms(caption: str, by: str) -> set[str]:
    """The tags or the lower-case words of a caption, without words as short as "a" and "of"."""
    if by == "tags":
        return set(split_tags(caption))
    return {word.lower() for word in _WORD.findall(caption) if len(word) > 2 or not word.isascii()}


def plan(captions: Mapping[str, str | None], edit: Edit) -> list[Change]:
    """What `edit` would change, in the order of `captions`: picture → caption. Raises EditError, RegexError."""
    if edit.kind not in EDITS:
        raise EditError(f"There is no change called {edit.kind!r}.")
    if max(len(edit.text), len(edit.to)) > MAX_TEXT:
        raise EditError(f"The text has more than {MAX_TEXT:,} characters.")
    if edit.kind not in ("sort", "dedupe") and not edit.text.strip():
        raise EditError("Write what to look for or to add first.")
    names = list(captions)
    before = [captions[name] or "" for name in names]
    after = _replaced(before, edit) if edit.kind == "replace" else [EDITS[edit.kind](text, edit) for text in before]
    changes: list[Change] = []
    for name, old, new in zip(names, before, after, strict=True):
        text = one_line(new)
        if len(text) > MAX_CAPTION_CHARACTERS:
            raise EditError(f"{name} would have {len(text):,} characters; captions have {MAX_CAPTION_CHARACTERS:,}.")
        if text != old:
            changes.append(Change(name, captions[name], text))
    return changes


def diff(before: str, after: str) -> list[tuple[str, str]]:
    """Pieces that are in both ("="), only in `before` ("-") or only in `after` ("+")."""
    old, new = _tokens(before), _tokens(after)
    if len(old) * len(new) > 1_000_000:  # difflib takes the square of it
        return [("-", before), ("+", after)]
    pieces: list[tuple[str, str]] = []
    for way, a, b, c, d in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if way == "equal":
            pieces.append(("=", "".join(old[a:b])))
            continue
        pieces += [(sign, text) for sign, text in (("-", "".join(old[a:b])), ("+", "".join(new[c:d]))) if text]
    return pieces


def _tokens(text: str) -> Sequence[str]:
    return re.findall(r"\w+|\s+|.", text, re.DOTALL)


def _replaced(captions: Sequence[str], edit: Edit) -> list[str]:
    pattern = edit.text if edit.is_regex else re.escape(edit.text)
    to = edit.to if edit.is_regex else edit.to.replace("\\", r"\\")
    return replace_in_all(pattern, to, captions, ignore_case=edit.ignore_case)


def _add_tag(caption: str, edit: Edit) -> str:
    tags, new = split_tags(caption), edit.text.strip()
    if new in tags:
        return caption
    return join_tags([*tags, new] if edit.at_end else [new, *tags])


def _remove_tag(caption: str, edit: Edit) -> str:
    unwanted = {tag.casefold() for tag in split_tags(edit.text)}
    tags = split_tags(caption)
    kept = [tag for tag in tags if tag.casefold() not in unwanted]
    return caption if len(kept) == len(tags) else join_tags(kept)


def _prefix(caption: str, edit: Edit) -> str:
    return caption if caption.startswith(edit.text.strip()) else f"{edit.text}{_gap(edit.text, caption)}{caption}"


def _suffix(caption: str, edit: Edit) -> str:
    return caption if caption.endswith(edit.text.strip()) else f"{caption}{_gap(caption, edit.text)}{edit.text}"


def _gap(left: str, right: str) -> str:
    """The space that keeps words apart."""
    touches = left and right and not left[-1].isspace() and not right[0].isspace() and right[0] not in ",.;:!?"
    return " " if touches else ""


def _sort(caption: str, _: Edit) -> str:
    return join_tags(sorted(split_tags(caption), key=str.casefold))


def _dedupe(caption: str, _: Edit) -> str:
    tags = split_tags(caption)
    first: dict[str, str] = {}
    for tag in tags:
        first.setdefault(tag.casefold(), tag)
    return caption if len(first) == len(tags) else join_tags(first.values())


def _set(_: str, edit: Edit) -> str:
    return edit.text


EDITS = {
    "replace": _set,  # done for all captions at once, see `_replaced`
    "add": _add_tag,
    "remove": _remove_tag,
    "prefix": _prefix,
    "suffix": _suffix,
    "sort": _sort,
    "dedupe": _dedupe,
    "set": _set,
}

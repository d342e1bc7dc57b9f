"""What may be wrong with a data set, as lists of pictures; and which pictures a filter lets through."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from webui.services.caption_text import histogram, style_of, terms
from webui.services.crops import CropView
from webui.services.facts import Facts, twins
from webui.services.picture_set import Picture, PictureSet, majority_style
from webui.services.tokens import MAX_TOKENS

SMALL = 1.0
"""Pictures that would be enlarged more than this many times are called small."""

EXTREME_LOSS = 0.2
"""Pictures that lose more than this share of their area to the crop are called extreme."""

MAX_HISTOGRAM = 400


@dataclass(frozen=True)
class Filter:
    """text: in caption or name. wanted, unwanted: tags or words, as `by` says. check: a key of `find_checks`."""

    text: str = ""
    wanted: tuple[str, ...] = ()
    unwanted: tuple[str, ...] = ()
    check: str = ""
    by: str = "tags"


@dataclass(frozen=True)
class View:
    """names: what the filter lets through, in the order of the set. checks: (picture → reason) of each check."""

    names: tuple[str, ...]
    terms: tuple[tuple[str, int], ...]
    checks: Mapping[str, Mapping[str, str]]


def find_checks(
    opened: PictureSet,
    facts: Mapping[str, Facts],
    pairs: list[tuple[str, str]],
    crops: Mapping[str, CropView],
    count_tokens: Callable[[str], int] | None,
) -> dict[str, dict[str, str]]:
    """Check → picture → what is to be said about it, "" if there is nothing more to say."""
    captions = {name: picture.caption for name, picture in opened.pictures.items() if picture.caption}
    main = majority_style(captions.values())
    tokens = {name: count_tokens(caption) for name, caption in captions.items()} if count_tokens else {}
    return {
        "unreadable": {name: fact.problem for name, fact in facts.items() if fact.problem and name in opened.pictures},
        "uncaptioned": {
            name: "" for name, picture in opened.pictures.items() if not picture.caption and not picture.problem
        },
        "badcaption": {name: picture.problem for name, picture in opened.pictures.items() if picture.problem},
        "long": {name: str(number) for name, number in tokens.items() if number > MAX_TOKENS},
        "mixed": {name: "" for name, caption in captions.items() if style_of(caption) not in ("", main)},
        "twins": _both(twins(facts)),
        "near": _both(pairs),
        "small": {
            name: f"{facts[name].width}×{facts[name].height}"
            for name, crop in crops.items()
            if crop.enlargement > SMALL
        },
        "extreme": {name: f"−{crop.lost:.0%}" for name, crop in crops.items() if crop.lost > EXTREME_LOSS},
        "rotated": {name: "" for name, fact in facts.items() if fact.is_rotated and name in opened.pictures},
        "alpha": {name: "" for name, fact in facts.items() if fact.has_alpha and name in opened.pictures},
        "animated": {name: "" for name, fact in facts.items() if fact.is_animated and name in opened.pictures},
    }


def view(opened: PictureSet, chosen: Filter, checks: Mapping[str, Mapping[str, str]]) -> View:
    """What the filter lets through, and what the captions of those say most."""
    text = chosen.text.casefold().strip()
    checked = checks.get(chosen.check)
    names: list[str] = []
    for name, picture in opened.pictures.items():
        if checked is not None and name not in checked:
            continue
        if text and text not in name.casefold() and text not in (picture.caption or "").casefold():
            continue
        if (chosen.wanted or chosen.unwanted) and not _fits(picture, chosen):
            continue
        names.append(name)
    captions = [opened.pictures[name].caption or "" for name in names]
    return View(tuple(names), tuple(histogram(captions, chosen.by)[:MAX_HISTOGRAM]), checks)


def _fits(picture: Picture, chosen: Filter) -> bool:
    found = terms(picture.caption or "", chosen.by)
    return found.issuperset(chosen.wanted) and found.isdisjoint(chosen.unwanted)


def _both(pairs: list[tuple[str, str]]) -> dict[str, str]:
    """Each picture of a pair with the other one's name; the pairs beside each other."""
    other: dict[str, str] = {}
    for first, second in pairs:
        other.setdefault(second, first)
        other.setdefault(first, second)
    return other

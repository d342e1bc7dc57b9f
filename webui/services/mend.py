"""A mended copy of a data set: what cannot be trained on is left out, what is turned is upright. The original stays."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_diffusion.data.images import ImageError, open_image
from lora_diffusion.files import write_text_atomically
from webui.services.facts import Facts, near_pairs, twins
from webui.services.picture_set import PictureSet


@dataclass(frozen=True)
class Mending:
    """What to do: leave pictures with equal bytes out but for one, those that look alike too, make all upright and
    lay transparent ones on white.
    """

    without_twins: bool = True
    without_near: bool = False
    upright: bool = True
    opaque: bool = True


@dataclass(frozen=True)
class Mended:
    """num_left_out counts unreadable pictures and copies, num_redrawn those saved anew as PNG."""

    num_copied: int
    num_redrawn: int
    num_left_out: int


def copy_mended(
    source: PictureSet, facts: Mapping[str, Facts], target: Path, mending: Mending, report: Callable[[int], None]
) -> Mended:
    """Fill `target`, an empty folder. Pictures that need nothing are copied byte for byte, captions as `.txt`.

    report: is told after each picture how many are done.
    """
    unwanted = {name for name, fact in facts.items() if fact.problem}
    if mending.without_twins:
        unwanted |= {name for name, _ in twins(facts)}
    if mending.without_near:
        for first, second in near_pairs(facts):
            if first not in unwanted and second not in unwanted:
                unwanted.add(min(first, second, key=lambda name: facts[name].width * facts[name].height))
    copied = redrawn = left_out = 0
    for number, (name, picture) in enumerate(source.pictures.items(), start=1):
        fact = facts.get(name, Facts())
        place = target / name
        if name in unwanted:
            left_out += 1
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                if (mending.upright and fact.is_rotated) or (mending.opaque and fact.has_alpha):
                    place = _free(place.with_suffix(".png"), name, source)
                    open_image(picture.path).save(place)
                    redrawn += 1
                else:
                    shutil.copyfile(picture.path, place)
                    copied += 1
                if picture.caption is not None:
                    write_text_atomically(place.with_suffix(".txt"), f"{picture.caption}\n")
            except (ImageError, OSError):
                place.unlink(missing_ok=True)
                left_out += 1
        report(number)
    return Mended(copied, redrawn, left_out)


def _free(place: Path, name: str, source: PictureSet) -> Path:
    """`place`, or a name beside it if another picture of the set has that."""
    taken = {Path(other).with_suffix("").name for other in source.pictures if other != name}
    while place.exists() or place.stem in taken:
        place = place.with_stem(f"{place.stem}-upright")
    return place

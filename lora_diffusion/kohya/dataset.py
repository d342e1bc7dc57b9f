"""Folders of pictures, as our tables [[dataset]], and how many steps an epoch of theirs has."""

from __future__ import annotations

import math
import posixpath
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lora_diffusion.data.errors import DataError
from lora_diffusion.data.folder import read_folder_name
from lora_diffusion.data.listing import list_folder, name_below
from lora_diffusion.data.sidecars import CaptionIndex
from lora_diffusion.kohya.ledger import Ledger

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif"})
"""Of pictures that sd-scripts reads; `.avif` where its package is there."""

MAX_REPEATS = 999  # of a folder's name as we read it; more digits are taken for a year
_LISTED = 8  # folders in one sentence

ALIASES = {"batch_size": "train_batch_size", "num_repeats": "dataset_repeats"}
"""What settings of a data set are called outside of dataset configs."""


@dataclass(frozen=True)
class Scope:
    """Looks a setting up where sd-scripts does: subset, data set, [general], the rest of the settings."""

    ledger: Ledger
    prefixes: tuple[str, ...]

    @property
    def is_regularisation(self) -> bool:
        """Whether a subset holds regularisation pictures, which it can only say itself."""
        return len(self.prefixes) > 1 and self.ledger.switch(f"{self.prefixes[0]}is_reg")

    def name(self, setting: str) -> str:
        """Under which name the setting is given; its plain one where it is not."""
        names = [f"{prefix}{setting}" for prefix in self.prefixes]
        names += [ALIASES[setting]] if setting in ALIASES else []
        return next((name for name in names if self.ledger.value(name) is not None), setting)


def scopes(ledger: Ledger) -> list[Scope]:
    """One for each folder of pictures that the settings name."""
    numbers = ledger.source.num_subsets
    return [
        Scope(ledger, (f"datasets.{i}.subsets.{j}.", f"datasets.{i}.", "general.", ""))
        for i, count in enumerate(numbers)
        for j in range(count)
    ] or [Scope(ledger, ("",))]


def translate_datasets(ledger: Ledger) -> None:
    """Fill [[dataset]], without regularisation pictures."""
    found = scopes(ledger)
    kept = [scope for scope in found if not scope.is_regularisation]
    for scope in found:
        if scope.is_regularisation:
            folder = ledger.text(scope.name("image_dir"))
            ledger.refuse(f"{scope.prefixes[0]}is_reg", f"{folder} is left out: it holds regularisation pictures")
    for index, scope in enumerate(kept):
        _translate_folder(ledger, scope, index)
    if ledger.source.num_subsets:
        for name in ("train_data_dir", "reg_data_dir", "in_json"):
            ledger.ignore(name, "sd-scripts takes the folders of the dataset config")
    extensions = " and ".join(dict.fromkeys(f"`{_extension(ledger, scope)}`" for scope in kept)) or "`.caption`"
    ledger.differ(f"captions: sd-scripts reads {extensions} files, their first line; here `.txt` and `.caption`, whole")


def _translate_folder(ledger: Ledger, scope: Scope, index: int) -> None:
    def put(key: str, value: object, setting: str, note: str = "") -> None:
        ledger.put(f"dataset.{index}.{key}", value, scope.name(setting), note=note)

    is_subset = bool(ledger.source.num_subsets)
    folder = scope.name("image_dir") if is_subset else "train_data_dir"
    if path := ledger.text(folder):
        put("path", path, folder if not is_subset else "image_dir")
        _note_folder(ledger, scope, Path(path), is_subset)
    _put_resolution(ledger, scope, index)
    if (repeats := ledger.whole(scope.name("num_repeats"))) is not None and is_subset:
        put("repeats", repeats, "num_repeats")
    elif not is_subset:
        ledger.ignore("dataset_repeats", "the names of the subfolders say the repeats")
    if ledger.is_on(scope.name("class_tokens")):
        put("default_caption", ledger.text(scope.name("class_tokens")), "class_tokens")
    for setting, key in (("shuffle_caption", "shuffle_tags"), ("flip_aug", "flip")):
        if ledger.switch(scope.name(setting)):
            put(key, True, setting)
    keep = ledger.whole(scope.name("keep_tokens"))
    if keep:
        put("keep_tokens", keep, "keep_tokens")
    for setting, key in (("caption_dropout_rate", "caption_dropout"), ("caption_tag_dropout_rate", "tag_dropout")):
        if share := ledger.number(scope.name(setting)):
            put(key, share, setting)
    if prefix := ledger.text(scope.name("caption_prefix")):
        put("caption_prefix", f"{prefix} ", "caption_prefix", "with the space that sd-scripts adds")
    if suffix := ledger.text(scope.name("caption_suffix")):
        put("caption_suffix", f" {suffix}", "caption_suffix", "with the space that sd-scripts adds")


def _put_resolution(ledger: Ledger, scope: Scope, index: int) -> None:
    def put(key: str, value: object, setting: str, note: str = "") -> None:
        ledger.put(f"dataset.{index}.{key}", value, scope.name(setting), note=note)

    name = scope.name("resolution")
    sides = [int(side) for side in ledger.numbers(name)]
    if len(sides) > 2:
        ledger.wrong(name, "one number or two")
    if not sides:
        ledger.differ("resolution: not given, which sd-scripts refuses; 512 here")
    else:
        put("resolution", sides[0] if len(set(sides)) == 1 else sides[:2], "resolution")
    buckets = scope.name("enable_bucket")
    has_buckets = ledger.switch(buckets)
    put("buckets", has_buckets, "enable_bucket", "" if ledger.value(buckets) is not None else "off if not given")
    if not has_buckets:
        for setting in ("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale"):
            ledger.ignore(scope.name(setting), "buckets are off")
        return
    step = ledger.whole(scope.name("bucket_reso_steps"))
    put("bucket_step", step or 64, "bucket_reso_steps", "" if step else "64 if not given")
    if ledger.switch(scope.name("bucket_no_upscale")):
        for setting in ("min_bucket_reso", "max_bucket_reso"):
            ledger.ignore(scope.name(setting), "sd-scripts does not use it with `bucket_no_upscale`")
        return
    for key, setting, default in (("bucket_min", "min_bucket_reso", 256), ("bucket_max", "max_bucket_reso", 1024)):
        side = ledger.whole(scope.name(setting))
        put(key, side or default, setting, "" if side else f"{default} if not given")


def _note_folder(ledger: Ledger, scope: Scope, folder: Path, is_subset: bool) -> None:
    """What would be read from the folder here and not there, or in another way."""
    try:
        listing = list_folder(folder)
    except DataError:
        state = "cannot be read" if folder.is_dir() else "is not there"
        ledger.differ(f"{folder} {state} now, so its pictures could not be counted")
        return
    names = [name_below(path, folder) for path in listing.images]
    shared = [name for name in names if _is_read(name, is_subset)]
    _note_extra(ledger, folder, set(names) - set(shared), is_subset)
    for name in sorted({posixpath.dirname(name) for name in shared} - {""}):
        _note_folder_name(ledger, folder / name)
    captions = CaptionIndex(folder, replace(listing, metadata=()))
    _note_captions(ledger, folder, [captions.file_of(folder / name) for name in shared], _extension(ledger, scope))


def _note_extra(ledger: Ledger, folder: Path, names: Collection[str], is_subset: bool) -> None:
    counts: Counter[str] = Counter()
    for name in names:
        stem, suffix = posixpath.splitext(name)
        kind = f" ({suffix.lower()})" if _is_read(f"{stem}.png", is_subset) else ""
        counts[f"{posixpath.dirname(name) or 'the folder itself'}{kind}"] += 1
    if not counts:
        return
    parts = [f"{count} in {where}" for where, count in sorted(counts.items())]
    if more := parts[_LISTED:]:
        parts[_LISTED:] = [f"the rest in {len(more)} more"]
    ledger.differ(
        f"{folder}: pictures that are trained on here and that sd-scripts leaves out: {', '.join(parts)}; move "
        "elsewhere what shall not be trained"
    )


def _note_folder_name(ledger: Ledger, folder: Path) -> None:
    repeats, class_token = _read_name(folder.name)
    ours, ours_token = read_folder_name(folder.name)
    if (ours, ours_token or "") == (repeats, class_token):
        return
    theirs = f"{repeats} repeats" + (f" and the caption {class_token!r}" if class_token else "")
    if repeats > MAX_REPEATS:
        advice = f"move it out of {folder.parent} and give it a [[dataset]] table with `repeats = {repeats}`"
    else:
        advice = f"rename it to `{repeats}_{class_token or 'name'}`; the name is the caption of pictures without one"
    ledger.differ(f"{folder}: sd-scripts reads {theirs} from its name, which says nothing here: {advice}")


def _note_captions(ledger: Ledger, folder: Path, files: Iterable[Path], extension: str) -> None:
    """files: for each picture the one that its caption is read from here, there or not."""
    counts: Counter[tuple[str, str]] = Counter()
    for file in files:
        here = file.suffix if file.is_file() else ""
        there = extension if Path(f"{file.with_suffix('')}{extension}").is_file() else ""
        if here != there:
            counts[there, here] += 1
    for (there, here), count in sorted(counts.items()):
        theirs, ours = (f"the `{suffix}` files" if suffix else "no caption files" for suffix in (there, here))
        advice = f"move the `{here}` files elsewhere" if here else f"rename the `{there}` files to `.txt`"
        ledger.differ(
            f"{folder}: of {count} pictures sd-scripts reads {theirs}, and here {ours} are read: {advice} to train "
            "what it trains"
        )


def pictures_per_epoch(ledger: Ledger) -> int | None:
    """Pictures times repeats, as they are trained here; None where a folder is not there."""
    total = 0
    for scope in scopes(ledger):
        if scope.is_regularisation:
            continue
        is_subset = bool(ledger.source.num_subsets)
        given = ledger.text(scope.name("image_dir") if is_subset else "train_data_dir")
        if not given:
            return None
        folder = Path(given)
        repeats = ledger.whole(scope.name("num_repeats")) or 1 if is_subset else 1
        try:
            images = list_folder(folder).images
        except DataError:
            return None
        total += sum(repeats * read_folder_name(posixpath.dirname(name_below(path, folder)))[0] for path in images)
    return total or None


def steps_per_epoch(ledger: Ledger, batch_size: int, accumulation: int) -> int | None:
    """Optimiser steps of an epoch, without the few that shapes of pictures add; None where it cannot be known."""
    pictures = pictures_per_epoch(ledger)
    return math.ceil(math.ceil(pictures / batch_size) / accumulation) if pictures else None


def batch_sizes(ledger: Ledger) -> Sequence[tuple[str, int | None]]:
    """The name and the value of each folder's batch size."""
    names = [scope.name("batch_size") for scope in scopes(ledger)]
    return [(name, ledger.whole(name)) for name in names]


def _is_read(name: str, is_subset: bool) -> bool:
    """Whether sd-scripts trains on the picture of this name below the folder."""
    *folders, file = name.split("/")
    is_level = not folders if is_subset else len(folders) == 1 and _read_name(folders[0])[0] > 0
    return is_level and posixpath.splitext(file)[1].lower() in SUFFIXES


def _read_name(folder: str) -> tuple[int, str]:
    """Repeats, 0 for a folder that is left out, and class token, as sd-scripts reads them from a folder's name."""
    number, _, class_token = folder.partition("_")
    try:
        return max(0, int(number)), class_token
    except ValueError:
        return 0, ""


def _extension(ledger: Ledger, scope: Scope) -> str:
    return ledger.text(scope.name("caption_extension")) or ledger.text("caption_extention") or ".caption"

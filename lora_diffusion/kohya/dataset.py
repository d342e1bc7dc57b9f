"""Folders of pictures, as our tables [[dataset]], and how many steps an epoch of theirs has."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_diffusion.data.listing import is_image_name
from lora_diffusion.kohya.ledger import Ledger

REPEATS_NAME = re.compile(r"(\d+)(?:_.*)?", re.DOTALL)
"""Subfolders of `train_data_dir` that sd-scripts trains on."""

MAX_REPEATS = 999  # of a folder's name as we read it; more digits are taken for a year

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
    extension = next((ledger.text(scope.name("caption_extension")) for scope in kept), "") or ".caption"
    ledger.differ(
        f"captions: sd-scripts reads `{extension}` files, their first line; here `.txt` and `.caption`, whole"
    )


def _translate_folder(ledger: Ledger, scope: Scope, index: int) -> None:
    def put(key: str, value: object, setting: str, note: str = "") -> None:
        ledger.put(f"dataset.{index}.{key}", value, scope.name(setting), note=note)

    is_subset = bool(ledger.source.num_subsets)
    folder = scope.name("image_dir") if is_subset else "train_data_dir"
    if path := ledger.text(folder):
        put("path", path, folder if not is_subset else "image_dir")
        _note_folder(ledger, Path(path), is_subset)
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


def _note_folder(ledger: Ledger, folder: Path, is_subset: bool) -> None:
    """What would be read from the folder here and not there."""
    if not folder.is_dir():
        ledger.differ(f"{folder} is not there now, so its pictures could not be counted")
        return
    subfolders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    others = [path for path in subfolders if is_subset or not _repeats(path)]
    if extra := [path.name for path in others if _num_pictures(path)]:
        ledger.differ(f"{folder}: pictures in {', '.join(extra)} are trained on here; sd-scripts leaves them out")
    if not is_subset and (loose := _num_pictures(folder)):
        ledger.differ(
            f"{folder}: {loose} pictures beside its subfolders are trained on here; sd-scripts leaves them out"
        )
    for path in subfolders:
        if not is_subset and _repeats(path) > MAX_REPEATS:
            ledger.differ(f"{path}: its name is not read as repeats, which end at {MAX_REPEATS}: set `dataset.repeats`")


def pictures_per_epoch(ledger: Ledger) -> int | None:
    """Pictures times repeats, as sd-scripts counts them; None where a folder is not there."""
    total = 0
    for scope in scopes(ledger):
        if scope.is_regularisation:
            continue
        is_subset = bool(ledger.source.num_subsets)
        folder = Path(ledger.text(scope.name("image_dir") if is_subset else "train_data_dir"))
        try:
            if is_subset:
                total += _num_pictures(folder) * (ledger.whole(scope.name("num_repeats")) or 1)
            else:
                total += sum(_num_pictures(path) * _repeats(path) for path in folder.iterdir() if path.is_dir())
        except OSError:
            return None
    return total or None


def steps_per_epoch(ledger: Ledger, batch_size: int, accumulation: int) -> int | None:
    """Optimiser steps of an epoch, without the few that shapes of pictures add; None where it cannot be known."""
    pictures = pictures_per_epoch(ledger)
    return math.ceil(math.ceil(pictures / batch_size) / accumulation) if pictures else None


def batch_sizes(ledger: Ledger) -> Sequence[tuple[str, int | None]]:
    """The name and the value of each folder's batch size."""
    names = [scope.name("batch_size") for scope in scopes(ledger)]
    return [(name, ledger.whole(name)) for name in names]


def _repeats(folder: Path) -> int:
    match = REPEATS_NAME.fullmatch(folder.name)
    return int(match[1]) if match else 0


def _num_pictures(folder: Path) -> int:
    return sum(is_image_name(path) and path.is_file() for path in folder.iterdir())

"""Scan a folder of pictures and captions: what is trained on, what is left out and why, what is worth knowing."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import PIL

from lora_diffusion.data.buckets import Bucket, Fit, Size, assign_bucket, fit, lost_fraction, scale_to_cover
from lora_diffusion.data.captions import printable
from lora_diffusion.data.errors import DataError
from lora_diffusion.data.file_facts import FileFacts, Stamp, stamp_of
from lora_diffusion.data.images import ImageError, check_whole, quiet_pillow, read_bytes
from lora_diffusion.data.listing import LeftOut, is_image_name, list_folder, name_below, relative_name
from lora_diffusion.data.sidecars import CaptionIndex, Note
from lora_diffusion.files import write_text_atomically
from lora_diffusion.progress import Track, silent

logger = logging.getLogger(__name__)

MAX_LEFT_OUT = 0.2
"""Share of a folder's pictures that may be unusable before the scan is an error: a few bad files are normal, many
mean that something happened to the folder."""

MAX_ENLARGEMENT = 8.0
"""Pictures that would be enlarged more than this many times are left out: a VAE latent pixel is 8 pixels wide."""

MAX_LOSS = 0.9
"""Pictures of which the crop would cut away more than this share are left out: what remains is not the picture."""

NOTED_ENLARGEMENT = 1.25
NOTED_LOSS = 0.2

NO_CAPTION = "no caption"
"""How the kinds of all notes about a missing caption begin."""

WITHOUT_CAPTION = f"{NO_CAPTION}: trained without"

_REPEATS_NAME = re.compile(r"([1-9][0-9]{0,2})_(.+)")  # kohya's `10_sks dog`; four digits are taken for a year
_FACTS_VERSION = 2  # change it when `check_whole` finds other pictures unusable, or another size
_MAX_THREADS = 4  # each may hold a picture of MAX_PIXELS
_TABLE_ROWS = 20


@dataclass(frozen=True, slots=True)
class Sample:
    """One picture to train on.

    size: upright, in pixels, before resizing. id: 16 hex digits of the path below the data set folder and the
    content, the same on every machine. content: sha256 of the file. source: index of the [[dataset]] table.
    """

    image: Path
    caption: str
    size: Size
    bucket: Bucket
    fit: Fit
    repeats: int
    id: str
    content: str
    source: int = 0


class Picture(NamedTuple):
    """What reading a picture's file tells. size: upright. content: sha256 of the file."""

    size: Size
    format: str
    is_animated: bool
    content: str


@dataclass(frozen=True)
class Scan:
    """What a folder holds: pictures to train on, sorted by path; files left out; notes."""

    samples: tuple[Sample, ...]
    left_out: tuple[LeftOut, ...]
    notes: tuple[Note, ...]


def scan_folder(
    folder: Path,
    *,
    buckets: Sequence[Bucket],
    repeats: int = 1,
    default_caption: str | None = None,
    source: int = 0,
    max_left_out: float = MAX_LEFT_OUT,
    facts: FileFacts | None = None,
    track: Track = silent,
) -> Scan:
    """Read every picture below `folder` once and find its caption.

    facts: what is known of the pictures (`picture_facts`); those that did not change since are not opened.

    A subfolder named `10_sks dog` as in kohya's tools gives its pictures 10 times `repeats` and the class token
    "sks dog". A picture's caption is its own (`a.txt`, `a.caption` or a line of metadata.jsonl), else
    `default_caption`, else the class token, else empty; all but the first are noted. Hidden files are ignored.
    Raises DataError, with a table of reasons, when no picture is usable or more than the share `max_left_out` is not.
    """
    listing = list_folder(folder)
    captions = CaptionIndex(folder, listing)
    left_out = list(listing.left_out)
    notes = list(captions.notes)
    samples: list[Sample] = []
    if facts is None:
        facts = picture_facts(None, folder)
    fits: dict[Size, tuple[Bucket, Fit]] = {}  # pictures of one size share theirs
    for path, found in zip(listing.images, _read_all(folder, listing.images, facts, track), strict=True):
        if isinstance(found, ImageError):
            left_out.append(LeftOut(path, str(found)))
            continue
        name = relative_name(path, folder)
        folder_repeats, class_token = read_folder_name(posixpath.dirname(name_below(path, folder)))
        try:
            if found.size not in fits:
                bucket = _choose_bucket(found.size, buckets)
                fits[found.size] = bucket, fit(found.size, bucket)
            caption, caption_notes = _choose_caption(captions, path, default_caption, class_token)
        except DataError as error:
            left_out.append(LeftOut(path, str(error)))
            continue
        bucket, fitted = fits[found.size]
        samples.append(
            Sample(
                image=path,
                caption=caption,
                size=found.size,
                bucket=bucket,
                fit=fitted,
                repeats=repeats * folder_repeats,
                id=hashlib.sha256(f"{name}\0{found.content}".encode()).hexdigest()[:16],
                content=found.content,
                source=source,
            )
        )
        notes += caption_notes + _note_geometry(path, found, bucket)
    notes += _note_twins(samples)
    _check_enough(folder, samples, left_out, max_left_out)
    return Scan(tuple(samples), tuple(left_out), tuple(notes))


def picture_facts(memory: Path | None, folder: Path, *, is_kept: bool = True) -> FileFacts:
    """What earlier scans of a data set folder found out about its pictures, kept in the folder `memory`.

    is_kept: whether the next scan adds to it.
    """
    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]
    version = f"{_FACTS_VERSION}, Pillow {PIL.__version__}"
    return FileFacts(memory / f"{name}.json" if memory else None, version, is_kept=is_kept)


def _read_all(folder: Path, images: Sequence[Path], facts: FileFacts, track: Track) -> list[Picture | ImageError]:
    """What is in each picture, or what is wrong with it. Decoding happens outside Python's lock.

    Only pictures that are new or changed are opened; of a picture that cannot be used nothing is remembered.
    """
    names = {path: name_below(path, folder) for path in images}
    stamps = {path: _stamp(path) for path in images}
    found: dict[Path, Picture | ImageError] = {}
    for path, stamp in stamps.items():
        if stamp is not None and (known := facts.get(names[path], stamp)) is not None:
            size, *rest = known
            found[path] = Picture(Size(*size), *rest)
    unknown = [path for path in images if path not in found]
    with quiet_pillow(), ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
        futures = [pool.submit(_read, path) for path in unknown]
        for path, future in zip(unknown, track(futures, "Reading images"), strict=True):
            picture = found[path] = future.result()
            if (stamp := stamps[path]) is not None and isinstance(picture, Picture):
                facts.put(names[path], stamp, picture)
    facts.save(only=set(names.values()))
    return [found[path] for path in images]


def _stamp(path: Path) -> Stamp | None:
    try:
        return stamp_of(path)
    except OSError:  # reading it will say what is wrong
        return None


def _read(path: Path) -> Picture | ImageError:
    try:
        data = read_bytes(path)
        header = check_whole(data)
        return Picture(header.size, header.format, header.is_animated, hashlib.sha256(data).hexdigest())
    except ImageError as error:
        return error


@lru_cache(maxsize=256)
def read_folder_name(below: str) -> tuple[int, str | None]:
    """(repeats, class token) from the nearest folder named like `10_sks dog`; (1, None) without one."""
    for parent in reversed(below.split("/")):
        if match := _REPEATS_NAME.fullmatch(parent):
            return int(match[1]), match[2]
    return 1, None


def _choose_caption(
    captions: CaptionIndex, path: Path, default: str | None, class_token: str | None
) -> tuple[str, list[Note]]:
    caption, notes = captions.find(path)
    if caption is not None:
        return caption, notes
    if default is not None:
        return default, [*notes, Note(path, f"{NO_CAPTION}: default used", f"uses the default caption {default!r}")]
    if class_token is not None:
        return class_token, [*notes, Note(path, f"{NO_CAPTION}: folder name used", f"uses {class_token!r}")]
    return "", [*notes, Note(path, WITHOUT_CAPTION, "is trained with an empty caption")]


def _choose_bucket(size: Size, buckets: Sequence[Bucket]) -> Bucket:
    bucket = assign_bucket(size, buckets)
    if (scale := scale_to_cover(size, bucket)) > MAX_ENLARGEMENT:
        raise ImageError(
            f"too small: {size.width}x{size.height} would be enlarged {scale:.0f} times "
            f"to fill {bucket.width}x{bucket.height} (limit {MAX_ENLARGEMENT:g})"
        )
    if (lost := lost_fraction(size, bucket)) > MAX_LOSS:
        raise ImageError(
            f"too long and thin: {size.width}x{size.height} would lose {lost:.0%} of its area "
            f"in {bucket.width}x{bucket.height}; cut it into pieces"
        )
    return bucket


def _note_geometry(path: Path, picture: Picture, bucket: Bucket) -> list[Note]:
    notes: list[Note] = []
    if picture.is_animated:
        notes.append(Note(path, "animated", f"a {picture.format} with several frames; only the first is used"))
    if (scale := scale_to_cover(picture.size, bucket)) > NOTED_ENLARGEMENT:
        notes.append(
            Note(path, "enlarged", f"{picture.size.width}x{picture.size.height} is enlarged {scale:.1f} times")
        )
    if (lost := lost_fraction(picture.size, bucket)) > NOTED_LOSS:
        notes.append(Note(path, "cropped", f"{lost:.0%} of its area is cut away for {bucket.width}x{bucket.height}"))
    return notes


def _note_twins(samples: Iterable[Sample]) -> list[Note]:
    """Pictures with equal bytes, and pictures that share a caption file because only their suffixes differ."""
    notes: list[Note] = []
    first_by_content: dict[str, Path] = {}
    first_by_stem: dict[str, Path] = {}
    for sample in samples:
        twin = first_by_content.setdefault(sample.content, sample.image)
        if twin != sample.image:
            notes.append(Note(sample.image, "duplicate", f"has the same bytes as {twin.name}; both are used"))
        namesake = first_by_stem.setdefault(os.path.splitext(sample.image)[0], sample.image)
        if namesake != sample.image:
            notes.append(Note(sample.image, "same name", f"shares its name and caption with {namesake.name}"))
    return notes


def _check_enough(folder: Path, samples: Sequence[Sample], left_out: Sequence[LeftOut], max_left_out: float) -> None:
    bad = [item for item in left_out if is_image_name(item.path)]
    total = len(samples) + len(bad)
    if not samples:
        shown = bad or left_out
        what = f"none of its {total} images can be used" if bad else "holds no images (PNG, JPEG, WebP, BMP, GIF, TIFF)"
    elif len(bad) > max_left_out * total:
        shown = bad
        what = f"{len(bad)} of {total} images cannot be used, more than {max_left_out:.0%}"
    else:
        return
    advice = "Mend or remove these files." if shown else "Put images there, or check [[dataset]] path."
    raise DataError("\n".join([f"{folder}: {what}.", *_reason_table(folder, shown), advice]))


def _reason_table(folder: Path, items: Sequence[LeftOut]) -> list[str]:
    names = [printable(item.path.relative_to(folder).as_posix()) for item in items[:_TABLE_ROWS]]
    width = min(40, max(map(len, names), default=0))
    rows = [f"  {name:<{width}}  {item.reason}" for name, item in zip(names, items, strict=False)]
    return rows + ([f"  … and {len(items) - _TABLE_ROWS} more"] if len(items) > _TABLE_ROWS else [])


def write_report(path: Path, scans: Sequence[Scan], token_counts: Mapping[str, int], max_tokens: int) -> None:
    """Write what was found to `path` as JSON, and log it in a line: a warning, if there is something to mend.

    token_counts: number of tokens of each caption, without start and end marks. max_tokens: how many are read.
    """
    report = build_report(scans, token_counts, max_tokens)
    parts = [f'"{key}": {_rows(value)}' for key, value in report.items()]
    write_text_atomically(path, "{" + ",\n".join(parts) + "}\n")
    summary = report["summary"]
    left_out, without, cut = summary["left_out"], summary["notes"].get(WITHOUT_CAPTION, 0), summary["captions_cut"]
    logger.log(
        logging.WARNING if left_out or without or cut else logging.INFO,
        "Data set: %d pictures. Files left out: %d, without a caption: %d, captions cut at %d tokens: %d. See %s.",
        summary["images"], left_out, without, max_tokens, cut, path,
    )  # fmt: skip


def _rows(value: object) -> str:
    """JSON, of a list one line per entry: of ten thousand pictures that is written fast and read with ease."""
    if not isinstance(value, list):
        return json.dumps(value, ensure_ascii=False, indent=2)
    entries: list[object] = value
    return "[" + ",".join("\n  " + json.dumps(entry, ensure_ascii=False) for entry in entries) + "\n]"


def build_report(scans: Sequence[Scan], token_counts: Mapping[str, int], max_tokens: int) -> dict[str, Any]:
    """The report as JSON values: `summary` first, then `used`, `left_out` and `notes`."""
    samples = [sample for scan in scans for sample in scan.samples]
    used = [_describe(sample, token_counts.get(sample.caption), max_tokens) for sample in samples]
    left_out = [{"file": _name(item.path), "reason": item.reason} for scan in scans for item in scan.left_out]
    notes = [
        {"file": _name(note.path), "kind": note.kind, "message": note.message} for scan in scans for note in scan.notes
    ]
    summary = {
        "images": len(samples),
        "images_per_epoch": sum(sample.repeats for sample in samples),
        "left_out": len(left_out),
        "captions_cut": sum(entry["is_caption_cut"] for entry in used),
        "max_tokens": max_tokens,
        "buckets": {f"{b.width}x{b.height}": n for b, n in sorted(Counter(s.bucket for s in samples).items())},
        "notes": dict(sorted(Counter(note["kind"] for note in notes).items())),
    }
    return {"summary": summary, "used": used, "left_out": left_out, "notes": notes}


def _describe(sample: Sample, num_tokens: int | None, max_tokens: int) -> dict[str, Any]:
    return {
        "file": _name(sample.image),
        "source": sample.source,
        "size": list(sample.size),
        "bucket": list(sample.bucket),
        "resized": list(sample.fit.resized),
        "crop": list(sample.fit.crop),
        "lost": round(lost_fraction(sample.size, sample.bucket), 4),
        "repeats": sample.repeats,
        "caption": sample.caption,
        "tokens": num_tokens,
        "is_caption_cut": num_tokens is not None and num_tokens > max_tokens,
        "id": sample.id,
        "sha256": sample.content,
    }


def _name(path: Path) -> str:
    return printable(path.as_posix())

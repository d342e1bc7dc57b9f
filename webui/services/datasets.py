"""The data sets of a workspace for the page that works on them: folders by id, answers ready to be sent."""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from lora_diffusion.data.buckets import Size
from lora_diffusion.errors import UserError
from webui.services.bases import bucket_step, find_base
from webui.services.caption_text import Change, Edit, plan
from webui.services.checks import Filter, find_checks, view
from webui.services.crops import CropView, buckets_for, count_buckets, crop_view, usual_step
from webui.services.facts import Look
from webui.services.glance import glance
from webui.services.journal import Journal
from webui.services.mend import Mended, Mending, copy_mended
from webui.services.picture_set import PictureSet, SetError, tags_or_words
from webui.services.places import Places
from webui.services.tokens import MAX_TOKENS, find_counter
from webui.services.uploads import Uploads

MAX_PICTURES = 20_000
MAX_SHOWN_CHANGES = 2_000
NUM_THUMBS = 4
RESOLUTIONS = (64, 128, 256, 512)

Json = dict[str, Any]


@dataclass
class OpenSet:
    """One folder that someone works on."""

    id: str
    pictures: PictureSet
    look: Look
    is_to_look: bool = True
    lock: threading.RLock = field(default_factory=threading.RLock)
    mending: Json | None = None


@dataclass
class Datasets:
    """All methods take and give plain values. They raise UserError with words for people."""

    places: Places
    _open: dict[str, OpenSet] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def uploads(self) -> Uploads:
        return Uploads(self.places.workspace.datasets)

    def all(self) -> list[Json]:
        """What there is to choose from."""
        found: list[Json] = []
        for id in dict.fromkeys(self.places.datasets()):
            try:
                self._folder(id)
            except UserError:
                continue  # a link that leads out
            if look := glance(self.places, id):
                thumbs = [picture for picture, _ in look.pictures[:NUM_THUMBS]]
                found.append({"id": id, "images": look.num_images, "captioned": look.num_captioned, "thumbs": thumbs})
        return found

    def open(self, id: str) -> Json:
        """Read a folder anew."""
        opened = self.opened(id, is_read=False)
        with opened.lock:
            opened.pictures.read()
            opened.is_to_look = True
            if len(opened.pictures.pictures) > MAX_PICTURES:
                raise SetError(f"{id} has more than {MAX_PICTURES:,} pictures; open one of its subfolders.")
            captions = {p.name: p.caption for p in opened.pictures.pictures.values() if p.caption}
            counter = find_counter(self.places.workspace)
            return {
                "set": opened.id,
                "pictures": self.rows(opened, opened.pictures.pictures),
                "by": tags_or_words(captions),
                "tokens": {"source": counter.source if counter else "", "most": MAX_TOKENS},
                "leftOut": opened.pictures.left_out[:500],
                "orphans": opened.pictures.orphans[:500],
                "levels": self.levels(opened),
            }

    def look(self, id: str) -> Json:
        """Look at the pictures that were read last, in the background; how far that is."""
        opened = self.opened(id)
        look = opened.look
        if opened.is_to_look:
            with opened.lock:
                opened.is_to_look = False
                look.start([(picture.name, picture.path) for picture in opened.pictures.pictures.values()])
        return {"done": look.done, "total": look.total, "isDone": look.is_done, "hasSizes": look.has_sizes}

    def view(self, id: str, filter: Mapping[str, Any], resolution: int = 0, step: int = 0, base: str = "") -> Json:
        """What the filter lets through, the histogram of those, the counts of all checks, and every crop.

        resolution, step: 0 for the usual ones. base: whose step is taken where none is given.
        """
        opened = self.opened(id)
        chosen = Filter(
            text=str(filter.get("text", ""))[:500],
            wanted=tuple(map(str, filter.get("wanted", ()))),
            unwanted=tuple(map(str, filter.get("unwanted", ()))),
            check=str(filter.get("check", "")),
            by="words" if filter.get("by") == "words" else "tags",
        )
        base_name, own_step = ("", None) if step else self._step_of(base)
        with opened.lock:
            resolution = resolution or self._usual_resolution(opened)
            step = min(step or own_step or usual_step(resolution), resolution // 2)
            crops = self._crops(opened, resolution, step)
            counter = find_counter(self.places.workspace)
            checks = find_checks(
                opened.pictures, opened.look.facts, opened.look.pairs, crops, counter.count if counter else None
            )
            seen = view(opened.pictures, chosen, checks)
        numbers = {name: number for number, name in enumerate(opened.pictures.pictures)}
        keys = {name: str(number) for name, number in numbers.items()}
        return {
            "shown": [numbers[name] for name in seen.names],
            "terms": seen.terms,
            "checks": {key: len(found) for key, found in checks.items()},
            "reasons": {keys[name]: reason for name, reason in checks.get(chosen.check, {}).items() if reason},
            "unreadable": [numbers[name] for name in checks["unreadable"]],
            "resolution": resolution,
            "step": step,
            "base": base_name if step == own_step else "",
            "buckets": [(f"{bucket.width}×{bucket.height}", number) for bucket, number in count_buckets(crops)],
            "lost": _mean_lost(crops),
            "crops": {keys[name]: _crop_row(crop) for name, crop in crops.items()},
            "sizes": {
                keys[name]: (fact.width, fact.height)
                for name, fact in opened.look.facts.items()
                if fact.width and name in numbers
            },
        }

    def save(self, id: str, name: str, before: str | None, text: str) -> Json:
        """Give one picture a caption."""
        opened = self.opened(id)
        with opened.lock:
            try:
                changed = opened.pictures.edit(name, before, text)
            except SetError as error:
                return {"error": str(error), "rows": self.rows(opened, {name} & opened.pictures.pictures.keys())}
            return {"rows": self.rows(opened, {name, *changed}), "levels": self.levels(opened)}

    def preview(self, id: str, names: Sequence[str], edit: Mapping[str, Any]) -> Json:
        """What an edit would do, and a digest of that for `apply`."""
        opened = self.opened(id)
        with opened.lock:
            changes = plan(opened.pictures.captions(names), edit_from(edit))
        return {
            "digest": _digest(changes),
            "number": len(changes),
            "changes": [
                {"name": change.name, "pieces": change.pieces(), "isNew": change.before is None}
                for change in changes[:MAX_SHOWN_CHANGES]
            ],
        }

    def apply(
        self, id: str, names: Sequence[str], edit: Mapping[str, Any], digest: str, without: Sequence[str] = ()
    ) -> Json:
        """Do what was previewed. without: pictures that were taken out of it."""
        opened = self.opened(id)
        with opened.lock:
            opened.pictures.read()
            changes = plan(opened.pictures.captions(names), edit_from(edit))
            if _digest(changes) != digest:
                raise SetError("The captions have changed since the preview. Look at it again.")
            kept = [change for change in changes if change.name not in set(without)]
            changed = opened.pictures.write(kept, edit_from(edit).kind) if kept else []
            return {"rows": self.rows(opened, changed), "levels": self.levels(opened)}

    def undo(self, id: str, *, again: bool = False) -> Json:
        """Take the last change back, or do it again."""
        opened = self.opened(id)
        with opened.lock:
            step, left = opened.pictures.redo() if again else opened.pictures.undo()
            return {
                "what": step.what,
                "number": len(step.changes) - len(left),
                "left": left,
                "rows": self.rows(opened, opened.pictures.pictures),
                "levels": self.levels(opened),
            }

    def mend(self, id: str, name: str, options: Mapping[str, Any]) -> Json:
        """Start to make a mended copy under data/."""
        opened = self.opened(id)
        if not opened.look.is_done:
            raise SetError("The pictures are still being looked at. Wait until that is done.")
        if opened.mending and not opened.mending["isDone"]:
            raise SetError("A copy is being made already.")
        target = self.uploads.make_set(name)
        keys = ("without_twins", "without_near", "upright", "opaque")
        mending = Mending(**{key: bool(options.get(key)) for key in keys})
        opened.mending = {
            "done": 0,
            "total": len(opened.pictures.pictures),
            "isDone": False,
            "set": self.places.id_of(target),
        }
        threading.Thread(target=_copy, args=(opened, target, mending, opened.mending), daemon=True).start()
        return opened.mending

    def mending(self, id: str) -> Json:
        """How far the copy is."""
        mending = self.opened(id).mending
        if mending is None:
            raise SetError("The web UI was started anew while the copy was made. Delete its folder and make it again.")
        return mending

    def make_set(self, name: str) -> str:
        """A new folder under data/ for an upload; its id."""
        return self.places.id_of(self.uploads.make_set(name))

    def upload(self, id: str, name: str, piece: str, offset: int, *, is_last: bool) -> str:
        """Take a piece of a file into a folder under data/."""
        folder = self._folder(id)
        if not folder.is_relative_to(self.places.workspace.datasets.resolve()):
            raise SetError("Files are only taken into folders under data/.")
        return self.uploads.add(folder, name, piece, offset, is_last=is_last)

    def _folder(self, id: str) -> Path:
        """The real folder of an id. Raises UserError for anything that is not a folder where data sets lie."""
        folder = self.places.resolve(id)
        workspace = self.places.workspace
        roots = [root.resolve() for root in (workspace.datasets, workspace.samples, *self.places.also)]
        if not any(folder.is_relative_to(root) for root in roots):
            raise SetError("Data sets lie under data/ and samples/. This folder is elsewhere.")
        if not folder.is_dir():
            raise SetError(f"There is no folder {id}. It may have been renamed.")
        return folder

    def opened(self, id: str, *, is_read: bool = True) -> OpenSet:
        folder = self._folder(id)
        id = self.places.id_of(folder)
        with self._lock:
            if id not in self._open:
                key = hashlib.sha256(id.encode()).hexdigest()[:24]
                private = self.places.workspace.private / "datasets" / key
                pictures = PictureSet(folder, Journal(private / "journal"))
                self._open[id] = OpenSet(id, pictures, Look(private / "facts.json"))
            opened = self._open[id]
        with opened.lock:
            if is_read and not opened.pictures.pictures:
                opened.pictures.read()
        return opened

    def rows(self, opened: OpenSet, names: Iterable[str]) -> list[Json]:
        counter = find_counter(self.places.workspace)
        root = opened.pictures.root
        return [
            {
                "name": name,
                "url": f"{opened.id}/{picture.path.relative_to(root).as_posix()}",
                "version": _version(picture.path),
                "caption": picture.caption,
                "problem": picture.problem,
                "tokens": counter.count(picture.caption or "") if counter else len((picture.caption or "").split()),
            }
            for name in names
            for picture in [opened.pictures.pictures[name]]
        ]

    def levels(self, opened: OpenSet) -> Json:
        done, undone = opened.pictures.journal.num_levels()
        last, again = opened.pictures.journal.last_done(), opened.pictures.journal.last_undone()
        return {
            "undo": done,
            "redo": undone,
            "what": last.what if last else "",
            "number": len(last.changes) if last else 0,
            "again": again.what if again else "",
        }

    def _crops(self, opened: OpenSet, resolution: int, step: int) -> dict[str, CropView]:
        buckets = buckets_for(resolution, step)
        facts = opened.look.facts
        by_size: dict[tuple[int, int], CropView] = {}
        crops: dict[str, CropView] = {}
        for name in opened.pictures.pictures:
            if (fact := facts.get(name)) and fact.width and not fact.problem:
                size = (fact.width, fact.height)
                crops[name] = by_size.get(size) or by_size.setdefault(size, crop_view(Size(*size), buckets))
        return crops

    def _step_of(self, base: str) -> tuple[str, int | None]:
        """Name and step of a base; its step is None if there is no such base, or it does not say."""
        try:
            found = find_base(self.places, base)
            return found.name, bucket_step(self.places, found)
        except UserError:
            return "", None

    def _usual_resolution(self, opened: OpenSet) -> int:
        sides = [math.sqrt(fact.width * fact.height) for fact in opened.look.facts.values() if fact.width]
        usual = median(sides) if sides else RESOLUTIONS[-1]
        return max((side for side in RESOLUTIONS if side <= usual), default=RESOLUTIONS[0])


def _version(path: Path) -> str:
    """Part of the address of a picture, so that browsers keep it as long as the file is as it is."""
    try:
        status = path.stat()
    except OSError:
        return ""
    return f"{status.st_mtime_ns:x}-{status.st_size:x}"


def edit_from(values: Mapping[str, Any]) -> Edit:
    """An edit from what the page sends."""
    return Edit(
        kind=str(values.get("kind", "")),
        text=str(values.get("text", "")),
        to=str(values.get("to", "")),
        at_end=bool(values.get("at_end", True)),
        is_regex=bool(values.get("is_regex")),
        ignore_case=bool(values.get("ignore_case")),
    )


def _copy(opened: OpenSet, target: Path, mending: Mending, progress: Json) -> None:
    try:
        done = copy_mended(opened.pictures, opened.look.facts, target, mending, lambda n: progress.update(done=n))
    except (OSError, UserError) as error:
        progress.update(error=str(error), isDone=True)
        return
    progress.update(_numbers(done), isDone=True)


def _numbers(done: Mended) -> Json:
    return {"copied": done.num_copied, "redrawn": done.num_redrawn, "leftOut": done.num_left_out}


def _digest(changes: Sequence[Change]) -> str:
    text = json.dumps([(change.name, change.before, change.after) for change in changes])
    return hashlib.sha256(text.encode()).hexdigest()


def _mean_lost(crops: Mapping[str, CropView]) -> float:
    return sum(crop.lost for crop in crops.values()) / len(crops) if crops else 0.0


def _crop_row(crop: CropView) -> list[float | str]:
    shares = (crop.left, crop.top, crop.width, crop.height, crop.lost, crop.enlargement)
    return [*(round(share, 4) for share in shares), f"{crop.bucket.width}×{crop.bucket.height}"]

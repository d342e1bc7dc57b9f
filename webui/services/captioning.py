"""Captions by a model for the page of data sets: start it, see how far it is, look at what it proposes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_diffusion.captioning.find import captioners, check_folder, is_hub_name
from lora_diffusion.captioning.proposals import Proposal, Proposals, proposals_file
from lora_diffusion.config_captions import CaptionConfig, CaptionOrder
from lora_diffusion.errors import UserError
from lora_diffusion.files import last_bytes, write_json_atomically
from lora_diffusion.jobs.condition import ACTIVE
from lora_diffusion.jobs.queue import Job, Queue
from lora_diffusion.runs import RunFolder
from webui.services.caption_text import Change
from webui.services.datasets import Datasets, Json, OpenSet
from webui.services.picture_set import SetError

MAX_SHOWN = 2_000
UNDO_NAME = "caption"
"""What the journal calls captions of a model."""


@dataclass
class Decisions:
    """What people said to the proposals of one captioning. accepted: picture → the caption it got."""

    accepted: dict[str, str] = field(default_factory=dict[str, str])
    rejected: set[str] = field(default_factory=set[str])
    adopted: set[str] = field(default_factory=set[str])
    """Pictures whose caption the captioning wrote, and that can be undone since."""

    @classmethod
    def read(cls, folder: Path) -> Decisions:
        try:
            values = json.loads((folder / "decisions.json").read_text(encoding="utf-8"))
            return cls(dict(values["accepted"]), set(values["rejected"]), set(values["adopted"]))
        except (OSError, ValueError, TypeError, KeyError):
            return cls()  # nothing was decided yet, or it is to be decided again

    def write(self, folder: Path) -> None:
        values = {"accepted": self.accepted, "rejected": sorted(self.rejected), "adopted": sorted(self.adopted)}
        write_json_atomically(folder / "decisions.json", values)


@dataclass(frozen=True)
class Pending:
    """A caption that someone is to look at, and the captioning it is from."""

    name: str
    caption: str
    job: Job


@dataclass
class Captioning:
    """All methods take and give plain values. They raise UserError with words for people."""

    datasets: Datasets
    queue: Queue
    _read: dict[Path, tuple[int, Proposals]] = field(default_factory=dict[Path, tuple[int, Proposals]])

    def state(self, id: str) -> Json:
        """The captioners at hand, the newest captioning of the data set, and how many captions wait for a look."""
        opened = self.datasets.opened(id)
        places = self.datasets.places
        jobs = self._jobs(opened)
        found = (places.id_of(Path(one)) if Path(one).is_absolute() else one for one in captioners(self._models()))
        return {
            "captioners": [{"id": one, "name": one.removeprefix("models/")} for one in found],
            "job": self._about(jobs[0]) if jobs else None,
            "pending": sum(1 for _ in self._pending(opened, jobs)),
        }

    def start(self, id: str, options: Mapping[str, Any]) -> Json:
        """Put a captioning of the data set into the queue. options: as the page asks for them."""
        opened = self.datasets.opened(id)
        if any(_is_unfinished(job) for job in self._jobs(opened)):
            raise SetError("This data set is being captioned already. Stop that first, or wait.")
        order = CaptionOrder.of(
            folder=opened.id,
            captioner=self._captioner(str(options.get("captioner", ""))),
            prefix=str(options.get("prefix", "")),
            suffix=str(options.get("suffix", "")),
            prompt=str(options.get("prompt", "")),
            overwrite=bool(options.get("overwrite")),
            write="missing" if options.get("fill") else "none",
        )
        self.queue.add_captions(order)
        return self.state(id)

    def stop(self, id: str) -> Json:
        """End the captioning of the data set; what it made so far stays."""
        for job in self._jobs(self.datasets.opened(id)):
            if _is_unfinished(job):
                self.queue.stop(job.id)
        return self.state(id)

    def take_in(self, id: str) -> Json:
        """Let what captionings wrote into the data set be undone: how many that is, and the newest one's pictures."""
        opened = self.datasets.opened(id)
        with opened.lock:
            opened.pictures.read()
            jobs = self._jobs(opened)
            number = sum(self._adopt(opened, job) for job in reversed(jobs) if not _is_unfinished(job))
            made = self._made(jobs[0]).made if jobs else {}
            written = [name for name in opened.pictures.pictures if name in made and made[name].is_written]
            rows = self.datasets.rows(opened, written)
            return {"number": number, "rows": rows, "levels": self.datasets.levels(opened)}

    def proposals(self, id: str) -> Json:
        """What waits for a look, with the caption as it is, and the pictures that got none."""
        opened = self.datasets.opened(id)
        with opened.lock:
            opened.pictures.read()
            jobs = self._jobs(opened)
            pending = list(self._pending(opened, jobs))
            rows = self.datasets.rows(opened, [one.name for one in pending[:MAX_SHOWN]])
        problems = self._made(jobs[0]).problems if jobs else {}
        return {
            "total": len(pending),
            "proposals": [row | {"proposed": one.caption} for row, one in zip(rows, pending, strict=False)],
            "problems": list(problems.items())[:MAX_SHOWN],
        }

    def accept(self, id: str, chosen: Sequence[Mapping[str, Any]]) -> Json:
        """Write captions, each unless the picture's own is no longer what it was for whoever accepted.

        chosen: name, before (the caption beside it) and text (the new one, perhaps edited) of each.
        """
        opened = self.datasets.opened(id)
        changes = [Change(str(one["name"]), _text_or_none(one["before"]), str(one["text"])) for one in chosen]
        with opened.lock:
            changed, left = opened.pictures.write_unless_changed(changes, UNDO_NAME)
            texts = {change.name: change.after for change in changes if change.name not in left}
            self._decide(opened, texts, lambda decisions, name: _accept(decisions, name, texts[name]))
            rows = self.datasets.rows(opened, dict.fromkeys([*changed, *left]))
            return {"rows": rows, "left": left, "levels": self.datasets.levels(opened)}

    def reject(self, id: str, names: Sequence[str], *, back: bool = False) -> Json:
        """Take proposals off the list, or put them back."""
        opened = self.datasets.opened(id)
        with opened.lock:
            self._decide(opened, map(str, names), lambda decisions, name: _reject(decisions, name, back))
        return {"back": back}

    def _models(self) -> Path:
        return self.datasets.places.workspace.models

    def _captioner(self, text: str) -> str:
        """As the order names it: a folder where the web UI may look, from the root, or a hub id."""
        text = text.strip()
        if not text:
            raise SetError("Choose a captioner, or write its folder or hub id.")
        places = self.datasets.places
        if is_hub_name(text, places.root):
            return text
        folder = places.resolve(text)
        if not folder.is_dir():
            raise SetError(f"There is no folder {text}. Put an image-to-text model such as BLIP into models/.")
        check_folder(folder)
        return places.id_of(folder)

    def _jobs(self, opened: OpenSet) -> list[Job]:
        """The captionings of a data set, the newest first."""
        root = self.datasets.places.root
        jobs = (job for job in self.queue.jobs() if job.kind == "caption")
        mine = [job for job in jobs if (order := self._order(job)) and (root / order.folder).resolve() == _real(opened)]
        return sorted(mine, key=lambda job: -job.id)

    def _order(self, job: Job) -> CaptionConfig | None:
        try:
            return self.queue.captions_order(job).caption
        except UserError:
            return None  # its file was deleted or changed by hand

    def _made(self, job: Job) -> Proposals:
        path = proposals_file(job.run)
        try:
            version = path.stat().st_mtime_ns
        except OSError:
            return Proposals()
        known = self._read.get(path)
        if known is None or known[0] != version:
            known = self._read[path] = (version, Proposals.read(path))
        return known[1]

    def _pending(self, opened: OpenSet, jobs: Iterable[Job]) -> Iterator[Pending]:
        """What is still to be decided, of each picture the newest; in the order of the pictures."""
        found: dict[str, Pending] = {}
        seen = set[str]()
        for job in jobs:
            decisions = Decisions.read(job.run)
            for name, proposal in self._made(job).made.items():
                picture = opened.pictures.pictures.get(name)
                is_open = picture and not picture.problem and _is_open(name, proposal, picture.caption, decisions)
                if name not in seen and is_open:
                    found[name] = Pending(name, proposal.caption, job)
                seen.add(name)
        return (found[name] for name in opened.pictures.pictures if name in found)

    def _decide(self, opened: OpenSet, names: Iterable[str], decide: Any) -> None:
        """Note what was decided, at the captioning whose proposal was shown."""
        wanted = set(names)
        for job in self._jobs(opened):
            mine = wanted & self._made(job).made.keys()
            if mine:
                decisions = Decisions.read(job.run)
                for name in mine:
                    decide(decisions, name)
                decisions.write(job.run)
                wanted -= mine

    def _adopt(self, opened: OpenSet, job: Job) -> int:
        """Write down in the journal what the captioning wrote; the number of captions."""
        decisions = Decisions.read(job.run)
        written = {
            name: Change(name, proposal.before, proposal.caption)
            for name, proposal in self._made(job).made.items()
            if proposal.is_written and name not in decisions.adopted
        }
        if not written:
            return 0
        number = opened.pictures.note_written(list(written.values()), UNDO_NAME)
        decisions.adopted |= written.keys()
        decisions.write(job.run)
        return number

    def _about(self, job: Job) -> Json:
        order = self._order(job)
        says = last_bytes(RunFolder(job.run).log, 400).decode("utf-8", "replace").strip().splitlines()
        return {
            "id": job.id,
            "status": job.status,
            "isActive": _is_unfinished(job),
            "position": job.position,
            "done": job.step,
            "total": job.steps,
            "captioner": order.captioner if order else "",
            "problems": len(self._made(job).problems),
            "made": len(self._made(job).made),
            "error": f"{job.error.message} {job.error.hint}".strip() if job.error else "",
            "says": says[-1].partition("  ")[2] if says and job.status in ACTIVE else "",
        }


def _is_unfinished(job: Job) -> bool:
    return job.status in (*ACTIVE, "queued")


def _is_open(name: str, proposal: Proposal, caption: str | None, decisions: Decisions) -> bool:
    """Whether a proposal is still to be decided; one that was accepted is again when that was undone."""
    if proposal.is_written or name in decisions.rejected:
        return False
    accepted = decisions.accepted.get(name)
    if accepted is not None:
        return caption == proposal.before and caption != accepted
    return caption != proposal.caption


def _accept(decisions: Decisions, name: str, caption: str) -> None:
    decisions.accepted[name] = caption


def _reject(decisions: Decisions, name: str, back: bool) -> None:
    (decisions.rejected.discard if back else decisions.rejected.add)(name)


def _text_or_none(value: object) -> str | None:
    return None if value is None else str(value)


def _real(opened: OpenSet) -> Path:
    return opened.pictures.root

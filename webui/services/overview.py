"""All runs side by side: what they were trained with, how well they did, and where their configs differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lora_diffusion.errors import UserError
from lora_diffusion.jobs.queue import Job
from lora_diffusion.runs import RunFolder
from webui.services.form_values import Fields, fields_from_toml
from webui.services.site import Site

COMPARED = 4

Best = tuple[float, int] | None
"""The lowest validation loss and its step."""

Stamp = tuple[int, ...]


@dataclass(frozen=True)
class RunRow:
    """One line of the table; of a captioning `base` is its model.

    best: the lowest validation loss and its step. picture: id of the newest preview.
    """

    id: str
    job: Job
    dataset_id: str
    """Of the data set that a captioning is for; empty for a run."""
    dataset: str
    base: str
    kind: str
    rank: str
    learning_rate: str
    best: Best
    picture: str | None


@dataclass
class Overview:
    """Reads configs once per version of their file, and numbers and pictures of a run only while they change."""

    site: Site
    _configs: dict[tuple[int, str], tuple[int, Fields]] = field(
        default_factory=dict[tuple[int, str], tuple[int, Fields]]
    )
    _results: dict[Path, tuple[Stamp, Best, str | None]] = field(
        default_factory=dict[Path, "tuple[Stamp, Best, str | None]"]
    )

    def rows(self) -> list[RunRow]:
        """The newest first; those that wait on top, in their order."""
        jobs = self.site.queue.jobs()
        waiting = [job for job in jobs if job.status == "queued"]
        others = sorted((job for job in jobs if job.status != "queued"), key=lambda job: -(job.started or job.created))
        return [self._row(job) for job in (*waiting, *others)]

    def _row(self, job: Job) -> RunRow:
        if job.kind == "caption":
            return self._captioning(job)
        fields = self.config(job)
        best, picture = self._result(job.run)
        return RunRow(
            id=self.site.run_id(job),
            job=job,
            dataset_id="",
            dataset=_last(fields.get("dataset.0.path", "")),
            base=_last(fields.get("model.path", "")),
            kind=fields.get("adapter.kind", ""),
            rank=fields.get("adapter.rank", ""),
            learning_rate=fields.get("optimizer.lr", ""),
            best=best,
            picture=picture,
        )

    def _captioning(self, job: Job) -> RunRow:
        try:
            order = self.site.queue.captions_order(job).caption
            id = self.site.places.id_of(self.site.workspace.root / order.folder)
            return RunRow(self.site.run_id(job), job, id, _last(id), _last(order.captioner), "", "", "", None, None)
        except UserError:
            return RunRow(self.site.run_id(job), job, "", job.name, "", "", "", "", None, None)

    def _result(self, run: Path) -> tuple[Best, str | None]:
        stamp = _stamp(RunFolder(run))
        known = self._results.get(run)
        if known is None or known[0] != stamp:
            follower = self.site.followers.of(run)
            with follower.lock:
                measured = [(row["val_loss"], row["step"]) for row in follower.run.metrics() if "val_loss" in row]
                pictures = follower.run.previews().pictures
            newest = pictures[max(pictures, key=lambda place: (place[1], -place[0]))] if pictures else None
            known = (stamp, min(measured, default=None), self.site.places.id_of(newest) if newest else None)
            self._results[run] = known
        return known[1], known[2]

    def config(self, job: Job) -> Fields:
        """The job's settings as the form shows them; empty where they cannot be read."""
        try:
            text = self.site.queue.config_of(job)
        except UserError:
            return {}
        known = self._configs.get((job.id, str(job.run)))
        if known is None or known[0] != hash(text):
            try:
                known = (hash(text), fields_from_toml(text)[0])
            except UserError:
                known = (hash(text), {})
            self._configs[job.id, str(job.run)] = known
        return known[1]


def differences(
    configs: Sequence[Mapping[str, str]], leave_out: frozenset[str] = frozenset({"run.output"})
) -> dict[str, list[str]]:
    """Setting → its value in each config, for those that are not everywhere the same."""
    names = dict.fromkeys(name for config in configs for name in config)
    values = {name: [config.get(name, "") for config in configs] for name in names if name not in leave_out}
    return {name: found for name, found in values.items() if len(set(found)) > 1}


def _stamp(run: RunFolder) -> Stamp:
    """Another one for other numbers or pictures."""
    stamp: list[int] = []
    for path in (run.metrics, run.previews):
        try:
            status = path.stat()
        except OSError:
            continue
        stamp += [status.st_size, status.st_mtime_ns]
    return tuple(stamp)


def _last(path: str) -> str:
    return Path(path).name or path

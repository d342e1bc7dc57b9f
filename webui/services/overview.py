"""All runs side by side: what they were trained with, how well they did, and where their configs differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lora_diffusion.errors import UserError
from lora_diffusion.jobs.queue import Job
from webui.services.form_values import Fields, fields_from_toml
from webui.services.site import Site

COMPARED = 4


@dataclass(frozen=True)
class RunRow:
    """One line of the table. best: the lowest validation loss and its step. picture: id of the newest preview."""

    id: str
    job: Job
    dataset: str
    base: str
    kind: str
    rank: str
    learning_rate: str
    best: tuple[float, int] | None
    picture: str | None


@dataclass
class Overview:
    """Reads configs once per version of their file."""

    site: Site
    _configs: dict[tuple[int, str], tuple[int, Fields]] = field(
        default_factory=dict[tuple[int, str], tuple[int, Fields]]
    )

    def rows(self) -> list[RunRow]:
        """The newest first; those that wait on top, in their order."""
        jobs = self.site.queue.jobs()
        waiting = [job for job in jobs if job.status == "queued"]
        others = sorted((job for job in jobs if job.status != "queued"), key=lambda job: -(job.started or job.created))
        return [self._row(job) for job in (*waiting, *others)]

    def _row(self, job: Job) -> RunRow:
        fields = self.config(job)
        follower = self.site.followers.of(job.run)
        with follower.lock:
            measured = [(row["val_loss"], row["step"]) for row in follower.run.metrics() if "val_loss" in row]
            previews = follower.run.previews()
        newest = (
            previews.pictures[max(previews.pictures, key=lambda place: (place[1], -place[0]))]
            if previews.pictures
            else None
        )
        return RunRow(
            id=self.site.run_id(job),
            job=job,
            dataset=_last(fields.get("dataset.0.path", "")),
            base=_last(fields.get("model.path", "")),
            kind=fields.get("adapter.kind", ""),
            rank=fields.get("adapter.rank", ""),
            learning_rate=fields.get("optimizer.lr", ""),
            best=min(measured, default=None),
            picture=self.site.places.id_of(newest) if newest else None,
        )

    def config(self, job: Job) -> Fields:
        """The job's settings as the form shows them; empty where they cannot be read."""
        try:
            text = self.site.queue.config(job.id)
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


def _last(path: str) -> str:
    return Path(path).name or path

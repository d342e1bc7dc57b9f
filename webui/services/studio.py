"""What the pages Generate and Adapters work with, once per workspace."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from lora_diffusion.errors import UserError
from lora_diffusion.files import write_json_atomically
from lora_diffusion.generation.infotext import Parameters
from lora_diffusion.generation.request import Request, take_out_tags, write_tags
from lora_diffusion.jobs.condition import ACTIVE
from lora_diffusion.jobs.queue import Job, Queue
from lora_diffusion.runs import RunFolder
from webui.services.drawings import Desk
from webui.services.engine import Engine
from webui.services.file_tools import FileTools
from webui.services.gallery import Gallery
from webui.services.library import Library
from webui.services.places import Places

logger = logging.getLogger(__name__)

PAUSED = "paused-to-draw.json"


@dataclass
class Studio:
    """A file knows the jobs that were paused to draw: they go on also if the web UI ends before all is drawn."""

    library: Library
    gallery: Gallery
    engine: Engine
    desk: Desk
    queue: Queue
    tools: FileTools
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def training(self) -> Job | None:
        """The job that has the device now."""
        return next((job for job in self.queue.jobs() if job.status in ACTIVE), None)

    def pause_training(self) -> Job | None:
        """Pause the run that has the device until everything is drawn, and what waits, which would take its place.

        What is added meanwhile waits for the same. Returns the run.
        """
        with self._lock:
            active = [job for job in self.queue.jobs() if job.status in ACTIVE]
            if not active:
                return None
            self.queue.hold_new()
            waiting = [job for job in self.queue.jobs() if job.status == "queued"]
            self._write_paused([*self._read_paused(), *(job.id for job in (*active, *waiting))])
            for job in (*waiting, *active):  # what waits first: it starts as soon as the device is free
                self.queue.pause(job.id)
        if not self.desk.unfinished():  # the last picture was done while this was asked for
            self.resume_training()
        return active[0]

    def resume_training(self) -> None:
        """Let the jobs go on that were paused to draw, in their order, unless someone has resumed or ended them."""
        with self._lock:
            if paused := self._read_paused():
                try:
                    self.queue.resume_paused(paused)
                except UserError as error:
                    logger.warning("Jobs that were paused to draw do not go on (%s): %s", _listed(paused), error)
                else:
                    self._write_paused([])
            self.queue.release_new()

    def _read_paused(self) -> list[int]:
        try:
            return [int(id) for id in json.loads(self._paused.read_text(encoding="utf-8"))]
        except (OSError, ValueError, TypeError):
            return []

    def _write_paused(self, ids: Iterable[int]) -> None:
        self._paused.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomically(self._paused, list(dict.fromkeys(ids)))

    @property
    def _paused(self) -> Path:
        return self.queue.workspace.private / PAUSED

    def sample_live(self, request: Request) -> Job | None:
        """Ask the run that trains now for a picture from its weights of this moment."""
        job = self.training()
        if job is None or job.kind != "train":
            return None
        prompt, _ = take_out_tags(request.prompt)
        content = {"prompts": [prompt], "seed": request.seed, "steps": request.steps, "cfg": request.cfg}
        RunFolder(job.run).ask("sample_now", content)
        return job

    def settle(self, parameters: Parameters) -> tuple[Request, list[str]]:
        """The picture's request with our names for its adapters, found by hash too, and those that are not here."""
        return settle(parameters, self.library)


def make_studio(places: Places, queue: Queue) -> Studio:
    library = Library(places, places.workspace.private / "library.json")
    engine = Engine(
        places.workspace,
        [folder for folder, _ in library.folders()],
        lambda: frozenset(adapter.name for adapter in library.adapters()),
    )
    studio = Studio(
        library, Gallery(places), engine, Desk(places.workspace, engine), queue, FileTools(places.workspace)
    )
    studio.desk.when_idle = studio.resume_training
    studio.resume_training()  # what an earlier web UI paused, and did not live to resume
    return studio


def _listed(ids: Iterable[int]) -> str:
    return ", ".join(map(str, ids))


def settle(parameters: Parameters, library: Library) -> tuple[Request, list[str]]:
    """As `Studio.settle`. The request has its adapters as tags in the prompt, as the page shows them."""
    adapters = library.adapters()
    names = {adapter.name for adapter in adapters}
    unknown: list[str] = []
    found: dict[str, float] = {}
    for name, strength in parameters.request.adapters.items():
        digits = parameters.hashes.get(name, "")
        by_hash = next((a.name for a in adapters if digits and a.facts.hash.startswith(digits.lower())), None)
        if name in names or by_hash:
            found[by_hash or name] = strength
        else:
            unknown.append(f"{name} ({digits})" if digits else name)
    return replace(parameters.request, prompt=with_tags(parameters.request.prompt, found), adapters={}), unknown


def with_tags(prompt: str, adapters: Mapping[str, float]) -> str:
    return " ".join(part for part in (prompt, write_tags(adapters)) if part)

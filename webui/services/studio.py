"""What the pages Generate and Adapters work with, once per workspace."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace

from lora_diffusion.errors import UserError
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


@dataclass
class Studio:
    """paused: ids of runs that were paused to draw, and go on when nothing is left to draw."""

    library: Library
    gallery: Gallery
    engine: Engine
    desk: Desk
    queue: Queue
    tools: FileTools
    paused: set[int] = field(default_factory=set[int])
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def training(self) -> Job | None:
        """The job that has the device now."""
        return next((job for job in self.queue.jobs() if job.status in ACTIVE), None)

    def pause_training(self) -> Job | None:
        """Pause the run that has the device until everything is drawn."""
        job = self.training()
        if job is not None:
            with self._lock:
                self.queue.pause(job.id)
                self.paused.add(job.id)
        return job

    def resume_training(self) -> None:
        """Let the paused runs go on."""
        with self._lock:
            for id in list(self.paused):
                with suppress(UserError):  # someone else resumed or ended it
                    self.queue.resume(id)
                self.paused.discard(id)

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
    return studio


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

"""What every page is given."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lora_diffusion.errors import UserError
from lora_diffusion.jobs.queue import Job, Queue
from lora_diffusion.workspace import Workspace
from webui.services.follow import Followers
from webui.services.pictures import Pictures
from webui.services.places import Places
from webui.services.studio import Studio, make_studio


@dataclass(frozen=True)
class Site:
    """The workspace and the services that look into it."""

    places: Places
    queue: Queue
    pictures: Pictures
    studio: Studio
    followers: Followers = field(default_factory=Followers)

    @property
    def workspace(self) -> Workspace:
        return self.places.workspace

    def run_id(self, job: Job) -> str:
        """What names a run in addresses: its folder, which stays the same whoever starts it. Captionings have none."""
        return self.places.id_of(job.run) if job.kind == "train" else f"captioning-{job.id}"

    def find_run(self, id: str) -> Job | None:
        """The job of a run folder; None if the queue knows none or the id leads out of the workspace."""
        try:
            path = self.places.resolve(id)
        except UserError:
            return None
        return next((job for job in self.queue.jobs() if job.kind == "train" and job.run.resolve() == path), None)

    def find_job(self, id: str) -> Job | None:
        """Like `find_run`, also for a captioning, by what `run_id` says."""
        return next((job for job in self.queue.jobs() if self.run_id(job) == id), None) or self.find_run(id)


def make_site(root: Path, also: tuple[Path, ...] = (), queue: Queue | None = None) -> Site:
    """root: the workspace's folder. queue: another one than the workspace's own, for tests."""
    workspace = Workspace(root.resolve())
    places = Places(workspace, tuple(folder.resolve() for folder in also))
    queue = queue or Queue(workspace)
    return Site(places, queue, Pictures(places, workspace.thumbnails), make_studio(places, queue))

"""What programs may ask the web UI for with `gradio_client`: how things are, runs in the queue, pictures.

The events of the pages are private to the browser, as their arguments are whatever a page has at hand; these stay.
"""

from __future__ import annotations

import gradio as gr
from gradio.events import api

from lora_diffusion.config import TrainConfig
from lora_diffusion.errors import UserError
from lora_diffusion.jobs.condition import ACTIVE
from lora_diffusion.jobs.queue import Job
from webui.services.bases import find_base
from webui.services.drawing_form import DrawingForm
from webui.services.drawings import Drawing
from webui.services.site import Site


def add_api(site: Site) -> None:
    """Register the functions in the app that is being built. None waits for another: each is done at once."""

    def status() -> dict:
        """How many runs wait and train, how many drawings wait, and the newest drawing's number (0 for none)."""
        jobs, unfinished = site.queue.jobs(), site.studio.desk.unfinished()
        newest = next(iter(site.studio.desk.drawings()), None)
        return {
            "queued": sum(job.status == "queued" for job in jobs),
            "active": sum(job.status in ACTIVE for job in jobs),
            "drawings": len(unfinished),
            "newest_drawing": newest.id if newest else 0,
        }

    def list_runs() -> list:
        """Every run and captioning as of the page Runs: id, kind, name, status, position, step, steps, error."""
        return [_run(site, job) for job in site.queue.jobs()]

    def queue_run(config: str) -> dict:
        """Put a run at the end of the queue. config: its TOML."""
        try:
            problems = site.places.problems_of(TrainConfig.parse(config))
            if problems:
                raise UserError("\n".join(str(problem) for problem in problems))
            return _run(site, site.queue.add(config))
        except UserError as error:
            raise gr.Error(str(error)) from None

    def stop_run(id: str) -> dict:
        """End a run with everything saved, or take it out of the queue. id: as list_runs says."""
        job = site.find_job(id)
        try:
            if job is None:
                raise UserError(f"There is no run {id!r}. list_runs tells which there are.")
            site.queue.stop(job.id)
            return _run(site, site.queue.job(job.id))
        except UserError as error:
            raise gr.Error(str(error)) from None

    def draw(base: str, prompt: str, seed: int, steps: int, width: int, height: int) -> dict:
        """Order a picture, which `drawing` tells about. base: id of the page Generate, such as models/my-base."""
        form = DrawingForm(prompt, "", steps, 7.0, "ddim", 1, 1, width, height, seed, "fixed")
        try:
            return _drawing(site, site.studio.desk.add("pictures", find_base(site.places, base).id, form.requests()))
        except UserError as error:
            raise gr.Error(str(error)) from None

    def drawing(number: int) -> dict:
        """What has become of an order: phase, share done, addresses of its pictures, message."""
        found = site.studio.desk.get(number)
        if found is None:
            raise gr.Error(f"There is no drawing {number}. It was long ago, or the web UI was started anew.")
        return _drawing(site, found)

    for function in (status, list_runs, queue_run, stop_run, draw, drawing):
        api(function, api_name=function.__name__, queue=False, concurrency_limit=None)


def _run(site: Site, job: Job) -> dict[str, object]:
    return {
        "id": site.run_id(job),
        "kind": job.kind,
        "name": job.name,
        "status": job.status,
        "position": job.position,
        "step": job.step,
        "steps": job.steps,
        "error": job.error.message if job.error else "",
    }


def _drawing(site: Site, drawing: Drawing) -> dict[str, object]:
    return {
        "number": drawing.id,
        "phase": drawing.phase,
        "share": round(drawing.share, 3),
        "pictures": [f"/picture/original/{site.places.id_of(path)}" if path else None for path in drawing.pictures],
        "message": drawing.message,
    }

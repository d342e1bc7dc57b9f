"""A job of the queue in words."""

from __future__ import annotations

from lora_diffusion.jobs.queue import Job
from webui.translate import Translator


def title(t: Translator, job: Job) -> str:
    """What a job is called where there are jobs of all kinds."""
    return job.name if job.kind == "train" else t("runs.captions", name=job.name)

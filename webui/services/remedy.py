"""What to change in a run that ran out of memory, in the order in which its message says it."""

from __future__ import annotations

from dataclasses import dataclass

from lora_diffusion.errors import UserError
from lora_diffusion.jobs.queue import Job, Queue
from webui.services.form_values import Fields, fields_from_toml, toml_from_fields


@dataclass(frozen=True)
class Remedy:
    """changes: key → before and after, as the form shows them. toml: a new run with them, under a free name."""

    changes: dict[str, tuple[str, str]]
    toml: str


def remedy_of(queue: Queue, job: Job) -> Remedy | None:
    """None if memory was not why the run failed, its config cannot be read, or there is nothing left to change."""
    if job.status != "failed" or job.error is None or not job.error.message.startswith("Out of memory"):
        return None
    try:
        fields, _ = fields_from_toml(queue.duplicate(job.id))
    except UserError:
        return None
    after = _with_less_memory(fields)
    changes = {key: (fields[key], value) for key, value in after.items() if value != fields[key]}
    return Remedy(changes, toml_from_fields(after)) if changes else None


def _with_less_memory(fields: Fields) -> Fields:
    """Checkpointing, which changes no result; then one picture at a time, as many of them per step as before."""
    if fields["model.gradient_checkpointing"] != "true":
        return fields | {"model.gradient_checkpointing": "true"}
    batch_size, accumulation = fields["run.batch_size"], fields["run.gradient_accumulation"]
    if not (batch_size.isdecimal() and accumulation.isdecimal()):
        return fields
    return fields | {"run.batch_size": "1", "run.gradient_accumulation": str(int(batch_size) * int(accumulation))}

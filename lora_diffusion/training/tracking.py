"""What a run tells: metrics.jsonl for programs, a progress line for people."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lora_diffusion.errors import RunError
from lora_diffusion.files import last_bytes
from lora_diffusion.training.batches import Batch

logger = logging.getLogger(__name__)

FILE_ONLY = "file_only"
"""Attribute of log records that the terminal leaves out."""

_PLAIN_LINE_EVERY_S = 10.0  # without a terminal a progress bar is noise; a line now and then is a log
_BAR_EVERY_S = 0.1  # a GPU makes a hundred steps in a second


class MetricsFile:
    """Appends one JSON object per line. Lines of an earlier start stay; `segment` tells the starts apart.

    JSON has no NaN and no infinity: null stands for them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.segment = 1 + max((int(line.get("segment", 0)) for line in read_metrics(path)), default=-1)

    def write(self, values: Mapping[str, float]) -> None:
        known = {key: value if math.isfinite(value) else None for key, value in values.items()}
        # A crash or a full disk may have cut the last line short: it costs only itself.
        start = "" if last_bytes(self.path, 1) in (b"", b"\n") else "\n"
        with self.path.open("a", encoding="utf-8") as file:
            file.write(start + json.dumps({"segment": self.segment, **known}, allow_nan=False) + "\n")


class Dispensable:
    """Inside is written what tells of a run, which can go on without: a full disk, said once, ends nothing."""

    def __init__(self) -> None:
        self._is_told = False

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> bool:
        if not isinstance(error, OSError):
            return False
        if not self._is_told:
            logger.warning(
                "What tells of the run cannot be written (%s). The training goes on; free some space.", error
            )
        self._is_told = True
        return True


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a metrics file; one that a crash or a full disk cut short is left out."""
    if not path.exists():
        return []
    lines: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            logger.warning("%s: one line was cut short by a crash or a full disk and is left out", path)
    return lines


def latest_per_step(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line per step, in order: after a resume the later start's line replaces the earlier one's."""
    by_step: dict[int, dict[str, Any]] = {}
    for line in metrics:
        by_step[line["step"]] = by_step.get(line["step"], {}) | line
    return [by_step[step] for step in sorted(by_step)]


def not_finite(
    value: float,
    what: str,
    step: int,
    lr: float,
    batches: Sequence[Batch],
    checkpoints: Path,
    unsaved: Exception | None = None,
) -> RunError:
    """The error of the step after `step`, whose weights are saved: on which pictures it came, and what to change.

    unsaved: why they are not.
    """
    pairs = [pair for batch in batches for pair in zip(batch.names, batch.captions, strict=True)]
    pictures = [f"{name} ({caption!r})" for name, caption in pairs]
    kept = f"The weights of step {step} are in {checkpoints}. " if step and unsaved is None else ""
    lost = ""
    if unsaved is not None:
        lost = f" The weights of step {step} cannot be saved: {str(unsaved) or type(unsaved).__name__}"
    return RunError(
        f"The {what} became {value} at step {step + 1} (learning rate {lr:.2e}) on {', '.join(pictures)}. "
        "Nothing of this step was saved. "
        f'{kept}Lower [optimizer] lr, use [run] precision = "bf16" or "fp32" instead of fp16, or look at these '
        f"pictures and captions.{lost}"
    )


def memory_in_use(device: torch.device) -> str:
    """Peak video memory on a GPU, resident memory of this process elsewhere."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GB VRAM"
    import psutil

    return f"{psutil.Process(os.getpid()).memory_info().rss / 2**30:.1f} GB"


@dataclass
class Console:
    """The progress line: a live bar on a terminal, a plain line every ten seconds in the log and elsewhere."""

    steps: int
    device: torch.device
    enabled: bool = True
    _bar: Any = field(default=None, init=False)
    _task: Any = field(default=None, init=False)
    _last_line: float = field(default=0.0, init=False)
    _last_bar: float = field(default=0.0, init=False)

    @contextmanager
    def open(self, step: int) -> Iterator[None]:
        if not (self.enabled and sys.stderr.isatty()):
            yield
            return
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
        with Progress(*columns, TimeRemainingColumn(), console=RichConsole(stderr=True)) as self._bar:
            self._task = self._bar.add_task("", total=self.steps, completed=step)
            yield
        self._bar = None

    def show(self, step: int, loss: float, learning_rate: float, seconds_per_step: float) -> None:
        now = time.monotonic()
        is_line_due = now - self._last_line > _PLAIN_LINE_EVERY_S or step == self.steps
        is_bar_due = now - self._last_bar > _BAR_EVERY_S or step == self.steps
        if not self.enabled or not (is_line_due or (is_bar_due and self._bar is not None)):
            return
        speed = f"{1 / seconds_per_step:.2f} it/s" if seconds_per_step < 1 else f"{seconds_per_step:.2f} s/it"
        text = f"loss {loss:.4f}  lr {learning_rate:.1e}  {speed}  {memory_in_use(self.device)}"
        if is_bar_due and self._bar is not None:
            self._last_bar = now
            self._bar.update(self._task, completed=step, description=text)
        if is_line_due:
            self._last_line = now
            minutes, seconds = divmod(round((self.steps - step) * seconds_per_step), 60)
            line = f"step {step}/{self.steps}  {text}  ETA {minutes}:{seconds:02d}"
            # Where a bar is shown the line goes to log.txt alone.
            logger.info("%s", line, extra={FILE_ONLY: self._bar is not None})

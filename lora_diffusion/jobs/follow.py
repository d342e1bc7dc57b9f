"""Reading a run's folder while it is written, for a page that shows it. No torch."""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_diffusion.jobs.release import adapters_by_step, released_step
from lora_diffusion.runs import RunFolder, RunState

MAX_POINTS = 300
LOG_TAIL_BYTES = 64_000

_PREVIEW = re.compile(r"(?P<now>now-)?(?P<step>\d{6,8})-(?P<index>\d+)\.png")
_ROW_START = b'{"segment"'


@dataclass(frozen=True)
class Series:
    """One measured value over the steps, thinned out for drawing."""

    steps: list[int]
    values: list[float]
    smoothed: list[float]


@dataclass(frozen=True)
class Previews:
    """The pictures as a matrix: a row per prompt, a column per step.

    pictures: (index of the prompt, step) → file; not every place need have one. asked: those drawn on request.
    """

    prompts: list[str]
    steps: list[int]
    pictures: dict[tuple[int, int], Path]
    asked: list[Path]


@dataclass(frozen=True)
class AdapterEntry:
    """An adapter file of the run. step: None for the result. is_released: it was chosen as the result."""

    path: Path
    step: int | None
    size: int
    is_released: bool


@dataclass
class RunFollower:
    """Follows one run. Metrics and log are read from where the last call ended; the rest is looked up.

    Every method can be called at any time: a folder that is not there, half a line, and a folder that starts anew are
    all ordinary.
    """

    run: RunFolder
    _rows: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]], init=False)
    _metrics: _Tail = field(default_factory=lambda: _Tail(), init=False)
    _log: _Tail = field(default_factory=lambda: _Tail(), init=False)

    @property
    def state(self) -> RunState | None:
        """Raises RunFolderError if it is damaged."""
        return self.run.read_state()

    def metrics(self) -> list[dict[str, Any]]:
        """All rows of metrics.jsonl in order of steps, one per step: those that a resume repeats are left out."""
        started_anew, new = self._metrics.read(self.run.metrics)
        if started_anew:
            self._rows.clear()
        for line in new.splitlines():
            row = _row(line)
            if row is None:
                continue
            if self._rows and row["segment"] != self._rows[-1]["segment"]:
                while self._rows and self._rows[-1]["step"] >= row["step"]:
                    self._rows.pop()
            self._rows.append(row)
        return self._rows

    def series(self, key: str = "loss", *, smoothing: float = 0.9, points: int = MAX_POINTS) -> Series:
        """A value of the metrics, such as "loss", "lr" or "val_loss"; rows without it are left out.

        smoothing: share of the old in the running mean, from 0 to below 1. At most `points` are kept, among them the
        first, the last, and the extremes between.
        """
        pairs = [(row["step"], row[key]) for row in self.metrics() if _is_number(row.get(key))]
        smoothed = smooth([value for _, value in pairs], smoothing)
        kept = thin_out([value for _, value in pairs], points)
        return Series([pairs[i][0] for i in kept], [pairs[i][1] for i in kept], [smoothed[i] for i in kept])

    def new_log(self) -> tuple[bool, str]:
        """(whether log.txt is another one than before, the whole lines that it got since the last call).

        At first its last 64 kB.
        """
        started_anew, new = self._log.read(self.run.log, at_most=LOG_TAIL_BYTES)
        return started_anew, new.decode("utf-8", "replace")

    def previews(self) -> Previews:
        pictures: dict[tuple[int, int], Path] = {}
        asked: list[tuple[int, int, Path]] = []
        for path in self.run.previews.glob("*.png"):
            match = _PREVIEW.fullmatch(path.name)
            if match and match["now"]:
                asked.append((int(match["step"]), int(match["index"]), path))
            elif match:
                pictures[int(match["index"]), int(match["step"])] = path
        prompts = self._prompts()
        missing = max((index for index, _ in pictures), default=-1) + 1 - len(prompts)
        return Previews(
            prompts + [""] * missing,
            sorted({step for _, step in pictures}),
            pictures,
            [path for *_, path in sorted(asked)],
        )

    def checkpoints(self) -> list[int]:
        """Steps that the run can be continued from."""
        folder = self.run.checkpoints
        return (
            sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal()) if folder.is_dir() else []
        )

    def adapters(self) -> list[AdapterEntry]:
        """Adapter files in order of steps, the result last."""
        by_step = adapters_by_step(self.run)
        released = released_step(self.run)
        results = sorted(set(self.run.path.glob("*.safetensors")) - set(by_step.values()))
        entries = [(path, step, step == released) for step, path in by_step.items()]
        entries += [(path, None, False) for path in results]
        return [
            AdapterEntry(path, step, size, is_released) for path, step, is_released in entries if (size := _size(path))
        ]

    def _prompts(self) -> list[str]:
        try:
            config = tomllib.loads(self.run.config.read_text(encoding="utf-8"))
            return [str(prompt) for prompt in config.get("preview", {}).get("prompts", [])]
        except (OSError, ValueError, AttributeError, TypeError):
            return []  # no run yet, or a config of another version


def smooth(values: Sequence[float], share: float) -> list[float]:
    """Exponential running mean that starts at the first value (divided by the weights seen so far)."""
    mean, weight = 0.0, 0.0
    means: list[float] = []
    for value in values:
        mean = share * mean + (1 - share) * value
        weight = share * weight + (1 - share)
        means.append(mean / weight)
    return means


def thin_out(values: Sequence[float], points: int) -> list[int]:
    """Indices of at most `points` values: first, last, and the least and greatest of equal parts between."""
    if len(values) <= points:
        return list(range(len(values)))
    inner = len(values) - 2
    parts = (points - 2) // 2
    kept = {0, len(values) - 1}
    for part in range(parts):
        indices = range(1 + part * inner // parts, 1 + (part + 1) * inner // parts)
        kept |= {min(indices, key=values.__getitem__), max(indices, key=values.__getitem__)}
    return sorted(kept)


@dataclass
class _Tail:
    """Whole lines of a growing file since the last call."""

    offset: int = 0
    inode: int = 0

    def read(self, path: Path, at_most: int | None = None) -> tuple[bool, bytes]:
        """(whether the file is another one than before or shorter, the new whole lines).

        at_most: skip older lines where there are more bytes than that. A last line without an end is left for later.
        """
        try:
            with path.open("rb") as file:
                stat = path.stat()
                is_anew = stat.st_ino != self.inode or stat.st_size < self.offset
                if is_anew:
                    self.offset, self.inode = 0, stat.st_ino
                skipped = at_most is not None and stat.st_size - self.offset > at_most
                if at_most is not None and skipped:
                    self.offset = stat.st_size - at_most
                file.seek(self.offset)
                data = file.read()
        except OSError:
            is_gone = self.inode != 0
            self.offset = self.inode = 0
            return is_gone, b""
        end = data.rfind(b"\n") + 1
        self.offset += end
        lines = data[:end]
        return is_anew, lines[lines.find(b"\n") + 1 :] if skipped else lines


def _row(line: bytes) -> dict[str, Any] | None:
    """A row of metrics.jsonl, also where a crash left half a row before it in the same line."""
    for text in (line, line[max(0, line.rfind(_ROW_START)) :]):
        try:
            row = json.loads(text)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int) and isinstance(row.get("segment"), int):
            return row
    return None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0

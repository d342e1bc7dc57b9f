"""What was done to caption files, so that it can be undone: after a restart too, and several times over."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_diffusion.errors import UserError
from lora_diffusion.files import write_json_atomically

MAX_LEVELS = 200
MERGED_WITHIN_S = 120.0
"""Edits of one caption that follow each other this closely are undone as one."""

DONE, UNDONE = ".done.json", ".undone.json"


class JournalError(UserError):
    """There is nothing to undo, or it cannot be undone."""


@dataclass(frozen=True)
class FileChange:
    """The whole content of a file before and after. None: it is not there."""

    file: str
    before: bytes | None
    after: bytes | None


@dataclass(frozen=True)
class Step:
    """Changes that are undone together. what: for people. number: counts up."""

    number: int
    what: str
    time: float
    changes: tuple[FileChange, ...]


@dataclass(frozen=True)
class Journal:
    """The steps of one data set, one file each in `folder`. The newest undone one is done again first.

    A step is written down before its files are, so that whatever interrupts the writing can be undone as well.
    """

    folder: Path

    def add(self, what: str, changes: Iterable[FileChange], *, merges: bool = False) -> Step:
        """Write a step down; what was undone before is gone. merges: into the last step if it is of the same file."""
        changes = tuple(changes)
        for path in self._paths(UNDONE):
            path.unlink(missing_ok=True)
        done = self._paths(DONE)
        last = self._read(done[-1]) if done else None
        now = time.time()
        if merges and last and _continues(last, what, changes, now):
            step = Step(
                last.number, what, now, (FileChange(changes[0].file, last.changes[0].before, changes[0].after),)
            )
        else:
            step = Step(last.number + 1 if last else 1, what, now, changes)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json_atomically(self.folder / f"{step.number:08d}{DONE}", _to_json(step))
        for path in done[: max(0, len(done) + 1 - MAX_LEVELS)]:
            path.unlink(missing_ok=True)
        return step

    def last_done(self) -> Step | None:
        """What `undo` would undo."""
        return self._read(paths[-1]) if (paths := self._paths(DONE)) else None

    def last_undone(self) -> Step | None:
        """What `redo` would do."""
        return self._read(paths[0]) if (paths := self._paths(UNDONE)) else None

    def num_levels(self) -> tuple[int, int]:
        """How many steps can be undone, and done again."""
        return len(self._paths(DONE)), len(self._paths(UNDONE))

    def undo(self, put: Callable[[FileChange], bool]) -> tuple[Step, list[str]]:
        """Give `put` the changes backwards; (the step, files for which it returned False). Raises JournalError."""
        return self._turn(DONE, UNDONE, put)

    def redo(self, put: Callable[[FileChange], bool]) -> tuple[Step, list[str]]:
        """Like `undo`, forwards."""
        return self._turn(UNDONE, DONE, put)

    def _turn(self, now: str, then: str, put: Callable[[FileChange], bool]) -> tuple[Step, list[str]]:
        step = self.last_done() if now == DONE else self.last_undone()
        if step is None:
            raise JournalError("There is nothing to undo." if now == DONE else "There is nothing to do again.")
        forwards = now == UNDONE
        changes = [c if forwards else FileChange(c.file, c.after, c.before) for c in step.changes]
        left = [change.file for change in changes if not put(change)]
        path = self.folder / f"{step.number:08d}{now}"
        path.replace(self.folder / f"{step.number:08d}{then}")
        return step, left

    def _paths(self, ending: str) -> list[Path]:
        return sorted(self.folder.glob(f"*{ending}")) if self.folder.is_dir() else []

    def _read(self, path: Path) -> Step | None:
        try:
            return _from_json(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError):
            path.unlink(missing_ok=True)  # private to us, and of no use damaged
            return None


def _continues(last: Step, what: str, changes: tuple[FileChange, ...], now: float) -> bool:
    return (
        len(changes) == len(last.changes) == 1
        and last.what == what
        and last.changes[0].file == changes[0].file
        and last.changes[0].after == changes[0].before
        and now - last.time < MERGED_WITHIN_S
    )


def _to_json(step: Step) -> dict[str, Any]:
    changes = [{"file": c.file, "before": _encode(c.before), "after": _encode(c.after)} for c in step.changes]
    return {"number": step.number, "what": step.what, "time": step.time, "changes": changes}


def _from_json(value: Mapping[str, Any]) -> Step:
    changes = tuple(FileChange(c["file"], _decode(c["before"]), _decode(c["after"])) for c in value["changes"])
    return Step(int(value["number"]), str(value["what"]), float(value["time"]), changes)


def _encode(data: bytes | None) -> str | None:
    return None if data is None else base64.b64encode(data).decode("ascii")


def _decode(text: str | None) -> bytes | None:
    return None if text is None else base64.b64decode(text)

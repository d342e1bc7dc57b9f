"""Everything that is drawn: in line, one after the other, on disk before it is shown. A closed page loses nothing."""

from __future__ import annotations

import itertools
import logging
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol

from PIL import Image

from lora_diffusion.errors import UserError
from lora_diffusion.files import write_bytes_atomically
from lora_diffusion.generation.infotext import save_png
from lora_diffusion.generation.request import Request
from lora_diffusion.generation.sheet import Sheet
from lora_diffusion.workspace import Workspace

logger = logging.getLogger(__name__)

Phase = Literal["waiting", "starting", "in line", "drawing", "done", "failed", "cancelled"]
Kind = Literal["pictures", "comparison", "sheet", "trial"]
UNFINISHED: tuple[Phase, ...] = ("waiting", "starting", "in line", "drawing")
KEPT = 200
MAX_PICTURES = 64
MAX_WAITING = 64
"""Drawings that are not finished. Beyond that people are told to wait, in place of a line that grows without end."""
KEPT_SHEETS = 40
"""So many sheets and merge previews keep their single pictures in pictures/cells/. The sheets themselves all stay."""
_OF_A_SHEET = re.compile(r"\d{8}-\d{6}-\d+")


class NoLongerWanted(Exception):
    """The drawing was cancelled."""


@dataclass(frozen=True)
class Progress:
    """What the engine says of one request. position: 1 is next. preview: a small PNG of the unfinished picture.

    warnings: what is odd about its adapters.
    """

    phase: Phase
    position: int = 0
    step: int = 0
    steps: int = 0
    preview: bytes = b""
    note: str = ""
    warnings: tuple[str, ...] = ()


Report = Callable[[Progress], None]
Stopped = Callable[[], bool]


class Draws(Protocol):
    """What draws: the engine's client, or a stub in tests."""

    def draw(self, base: str, requests: Sequence[Request], report: Report, stopped: Stopped) -> Iterator[bytes]:
        """PNG files with their settings, in the order of the requests.

        Raises UserError for what cannot be drawn, and NoLongerWanted soon after `stopped` says so.
        """
        ...


@dataclass(frozen=True)
class Drawing:
    """Something that was asked for, as it is now. pictures: by request, None where there is none yet.

    tab: what the browser calls the tab that ordered it; empty for a program.
    """

    id: int
    kind: Kind
    base: str
    requests: tuple[Request, ...]
    phase: Phase = "waiting"
    progress: Progress = Progress("waiting")
    pictures: tuple[Path | None, ...] = ()
    message: str = ""
    warnings: tuple[str, ...] = ()
    sheet: Sheet | None = None
    sheet_file: Path | None = None
    tab: str = ""
    asked: float = field(default_factory=time.time)
    ended: float | None = None

    @property
    def num_done(self) -> int:
        return sum(picture is not None for picture in self.pictures)

    @property
    def is_unfinished(self) -> bool:
        return self.phase in UNFINISHED

    @property
    def share(self) -> float:
        """How much is done, from 0 to 1."""
        step = self.progress.step / self.progress.steps if self.progress.steps else 0.0
        return min((self.num_done + step) / max(len(self.requests), 1), 1.0)

    def pair(self) -> tuple[Image.Image, Image.Image] | None:
        """Both pictures of a comparison or a trial as RGB; None while one is not there, or is no longer."""
        first, second = self.pictures
        if first is None or second is None or not (first.is_file() and second.is_file()):
            return None
        return _open_rgb(first), _open_rgb(second)


@dataclass
class Desk:
    """Takes orders and works through them in a thread of its own."""

    workspace: Workspace
    engine: Draws
    when_idle: Callable[[], None] = lambda: None
    seconds_per_picture: float | None = None
    """Of the last drawing that was finished."""
    _drawings: dict[int, Drawing] = field(default_factory=dict[int, Drawing])
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    _lock: threading.Condition = field(default_factory=threading.Condition)
    _stopped: set[int] = field(default_factory=set[int])
    _thread: threading.Thread | None = None

    def add(
        self, kind: Kind, base: str, requests: Sequence[Request], sheet: Sheet | None = None, *, tab: str = ""
    ) -> Drawing:
        """Put it in line. Raises UserError if it is too much, or the line is full."""
        limit = 400 if kind == "sheet" else MAX_PICTURES
        if not 1 <= len(requests) <= limit:
            raise UserError(f"{len(requests)} pictures at once; at most {limit} are drawn.")
        with self._lock:
            if sum(other.is_unfinished for other in self._drawings.values()) >= MAX_WAITING:
                raise UserError(f"Busy: {MAX_WAITING} drawings are in line already. Try again when some are done.")
            id = next(self._numbers)
            nothing = (None,) * len(requests)
            drawing = Drawing(id, kind, base, tuple(requests), pictures=nothing, sheet=sheet, tab=tab)
            self._drawings[id] = drawing
            for old in [d.id for d in self._drawings.values() if not d.is_unfinished][:-KEPT]:
                del self._drawings[old]
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._work, daemon=True, name="drawings")
                self._thread.start()
            self._lock.notify_all()
            return drawing

    def drawings(self) -> list[Drawing]:
        """The latest first."""
        with self._lock:
            return list(reversed(self._drawings.values()))

    def get(self, id: int) -> Drawing | None:
        with self._lock:
            return self._drawings.get(id)

    def unfinished(self) -> list[Drawing]:
        """In the order in which they are drawn."""
        return [drawing for drawing in reversed(self.drawings()) if drawing.is_unfinished]

    def adapters(self) -> frozenset[str]:
        """What the unfinished drawings call."""
        return frozenset(
            name for drawing in self.unfinished() for request in drawing.requests for name in request.adapters
        )

    def latest(self, *kinds: Kind) -> Drawing | None:
        return next((drawing for drawing in self.drawings() if drawing.kind in kinds), None)

    def cancel(self, id: int | None = None) -> None:
        """One drawing, or all that are not finished. What is drawn already stays."""
        with self._lock:
            for drawing in list(self._drawings.values()):
                if drawing.is_unfinished and id in (None, drawing.id):
                    if drawing.phase == "waiting":
                        self._change(drawing.id, phase="cancelled", ended=time.time())
                    else:
                        self._stopped.add(drawing.id)

    def _work(self) -> None:
        while True:
            with self._lock:
                waiting = [drawing for drawing in self._drawings.values() if drawing.phase == "waiting"]
                if not waiting:
                    self._thread = None
                    break
                drawing = waiting[0]
                self._change(drawing.id, phase="starting")
            self._draw(drawing)
        self.when_idle()

    def _draw(self, drawing: Drawing) -> None:
        folder = self._folder(drawing)
        pictures = list(drawing.pictures)
        began = time.monotonic()
        try:
            drawn = self.engine.draw(
                drawing.base,
                drawing.requests,
                lambda progress: self._report(drawing.id, progress),
                lambda: drawing.id in self._stopped,
            )
            for index, data in enumerate(drawn):
                if index == 0:
                    began = time.monotonic() if len(pictures) > 1 else began
                path = _free_file(folder, drawing.requests[index].seed)
                write_bytes_atomically(path, data)
                pictures[index] = path
                self._change(drawing.id, pictures=tuple(pictures), progress=Progress("drawing"))
            self.seconds_per_picture = (time.monotonic() - began) / max(len(pictures) - 1, 1)
            self._change(drawing.id, phase="done", sheet_file=self._write_sheet(drawing, pictures, folder))
        except NoLongerWanted:
            self._change(drawing.id, phase="cancelled")
        except UserError as error:
            self._change(drawing.id, phase="failed", message=str(error))
        except Exception as error:
            logger.exception("drawing failed")
            self._change(drawing.id, phase="failed", message=f"{type(error).__name__}: {error}")
        with self._lock:
            self._stopped.discard(drawing.id)
            self._change(drawing.id, ended=time.time())

    def _folder(self, drawing: Drawing) -> Path:
        folder = self.workspace.pictures
        if drawing.kind in ("sheet", "trial"):  # cells stay out of the gallery
            self._forget_old_cells(folder / "cells")
            folder = folder / "cells" / f"{time.strftime('%Y%m%d-%H%M%S')}-{drawing.id}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _forget_old_cells(self, folder: Path) -> None:
        """Make room for one more sheet: `KEPT_SHEETS` stay. Folders of other names are not ours."""
        ours = sorted(path for path in folder.glob("*") if _OF_A_SHEET.fullmatch(path.name) and not path.is_symlink())
        for old in ours[: len(ours) - KEPT_SHEETS + 1]:
            shutil.rmtree(old, ignore_errors=True)

    def _write_sheet(self, drawing: Drawing, pictures: Sequence[Path | None], folder: Path) -> Path | None:
        if drawing.sheet is None:
            return None
        images = [_open_rgb(picture) if picture else None for picture in pictures]
        path = _free_file(self.workspace.pictures, drawing.requests[0].seed, "grid-")
        save_png(drawing.sheet.picture(images), path, drawing.sheet.parameters(Path(drawing.base).name, {}))
        return path

    def _report(self, id: int, progress: Progress) -> None:
        with self._lock:
            warnings = self._drawings[id].warnings if id in self._drawings else ()
            warnings = tuple(dict.fromkeys([*warnings, *progress.warnings]))
            self._change(id, progress=progress, phase=progress.phase, warnings=warnings)

    def _change(self, id: int, **values: object) -> None:
        with self._lock:
            if id in self._drawings:
                self._drawings[id] = replace(self._drawings[id], **values)  # pyright: ignore[reportArgumentType]


def _open_rgb(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _free_file(folder: Path, seed: int, prefix: str = "") -> Path:
    """A new name that sorts by time: 20261124-161230-00-7.png."""
    now = time.strftime("%Y%m%d-%H%M%S")
    for number in range(10_000):
        path = folder / f"{now}-{number:02d}-{prefix}{seed}.png"
        if not path.exists():
            return path
    raise UserError(f"{folder}: too many pictures within a second.")

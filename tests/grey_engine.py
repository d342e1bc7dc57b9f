"""The web UI's pages without torch, for tests: a workspace whose engine draws grey squares."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from PIL import Image

from lora_diffusion.generation.infotext import png_bytes, write_parameters
from lora_diffusion.generation.request import Request
from lora_diffusion.jobs.queue import Queue
from lora_diffusion.workspace import Workspace
from webui.services.drawings import Desk, NoLongerWanted, Progress, Report, Stopped
from webui.services.site import Site, make_site

VALUES = ["a red house", "", 20, 5.0, "ddim", 1, 1, 64, 64, 7, "fixed"]
"""Of the fields of the page Generate."""


class GreyEngine:
    """Draws at once while `gate` is open."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.warnings: tuple[str, ...] = ()

    def draw(self, base: str, requests: Sequence[Request], report: Report, stopped: Stopped) -> Iterator[bytes]:
        for request in requests:
            report(Progress("drawing", 0, 1, 2, warnings=self.warnings))
            while not self.gate.wait(0.01):
                if stopped():
                    raise NoLongerWanted
            yield png_bytes(Image.new("RGB", (64, 64)), write_parameters(request, base, {}))


def make_grey_site(root: Path, engine: GreyEngine) -> Site:
    """A workspace with a base, models/b."""
    base = root / "models" / "b"
    base.mkdir(parents=True)
    (base / "model_index.json").write_text("{}")
    site = make_site(root, queue=Queue(Workspace(root), start_runner=lambda _: None))
    site.studio.desk = Desk(site.workspace, engine)
    return site


def clicked(**data: Any) -> Any:
    """What Gradio tells of a click."""
    return SimpleNamespace(_data=data)

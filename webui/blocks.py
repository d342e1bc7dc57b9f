"""Gradio's app, with the check of files that it leaves out where it is mounted and not launched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder


class Pages(gr.Blocks):
    """Takes no file from a browser but those that were uploaded: no path of this machine, no address to fetch."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.has_launched = True  # or Gradio trusts every path; a mounted app is never launched

    async def preprocess_data(
        self, block_fn: Any, inputs: list[Any], state: Any, explicit_call: bool = False
    ) -> list[Any]:
        """As Gradio's; every event goes through it. Raises gr.Error for a file that was not uploaded."""
        for path in _named_files(inputs):
            if not _is_uploaded(path):
                raise gr.Error("Only files that were uploaded here are taken.")
        return await super().preprocess_data(block_fn, inputs, state, explicit_call)


def _named_files(value: object) -> Iterator[object]:
    """What a value from a browser says are paths of files, wherever in it Gradio would look."""
    if isinstance(value, dict):
        if "path" in value and "meta" in value:
            yield value["path"]
        for inner in value.values():
            yield from _named_files(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _named_files(inner)


def _is_uploaded(path: object) -> bool:
    """SVG is none: Gradio would show it as a page of ours, with the scripts in it."""
    try:
        real = Path(str(path)).resolve()
        return real.is_relative_to(Path(get_upload_folder()).resolve()) and real.suffix.lower() != ".svg"
    except (OSError, ValueError, RuntimeError):
        return False

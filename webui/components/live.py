"""Parts of a page that follow the disk: drawn when the page opens, and again only when they have changed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import gradio as gr
from gradio.components import Component
from markupsafe import Markup

EVERY_S = 2.0


def live(
    demo: gr.Blocks,
    render: Callable[..., Sequence[Markup]],
    outputs: Sequence[gr.HTML],
    inputs: Sequence[Component] = (),
    every_s: float = EVERY_S,
) -> None:
    """Fill `outputs` with what `render(request, *inputs)` returns, now and every few seconds.

    A part that is as it was is left alone, so that nothing flickers and no selection is lost.
    """
    shown = gr.State([""] * len(outputs))

    def refresh(digests: list[str], request: gr.Request, *values: object) -> list[object]:
        parts = [str(part) for part in render(request, *values)]
        now = [hashlib.sha256(part.encode()).hexdigest() for part in parts]
        changes = [part if new != old else gr.skip() for part, new, old in zip(parts, now, digests, strict=True)]
        return [now if now != digests else gr.skip(), *changes]

    timer = gr.Timer(every_s)
    gr.on(
        [demo.load, timer.tick, *(change for item in inputs if (change := getattr(item, "change", None)))],
        refresh,
        [shown, *inputs],
        [shown, *outputs],
        queue=False,
        show_progress="hidden",
        api_visibility="private",
    )

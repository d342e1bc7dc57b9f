"""The adapters of a text as sliders, on the pages Generate and Adapters: the text is the truth."""

from __future__ import annotations

from collections.abc import Callable

import gradio as gr

from webui.pages.events import QUICK
from webui.services.prompt_tags import set_strength, toggle_words, without


def connect_stack(text: gr.Textbox, stack: gr.HTML, show: Callable[[str], str]) -> None:
    """Let the sliders and buttons in `stack` edit the tags in `text`, and draw `stack` anew when `text` changes.

    show: the text as the HTML of the stack, by `render_stack`.
    """
    slid = gr.State("")

    def follow(now: str, by_slider: str) -> object:
        """A slider's own change must not replace the slider that is being moved."""
        return gr.skip() if now == by_slider else show(now)

    def slide(now: str, event: gr.EventData) -> tuple[str, str]:
        name, strength = event._data.get("name"), event._data.get("strength")
        if isinstance(name, str) and isinstance(strength, int | float) and not isinstance(strength, bool):
            now = set_strength(now, name, float(strength))
        return now, now

    def act(now: str, event: gr.EventData) -> tuple[str, str]:
        match event._data.get("act"):
            case "remove":
                now = without(now, str(event._data.get("name")))
            case "words":
                now = toggle_words(now, str(event._data.get("words")))
        return now, show(now)

    text.change(follow, [text, slid], stack, trigger_mode="always_last", **QUICK)
    stack.input(slide, text, [text, slid], trigger_mode="always_last", **QUICK)
    stack.select(act, text, [text, stack], **QUICK)

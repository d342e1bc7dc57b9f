"""The prompt with its stack of adapters, and the size that suits the base."""

from __future__ import annotations

import gradio as gr

from lora_diffusion.errors import UserError
from webui.components.studio import render_stack
from webui.pages.events import QUICK
from webui.pages.generate.layout import Controls, size_choices
from webui.pages.stack import connect_stack
from webui.services.bases import find_base
from webui.services.prompt_tags import set_strength, stack_of
from webui.services.site import Site
from webui.translate import Translator


def connect(site: Site, t: Translator, controls: Controls) -> None:
    """Events of the prompt, the stack, the base and the size."""
    fields = controls.fields

    def add_adapter(text: str, name: str | None) -> tuple[object, ...]:
        if not name:
            return gr.skip(), gr.skip(), gr.skip()
        if all(item.name != name for item in stack_of(text)):
            text = set_strength(text, name, 1.0)
        return text, show_stack(site, t, text), ""

    def choose_base(id: str) -> tuple[object, ...]:
        try:
            chosen = find_base(site.places, id)
        except UserError:
            return gr.skip(), gr.skip(), gr.skip()
        width, height = chosen.sizes[0]
        return gr.Dropdown(choices=size_choices(t, chosen), value=f"{width}x{height}"), width, height

    def choose_size(text: str) -> tuple[object, object]:
        width, _, height = text.partition("x")
        return (int(width), int(height)) if width.isdecimal() and height.isdecimal() else (gr.skip(), gr.skip())

    connect_stack(fields.prompt, controls.stack, lambda text: show_stack(site, t, text))
    controls.add.input(
        add_adapter, [fields.prompt, controls.add], [fields.prompt, controls.stack, controls.add], **QUICK
    )
    sides = [fields.width, fields.height]
    controls.base.input(choose_base, controls.base, [controls.size, *sides], **QUICK)
    controls.size.input(choose_size, controls.size, sides, **QUICK)
    gr.on([side.input for side in (fields.width, fields.height)], lambda: "", None, controls.size, **QUICK)


def show_stack(site: Site, t: Translator, prompt: str) -> str:
    """The adapters of the prompt as sliders."""
    known = {adapter.name: adapter for adapter in site.studio.library.adapters()}
    return str(render_stack(t, stack_of(prompt), known, prompt=prompt))

"""Fields that the browser keeps: a reload of the page, or the other language, loses nothing of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr
from gradio.components import Component

from webui.pages.events import LOADED, QUICK


def keep_fields(
    demo: gr.Blocks,
    keeper: str,
    fields: Sequence[Component],
    open_page: Callable[..., list[object]],
    inputs: Sequence[Component],
    outputs: Sequence[Component],
) -> None:
    """Fill the page by `open_page` when it is opened, and keep the values of `fields` from then on.

    keeper: its name in static/app.js. inputs: the first one gets what was kept, for `services.kept.kept_values`.
    """
    known = f"window.loraDiffusion.{keeper}"
    recall = f"""async (_, ...values) => {{
        {LOADED}
        return [{known}.kept(), ...values];
    }}"""
    demo.load(open_page, [*inputs], [*outputs], js=recall, **QUICK).then(
        None, [*fields], None, js=f"(...values) => {known}.opened(...values)", api_visibility="private"
    )
    changes: list[Any] = [field.change for field in fields]  # pyright: ignore[reportAttributeAccessIssue]
    keep = f"(...values) => window.loraDiffusion?.{keeper}.keep(...values) ?? []"
    gr.on(changes, None, [*fields], None, js=keep, api_visibility="private")

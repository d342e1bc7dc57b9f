"""Generate: pictures from a base and any number of adapters, one by one, with and without, and as grids."""

from __future__ import annotations

import gradio as gr

from webui.pages.generate import opening, ordering, prompt, results
from webui.pages.generate.layout import make_controls, make_results
from webui.services.bases import bases
from webui.services.site import Site
from webui.translate import Translator


def build(site: Site, t: Translator, demo: gr.Blocks) -> None:
    """Layout and events."""
    with gr.Row(elem_classes=["generate", "studio"], equal_height=False):
        with gr.Column(scale=4, min_width=320, elem_classes="controls"):
            controls = make_controls(t, bases(site.places))
        with gr.Column(scale=6, min_width=320, elem_classes="results"):
            shown = make_results(t)
    prompt.connect(site, t, controls)
    ordering.connect(site, t, demo, controls, shown)
    results.connect(site, t, demo, controls, shown)
    opening.connect(site, t, demo, controls, shown)

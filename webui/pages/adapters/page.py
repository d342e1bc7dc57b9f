"""Adapters: the library, what is in a file, and the tools that make new files of it."""

from __future__ import annotations

import gradio as gr

from webui.pages.adapters import change, library, mix, opening
from webui.pages.adapters.layout import make_inspector, make_listing, make_title
from webui.services.bases import bases
from webui.services.site import Site
from webui.translate import Translator


def build(site: Site, t: Translator, demo: gr.Blocks) -> None:
    """Layout and events."""
    make_title(t)
    with gr.Row(elem_classes=["adapter-page", "studio"], equal_height=False):
        with gr.Column(scale=6, min_width=320):
            listing = make_listing(t)
        with gr.Column(scale=5, min_width=320, elem_classes="rail"):
            inspector = make_inspector(t, bases(site.places))
    redraw = library.connect(site, t, demo, listing, inspector)
    change.connect(site, t, listing, inspector, redraw)
    mix.connect(site, t, demo, inspector, redraw)
    opening.connect(site, t, demo, listing, inspector)

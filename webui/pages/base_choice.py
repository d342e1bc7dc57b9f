"""The list of bases, on the pages Generate and Adapters: those that there are when the page is opened."""

from __future__ import annotations

import gradio as gr

from webui.pages.events import QUICK
from webui.services.bases import bases
from webui.services.site import Site


def follow_bases(site: Site, demo: gr.Blocks, base: gr.Dropdown) -> None:
    """Bases come while the server runs: baked ones, and what is put into models/."""

    def offer(chosen: str | None) -> gr.Dropdown:
        known = bases(site.places)
        ids = [it.id for it in known]
        value = chosen if chosen in ids else next(iter(ids), None)
        return gr.Dropdown(choices=[(it.name, it.id) for it in known], value=value)

    demo.load(offer, base, base, **QUICK)

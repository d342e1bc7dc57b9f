"""The list of bases, on the pages Generate and Adapters: those that there are when the page is opened."""

from __future__ import annotations

import gradio as gr

from webui.services.bases import Base, bases
from webui.services.site import Site


def offer_bases(site: Site, *wanted: str | None) -> tuple[gr.Dropdown, Base | None]:
    """The list with the first of `wanted` that there is chosen, or else the first of all; and what is chosen.

    Bases come while the server runs: baked ones, and what is put into models/.
    """
    known = {it.id: it for it in bases(site.places)}
    value = next((id for id in wanted if id in known), next(iter(known), None))
    return gr.Dropdown(choices=[(it.name, it.id) for it in known.values()], value=value), known.get(value or "")

"""The cards and their filters; the one that is chosen, looked into."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from lora_diffusion.errors import UserError
from webui.components.html import html, said
from webui.components.library import SHOWN, render_cards, render_head, render_inspection
from webui.pages.adapters.layout import NEW_NAME, Inspector, Listing
from webui.pages.events import QUICK, TOOLS
from webui.services.adapter_edit import NUM_TEXTS, is_about, note_of, texts_of
from webui.services.library import matching, tags_in
from webui.services.prompt_tags import set_strength, stack_of
from webui.services.site import Site
from webui.services.thumbnails import picture_of
from webui.translate import Translator


def connect(site: Site, t: Translator, demo: gr.Blocks, listing: Listing, inspector: Inspector) -> dict[str, Any]:
    """Events of filters and cards. Returns the event that draws the cards anew, for `.then(**redraw)`."""
    handlers = Library(site, t)
    chosen, mix, describe, change = listing.chosen, inspector.mix, inspector.describe, inspector.change
    redraw: dict[str, Any] = {"fn": handlers.cards, "inputs": [*listing.filters(), chosen], "outputs": listing.cards}
    redraw |= QUICK
    changes = [item.change for item in (listing.search, listing.family, listing.kind, listing.source, listing.tag)]
    gr.on([demo.load, *changes], trigger_mode="always_last", **redraw)
    listing.cards.select(handlers.act, [chosen, mix.text], [chosen, mix.text, inspector.tabs], **QUICK)
    parts = [inspector.head, inspector.inspection, *describe.texts(), describe.filled, change.name]
    chosen.change(handlers.chosen, [chosen, describe.filled], parts, **QUICK).then(**redraw).then(
        handlers.inspection, chosen, inspector.inspection, **TOOLS
    )
    demo.load(handlers.tags, None, listing.tag, **QUICK)
    return redraw


@dataclass(frozen=True)
class Library:
    """Handlers."""

    site: Site
    t: Translator

    def cards(self, *values: str | None) -> str:
        """Those that fit the filters. values: of `Listing.filters`, and the id of the chosen one."""
        *filters, id = (value or "" for value in values)
        adapters = self.site.studio.library.adapters()
        found = matching(adapters, *filters)
        pictured = {it.id for it in found[:SHOWN] if it.facts.has_thumbnail or picture_of(self.site, it)}
        return str(render_cards(self.t, found, len(adapters), id, pictured))

    def tags(self) -> gr.Dropdown:
        """What the filter offers: the tags that there are."""
        tags = tags_in(self.site.studio.library.adapters())
        return gr.Dropdown(choices=[(self.t("adapters.tag"), ""), *((tag, tag) for tag in tags)])

    def act(self, id: str, mixed: str, event: gr.EventData) -> tuple[object, ...]:
        """A card was clicked: chosen, or put into the mix."""
        if event._data.get("act") == "mix":
            name = str(event._data.get("name"))
            if self.site.studio.library.named(name) and all(item.name != name for item in stack_of(mixed)):
                mixed = set_strength(mixed, name, 1.0)
            return id, mixed, gr.Tabs(selected="mix")
        return str(event._data.get("id", "")), mixed, gr.Tabs(selected="look")

    def chosen(self, id: str, filled: str) -> tuple[object, ...]:
        """Head, a word that it is being measured, the texts and what they are, a name for what is made of it.

        filled: what the texts were filled with. Those of this adapter stay, as a person may have changed them.
        """
        adapter = self.site.studio.library.find(id)
        if adapter is None:
            return str(render_head(self.t, None)), "", *[""] * NUM_TEXTS, "", ""
        measuring = html('<p class="busy">{text}</p>', text=self.t("adapters.measuring"))
        head = str(render_head(self.t, adapter))
        if is_about(filled, id):
            return head, str(measuring), *[gr.skip()] * (NUM_TEXTS + 2)
        texts = texts_of(adapter)
        return head, str(measuring), *texts, note_of(adapter, texts), NEW_NAME.format(name=adapter.path.stem)

    def inspection(self, id: str) -> str:
        """What `inspect` measures; it takes seconds."""
        adapter = self.site.studio.library.find(id)
        if adapter is None:
            return ""
        try:
            return str(render_inspection(self.t, self.site.studio.tools.inspect(adapter)))
        except UserError as error:
            return said(str(error), bad=True)

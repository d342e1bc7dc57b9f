"""What the page opens with: the adapter and the mix that the browser kept."""

from __future__ import annotations

from dataclasses import dataclass

import gradio as gr

from lora_diffusion.generation.sheet import MAX_PROMPT_LENGTH
from webui.components.library import render_head
from webui.pages.adapters.layout import MAX_RANK, METHODS, Inspector, Listing
from webui.pages.adapters.mix import Mixing
from webui.pages.base_choice import offer_bases
from webui.pages.kept import keep_fields
from webui.services.kept import kept_values
from webui.services.site import Site
from webui.translate import Translator

KEPT = ("chosen", "mixed", "method", "rank", "base", "prompt", "name")


def connect(site: Site, t: Translator, demo: gr.Blocks, listing: Listing, inspector: Inspector) -> None:
    """What fills the page when it is opened."""
    mix = inspector.mix
    fields = [listing.chosen, mix.text, mix.method, mix.rank, mix.base, mix.prompt, mix.name]
    outputs = [*fields, mix.stack, inspector.head]
    keep_fields(demo, "mixing", fields, Opening(site, t).open_page, [listing.kept, mix.base], outputs)


@dataclass(frozen=True)
class Opening:
    """Handler."""

    site: Site
    t: Translator

    def open_page(self, kept: str, base_id: str | None) -> list[object]:
        """The fields in the order of `KEPT`, the stack of the mix, and the head of an inspector without an adapter."""
        fields = kept_values(kept, KEPT, _fits)
        chosen = self.site.studio.library.find(str(fields.get("chosen", "")))
        fields["chosen"] = chosen.id if chosen else ""
        fields["base"] = offer_bases(self.site, str(fields.get("base")), base_id)[0]
        return [
            *(fields.get(name, gr.skip()) for name in KEPT),
            Mixing(self.site, self.t).stack(str(fields.get("mixed", ""))),
            gr.skip() if chosen else str(render_head(self.t, None)),
        ]


def _fits(name: str, value: object) -> bool:
    match name:
        case "method":
            return value in METHODS
        case "rank":
            return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= MAX_RANK
        case _:
            return isinstance(value, str) and len(value) <= MAX_PROMPT_LENGTH

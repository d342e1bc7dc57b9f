"""What the page opens with: the adapter, what was typed about it, and the mix, as the browser kept them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import gradio as gr

from lora_diffusion.generation.sheet import MAX_PROMPT_LENGTH
from webui.components.library import render_head
from webui.pages.adapters.layout import FORMATS, MAX_RANK, METHODS, NEW_NAME, PRECISIONS, Inspector, Listing
from webui.pages.adapters.mix import Mixing
from webui.pages.base_choice import offer_bases
from webui.pages.kept import keep_fields
from webui.services.adapter_edit import is_about, note_of, texts_of, typed_over
from webui.services.kept import kept_values
from webui.services.library import Adapter
from webui.services.site import Site
from webui.translate import Translator

MIX = ("mixed", "method", "rank", "base", "prompt", "name")
TEXTS = ("title", "trigger", "tags", "about")
CHANGE = ("new_name", "format", "precision", "new_rank", "energy")
KEPT = ("chosen", *MIX, *TEXTS, "filled", *CHANGE)
ABOUT_ONE = ("chosen", *TEXTS, "filled", "new_name")
"""Empty when no adapter is chosen."""


def connect(site: Site, t: Translator, demo: gr.Blocks, listing: Listing, inspector: Inspector) -> None:
    """What fills the page when it is opened."""
    mix, describe = inspector.mix, inspector.describe
    fields = [listing.chosen, mix.text, mix.method, mix.rank, mix.base, mix.prompt, mix.name]
    fields += [*describe.texts(), describe.filled, *inspector.change.values()]
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
        fields |= _about(chosen, fields) if chosen else dict.fromkeys(ABOUT_ONE, "")
        fields["base"] = offer_bases(self.site, str(fields.get("base")), base_id)[0]
        return [
            *(fields.get(name, gr.skip()) for name in KEPT),
            Mixing(self.site, self.t).stack(str(fields.get("mixed", ""))),
            gr.skip() if chosen else str(render_head(self.t, None)),
        ]


def _about(chosen: Adapter, kept: Mapping[str, object]) -> dict[str, object]:
    """The values of `ABOUT_ONE`: what the file says, and what was typed over it."""
    now, filled = texts_of(chosen), str(kept.get("filled", ""))
    texts = typed_over(chosen, now, [kept.get(name) for name in TEXTS], filled)
    name = kept.get("new_name") if is_about(filled, chosen.id) else None
    return {
        "chosen": chosen.id,
        **dict(zip(TEXTS, texts, strict=True)),
        "filled": note_of(chosen, now),
        "new_name": NEW_NAME.format(name=chosen.path.stem) if name is None else name,
    }


def _fits(name: str, value: object) -> bool:
    match name:
        case "method":
            return value in METHODS
        case "format":
            return value in FORMATS
        case "precision":
            return value in PRECISIONS
        case "rank" | "new_rank" | "energy":
            least, most = {"rank": (0, MAX_RANK), "new_rank": (1, MAX_RANK), "energy": (0, 1)}[name]
            return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most
        case "filled":
            return isinstance(value, str)
        case _:
            return isinstance(value, str) and len(value) <= MAX_PROMPT_LENGTH

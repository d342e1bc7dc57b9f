"""What is done with the chosen adapter: copied, deleted, described, converted, made smaller."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from lora_diffusion.errors import UserError
from webui.components.html import said
from webui.components.library import render_head
from webui.pages.adapters.layout import Inspector, Listing
from webui.pages.events import QUICK, TOOLS
from webui.services.adapter_edit import Description, copy_to_library, edit, note_of, texts_of
from webui.services.library import Adapter
from webui.services.site import Site
from webui.services.thumbnails import data_uri
from webui.services.trash import move_to_trash
from webui.translate import Translator


def connect(site: Site, t: Translator, listing: Listing, inspector: Inspector, redraw: dict[str, Any]) -> None:
    """Events of the head and of the tabs Describe and Convert."""
    handlers = Changes(site, t)
    chosen, head, out = listing.chosen, inspector.head, inspector.said
    describe, change = inspector.describe, inspector.change
    head.select(handlers.act, chosen, [chosen, out], **QUICK).then(**redraw)
    describe.save.click(handlers.describe, [chosen, *describe.texts(), describe.thumbnail], out, **QUICK).then(
        handlers.head, chosen, [head, describe.thumbnail, describe.filled], **QUICK
    ).then(**redraw)
    change.convert.click(handlers.working, None, out, **QUICK).then(
        handlers.convert, [chosen, change.name, change.format, change.precision], out, **TOOLS
    ).then(**redraw)
    change.resize.click(handlers.working, None, out, **QUICK).then(
        handlers.resize, [chosen, change.name, change.rank, change.energy], out, **TOOLS
    ).then(**redraw)


@dataclass(frozen=True)
class Changes:
    """Handlers. id: of the chosen adapter."""

    site: Site
    t: Translator

    def working(self) -> str:
        return said(self.t("adapters.working"))

    def head(self, id: str) -> tuple[str, None, str]:
        """The head anew, no file in the field for a thumbnail, and what the file says now."""
        adapter = self.site.studio.library.find(id)
        return str(render_head(self.t, adapter)), None, note_of(adapter, texts_of(adapter)) if adapter else ""

    def act(self, id: str, event: gr.EventData) -> tuple[object, str]:
        """Copy it into the library, or put it into the trash. Returns which one is chosen now, and what is said."""
        adapter = self.site.studio.library.find(id)
        if adapter is None:
            return gr.skip(), said(self.t("adapters.gone"), bad=True)
        try:
            match event._data.get("act"):
                case "copy":
                    copy = self.site.places.id_of(copy_to_library(self.site.workspace, adapter))
                    return copy, said(self.t("adapters.copied", name=copy))
                case "delete" if adapter.source != "sample":
                    move_to_trash(self.site.workspace, adapter.path)
                    return "", said(self.t("adapters.deleted", name=adapter.path.name))
        except (UserError, OSError) as error:
            return gr.skip(), said(str(error), bad=True)
        return gr.skip(), ""

    def describe(self, id: str, title: str, trigger: str, tags: str, about: str, picture: str | None) -> str:
        """Write the texts and the picture into the file."""

        def write(adapter: Adapter) -> str:
            thumbnail = data_uri(Path(picture)) if picture else None
            edit(adapter, Description(title, trigger, tags, about, thumbnail))
            return self.t("adapters.edit.done")

        return self._on(id, write)

    def convert(self, id: str, name: str, format: str, precision: str) -> str:
        return self._on(
            id, lambda adapter: self._made(self.site.studio.tools.convert(adapter, name, format, precision))
        )

    def resize(self, id: str, name: str, rank: float | None, energy: float | None) -> str:
        def make(adapter: Adapter) -> str:
            if not energy and not rank:
                raise UserError(self.t("adapters.resize.rank"))
            return self._made(self.site.studio.tools.resize(adapter, name, int(rank) if rank else None, energy or None))

        return self._on(id, make)

    def _made(self, made: tuple[Path, str]) -> str:
        path, text = made
        return f"{self.t('adapters.made', name=path.name)}\n{text}"

    def _on(self, id: str, do: Callable[[Adapter], str]) -> str:
        adapter = self.site.studio.library.find(id)
        if adapter is None:
            return said(self.t("adapters.none"), bad=True)
        try:
            return said(do(adapter))
        except (UserError, OSError, Image.DecompressionBombError) as error:
            return said(str(error), bad=True)

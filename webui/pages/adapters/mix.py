"""Several adapters together: merged and looked at, saved, baked into a base, compared."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from lora_diffusion.errors import UserError
from lora_diffusion.generation.request import Request, take_out_tags
from webui.components.html import html, said
from webui.components.library import render_overlap
from webui.components.studio import render_stack
from webui.pages.adapters.layout import Inspector
from webui.pages.events import QUICK, TOOLS
from webui.pages.stack import connect_stack
from webui.services.bases import Base, find_base
from webui.services.prompt_tags import stack_of
from webui.services.site import Site
from webui.translate import Translator

EVERY_S = 1.0


def connect(site: Site, t: Translator, demo: gr.Blocks, inspector: Inspector, redraw: dict[str, Any]) -> None:
    """Events of the tab Mix."""
    handlers, mix, out = Mixing(site, t), inspector.mix, inspector.said
    merged, ordered, shown = gr.State(""), gr.State(0), gr.State(0)
    recipe = [mix.text, mix.method, mix.rank, mix.base]

    def working() -> str:
        return said(t("adapters.working"))

    connect_stack(mix.text, mix.stack, handlers.stack)
    mix.preview.click(working, None, out, **QUICK).then(
        handlers.preview, [*recipe, mix.prompt], [merged, ordered, out], **TOOLS
    )
    mix.save.click(working, None, out, **QUICK).then(handlers.save, [*recipe, mix.name, merged], out, **TOOLS).then(
        **redraw
    )
    mix.bake.click(working, None, out, **QUICK).then(handlers.bake, [mix.text, mix.base, mix.name], out, **TOOLS)
    mix.overlap.click(working, None, out, **QUICK).then(handlers.overlap, mix.text, [mix.heat, out], **TOOLS)
    gr.Timer(EVERY_S).tick(handlers.trial, [ordered, shown], [shown, mix.slider, out], **QUICK)


@dataclass(frozen=True)
class Mixing:
    """Handlers. mixed: the adapters as tags, as they stand in a prompt."""

    site: Site
    t: Translator

    def stack(self, mixed: str) -> str:
        """The adapters as sliders."""
        known = {adapter.name: adapter for adapter in self.site.studio.library.adapters()}
        items = stack_of(mixed)
        if not items:
            return str(html('<p class="stack-empty">{text}</p>', text=self.t("adapters.mix.about")))
        return str(render_stack(self.t, items, known))

    def preview(
        self, mixed: str, method: str, rank: float | None, base_id: str | None, prompt: str
    ) -> tuple[object, object, str]:
        """Merge into a file that is only looked at, and have both drawn: its ticket, the drawing's id, what is said."""
        studio = self.site.studio
        try:
            base = self._base(base_id)
            weights = self._weights(mixed, 2)
            target = studio.tools.preview_file(secrets.token_hex(3), studio.desk.adapters())
            studio.tools.merge(weights, target, method, int(rank) if rank else None, self._path(base))
            drawing = studio.desk.add("trial", base.id, _both(base, prompt, mixed, target))
        except UserError as error:
            return gr.skip(), gr.skip(), said(str(error), bad=True)
        return _ticket(mixed, method, rank, target.name), drawing.id, said(self.t("adapters.mix.drawing"))

    def save(self, mixed: str, method: str, rank: float | None, base_id: str | None, name: str, looked_at: str) -> str:
        """looked_at: the ticket of the preview; if nothing has changed since, that file is what is saved."""
        tools = self.site.studio.tools
        try:
            weights = self._weights(mixed, 2)
            target = tools.target(name)
            previewed = tools.previews / looked_at.rpartition("\n")[2]
            if looked_at == _ticket(mixed, method, rank, previewed.name) and previewed.is_file():
                tools.keep_preview(previewed, target)
                return said(self.t("adapters.made", name=target.name))
            base = self._path(self._base(base_id)) if base_id else None
            text = tools.merge(weights, target, method, int(rank) if rank else None, base)
            return said(f"{self.t('adapters.made', name=target.name)}\n{text}")
        except (UserError, OSError) as error:
            return said(str(error), bad=True)

    def bake(self, mixed: str, base_id: str | None, name: str) -> str:
        """A copy of the base with the adapters in it."""
        try:
            base = self._path(self._base(base_id))
            if base is None:
                raise UserError(self.t("adapters.bake.on_disk"))
            path, _ = self.site.studio.tools.bake(self._weights(mixed, 1), base, name)
            return said(self.t("adapters.baked", name=path.name))
        except (UserError, OSError) as error:
            return said(str(error), bad=True)

    def overlap(self, mixed: str) -> tuple[str, str]:
        """The heat map, and what is said."""
        studio = self.site.studio
        try:
            names = [item.name for item in stack_of(mixed)]
            adapters = [adapter for name in names if (adapter := studio.library.named(name))]
            if len(adapters) < 2:
                raise UserError(self.t("adapters.mix.few"))
            return str(render_overlap(self.t, studio.tools.overlap(adapters))), ""
        except UserError as error:
            return "", said(str(error), bad=True)

    def trial(self, ordered: int, shown: int) -> tuple[object, ...]:
        """The pictures of this tab's preview, `ordered`, when it has ended and is not yet `shown`; what is said."""
        drawing = self.site.studio.desk.get(ordered) if ordered != shown else None
        if drawing is None or drawing.is_unfinished:
            return gr.skip(), gr.skip(), gr.skip()
        if drawing.phase != "done":
            return drawing.id, gr.skip(), said(drawing.message or self.t("generate.cancelled"), bad=True)
        images = drawing.pair()
        if images is None:
            return drawing.id, gr.skip(), gr.skip()
        return drawing.id, gr.ImageSlider(value=images, visible=True), said(self.t("adapters.mix.preview.about"))

    def _weights(self, mixed: str, least: int) -> dict[Path, float]:
        found: dict[Path, float] = {}
        for item in stack_of(mixed):
            adapter = self.site.studio.library.named(item.name)
            if adapter is not None and item.strength is not None:
                found[adapter.path] = item.strength
        if len(found) < least:
            raise UserError(self.t("adapters.mix.few" if least > 1 else "adapters.mix.one"))
        return found

    def _base(self, id: str | None) -> Base:
        return find_base(self.site.places, id or "")

    def _path(self, base: Base) -> Path | None:
        """None for a base of the hub: tools read bases on disk."""
        path = self.site.places.root / base.id
        return path if path.exists() else None


def _both(base: Base, text: str, mixed: str, merged: Path) -> list[Request]:
    """The adapters at their strengths, then the merged file at 1."""
    prompt, _ = take_out_tags(text)
    strengths = {item.name: item.strength for item in stack_of(mixed) if item.strength is not None}
    common = {"prompt": prompt, "seed": 7, "steps": 20, "cfg": 5.0, "size": base.sizes[0]}
    return [Request(**common, adapters=strengths), Request(**common, adapters={merged.stem: 1.0})]


def _ticket(mixed: str, method: str, rank: float | None, file: str) -> str:
    """What a preview was made of, and its file."""
    return f"{mixed}\n{method}\n{rank}\n{file}"

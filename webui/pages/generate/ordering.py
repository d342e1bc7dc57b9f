"""The buttons that order pictures, comparisons and grids, and the one that cancels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import gradio as gr

from lora_diffusion.errors import UserError
from webui.components.html import duration, html, said
from webui.pages.events import LOADED, QUICK
from webui.pages.generate.layout import Controls, Results
from webui.services.bases import find_base
from webui.services.drawing_form import DrawingForm, next_seed
from webui.services.site import Site
from webui.translate import Translator

TAB = f"async () => {{ {LOADED} return window.loraDiffusion.tab(); }}"


def connect(site: Site, t: Translator, demo: gr.Blocks, controls: Controls, results: Results) -> None:
    """Events of the buttons; the size of a grid follows its axes."""
    orders = Orders(site, t)
    tab, fields, grid = controls.tab, controls.fields.all(), results.grid
    demo.load(None, None, tab, js=TAB, api_visibility="private")
    controls.go.click(orders.pictures, [tab, controls.base, *fields], [controls.said, controls.fields.seed], **QUICK)
    controls.stop.click(orders.cancel, tab, controls.said, **QUICK)
    results.compare.click(orders.comparison, [tab, controls.base, *fields], controls.said, **QUICK)
    grid.go.click(orders.grid, [tab, controls.base, *grid.axes(), *fields], controls.said, **QUICK)
    axes = (grid.x_name, grid.x_values, grid.y_name, grid.y_values)
    gr.on(
        [demo.load, *(field.change for field in (*axes, controls.fields.prompt))],
        orders.describe_grid,
        [*grid.axes(), *fields],
        grid.about,
        trigger_mode="always_last",
        **QUICK,
    )


@dataclass(frozen=True)
class Orders:
    """Handlers. tab: who orders. `values` are those of `Fields`; the axes are x name, x values, y name, y values."""

    site: Site
    t: Translator

    def pictures(self, tab: str, base_id: str, *values: Any) -> tuple[object, object]:
        """What is said, and the next seed."""
        form = DrawingForm(*values)
        try:
            requests = form.requests()
            self.site.studio.desk.add("pictures", self._base(base_id), requests, tab=tab)
        except UserError as error:
            return said(str(error), bad=True), gr.skip()
        return "", next_seed(form, requests)

    def comparison(self, tab: str, base_id: str, *values: Any) -> str:
        try:
            wanted = DrawingForm(*values).request()
            if not wanted.adapters:
                return said(self.t("generate.compare.none"), bad=True)
            requests = [replace(wanted, adapters={}), wanted]
            self.site.studio.desk.add("comparison", self._base(base_id), requests, tab=tab)
        except UserError as error:
            return said(str(error), bad=True)
        return ""

    def grid(self, tab: str, base_id: str, xn: str, xv: str, yn: str, yv: str, *values: Any) -> str:
        try:
            sheet = DrawingForm(*values).sheet((xn, xv), (yn, yv))
            requests = [cell.request for cell in sheet.cells()]
            self.site.studio.desk.add("sheet", self._base(base_id), requests, sheet, tab=tab)
        except UserError as error:
            return said(str(error), bad=True)
        return ""

    def describe_grid(self, xn: str, xv: str, yn: str, yv: str, *values: Any) -> str:
        """How many pictures, and how long they take as far as that is known."""
        try:
            number = len(DrawingForm(*values).sheet((xn, xv), (yn, yv)).cells())
        except UserError as error:
            return str(html('<p class="hint warn">{text}</p>', text=str(error)))
        parts = [self.t("generate.grid.cells", n=number)]
        seconds = self.site.studio.desk.seconds_per_picture
        if seconds:
            parts.append(self.t("generate.grid.time", time=duration(seconds * number)))
        return str(html('<p class="hint"><b>{a}</b> · {b}</p>', a=" · ".join(parts), b=self.t("generate.grid.hint")))

    def cancel(self, tab: str) -> str:
        """End what this tab has ordered, and nothing of others."""
        desk = self.site.studio.desk
        unfinished = desk.unfinished()
        own = [drawing for drawing in unfinished if tab and drawing.tab == tab]
        for drawing in own:
            desk.cancel(drawing.id)
        if own:
            return said(self.t("generate.cancelled"))
        return said(self.t("generate.cancel.others"), bad=True) if unfinished else ""

    def _base(self, id: str | None) -> str:
        return find_base(self.site.places, id or "").id

"""What is being drawn and what was drawn, as it is now; what can be done while a training has the device."""

from __future__ import annotations

from dataclasses import dataclass

import gradio as gr
from markupsafe import Markup

from lora_diffusion.errors import UserError
from webui.components.html import said
from webui.components.job import title
from webui.components.live import live
from webui.components.studio import render_engine, render_gallery, render_grid, render_status
from webui.pages.events import QUICK
from webui.pages.generate.layout import Controls, Results
from webui.services.site import Site
from webui.translate import Translator

EVERY_S = 0.6


def connect(site: Site, t: Translator, demo: gr.Blocks, controls: Controls, results: Results) -> None:
    """Everything that follows the desk."""
    handlers = Shown(site, t)
    parts = [results.status, results.gallery, results.grid.cells]
    live(demo, lambda _request, tab: handlers.draw(tab), parts, [controls.tab], EVERY_S)
    shown = gr.State(0)
    gr.on([demo.load, gr.Timer(EVERY_S).tick], handlers.comparison, shown, [shown, results.slider], **QUICK)
    results.status.select(handlers.act, None, controls.said, **QUICK)


@dataclass(frozen=True)
class Shown:
    """Handlers."""

    site: Site
    t: Translator

    def draw(self, tab: str) -> list[Markup]:
        """Status, gallery, grid. tab: who looks."""
        studio, places = self.site.studio, self.site.places
        unfinished = studio.desk.unfinished()
        loaded = None if unfinished else studio.engine.record()
        training = studio.training() if unfinished and unfinished[0].progress.note else None
        sheet = studio.desk.latest("sheet")
        drawings = studio.desk.drawings()
        return [
            render_status(self.t, unfinished, drawings[0] if drawings else None, training, tab)
            + render_engine(self.t, loaded.base_name if loaded else ""),
            render_gallery(self.t, studio.gallery.newest()),
            render_grid(
                self.t,
                sheet,
                [places.id_of(path) if path else None for path in sheet.pictures] if sheet else [],
                places.id_of(sheet.sheet_file) if sheet and sheet.sheet_file else None,
            ),
        ]

    def comparison(self, before: int) -> tuple[object, object]:
        """The latest one for the slider, unless it is the one with the id `before`."""
        drawing = self.site.studio.desk.latest("comparison")
        if drawing is None or drawing.phase != "done" or drawing.id == before:
            return gr.skip(), gr.skip()
        return drawing.id, drawing.pair()

    def act(self, event: gr.EventData) -> str:
        """End the idle engine or all drawings, or a choice while a training has the device: pause it, ask it, wait."""
        studio = self.site.studio
        unfinished = studio.desk.unfinished()
        act = str(event._data.get("act"))
        if act == "free" and not unfinished:
            studio.engine.stop()
            return said(self.t("generate.freed"))
        if act == "free" or not unfinished:
            return ""
        if act == "cancel":
            studio.desk.cancel()
            return said(self.t("generate.cancelled"))
        try:
            if act == "pause":
                job = studio.pause_training()
            elif act == "live" and (job := studio.sample_live(unfinished[0].requests[0])):
                studio.desk.cancel(unfinished[0].id)
            else:
                act, job = "wait", studio.training()
        except UserError as error:
            return said(str(error), bad=True)
        return said(self.t(f"generate.busy.{act}.done", name=title(self.t, job))) if job else ""

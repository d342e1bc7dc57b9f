"""Runs: everything that waits, trains or ended; the order of the queue; two to four runs compared."""

from __future__ import annotations

import json
import time

import gradio as gr
from markupsafe import Markup

from lora_diffusion.errors import UserError
from webui.components.html import html, said
from webui.components.live import live
from webui.components.runs_table import render_comparison_of_runs, render_runs
from webui.pages.events import QUICK
from webui.services.overview import COMPARED, Overview, differences
from webui.services.site import Site
from webui.translate import Translator

LISTEN = """
element.addEventListener('change', (event) => { if (event.target.dataset.tick) trigger('input'); });
element.addEventListener('click', (event) => {
    const button = event.target.closest('[data-act]');
    if (button) trigger('select', { act: button.dataset.act, id: button.dataset.id });
});
"""
TICKED = "() => window.loraDiffusion.ticked()"


def build(site: Site, t: Translator, demo: gr.Blocks) -> None:
    """Layout and events."""
    overview = Overview(site)
    gr.HTML(
        str(
            html(
                '<div class="title"><h1>{title}</h1><a class="go" href="{href}" id="runs-new">{new}</a></div>',
                title=t("runs.title"),
                href=t.href("/"),
                new=t("runs.new"),
            )
        ),
        elem_id="runs-title",
        apply_default_css=False,
    )
    ticked = gr.Textbox("[]", visible="hidden", elem_id="runs-ticked", label="ticked")
    out = gr.HTML(elem_id="runs-said", apply_default_css=False)
    table = gr.HTML(elem_id="runs-list", apply_default_css=False, js_on_load=LISTEN)
    compared = gr.HTML(elem_id="runs-compared", apply_default_css=False)

    def draw(_request: gr.Request, ticked: str) -> list[Markup]:
        chosen = _ids(ticked)
        rows = overview.rows()
        return [
            render_runs(t, rows, time.time()),
            _comparison(site, t, overview, chosen) if len(rows) > 1 else Markup(""),
        ]

    live(demo, draw, [table, compared], [ticked])

    def act(event: gr.EventData) -> str:
        job = site.find_job(str(event._data.get("id", "")))
        if job is None:
            return ""
        try:
            match event._data.get("act"):
                case "up" | "down" as way if job.position:
                    site.queue.move(job.id, job.position + (1 if way == "down" else -1))
                case "cancel":
                    site.queue.cancel(job.id)
                case "stop":
                    site.queue.stop(job.id)
                case "forget":
                    site.queue.forget(job.id)
        except UserError as error:
            return said(str(error), bad=True)
        return ""

    table.input(lambda ids: ids, ticked, ticked, js=TICKED, **QUICK)
    table.select(act, None, out, **QUICK)


def _ids(text: str) -> list[str]:
    try:
        ids = json.loads(text)
    except ValueError:
        return []
    return [id for id in ids if isinstance(id, str)][:COMPARED] if isinstance(ids, list) else []


def _comparison(site: Site, t: Translator, overview: Overview, ids: list[str]) -> Markup:
    jobs = [job for id in ids if (job := site.find_run(id))]
    if len(jobs) < 2:
        return html('<p class="hint">{text}</p>', text=t("runs.compare.hint", n=COMPARED))
    losses: list[list[tuple[float, float]]] = []
    for job in jobs:
        follower = site.followers.of(job.run)
        with follower.lock:
            loss = follower.run.series("loss")
        losses.append(list(zip(loss.steps, loss.smoothed, strict=True)))
    return render_comparison_of_runs(
        t, [job.name for job in jobs], losses, differences([overview.config(job) for job in jobs])
    )

"""The pages put together: `build` makes the Gradio app of one language.

A page is a module in `pages/` with `build(site, t, demo)`, and one line in `PAGES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import gradio as gr
from markupsafe import Markup

from lora_diffusion.jobs.condition import ACTIVE
from webui.api import add_api
from webui.blocks import Pages
from webui.components.live import live
from webui.components.strip import render_navigation, render_strip
from webui.pages import dataset, run, runs, train
from webui.pages.adapters import page as adapters
from webui.pages.generate import page as generate
from webui.services.machine import read_machine
from webui.services.site import Site
from webui.translate import Translator

Build = Callable[[Site, Translator, gr.Blocks], None]


@dataclass(frozen=True)
class Page:
    """path: its address. title: key of its name. in_navigation: whether it can be reached from every page."""

    path: str
    title: str
    build: Build
    in_navigation: bool = True


PAGES = (
    Page("/", "nav.train", train.build),
    Page("/dataset", "nav.dataset", dataset.build),
    Page("/runs", "nav.runs", runs.build),
    Page("/generate", "nav.generate", generate.build),
    Page("/adapters", "nav.adapters", adapters.build),
    Page("/run", "nav.run", run.build, in_navigation=False),
)


def build(site: Site, language: str) -> gr.Blocks:
    """All pages in one language."""
    t = Translator(language)
    with Pages(title="lora_diffusion", analytics_enabled=False, fill_width=True) as demo:
        _fill(PAGES[0], site, t, demo)
        if language == "en":  # programs have one address, whatever people read
            add_api(site)
    for page in PAGES[1:]:
        with demo.route(t(page.title), page.path):
            _fill(page, site, t, demo)
    return demo


def _fill(page: Page, site: Site, t: Translator, demo: gr.Blocks) -> None:
    shown = [(other.path, other.title) for other in PAGES if other.in_navigation]
    gr.HTML(str(render_navigation(t, shown, page.path)), elem_id="top", apply_default_css=False)
    strip = gr.HTML(elem_id="top-strip", apply_default_css=False, min_height=34)

    def render(_request: gr.Request) -> list[Markup]:
        jobs = site.queue.jobs()
        active = [(site.run_id(job), job) for job in jobs if job.status in ACTIVE]
        return [render_strip(t, read_machine(), active, sum(job.status == "queued" for job in jobs))]

    live(demo, render, [strip])
    with gr.Column(elem_classes=["page", f"page-{page.title.partition('.')[2]}"]):
        page.build(site, t, demo)

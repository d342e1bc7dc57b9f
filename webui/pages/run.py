"""Run: one run while it trains and after; sample, save, pause, stop, resume; which step was the best."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import gradio as gr
from markupsafe import Markup

from lora_diffusion.errors import UserError
from lora_diffusion.jobs.condition import ACTIVE
from lora_diffusion.jobs.queue import Job
from lora_diffusion.jobs.release import release
from lora_diffusion.runs import RunFolder
from webui.components.chart import Line, render_chart, render_legend
from webui.components.html import html, said
from webui.components.listen import CLICKS
from webui.components.live import live
from webui.components.monitor import (
    render_comparison,
    render_files,
    render_head,
    render_log,
    render_matrix,
    run_href,
)
from webui.pages.events import GO, QUICK
from webui.services.follow import Follower
from webui.services.remedy import remedy_of
from webui.services.site import Site
from webui.translate import Translator

BUTTONS: dict[str, tuple[str, ...]] = {
    "sample": ("running",),
    "save": ("running",),
    "pause": (*ACTIVE, "queued"),
    "stop": (*ACTIVE, "paused"),
    "resume": ("paused", "stopped", "interrupted", "failed"),
    "retry": ("failed", "interrupted", "cancelled"),
    "cancel": ("queued",),
}
"""What can be asked of a run, and in which states it makes sense."""

LISTEN = """
element.addEventListener('click', (event) => {
    const star = event.target.closest('[data-star]');
    if (star) trigger('select', { step: Number(star.dataset.star) });
});
"""


@dataclass(frozen=True)
class Layout:
    """What is on the page. goto: hidden, an address to open. buttons: by name in `BUTTONS`."""

    head: gr.HTML
    goto: gr.Textbox
    buttons: dict[str, gr.Button]
    copy: gr.Button
    prompts: gr.Textbox
    said: gr.HTML
    chart: gr.HTML
    is_log: gr.Checkbox
    smoothing: gr.Slider
    matrix: gr.HTML
    comparison: gr.HTML
    files: gr.HTML
    log: gr.HTML


def build(site: Site, t: Translator, demo: gr.Blocks) -> None:
    """Layout and events."""
    page, handlers = _layout(t), Handlers(site, t)
    live(
        demo,
        handlers.draw,
        [page.head, page.chart, page.matrix, page.comparison, page.files, page.log],
        [page.is_log, page.smoothing],
    )
    shown = gr.State("")
    seen = [shown, *page.buttons.values(), page.copy, page.prompts]
    gr.on([demo.load, gr.Timer(1.5).tick], handlers.choose_buttons, shown, seen, **QUICK)
    for name, button in page.buttons.items():
        button.click(handlers.asking(name), page.prompts, page.said, **QUICK).then(
            handlers.choose_buttons, shown, seen, **QUICK
        )
    page.copy.click(
        None,
        js="() => window.location.assign("
        f"'{t.href('/')}?copy=' + encodeURIComponent(new URLSearchParams(location.search).get('id')))",
        api_visibility="private",
    )
    page.head.select(handlers.start_remedy, None, [page.said, page.goto], **QUICK).then(
        None, page.goto, None, js=GO, api_visibility="private"
    )
    page.matrix.select(handlers.star, None, page.said, **QUICK)


def _layout(t: Translator) -> Layout:
    head = gr.HTML(elem_id="run-head", apply_default_css=False, js_on_load=CLICKS)
    goto = gr.Textbox("", visible="hidden", elem_id="run-goto", label="address")
    with gr.Row(elem_classes="buttons"):
        buttons = {name: _button(t, name) for name in BUTTONS}
        copy = gr.Button(t("run.copy"), elem_id="run-copy", visible=False, size="md")
    prompts = gr.Textbox(
        "",
        label=t("run.own_prompts"),
        placeholder=t("run.own_prompts.hint"),
        lines=1,
        max_lines=4,
        max_length=4000,
        visible=False,
        elem_id="run-prompts",
    )
    said = gr.HTML(elem_id="run-said", apply_default_css=False)
    with gr.Row(elem_classes="train", equal_height=False):
        with gr.Column(scale=5, min_width=320):
            chart = gr.HTML(elem_id="run-chart", apply_default_css=False)
            with gr.Row(elem_classes="chart-options"):
                is_log = gr.Checkbox(label=t("run.log_scale"), value=True, elem_id="run-log-scale", container=False)
                smoothing = gr.Slider(
                    0, 0.99, 0.9, step=0.01, label=t("run.smoothing"), elem_id="run-smoothing", buttons=[]
                )
            matrix = gr.HTML(elem_id="run-samples", apply_default_css=False, js_on_load=LISTEN)
        with gr.Column(scale=3, min_width=320):
            comparison = gr.HTML(elem_id="run-comparison", apply_default_css=False)
            files = gr.HTML(elem_id="run-files", apply_default_css=False)
            log = gr.HTML(elem_id="run-log", apply_default_css=False)
    return Layout(head, goto, buttons, copy, prompts, said, chart, is_log, smoothing, matrix, comparison, files, log)


def _button(t: Translator, name: str) -> gr.Button:
    variants: dict[str, Literal["stop", "primary", "secondary"]] = {"stop": "stop", "resume": "primary"}
    variant = variants.get(name, "secondary")
    return gr.Button(t(f"run.{name}"), elem_id=f"run-{name}", visible=False, size="md", variant=variant)


@dataclass(frozen=True)
class Handlers:
    """Which run it is stands in the address."""

    site: Site
    t: Translator

    def draw(self, request: gr.Request, is_log: bool, smoothing: float) -> list[Markup]:
        """Head, chart, samples, comparison, files, log."""
        site, t, job = self.site, self.t, self._job(request)
        if job is None:
            return [_missing(t), *[Markup("")] * 5]
        follower, remedy = site.followers.of(job.run), remedy_of(site.queue, job)
        with follower.lock:
            return [
                render_head(t, job, site.run_id(job), time.time(), remedy.changes if remedy else None),
                _chart(t, follower, bool(is_log), float(smoothing)),
                *_pictures(site, t, follower),
                render_files(t, site.run_id(job), follower.run.adapters(), follower.run.checkpoints()),
                render_log(t, follower.read_log()),
            ]

    def choose_buttons(self, status: str, request: gr.Request) -> list[object]:
        """The run's status and the buttons that suit it, unless the status is still `status`."""
        job = self._job(request)
        now = job.status if job else "none"
        if now == status:
            return [gr.skip()] * (len(BUTTONS) + 3)
        return [
            now,
            *(gr.Button(visible=now in states) for states in BUTTONS.values()),
            gr.Button(visible=job is not None),
            gr.Textbox(visible=now in BUTTONS["sample"]),
        ]

    def asking(self, name: str) -> Callable[[str, gr.Request], str]:
        """The handler of the button `name`."""

        def ask(own_prompts: str, request: gr.Request) -> str:
            job = self._job(request)
            if job is None:
                return ""
            try:
                self._ask(job, name, own_prompts.splitlines())
            except UserError as error:
                return said(str(error), bad=True)
            return said(self.t(f"run.{name}.done"))

        return ask

    def start_remedy(self, request: gr.Request) -> tuple[str, str]:
        """Put a run into the queue that needs less memory: what is said, and the address of its page."""
        job = self._job(request)
        remedy = remedy_of(self.site.queue, job) if job else None
        if remedy is None:
            return "", ""
        try:
            new = self.site.queue.add(remedy.toml)
        except UserError as error:
            return said(str(error), bad=True), ""
        return said(self.t("train.started", name=new.name)), run_href(self.t, self.site.run_id(new))

    def star(self, request: gr.Request, event: gr.EventData) -> str:
        """Make a step's adapter the result."""
        job, step = self._job(request), event._data.get("step")
        if job is None or type(step) is not int:
            return ""
        try:
            path = release(RunFolder(job.run), step)
        except UserError as error:
            return said(str(error), bad=True)
        return said(self.t("run.star.done", step=step, file=path.name))

    def _job(self, request: gr.Request) -> Job | None:
        return self.site.find_run(str(request.query_params.get("id", "")))

    def _ask(self, job: Job, name: str, own_prompts: list[str]) -> None:
        if name == "sample":
            chosen = [prompt.strip() for prompt in own_prompts if prompt.strip()]
            RunFolder(job.run).ask("sample_now", {"prompts": chosen} if chosen else None)
        elif name == "save":
            RunFolder(job.run).ask("save_now")
        else:
            getattr(self.site.queue, name)(job.id)


def _chart(t: Translator, follower: Follower, is_log: bool, smoothing: float) -> Markup:
    loss = follower.run.series("loss", smoothing=min(max(smoothing, 0.0), 0.99))
    if not loss.steps:
        return html(
            '<div class="card chart"><h2>{title}</h2><p class="empty">{text}</p></div>',
            title=t("run.loss"),
            text=t("run.no_loss"),
        )
    held_out, rate = follower.run.series("val_loss"), follower.run.series("lr")
    lines = [
        Line("", 1, list(zip(loss.steps, loss.values, strict=True)), is_faint=True),
        Line(t("run.loss"), 1, list(zip(loss.steps, loss.smoothed, strict=True))),
        Line(t("run.val_loss"), 2, list(zip(held_out.steps, held_out.values, strict=True)), is_dashed=True),
    ]
    rates = [Line(t("run.lr"), 3, list(zip(rate.steps, rate.values, strict=True)))]
    word = t("run.step")
    return html(
        '<div class="card chart"><h2>{title}</h2>{legend}{loss}<h3>{rate}</h3>{rates}</div>',
        title=t("run.loss"),
        legend=render_legend(lines),
        loss=render_chart(lines, step_word=word, is_log=is_log, label=t("run.loss")),
        rate=t("run.lr"),
        rates=render_chart(rates, step_word=word, is_low=True, label=t("run.lr")),
    )


def _pictures(site: Site, t: Translator, follower: Follower) -> list[Markup]:
    previews = follower.run.previews()
    pictures = {place: site.places.id_of(path) for place, path in previews.pictures.items()}
    entries = follower.run.adapters()
    starred = next((entry.step for entry in entries if entry.is_released), None)
    return [
        render_matrix(
            t,
            previews.prompts,
            previews.steps,
            pictures,
            [site.places.id_of(path) for path in previews.asked],
            starred,
            frozenset(entry.step for entry in entries if entry.step is not None),
        ),
        render_comparison(t, previews.prompts, previews.steps, pictures),
    ]


def _missing(t: Translator) -> Markup:
    return html(
        '<div class="card"><p class="empty"><strong>{a}</strong><a href="{href}">{b}</a></p></div>',
        a=t("run.missing"),
        href=t.href("/runs"),
        b=t("run.missing.hint"),
    )

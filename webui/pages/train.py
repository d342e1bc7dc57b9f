"""Train: pictures → base → preset → look before you start → start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import gradio as gr

from lora_diffusion.config import TrainConfig
from lora_diffusion.config_errors import ConfigError
from lora_diffusion.errors import UserError
from webui.components.form import Choices, render_form
from webui.components.html import said
from webui.components.listen import once_loaded
from webui.components.monitor import run_href
from webui.components.report import render_glances, render_problems, render_report, render_toml
from webui.pages.events import GO, LOADED, QUICK
from webui.services import goals, preflight
from webui.services.form_values import (
    Fields,
    default_fields,
    fields_from_json,
    fields_from_toml,
    num_tables,
    toml_from_fields,
    with_dataset,
)
from webui.services.glance import glance
from webui.services.presets import FIRST, Preset, apply, presets
from webui.services.site import Site
from webui.translate import Translator

REVEAL = """() => {
    document.querySelector('#train-report').scrollIntoView({ block: 'nearest', behavior: 'smooth' });
    return [];  // Chromium's scrollIntoView returns something, which Gradio would take for the event's inputs
}"""
DRAFT = f"async () => {{ {LOADED} return window.loraDiffusion.draft(); }}"
OPENED = "() => window.loraDiffusion.opened()"
COLLECT = "() => window.loraDiffusion.collect()"


@dataclass(frozen=True)
class Layout:
    """What is on the page. fields: hidden, the form's values as JSON. goto: hidden, an address to open."""

    fields: gr.Textbox
    goto: gr.Textbox
    form: gr.HTML
    problems: gr.HTML
    start: gr.Button
    look: gr.Button
    said: gr.HTML
    report: gr.HTML
    toml: gr.HTML
    upload: gr.File
    pasted: gr.Textbox
    load: gr.Button
    glances: gr.HTML


def build(site: Site, t: Translator, demo: gr.Blocks) -> None:
    """Layout and events."""
    shipped = presets()
    handlers = Handlers(site, t, shipped)
    page = _layout(t, handlers.first_form())
    fields, rail = page.fields, [page.problems, page.toml, page.glances]
    parts = [page.form, *rail]
    demo.load(handlers.open_page, fields, page.form, js=DRAFT, **QUICK).then(
        handlers.edit, fields, rail, js=OPENED, **QUICK
    )
    page.form.input(handlers.edit, fields, rail, js=COLLECT, trigger_mode="always_last", **QUICK)
    page.form.select(handlers.choose, fields, parts, js=COLLECT, **QUICK)
    page.upload.upload(handlers.read, [page.pasted, page.upload], [*parts, page.said], **QUICK)
    page.load.click(handlers.read, [page.pasted, page.upload], [*parts, page.said], **QUICK)
    page.look.click(lambda: str(render_report(t, None)), None, page.report, js=REVEAL, **QUICK).then(
        handlers.check,
        fields,
        [page.problems, page.report],
        js=COLLECT,
        concurrency_id="check",
        concurrency_limit=1,
        show_progress="hidden",
        api_visibility="private",
    )
    page.start.click(handlers.add, fields, [page.said, page.goto], js=COLLECT, **QUICK).then(
        None,
        page.goto,
        None,
        js=GO,
        api_visibility="private",
    )


def _layout(t: Translator, first_form: str) -> Layout:
    fields = gr.Textbox("", visible="hidden", elem_id="train-values", label="values")
    goto = gr.Textbox("", visible="hidden", elem_id="train-goto", label="address")
    with gr.Row(elem_classes="train", equal_height=False):
        with gr.Column(scale=5, min_width=320):
            form = gr.HTML(
                first_form,
                elem_id="train-form",
                apply_default_css=False,
                js_on_load=once_loaded("loraDiffusion", "window.loraDiffusion.form(trigger);"),
            )
        with gr.Column(scale=3, min_width=320, elem_classes="rail"):
            problems = gr.HTML(elem_id="train-problems", apply_default_css=False)
            with gr.Row(elem_classes="actions"):
                start = gr.Button(t("train.start"), variant="primary", elem_id="train-start", scale=2)
                look = gr.Button(t("train.check"), elem_id="train-check", scale=1)
            said = gr.HTML(elem_id="train-said", apply_default_css=False)
            report = gr.HTML(elem_id="train-report", apply_default_css=False)
            toml = gr.HTML(elem_id="train-toml", apply_default_css=False)
            with gr.Accordion(t("train.open"), open=False, elem_id="train-open"):
                upload = gr.File(
                    label=t("train.open.file"),
                    file_types=[".toml"],
                    type="binary",
                    elem_id="train-upload",
                    height=110,
                )
                pasted = gr.Textbox(
                    "", label=t("train.open.paste"), lines=6, elem_id="train-paste", max_length=1_000_000
                )
                load = gr.Button(t("train.open.load"), elem_id="train-load")
            glances = gr.HTML(elem_id="train-glances", apply_default_css=False)
    return Layout(fields, goto, form, problems, start, look, said, report, toml, upload, pasted, load, glances)


@dataclass(frozen=True)
class Handlers:
    """values: the form's fields as JSON, as the browser collects them. shipped: the presets by id."""

    site: Site
    t: Translator
    shipped: Mapping[str, Preset]

    def first_form(self) -> str:
        """What a new visitor sees."""
        return self._form(self._first().fields, self._first().id)

    def open_page(self, draft: str, request: gr.Request) -> object:
        """The form of a run to copy, or of what was left unfinished, with the data set that the address names."""
        asked = {key: str(request.query_params.get(key, "")) for key in ("copy", "dataset")}
        copied = self.site.find_run(asked["copy"])
        try:
            now = fields_from_toml(self.site.queue.duplicate(copied.id))[0] if copied else fields_from_json(draft)[0]
        except UserError:
            now = fields_from_json(draft)[0]
        if asked["dataset"]:  # what is wrong with it is said beside the form, as of any folder that is typed
            now = with_dataset(now or self._first().fields, asked["dataset"])
        return self._form(now) if now else gr.skip()

    def edit(self, values: str) -> list[object]:
        """Problems, file and pictures of what stands in the form."""
        return self._rail(fields_from_json(values)[0])

    def choose(self, values: str) -> list[object]:
        """A preset or a goal was clicked: the form and all else."""
        now, given = fields_from_json(values)
        now = now or default_fields()
        if given.get("preset") in self.shipped:
            chosen = self.shipped[given["preset"]]
            before = self.shipped[given["from"]].fields if given.get("from") in self.shipped else {}
            return self._all(apply(chosen.fields, now, before), chosen.id)
        return self._all(goals.apply(given.get("goal", ""), given.get("word", ""), now))

    def read(self, text: str, file: bytes | None) -> Sequence[object]:
        """A config that was pasted or dropped; last, what is said about it."""
        try:
            loaded, wrong = fields_from_toml(file.decode("utf-8-sig") if file else text)
        except UnicodeDecodeError:
            return [*[gr.skip()] * 4, said(self.t("train.not_text"), bad=True)]
        except ConfigError as error:
            return [*[gr.skip()] * 4, said(str(error), bad=True)]
        unknown = [str(problem) for problem in wrong if "unknown" in problem.message]
        return [*self._all(loaded), said("\n".join(unknown), bad=True) if unknown else ""]

    def check(self, values: str) -> list[object]:
        """Problems and the report of `lora-diffusion check`, which takes seconds."""
        text = toml_from_fields(fields_from_json(values)[0])
        wrong = _problems(self.site, text)
        if wrong:
            return [str(render_problems(self.t, wrong)), said(self.t("train.mend_first"), bad=True)]
        return [gr.skip(), str(render_report(self.t, preflight.check(self.site.workspace, text)))]

    def add(self, values: str) -> list[object]:
        """Put the run into the queue: what is said, and the address of its page."""
        text = toml_from_fields(fields_from_json(values)[0])
        if _problems(self.site, text):
            return [said(self.t("train.mend_first"), bad=True), ""]
        try:
            job = self.site.queue.add(text)
        except UserError as error:
            return [said(str(error), bad=True), ""]
        return [said(self.t("train.started", name=job.name)), run_href(self.t, self.site.run_id(job))]

    def _first(self) -> Preset:
        return self.shipped.get(FIRST) or next(iter(self.shipped.values()))

    def _all(self, now: Fields, preset: str = "") -> list[object]:
        return [self._form(now, preset), *self._rail(now)]

    def _form(self, now: Fields, preset: str = "") -> str:
        choices = Choices(self.site.places.datasets(), self.site.places.models(), self.shipped)
        return str(render_form(self.t, now, choices, preset))

    def _rail(self, now: Fields) -> list[object]:
        text = toml_from_fields(now)
        folders = [now.get(f"dataset.{index}.path", "") for index in range(num_tables(now))]
        return [
            str(render_problems(self.t, _problems(self.site, text))),
            str(render_toml(self.t, text, now.get("run.name", ""))),
            str(render_glances(self.t, [(folder, glance(self.site.places, folder)) for folder in folders])),
        ]


def _problems(site: Site, toml: str) -> tuple[tuple[str, str], ...]:
    """(key, message) of everything that keeps the config from being started."""
    try:
        config = TrainConfig.parse(toml)
    except ConfigError as error:
        return tuple((".".join(map(str, problem.key)), problem.message) for problem in error.problems)
    return tuple((".".join(map(str, problem.key)), problem.message) for problem in site.places.problems_of(config))

"""Train: pictures → base → preset → look before you start → start."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlencode

import gradio as gr

from lora_diffusion.config import TrainConfig
from lora_diffusion.config_errors import ConfigError
from lora_diffusion.errors import UserError
from webui.components.form import Choices, render_form
from webui.components.html import html, when_there
from webui.components.report import render_glances, render_problems, render_report, render_toml
from webui.services import goals, preflight
from webui.services.form_values import (
    Fields,
    default_fields,
    fields_from_json,
    fields_from_toml,
    num_tables,
    toml_from_fields,
)
from webui.services.glance import glance
from webui.services.presets import FIRST, apply, presets
from webui.services.site import Site
from webui.translate import Translator

COLLECT = "() => window.loraDiffusion.collect()"
DRAFT = f"() => new Promise((give) => {when_there('loraDiffusion', 'give(window.loraDiffusion.draft())')})"


def build(site: Site, t: Translator, demo: gr.Blocks) -> None:
    """Layout and events."""
    shipped = presets()
    first = shipped.get(FIRST) or next(iter(shipped.values()))
    choices = Choices(site.places.datasets(), site.places.models(), shipped)
    fields = gr.Textbox(visible="hidden", elem_id="train-values", label="values")
    goto = gr.Textbox(visible="hidden", elem_id="train-goto", label="address")
    with gr.Row(elem_classes="train", equal_height=False):
        with gr.Column(scale=5, min_width=320):
            form = gr.HTML(
                str(render_form(t, first.fields, choices, first.id)),
                elem_id="train-form",
                apply_default_css=False,
                js_on_load=when_there("loraDiffusion", "window.loraDiffusion.form(trigger)"),
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
                pasted = gr.Textbox(label=t("train.open.paste"), lines=6, elem_id="train-paste", max_length=1_000_000)
                load = gr.Button(t("train.open.load"), elem_id="train-load")
            glances = gr.HTML(elem_id="train-glances", apply_default_css=False)

    def redraw(now: Fields, preset: str = "") -> list[object]:
        fresh = Choices(site.places.datasets(), site.places.models(), shipped)
        return [str(render_form(t, now, fresh, preset)), *describe(now)]

    def describe(now: Fields) -> list[object]:
        text = toml_from_fields(now)
        folders = [now.get(f"dataset.{index}.path", "") for index in range(num_tables(now))]
        return [
            str(render_problems(t, _problems(site, text))),
            str(render_toml(t, text, now.get("run.name", ""))),
            str(render_glances(t, [(folder, glance(site.places, folder)) for folder in folders])),
        ]

    def open_page(draft: str, request: gr.Request) -> object:
        """The form of a run to copy, or of what was left unfinished; otherwise it stays as it was built."""
        copied = site.find_run(str(request.query_params.get("copy", "")))
        try:
            now = fields_from_toml(site.queue.duplicate(copied.id))[0] if copied else fields_from_json(draft)[0]
        except UserError:
            now = {}
        return redraw(now)[0] if now else gr.skip()

    def edit(values: str) -> list[object]:
        return describe(fields_from_json(values)[0])

    def choose(values: str) -> list[object]:
        now, given = fields_from_json(values)
        now = now or default_fields()
        if given.get("preset") in shipped:
            chosen = shipped[given["preset"]]
            return redraw(
                apply(chosen.fields, now, shipped[given["from"]].fields if given.get("from") in shipped else {}),
                chosen.id,
            )
        return redraw(goals.apply(given.get("goal", ""), given.get("word", ""), now))

    def read(text: str, file: bytes | None) -> Sequence[object]:
        try:
            source = file.decode("utf-8-sig") if file else text
            loaded, wrong = fields_from_toml(source)
        except UnicodeDecodeError:
            return [*[gr.skip()] * 4, _message(t("train.not_text"), bad=True)]
        except ConfigError as error:
            return [*[gr.skip()] * 4, _message(str(error), bad=True)]
        unknown = [str(problem) for problem in wrong if "unknown" in problem.message]
        return [*redraw(loaded), _message("\n".join(unknown), bad=True) if unknown else ""]

    def check(values: str) -> list[object]:
        text = toml_from_fields(fields_from_json(values)[0])
        wrong = _problems(site, text)
        if wrong:
            return [str(render_problems(t, wrong)), _message(t("train.mend_first"), bad=True)]
        return [gr.skip(), str(render_report(t, preflight.check(site.workspace, text)))]

    def add(values: str) -> list[object]:
        text = toml_from_fields(fields_from_json(values)[0])
        wrong = _problems(site, text)
        if wrong:
            return [_message(t("train.mend_first"), bad=True), ""]
        try:
            job = site.queue.add(text)
        except UserError as error:
            return [_message(str(error), bad=True), ""]
        return [_message(t("train.started", name=job.name)), f"{t.href('/run')}?{urlencode({'id': site.run_id(job)})}"]

    parts = [form, problems, toml, glances]
    quick = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    demo.load(open_page, fields, form, js=DRAFT, **quick).then(edit, fields, parts[1:], js=COLLECT, **quick)
    form.input(edit, fields, parts[1:], js=COLLECT, trigger_mode="always_last", **quick)
    form.select(choose, fields, parts, js=COLLECT, **quick)
    upload.upload(read, [pasted, upload], [*parts, said], **quick)
    load.click(read, [pasted, upload], [*parts, said], **quick)
    look.click(
        lambda: str(render_report(t, None)), None, report, queue=False, show_progress="hidden", api_visibility="private"
    ).then(
        check, fields, [problems, report], js=COLLECT, concurrency_id="check", concurrency_limit=1,
        show_progress="hidden", api_visibility="private",
    )  # fmt: skip
    start.click(add, fields, [said, goto], js=COLLECT, **quick).then(
        None, goto, None, js="(address) => { if (address) window.location.assign(address); }", api_visibility="private"
    )


def _problems(site: Site, toml: str) -> tuple[tuple[str, str], ...]:
    """(key, message) of everything that keeps the config from being started."""
    try:
        config = TrainConfig.parse(toml)
    except ConfigError as error:
        return tuple((".".join(map(str, problem.key)), problem.message) for problem in error.problems)
    return tuple((".".join(map(str, problem.key)), problem.message) for problem in site.places.problems_of(config))


def _message(text: str, *, bad: bool = False) -> str:
    return str(html('<p class="said {kind}" role="status">{text}</p>', kind="bad" if bad else "good", text=text))

"""Generate: pictures from a base and any number of adapters, one by one, with and without, and as grids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
from markupsafe import Markup
from PIL import Image

from lora_diffusion.errors import UserError
from lora_diffusion.generation.request import Request, resolve_tags
from lora_diffusion.generation.samplers import SAMPLERS
from lora_diffusion.generation.sheet import AXES
from webui.components.html import duration, html
from webui.components.live import live
from webui.components.studio import render_gallery, render_grid, render_stack, render_status
from webui.services.bases import Base, bases, find_base
from webui.services.drawing_form import SEED_MODES, DrawingForm, next_seed
from webui.services.infotext_file import read_settings
from webui.services.prompt_tags import set_strength, stack_of, toggle_words, without
from webui.services.site import Site
from webui.services.studio import with_tags
from webui.services.trash import move_to_trash
from webui.translate import Translator

EVERY_S = 0.6
FIRST_PROMPT = "a red house under a yellow sun"
QUICK: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}

LISTEN_STACK = """
element.addEventListener('input', (event) => {
    const range = event.target.closest('input[type=range]');
    if (!range) return;
    range.nextElementSibling.textContent = String(Number(range.value));
    trigger('input', { name: range.dataset.name, strength: Number(range.value) });
});
element.addEventListener('click', (event) => {
    const button = event.target.closest('[data-act]');
    if (button) trigger('select', { ...button.dataset });
});
"""
LISTEN = """
element.addEventListener('click', (event) => {
    const button = event.target.closest('[data-act]');
    if (!button || (button.dataset.confirm && !window.confirm(button.dataset.confirm))) return;
    trigger('select', { ...button.dataset });
});
element.addEventListener('keydown', (event) => {
    if (event.key === 'Enter' && event.target.matches('[role=button][data-act]')) event.target.click();
});
"""


def build(site: Site, t: Translator, demo: gr.Blocks) -> None:
    """Layout and events."""
    studio = site.studio
    known_bases = bases(site.places)
    first = known_bases[0] if known_bases else Base("", "", ((512, 512),))
    width, height = first.sizes[0]

    with gr.Row(elem_classes=["generate", "studio"], equal_height=False):
        with gr.Column(scale=4, min_width=320, elem_classes="controls"):
            base = gr.Dropdown(
                [(it.name, it.id) for it in known_bases],
                value=first.id or None,
                label=t("generate.base"),
                info=None if known_bases else t("generate.no_base"),
                elem_id="generate-base",
            )
            prompt = gr.Textbox(
                FIRST_PROMPT,
                label=t("generate.prompt"),
                info=t("generate.prompt.hint"),
                lines=3,
                max_lines=12,
                max_length=10_000,
                elem_id="generate-prompt",
            )
            with gr.Group(elem_classes="adapter-stack"):
                stack = gr.HTML(elem_id="generate-stack", apply_default_css=False, js_on_load=LISTEN_STACK)
                add = gr.Dropdown(
                    [],
                    value=None,
                    show_label=False,
                    label=t("generate.add"),
                    info=t("generate.add"),
                    filterable=True,
                    elem_id="generate-add",
                )
            with gr.Row(elem_classes="actions"):
                go = gr.Button(t("generate.go"), variant="primary", elem_id="generate-go", scale=3, min_width=120)
                stop = gr.Button(t("generate.cancel"), elem_id="generate-cancel", scale=1, min_width=90)
            said = gr.HTML(elem_id="generate-said", apply_default_css=False)
            negative = gr.Textbox(label=t("generate.negative"), lines=1, max_length=10_000, elem_id="generate-negative")
            with gr.Row():
                steps = gr.Slider(1, 100, 20, step=1, label=t("generate.steps"), elem_id="generate-steps")
                cfg = gr.Slider(1, 20, 5, step=0.5, label=t("generate.cfg"), elem_id="generate-cfg")
            with gr.Row():
                sampler = gr.Dropdown(
                    [(f"{it.label} {it.schedule_type}".strip(), key) for key, it in SAMPLERS.items()],
                    value="ddim",
                    label=t("generate.sampler"),
                    elem_id="generate-sampler",
                )
                count = gr.Slider(1, 16, 1, step=1, label=t("generate.count"), elem_id="generate-count")
            with gr.Row():
                size = gr.Dropdown(
                    _size_choices(t, first),
                    value=f"{width}x{height}",
                    label=t("generate.size"),
                    elem_id="generate-size",
                )
                side_x = gr.Number(
                    width,
                    label=t("generate.width"),
                    precision=0,
                    minimum=8,
                    maximum=2048,
                    elem_id="generate-width",
                    min_width=80,
                )
                side_y = gr.Number(
                    height,
                    label=t("generate.height"),
                    precision=0,
                    minimum=8,
                    maximum=2048,
                    elem_id="generate-height",
                    min_width=80,
                )
            with gr.Row():
                seed = gr.Number(
                    1, label=t("generate.seed"), precision=0, minimum=0, elem_id="generate-seed", min_width=120
                )
                clip_skip = gr.Slider(
                    1, 4, 1, step=1, label=t("generate.clip_skip"), elem_id="generate-clip-skip", min_width=120
                )
            seed_mode = gr.Radio(
                [(t(f"generate.seed.{mode}"), mode) for mode in SEED_MODES],
                value="random",
                label=t("generate.seed_mode"),
                elem_id="generate-seed-mode",
            )
            with gr.Accordion(t("generate.open"), open=False, elem_id="generate-open"):
                dropped = gr.File(
                    label=t("generate.open.file"),
                    file_types=[".png"],
                    type="filepath",
                    height=110,
                    elem_id="generate-png",
                )
        with gr.Column(scale=6, min_width=320, elem_classes="results"):
            status = gr.HTML(elem_id="generate-status", apply_default_css=False, js_on_load=LISTEN)
            with gr.Tabs(elem_id="generate-tabs"):
                with gr.Tab(t("generate.tab.pictures"), id="pictures"):
                    gallery = gr.HTML(elem_id="generate-gallery", apply_default_css=False, js_on_load=LISTEN)
                with gr.Tab(t("generate.tab.compare"), id="compare"):
                    gr.HTML(
                        str(html('<p class="hint">{text}</p>', text=t("generate.compare.about"))),
                        elem_id="generate-compare-about",
                        apply_default_css=False,
                    )
                    compare = gr.Button(t("generate.compare.go"), elem_id="generate-compare")
                    slider = gr.ImageSlider(
                        show_label=False, label="", interactive=False, elem_id="generate-slider", buttons=["fullscreen"]
                    )
                with gr.Tab(t("generate.tab.grid"), id="grid"):
                    axes = [(t(f"generate.axis.{name}"), name) for name in AXES]
                    with gr.Row():
                        x_name = gr.Dropdown(
                            axes, value="strength", label=t("generate.grid.x"), elem_id="generate-x", min_width=140
                        )
                        x_values = gr.Textbox(
                            "0, 0.5, 1",
                            label=t("generate.grid.values"),
                            elem_id="generate-x-values",
                            scale=2,
                            max_length=4000,
                        )
                    with gr.Row():
                        y_name = gr.Dropdown(
                            [(t("generate.grid.none"), ""), *axes],
                            value="seed",
                            label=t("generate.grid.y"),
                            elem_id="generate-y",
                            min_width=140,
                        )
                        y_values = gr.Textbox(
                            "1, 2",
                            label=t("generate.grid.values"),
                            elem_id="generate-y-values",
                            scale=2,
                            max_length=4000,
                        )
                    about = gr.HTML(elem_id="generate-grid-about", apply_default_css=False)
                    draw_grid = gr.Button(t("generate.grid.go"), elem_id="generate-grid-go")
                    grid = gr.HTML(elem_id="generate-grid", apply_default_css=False)

    fields = [prompt, negative, steps, cfg, sampler, clip_skip, count, side_x, side_y, seed, seed_mode]

    # ---- Prompt and stack ----

    def show_stack(text: str) -> str:
        known = {adapter.name: adapter for adapter in studio.library.adapters()}
        return str(render_stack(t, text, stack_of(text), known))

    slid = gr.State("")

    def follow_prompt(text: str, by_slider: str) -> object:
        """The stack for what was typed. A slider's own change must not replace the slider that is being moved."""
        return gr.skip() if text == by_slider else show_stack(text)

    def slide(text: str, event: gr.EventData) -> tuple[str, str]:
        name, strength = event._data.get("name"), event._data.get("strength")
        if isinstance(name, str) and isinstance(strength, int | float) and not isinstance(strength, bool):
            text = set_strength(text, name, float(strength))
        return text, text

    def act_on_stack(text: str, event: gr.EventData) -> tuple[str, str]:
        match event._data.get("act"):
            case "remove":
                text = without(text, str(event._data.get("name")))
            case "words":
                text = toggle_words(text, str(event._data.get("words")))
        return text, show_stack(text)

    def add_adapter(text: str, name: str | None) -> tuple[object, ...]:
        if not name:
            return gr.skip(), gr.skip(), gr.skip()
        if all(item.name != name for item in stack_of(text)):
            text = set_strength(text, name, 1.0)
        return text, show_stack(text), None

    prompt.change(follow_prompt, [prompt, slid], stack, trigger_mode="always_last", **QUICK)
    stack.input(slide, prompt, [prompt, slid], trigger_mode="always_last", **QUICK)
    stack.select(act_on_stack, prompt, [prompt, stack], **QUICK)
    add.input(add_adapter, [prompt, add], [prompt, stack, add], **QUICK)

    # ---- Base and size ----

    def choose_base(id: str) -> tuple[object, ...]:
        try:
            chosen = find_base(site.places, id)
        except UserError:
            return gr.skip(), gr.skip(), gr.skip()
        w, h = chosen.sizes[0]
        return gr.Dropdown(choices=_size_choices(t, chosen), value=f"{w}x{h}"), w, h

    def choose_size(text: str) -> tuple[object, object]:
        w, _, h = text.partition("x")
        return (int(w), int(h)) if w.isdecimal() and h.isdecimal() else (gr.skip(), gr.skip())

    base.input(choose_base, base, [size, side_x, side_y], **QUICK)
    size.input(choose_size, size, [side_x, side_y], **QUICK)
    gr.on([side_x.input, side_y.input], lambda: "", None, size, **QUICK)

    # ---- Drawing ----

    def order(base_id: str, *values: Any) -> tuple[object, object]:
        form = DrawingForm(*values)
        try:
            requests = form.requests()
            studio.desk.add("pictures", find_base(site.places, base_id or "").id, requests)
        except UserError as error:
            return _said(str(error), bad=True), gr.skip()
        return "", next_seed(form, requests)

    def order_comparison(base_id: str, *values: Any) -> str:
        try:
            request = DrawingForm(*values).request()
            if not request.adapters:
                return _said(t("generate.compare.none"), bad=True)
            requests = [replace(request, adapters={}), request]
            studio.desk.add("comparison", find_base(site.places, base_id or "").id, requests)
        except UserError as error:
            return _said(str(error), bad=True)
        return ""

    def order_grid(base_id: str, xn: str, xv: str, yn: str, yv: str, *values: Any) -> str:
        try:
            sheet = DrawingForm(*values).sheet((xn, xv), (yn, yv))
            requests = [resolve_tags(cell.request) for cell in sheet.cells()]
            studio.desk.add("sheet", find_base(site.places, base_id or "").id, requests, sheet)
        except UserError as error:
            return _said(str(error), bad=True)
        return ""

    def describe_grid(xn: str, xv: str, yn: str, yv: str, *values: Any) -> str:
        try:
            number = len(DrawingForm(*values).sheet((xn, xv), (yn, yv)).cells())
        except UserError as error:
            return str(html('<p class="hint warn">{text}</p>', text=str(error)))
        parts = [t("generate.grid.cells", n=number)]
        seconds = studio.desk.seconds_per_picture
        if seconds:
            parts.append(t("generate.grid.time", time=duration(seconds * number)))
        return str(html('<p class="hint"><b>{a}</b> · {b}</p>', a=" · ".join(parts), b=t("generate.grid.hint")))

    def cancel() -> str:
        was_drawing = bool(studio.desk.unfinished())
        studio.desk.cancel()
        return _said(t("generate.cancelled")) if was_drawing else ""

    axis_fields = [x_name, x_values, y_name, y_values]
    go.click(order, [base, *fields], [said, seed], **QUICK)
    compare.click(order_comparison, [base, *fields], said, **QUICK)
    draw_grid.click(order_grid, [base, *axis_fields, *fields], said, **QUICK)
    stop.click(cancel, None, said, **QUICK)
    gr.on(
        [demo.load, *(field.change for field in (*axis_fields, prompt))],
        describe_grid,
        [*axis_fields, *fields],
        about,
        trigger_mode="always_last",
        **QUICK,
    )

    # ---- What is there ----

    def draw(_request: gr.Request) -> list[Markup]:
        unfinished = studio.desk.unfinished()
        training = studio.training() if unfinished and unfinished[0].progress.note else None
        sheet = studio.desk.latest("sheet")
        drawings = studio.desk.drawings()
        return [
            render_status(t, unfinished, drawings[0] if drawings else None, training.name if training else ""),
            render_gallery(t, studio.gallery.newest()),
            render_grid(
                t,
                sheet,
                [site.places.id_of(path) if path else None for path in sheet.pictures] if sheet else [],
                site.places.id_of(sheet.sheet_file) if sheet and sheet.sheet_file else None,
            ),
        ]

    live(demo, draw, [status, gallery, grid], every_s=EVERY_S)

    shown = gr.State(0)

    def show_comparison(before: int) -> tuple[object, object]:
        drawing = studio.desk.latest("comparison")
        if drawing is None or drawing.phase != "done" or drawing.id == before:
            return gr.skip(), gr.skip()
        return drawing.id, _opened(drawing.pictures)

    gr.on([demo.load, gr.Timer(EVERY_S).tick], show_comparison, shown, [shown, slider], **QUICK)

    # ---- Settings of pictures ----

    def fill(request: Request) -> list[object]:
        w, h = request.size or (gr.skip(), gr.skip())
        return [
            request.prompt,
            request.negative,
            request.steps,
            request.cfg,
            request.sampler if request.sampler in SAMPLERS else "ddim",
            request.clip_skip,
            gr.skip(),
            w,
            h,
            request.seed,
            "fixed",
            show_stack(request.prompt),
            f"{w}x{h}" if request.size else gr.skip(),
        ]

    filled = [*fields, stack, size]
    nothing: list[object] = [gr.skip()] * len(filled)

    def act_on_picture(base_id: str, event: gr.EventData) -> list[object]:
        picture = studio.gallery.find(str(event._data.get("id", "")))
        if picture is None:
            return [*nothing, ""]
        match event._data.get("act"):
            case "delete":
                move_to_trash(site.workspace, site.places.resolve(picture.id))
                return [*nothing, _said(t("generate.deleted", name=picture.name))]
            case "use" if picture.parameters:
                request, unknown = studio.settle(picture.parameters)
                return [*fill(request), _about_unknown(t, unknown, picture.name)]
            case "again" if picture.parameters:
                request, unknown = studio.settle(picture.parameters)
                form = DrawingForm(
                    request.prompt,
                    request.negative,
                    request.steps,
                    request.cfg,
                    request.sampler,
                    request.clip_skip,
                    1,
                    picture.width,
                    picture.height,
                    0,
                    "random",
                )
                said, _ = order(base_id, *vars(form).values())
                return [*nothing, said or _about_unknown(t, unknown, "")]
        return [*nothing, ""]

    def act_on_status(event: gr.EventData) -> str:
        unfinished = studio.desk.unfinished()
        if not unfinished:
            return ""
        act = str(event._data.get("act"))
        try:
            if act == "pause":
                job = studio.pause_training()
            elif act == "live":
                job = studio.sample_live(unfinished[0].requests[0])
                studio.desk.cancel(unfinished[0].id)
            else:
                act, job = "wait", studio.training()
        except UserError as error:
            return _said(str(error), bad=True)
        return _said(t(f"generate.busy.{act}.done", name=job.name)) if job else ""

    def open_png(file: str | None) -> list[object]:
        if not file:
            return [*nothing, gr.skip(), None]
        try:
            parameters = read_settings(Path(file))
        except UserError:
            return [*nothing, _said(t("generate.open.none"), bad=True), None]
        request, unknown = studio.settle(parameters)
        return [*fill(request), _about_unknown(t, unknown, Path(file).name), None]

    def open_page(text: str, request: gr.Request) -> list[object]:
        """With the adapter of the address, or the settings of the newest picture."""
        adapters = studio.library.adapters()
        choices = gr.Dropdown(choices=[adapter.name for adapter in adapters if not adapter.facts.error], value=None)
        wanted = request.query_params.get("adapter")
        adapter = next((it for it in adapters if it.id == wanted), None)
        newest = next((it for it in studio.gallery.newest(8) if it.parameters), None)
        if adapter is not None:
            words = [adapter.facts.trigger] if adapter.facts.trigger else []
            text = with_tags(", ".join([*words, FIRST_PROMPT]), {adapter.name: 1.0})
            values = [text, *nothing[1:]]
        elif newest is not None and newest.parameters is not None:
            settled, _ = studio.settle(newest.parameters)
            values = fill(settled)
            values[fields.index(seed_mode)] = gr.skip()
            text = settled.prompt
        else:
            values = list(nothing)
        values[len(fields)] = show_stack(text)
        return [*values, choices]

    gallery.select(act_on_picture, base, [*filled, said], **QUICK)
    status.select(act_on_status, None, said, **QUICK)
    dropped.upload(open_png, dropped, [*filled, said, dropped], **QUICK)
    demo.load(open_page, prompt, [*filled, add], **QUICK)


def _size_choices(t: Translator, base: Base) -> list[tuple[str, str]]:
    return [*((f"{w} × {h}", f"{w}x{h}") for w, h in base.sizes), (t("generate.size.own"), "")]


def _opened(paths: Sequence[Path | None]) -> tuple[Image.Image, ...] | None:
    """Both pictures of a comparison."""
    images: list[Image.Image] = []
    for path in paths:
        if path is None or not path.is_file():
            return None
        with Image.open(path) as image:
            images.append(image.convert("RGB"))
    return tuple(images)


def _about_unknown(t: Translator, unknown: Sequence[str], name: str) -> str:
    if unknown:
        return _said(t("generate.open.unknown", names=", ".join(unknown)), bad=True)
    return _said(t("generate.open.done", name=name)) if name else ""


def _said(text: str, *, bad: bool = False) -> str:
    return str(html('<p class="said {kind}" role="status">{text}</p>', kind="bad" if bad else "good", text=text))

"""What is on the page Generate. Its components are made here and nowhere else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from dataclasses import fields as fields_of

import gradio as gr
from gradio.components import Component

from lora_diffusion.generation.samplers import SAMPLERS
from lora_diffusion.generation.sheet import AXES
from webui.components.html import html
from webui.components.listen import CLICKS, STACK
from webui.services.bases import Base
from webui.services.drawing_form import FIRST_PROMPT, SEED_MODES
from webui.translate import Translator


@dataclass(frozen=True)
class Fields:
    """What a picture is drawn with: the fields of `DrawingForm`, in its order."""

    prompt: gr.Textbox
    negative: gr.Textbox
    steps: gr.Slider
    cfg: gr.Slider
    sampler: gr.Dropdown
    clip_skip: gr.Slider
    count: gr.Slider
    width: gr.Number
    height: gr.Number
    seed: gr.Number
    seed_mode: gr.Radio

    def all(self) -> list[Component]:
        return [getattr(self, field.name) for field in fields_of(self)]


@dataclass(frozen=True)
class Controls:
    """The left side. fields: what a `DrawingForm` is made of. kept: hidden, what the browser kept of it as JSON.

    tab: hidden, what the browser calls this tab, which stays the same when the page is loaded again.
    """

    base: gr.Dropdown
    stack: gr.HTML
    add: gr.Dropdown
    go: gr.Button
    stop: gr.Button
    said: gr.HTML
    size: gr.Dropdown
    dropped: gr.File
    fields: Fields
    kept: gr.Textbox
    tab: gr.Textbox


@dataclass(frozen=True)
class GridTab:
    """Two axes, how many pictures they make, and the pictures."""

    x_name: gr.Dropdown
    x_values: gr.Textbox
    y_name: gr.Dropdown
    y_values: gr.Textbox
    about: gr.HTML
    go: gr.Button
    cells: gr.HTML

    def axes(self) -> list[Component]:
        """In the order of `drawing_form.AXIS_FIELDS`."""
        return [self.x_name, self.x_values, self.y_name, self.y_values]


@dataclass(frozen=True)
class Results:
    """The right side."""

    status: gr.HTML
    gallery: gr.HTML
    compare: gr.Button
    slider: gr.ImageSlider
    grid: GridTab


def make_controls(t: Translator, known_bases: Sequence[Base]) -> Controls:
    """In the order in which they are seen."""
    first = known_bases[0] if known_bases else Base("", "", ((512, 512),))
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
    stack, add = _stack(t)
    with gr.Row(elem_classes="actions"):
        go = gr.Button(t("generate.go"), variant="primary", elem_id="generate-go", scale=3, min_width=120)
        stop = gr.Button(t("generate.cancel"), elem_id="generate-cancel", scale=1, min_width=90)
    said = gr.HTML(elem_id="generate-said", apply_default_css=False)
    negative = gr.Textbox("", label=t("generate.negative"), lines=1, max_length=10_000, elem_id="generate-negative")
    steps, cfg, sampler, count = _sampling(t)
    size, width, height = _size(t, first)
    seed, clip_skip, seed_mode = _seed(t)
    fields = Fields(prompt, negative, steps, cfg, sampler, clip_skip, count, width, height, seed, seed_mode)
    with gr.Accordion(t("generate.open"), open=False, elem_id="generate-open"):
        dropped = gr.File(
            label=t("generate.open.file"),
            file_types=[".png"],
            type="filepath",
            height=110,
            elem_id="generate-png",
        )
    kept = gr.Textbox("", visible="hidden", elem_id="generate-kept", label="kept")
    tab = gr.Textbox("", visible="hidden", elem_id="generate-tab", label="tab")
    return Controls(base, stack, add, go, stop, said, size, dropped, fields, kept, tab)


def size_choices(t: Translator, base: Base) -> list[tuple[str, str]]:
    """The sizes of a base, and "" for one's own."""
    return [*((f"{w} × {h}", f"{w}x{h}") for w, h in base.sizes), (t("generate.size.own"), "")]


def add_choices(t: Translator, names: Iterable[str]) -> list[tuple[str, str]]:
    """Adapters to add, after an entry that says what the list is for and adds none."""
    return [(t("generate.add"), ""), *((name, name) for name in names)]


def make_results(t: Translator) -> Results:
    """In the order in which they are seen."""
    status = gr.HTML(elem_id="generate-status", apply_default_css=False, js_on_load=CLICKS)
    with gr.Tabs(elem_id="generate-tabs"):
        with gr.Tab(t("generate.tab.pictures"), id="pictures"):
            gallery = gr.HTML(elem_id="generate-gallery", apply_default_css=False, js_on_load=CLICKS)
        with gr.Tab(t("generate.tab.compare"), id="compare"):
            about = html('<p class="hint">{text}</p>', text=t("generate.compare.about"))
            gr.HTML(str(about), elem_id="generate-compare-about", apply_default_css=False)
            compare = gr.Button(t("generate.compare.go"), elem_id="generate-compare")
            slider = gr.ImageSlider(
                show_label=False, label="", interactive=False, elem_id="generate-slider", buttons=["fullscreen"]
            )
        with gr.Tab(t("generate.tab.grid"), id="grid"):
            grid = _grid(t)
    return Results(status, gallery, compare, slider, grid)


def _stack(t: Translator) -> tuple[gr.HTML, gr.Dropdown]:
    with gr.Group(elem_classes="adapter-stack"):
        stack = gr.HTML(elem_id="generate-stack", apply_default_css=False, js_on_load=STACK)
        add = gr.Dropdown(
            add_choices(t, ()),
            value="",
            show_label=False,
            label=t("generate.add"),
            container=False,
            elem_id="generate-add",
        )
    return stack, add


def _sampling(t: Translator) -> tuple[gr.Slider, gr.Slider, gr.Dropdown, gr.Slider]:
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
    return steps, cfg, sampler, count


def _size(t: Translator, base: Base) -> tuple[gr.Dropdown, gr.Number, gr.Number]:
    width, height = base.sizes[0]
    with gr.Row():
        size = gr.Dropdown(
            size_choices(t, base), value=f"{width}x{height}", label=t("generate.size"), elem_id="generate-size"
        )
        return size, _side(t, "width", width), _side(t, "height", height)


def _side(t: Translator, name: str, value_px: int) -> gr.Number:
    return gr.Number(
        value_px,
        label=t(f"generate.{name}"),
        precision=0,
        minimum=8,
        maximum=2048,
        elem_id=f"generate-{name}",
        min_width=80,
    )


def _seed(t: Translator) -> tuple[gr.Number, gr.Slider, gr.Radio]:
    with gr.Row():
        seed = gr.Number(1, label=t("generate.seed"), precision=0, minimum=0, elem_id="generate-seed", min_width=120)
        clip_skip = gr.Slider(
            1, 4, 1, step=1, label=t("generate.clip_skip"), elem_id="generate-clip-skip", min_width=120
        )
    seed_mode = gr.Radio(
        [(t(f"generate.seed.{mode}"), mode) for mode in SEED_MODES],
        value="random",
        label=t("generate.seed_mode"),
        elem_id="generate-seed-mode",
    )
    return seed, clip_skip, seed_mode


def _grid(t: Translator) -> GridTab:
    none = [(t("generate.grid.none"), "")]
    x_name, x_values = _axis(t, "x", [], "strength", "0, 0.5, 1")
    y_name, y_values = _axis(t, "y", none, "seed", "1, 2")
    return GridTab(
        x_name=x_name,
        x_values=x_values,
        y_name=y_name,
        y_values=y_values,
        about=gr.HTML(elem_id="generate-grid-about", apply_default_css=False),
        go=gr.Button(t("generate.grid.go"), elem_id="generate-grid-go"),
        cells=gr.HTML(elem_id="generate-grid", apply_default_css=False),
    )


def _axis(
    t: Translator, letter: str, before: Sequence[tuple[str, str]], name: str, values: str
) -> tuple[gr.Dropdown, gr.Textbox]:
    with gr.Row():
        return (
            gr.Dropdown(
                [*before, *((t(f"generate.axis.{axis}"), axis) for axis in AXES)],
                value=name,
                label=t(f"generate.grid.{letter}"),
                elem_id=f"generate-{letter}",
                min_width=140,
            ),
            gr.Textbox(
                values,
                label=t("generate.grid.values"),
                elem_id=f"generate-{letter}-values",
                scale=2,
                max_length=4000,
            ),
        )

"""What is on the page Adapters. Its components are made here and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import gradio as gr
from gradio.components import Component

from lora_diffusion.formats.families import FAMILY_NAMES
from webui.components.html import html
from webui.components.listen import CLICKS, STACK
from webui.services.bases import Base
from webui.services.drawing_form import FIRST_PROMPT
from webui.services.library import KINDS
from webui.translate import Translator

SOURCES = ("library", "run", "sample")
METHODS = ["concat", "svd", "ties", "dare"]
FORMATS = ["kohya", "peft"]
PRECISIONS = ["same", "fp16", "bf16", "fp32"]
MAX_RANK = 1024
NEW_NAME = "{name} small"
"""What is proposed for a file that is made of another."""


@dataclass(frozen=True)
class Listing:
    """The left side. chosen: a hidden field with the id of the adapter whose inspector is open. kept: hidden, what the
    browser kept of it and of the mix as JSON.

    A hidden field and no State: only its changes are told when events do not wait in the queue.
    """

    chosen: gr.Textbox
    kept: gr.Textbox
    search: gr.Textbox
    family: gr.Dropdown
    kind: gr.Dropdown
    source: gr.Dropdown
    tag: gr.Dropdown
    cards: gr.HTML

    def filters(self) -> list[Component]:
        """In the order of `matching`."""
        return [self.search, self.family, self.kind, self.source, self.tag]


@dataclass(frozen=True)
class Describe:
    """What a file says of itself. filled: a hidden field with what the texts were filled with, by `note_of`."""

    filled: gr.Textbox
    title: gr.Textbox
    trigger: gr.Textbox
    tags: gr.Textbox
    about: gr.Textbox
    thumbnail: gr.File
    save: gr.Button

    def texts(self) -> list[Component]:
        return [self.title, self.trigger, self.tags, self.about]


@dataclass(frozen=True)
class Change:
    """New files of the chosen one."""

    name: gr.Textbox
    format: gr.Dropdown
    precision: gr.Dropdown
    convert: gr.Button
    rank: gr.Number
    energy: gr.Number
    resize: gr.Button

    def values(self) -> list[Component]:
        return [self.name, self.format, self.precision, self.rank, self.energy]


@dataclass(frozen=True)
class Mix:
    """New files of several. text: a hidden field with their tags, as in a prompt."""

    text: gr.Textbox
    stack: gr.HTML
    method: gr.Dropdown
    rank: gr.Number
    base: gr.Dropdown
    prompt: gr.Textbox
    preview: gr.Button
    overlap: gr.Button
    slider: gr.ImageSlider
    heat: gr.HTML
    name: gr.Textbox
    save: gr.Button
    bake: gr.Button


@dataclass(frozen=True)
class Inspector:
    """The right side."""

    head: gr.HTML
    said: gr.HTML
    tabs: gr.Tabs
    inspection: gr.HTML
    describe: Describe
    change: Change
    mix: Mix


def make_listing(t: Translator) -> Listing:
    """Filters above, cards below."""
    chosen = gr.Textbox("", visible="hidden", elem_id="adapters-chosen", label="chosen")
    kept = gr.Textbox("", visible="hidden", elem_id="adapters-kept", label="kept")
    with gr.Row(elem_classes="filters"):
        search = gr.Textbox(
            "",
            placeholder=t("adapters.search"),
            label=t("adapters.search"),
            show_label=False,
            container=False,
            elem_id="adapters-search",
            scale=3,
            max_length=300,
        )
        family = _filter(t, "family", [(name, key) for key, name in FAMILY_NAMES.items()], 100)
        kind = _filter(t, "kind", [(kind, kind) for kind in KINDS], 90)
        source = _filter(t, "source", [(t(f"adapters.source.{it}"), it) for it in SOURCES], 100)
        tag = _filter(t, "tag", [], 90)
    cards = gr.HTML(elem_id="adapters-cards", apply_default_css=False, js_on_load=CLICKS)
    return Listing(chosen, kept, search, family, kind, source, tag, cards)


def make_inspector(t: Translator, known_bases: Sequence[Base]) -> Inspector:
    """The chosen one on top, what can be done below."""
    mixed = gr.Textbox("", visible="hidden", elem_id="adapters-mixed", label="mix")
    head = gr.HTML(elem_id="adapters-head", apply_default_css=False, js_on_load=CLICKS)
    said = gr.HTML(elem_id="adapters-said", apply_default_css=False)
    with gr.Tabs(elem_id="adapters-tabs") as tabs:
        with gr.Tab(t("adapters.tab.look"), id="look"):
            inspection = gr.HTML(elem_id="adapters-inspection", apply_default_css=False)
        with gr.Tab(t("adapters.tab.edit"), id="edit"):
            describe = _describe(t)
        with gr.Tab(t("adapters.tab.change"), id="change"):
            change = _change(t)
        with gr.Tab(t("adapters.tab.mix"), id="mix"):
            mix = _mix(t, mixed, known_bases)
    return Inspector(head, said, tabs, inspection, describe, change, mix)


def make_title(t: Translator) -> None:
    heading = html('<div class="title"><h1>{text}</h1></div>', text=t("adapters.title"))
    gr.HTML(str(heading), elem_id="adapters-title", apply_default_css=False)


def _filter(t: Translator, name: str, choices: Sequence[tuple[str, str]], min_width: int) -> gr.Dropdown:
    """A list whose first entry is its name and stands for everything."""
    return gr.Dropdown(
        [(t(f"adapters.{name}"), ""), *choices],
        value="",
        label=t(f"adapters.{name}"),
        show_label=False,
        container=False,
        elem_id=f"adapters-{name}",
        min_width=min_width,
    )


def _describe(t: Translator) -> Describe:
    return Describe(
        filled=gr.Textbox("", visible="hidden", elem_id="adapters-edit-filled", label="filled"),
        title=gr.Textbox("", label=t("adapters.edit.title"), elem_id="adapters-edit-title", max_length=300),
        trigger=gr.Textbox("", label=t("adapters.edit.trigger"), elem_id="adapters-edit-trigger", max_length=1000),
        tags=gr.Textbox("", label=t("adapters.edit.tags"), elem_id="adapters-edit-tags", max_length=4000),
        about=gr.Textbox(
            "", label=t("adapters.edit.description"), lines=3, elem_id="adapters-edit-description", max_length=8000
        ),
        thumbnail=gr.File(
            label=t("adapters.edit.thumbnail"),
            file_types=[".png", ".jpg", ".jpeg", ".webp"],
            type="filepath",
            height=90,
            elem_id="adapters-edit-thumbnail",
        ),
        save=gr.Button(t("adapters.edit.save"), variant="primary", elem_id="adapters-edit-save"),
    )


def _change(t: Translator) -> Change:
    name = gr.Textbox("", label=t("adapters.name"), elem_id="adapters-new-name", max_length=100)
    with gr.Row():
        format = _choice(t("adapters.format"), "adapters-format", FORMATS, "peft")
        precision = _choice(t("adapters.precision"), "adapters-precision", PRECISIONS, "same")
        convert = gr.Button(t("adapters.convert"), elem_id="adapters-convert", min_width=100)
    with gr.Row():
        rank = gr.Number(
            8,
            label=t("adapters.resize.rank"),
            precision=0,
            minimum=1,
            maximum=MAX_RANK,
            elem_id="adapters-rank",
            min_width=90,
        )
        energy = gr.Number(
            0,
            label=t("adapters.resize.energy"),
            minimum=0,
            maximum=1,
            step=0.01,
            elem_id="adapters-energy",
            min_width=130,
        )
        resize = gr.Button(t("adapters.resize"), elem_id="adapters-resize", min_width=100)
    return Change(name, format, precision, convert, rank, energy, resize)


def _choice(label: str, elem_id: str, choices: list[str], value: str) -> gr.Dropdown:
    return gr.Dropdown([(name, name) for name in choices], value=value, label=label, elem_id=elem_id, min_width=100)


def _mix(t: Translator, text: gr.Textbox, known_bases: Sequence[Base]) -> Mix:
    with gr.Group(elem_classes="adapter-stack"):
        stack = gr.HTML(elem_id="adapters-mix", apply_default_css=False, js_on_load=STACK)
    with gr.Row():
        method = _choice(t("adapters.mix.method"), "adapters-method", METHODS, METHODS[0])
        rank = gr.Number(
            0,
            label=t("adapters.mix.rank"),
            precision=0,
            minimum=0,
            maximum=MAX_RANK,
            elem_id="adapters-merge-rank",
            min_width=100,
        )
        base = gr.Dropdown(
            [(it.name, it.id) for it in known_bases],
            value=known_bases[0].id if known_bases else None,
            label=t("generate.base"),
            elem_id="adapters-base",
            min_width=120,
        )
    prompt = gr.Textbox(FIRST_PROMPT, label=t("adapters.mix.prompt"), elem_id="adapters-prompt", max_length=4000)
    with gr.Row():
        preview = gr.Button(t("adapters.mix.preview"), variant="primary", elem_id="adapters-preview")
        overlap = gr.Button(t("adapters.mix.overlap"), elem_id="adapters-overlap")
    slider = gr.ImageSlider(
        show_label=False,
        label="",
        interactive=False,
        elem_id="adapters-slider",
        buttons=["fullscreen"],
        visible=False,
    )
    heat = gr.HTML(elem_id="adapters-heat", apply_default_css=False)
    name = gr.Textbox("", label=t("adapters.name"), elem_id="adapters-merge-name", max_length=100)
    with gr.Row():
        save = gr.Button(t("adapters.mix.save"), elem_id="adapters-merge-save")
        bake = gr.Button(t("adapters.mix.bake"), elem_id="adapters-bake")
    return Mix(text, stack, method, rank, base, prompt, preview, overlap, slider, heat, name, save, bake)

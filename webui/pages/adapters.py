"""Adapters: the library, what is in a file, and the tools that make new files of it."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from lora_diffusion.container import read_header
from lora_diffusion.errors import UserError
from lora_diffusion.formats.families import FAMILY_NAMES
from lora_diffusion.generation.request import Request, take_out_tags
from webui.components.html import html
from webui.components.library import SHOWN, render_cards, render_head, render_inspection, render_overlap
from webui.components.studio import render_stack
from webui.pages.generate import FIRST_PROMPT, LISTEN, LISTEN_STACK, QUICK
from webui.services.adapter_edit import Description, copy_to_library, edit
from webui.services.bases import Base, bases, find_base
from webui.services.library import KINDS, Adapter, matching
from webui.services.prompt_tags import set_strength, stack_of, without
from webui.services.site import Site
from webui.services.thumbnails import data_uri, picture_of
from webui.services.trash import move_to_trash
from webui.translate import Translator

TOOLS: dict[str, Any] = {
    "concurrency_id": "tools",
    "concurrency_limit": 2,
    "show_progress": "hidden",
    "api_visibility": "private",
}
EVERY_S = 1.0


def build(site: Site, t: Translator, demo: gr.Blocks) -> None:
    """Layout and events."""
    studio = site.studio
    known_bases = bases(site.places)
    heading = html('<div class="title"><h1>{text}</h1></div>', text=t("adapters.title"))
    gr.HTML(str(heading), elem_id="adapters-title", apply_default_css=False)
    # A hidden field and no State: only its changes are told when events do not wait in the queue.
    chosen = gr.Textbox(visible="hidden", elem_id="adapters-chosen", label="chosen")
    mix = gr.Textbox(visible="hidden", elem_id="adapters-mixed", label="mix")
    merged = gr.State("")
    with gr.Row(elem_classes=["adapter-page", "studio"], equal_height=False):
        with gr.Column(scale=6, min_width=320):
            with gr.Row(elem_classes="filters"):
                search = gr.Textbox(
                    placeholder=t("adapters.search"),
                    label=t("adapters.search"),
                    show_label=False,
                    container=False,
                    elem_id="adapters-search",
                    scale=3,
                    max_length=300,
                )
                family = gr.Dropdown(
                    [(t("adapters.family"), ""), *((name, key) for key, name in FAMILY_NAMES.items())],
                    value="",
                    label=t("adapters.family"),
                    show_label=False,
                    container=False,
                    elem_id="adapters-family",
                    min_width=100,
                )
                kind = gr.Dropdown(
                    [(t("adapters.kind"), ""), *KINDS],
                    value="",
                    label=t("adapters.kind"),
                    show_label=False,
                    container=False,
                    elem_id="adapters-kind",
                    min_width=90,
                )
                source = gr.Dropdown(
                    [
                        (t("adapters.source"), ""),
                        *((t(f"adapters.source.{it}"), it) for it in ("library", "run", "sample")),
                    ],
                    value="",
                    label=t("adapters.source"),
                    show_label=False,
                    container=False,
                    elem_id="adapters-source",
                    min_width=100,
                )
            cards = gr.HTML(elem_id="adapters-cards", apply_default_css=False, js_on_load=LISTEN)
        with gr.Column(scale=5, min_width=320, elem_classes="rail"):
            head = gr.HTML(elem_id="adapters-head", apply_default_css=False, js_on_load=LISTEN)
            said = gr.HTML(elem_id="adapters-said", apply_default_css=False)
            with gr.Tabs(elem_id="adapters-tabs") as tabs:
                with gr.Tab(t("adapters.tab.look"), id="look"):
                    inspection = gr.HTML(elem_id="adapters-inspection", apply_default_css=False)
                with gr.Tab(t("adapters.tab.edit"), id="edit"):
                    title = gr.Textbox(label=t("adapters.edit.title"), elem_id="adapters-edit-title", max_length=300)
                    trigger = gr.Textbox(
                        label=t("adapters.edit.trigger"), elem_id="adapters-edit-trigger", max_length=1000
                    )
                    tags = gr.Textbox(label=t("adapters.edit.tags"), elem_id="adapters-edit-tags", max_length=4000)
                    about = gr.Textbox(
                        label=t("adapters.edit.description"),
                        lines=3,
                        elem_id="adapters-edit-description",
                        max_length=8000,
                    )
                    thumbnail = gr.File(
                        label=t("adapters.edit.thumbnail"),
                        file_types=[".png", ".jpg", ".jpeg", ".webp"],
                        type="filepath",
                        height=90,
                        elem_id="adapters-edit-thumbnail",
                    )
                    save = gr.Button(t("adapters.edit.save"), variant="primary", elem_id="adapters-edit-save")
                with gr.Tab(t("adapters.tab.change"), id="change"):
                    new_name = gr.Textbox(label=t("adapters.name"), elem_id="adapters-new-name", max_length=100)
                    with gr.Row():
                        format = gr.Dropdown(
                            ["kohya", "peft"],
                            value="peft",
                            label=t("adapters.format"),
                            elem_id="adapters-format",
                            min_width=100,
                        )
                        precision = gr.Dropdown(
                            ["same", "fp16", "bf16", "fp32"],
                            value="same",
                            label=t("adapters.precision"),
                            elem_id="adapters-precision",
                            min_width=100,
                        )
                        convert = gr.Button(t("adapters.convert"), elem_id="adapters-convert", min_width=100)
                    with gr.Row():
                        rank = gr.Number(
                            8,
                            label=t("adapters.resize.rank"),
                            precision=0,
                            minimum=1,
                            maximum=1024,
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
                with gr.Tab(t("adapters.tab.mix"), id="mix"):
                    with gr.Group(elem_classes="adapter-stack"):
                        stack = gr.HTML(elem_id="adapters-mix", apply_default_css=False, js_on_load=LISTEN_STACK)
                    with gr.Row():
                        method = gr.Dropdown(
                            ["concat", "svd", "ties", "dare"],
                            value="concat",
                            label=t("adapters.mix.method"),
                            elem_id="adapters-method",
                            min_width=100,
                        )
                        merge_rank = gr.Number(
                            0,
                            label=t("adapters.mix.rank"),
                            precision=0,
                            minimum=0,
                            maximum=1024,
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
                    prompt = gr.Textbox(
                        FIRST_PROMPT, label=t("adapters.mix.prompt"), elem_id="adapters-prompt", max_length=4000
                    )
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
                    merge_name = gr.Textbox(label=t("adapters.name"), elem_id="adapters-merge-name", max_length=100)
                    with gr.Row():
                        keep = gr.Button(t("adapters.mix.save"), elem_id="adapters-merge-save")
                        bake = gr.Button(t("adapters.mix.bake"), elem_id="adapters-bake")

    filters = [search, family, kind, source]
    fields = [title, trigger, tags, about]

    # ---- The list ----

    def show_cards(words: str, family: str, kind: str, source: str, id: str) -> str:
        adapters = studio.library.adapters()
        found = matching(adapters, words or "", family or "", kind or "", source or "")
        pictured = {it.id for it in found[:SHOWN] if it.facts.has_thumbnail or picture_of(site, it)}
        return str(render_cards(t, found, len(adapters), id, pictured))

    def act(id: str, mixed: str, event: gr.EventData) -> tuple[object, ...]:
        """A card was clicked: chosen, or put into the mix."""
        if event._data.get("act") == "mix":
            name = str(event._data.get("name"))
            if studio.library.named(name) and all(item.name != name for item in stack_of(mixed)):
                mixed = set_strength(mixed, name, 1.0)
            return id, mixed, gr.Tabs(selected="mix")
        return str(event._data.get("id", "")), mixed, gr.Tabs(selected="look")

    def show_chosen(id: str) -> tuple[object, ...]:
        adapter = studio.library.find(id)
        measuring = html('<p class="busy">{text}</p>', text=t("adapters.measuring")) if adapter else ""
        if adapter is None:
            return str(render_head(t, None)), "", "", "", "", "", ""
        facts = adapter.facts
        given = read_header(adapter.path).metadata
        values = (given.get("modelspec.title", ""), facts.trigger, given.get("modelspec.tags", ""), facts.description)
        return str(render_head(t, adapter)), str(measuring), *values, f"{adapter.path.stem} small"

    def inspect(id: str) -> str:
        adapter = studio.library.find(id)
        if adapter is None:
            return ""
        try:
            return str(render_inspection(t, studio.tools.inspect(adapter)))
        except UserError as error:
            return _said(str(error), bad=True)

    gr.on(
        [demo.load, *(item.change for item in filters)],
        show_cards,
        [*filters, chosen],
        cards,
        trigger_mode="always_last",
        **QUICK,
    )
    cards.select(act, [chosen, mix], [chosen, mix, tabs], **QUICK)
    chosen.change(show_chosen, chosen, [head, inspection, *fields, new_name], **QUICK).then(
        show_cards, [*filters, chosen], cards, **QUICK
    ).then(inspect, chosen, inspection, **TOOLS)
    demo.load(lambda: str(render_head(t, None)), None, head, **QUICK)

    # ---- One adapter ----

    def act_on_one(id: str, event: gr.EventData) -> tuple[object, str]:
        adapter = studio.library.find(id)
        if adapter is None:
            return gr.skip(), _said(t("adapters.gone"), bad=True)
        try:
            if event._data.get("act") == "copy":
                path = copy_to_library(site.workspace, adapter)
                return site.places.id_of(path), _said(t("adapters.copied", name=site.places.id_of(path)))
            if event._data.get("act") == "delete" and adapter.source != "sample":
                move_to_trash(site.workspace, adapter.path)
                return "", _said(t("adapters.deleted", name=adapter.path.name))
        except (UserError, OSError) as error:
            return gr.skip(), _said(str(error), bad=True)
        return gr.skip(), ""

    def save_description(id: str, title: str, trigger: str, tags: str, about: str, picture: str | None) -> str:
        def write(adapter: Adapter) -> str:
            thumbnail = data_uri(Path(picture)) if picture else None
            edit(adapter, Description(title, trigger, tags, about, thumbnail))
            return t("adapters.edit.done")

        return on_chosen(id, write)

    def on_chosen(id: str, do: Callable[[Adapter], str]) -> str:
        adapter = studio.library.find(id)
        if adapter is None:
            return _said(t("adapters.none"), bad=True)
        try:
            return _said(do(adapter))
        except (UserError, OSError, Image.DecompressionBombError) as error:
            return _said(str(error), bad=True)

    def convert_chosen(id: str, name: str, format: str, precision: str) -> str:
        def run(adapter: Adapter) -> str:
            path, text = studio.tools.convert(adapter, name, format, precision)
            return f"{t('adapters.made', name=path.name)}\n{text}"

        return on_chosen(id, run)

    def resize_chosen(id: str, name: str, rank: float | None, energy: float | None) -> str:
        def run(adapter: Adapter) -> str:
            if not energy and not rank:
                raise UserError(t("adapters.resize.rank"))
            path, text = studio.tools.resize(adapter, name, int(rank) if rank else None, energy or None)
            return f"{t('adapters.made', name=path.name)}\n{text}"

        return on_chosen(id, run)

    working = _said(t("adapters.working"))
    redraw = {"fn": show_cards, "inputs": [*filters, chosen], "outputs": cards}
    head.select(act_on_one, chosen, [chosen, said], **QUICK).then(**redraw, **QUICK)
    save.click(save_description, [chosen, *fields, thumbnail], said, **QUICK).then(
        lambda id: (str(render_head(t, studio.library.find(id))), None), chosen, [head, thumbnail], **QUICK
    ).then(**redraw, **QUICK)
    convert.click(lambda: working, None, said, **QUICK).then(
        convert_chosen, [chosen, new_name, format, precision], said, **TOOLS
    ).then(**redraw, **QUICK)
    resize.click(lambda: working, None, said, **QUICK).then(
        resize_chosen, [chosen, new_name, rank, energy], said, **TOOLS
    ).then(**redraw, **QUICK)

    # ---- The mix ----

    def show_mix(mixed: str) -> str:
        known = {adapter.name: adapter for adapter in studio.library.adapters()}
        items = stack_of(mixed)
        if not items:
            return str(html('<p class="stack-empty">{text}</p>', text=t("adapters.mix.about")))
        return str(render_stack(t, "", items, known))

    slid = gr.State("")

    def slide(mixed: str, event: gr.EventData) -> tuple[str, str]:
        name, strength = event._data.get("name"), event._data.get("strength")
        if isinstance(name, str) and isinstance(strength, int | float) and not isinstance(strength, bool):
            mixed = set_strength(mixed, name, float(strength))
        return mixed, mixed

    def follow_mix(mixed: str, by_slider: str) -> object:
        return gr.skip() if mixed == by_slider else show_mix(mixed)

    def act_on_mix(mixed: str, event: gr.EventData) -> tuple[str, str]:
        if event._data.get("act") == "remove":
            mixed = without(mixed, str(event._data.get("name")))
        return mixed, show_mix(mixed)

    def weights_of(mixed: str, least: int) -> dict[Path, float]:
        found: dict[Path, float] = {}
        for item in stack_of(mixed):
            adapter = studio.library.named(item.name)
            if adapter is not None and item.strength is not None:
                found[adapter.path] = item.strength
        if len(found) < least:
            raise UserError(t("adapters.mix.few" if least > 1 else "adapters.mix.one"))
        return found

    def merge(mixed: str, method: str, rank: float | None, base_id: str | None, text: str) -> tuple[object, str]:
        """Merge into a file that is only looked at, and have both drawn."""
        try:
            chosen_base = find_base(site.places, base_id or "")
            weights = weights_of(mixed, 2)
            target = studio.tools.preview_file(secrets.token_hex(3))
            studio.tools.merge(weights, target, method, int(rank) if rank else None, site.places.root / chosen_base.id)
            studio.desk.add("trial", chosen_base.id, _both(chosen_base, text, mixed, target))
        except UserError as error:
            return gr.skip(), _said(str(error), bad=True)
        return _ticket(mixed, method, rank, target.name), _said(t("adapters.mix.drawing"))

    def keep_merged(mixed: str, method: str, rank: float | None, base_id: str | None, name: str, looked_at: str) -> str:
        try:
            weights = weights_of(mixed, 2)
            target = studio.tools.target(name)
            previewed = site.workspace.adapters / "_preview" / looked_at.rpartition("\n")[2]
            if looked_at == _ticket(mixed, method, rank, previewed.name) and previewed.is_file():
                previewed.rename(target)  # what was looked at is what is saved
                return _said(t("adapters.made", name=target.name))
            base_path = site.places.root / find_base(site.places, base_id).id if base_id else None
            text = studio.tools.merge(weights, target, method, int(rank) if rank else None, base_path)
            return _said(f"{t('adapters.made', name=target.name)}\n{text}")
        except (UserError, OSError) as error:
            return _said(str(error), bad=True)

    def bake_mix(mixed: str, base_id: str | None, name: str) -> str:
        try:
            chosen_base = site.places.root / find_base(site.places, base_id or "").id
            path, _ = studio.tools.bake(weights_of(mixed, 1), chosen_base, name)
            return _said(t("adapters.baked", name=path.name))
        except (UserError, OSError) as error:
            return _said(str(error), bad=True)

    def compare(mixed: str) -> tuple[str, str]:
        try:
            names = [item.name for item in stack_of(mixed)]
            adapters = [adapter for name in names if (adapter := studio.library.named(name))]
            if len(adapters) < 2:
                raise UserError(t("adapters.mix.few"))
            return str(render_overlap(t, studio.tools.overlap(adapters))), ""
        except UserError as error:
            return "", _said(str(error), bad=True)

    mix.change(follow_mix, [mix, slid], stack, **QUICK)
    demo.load(show_mix, mix, stack, **QUICK)
    stack.input(slide, mix, [mix, slid], trigger_mode="always_last", **QUICK)
    stack.select(act_on_mix, mix, [mix, stack], **QUICK)
    preview.click(lambda: working, None, said, **QUICK).then(
        merge, [mix, method, merge_rank, base, prompt], [merged, said], **TOOLS
    )
    keep.click(lambda: working, None, said, **QUICK).then(
        keep_merged, [mix, method, merge_rank, base, merge_name, merged], said, **TOOLS
    ).then(**redraw, **QUICK)
    bake.click(lambda: working, None, said, **QUICK).then(bake_mix, [mix, base, merge_name], said, **TOOLS)
    overlap.click(lambda: working, None, said, **QUICK).then(compare, mix, [heat, said], **TOOLS)

    shown = gr.State(0)

    def show_trial(before: int) -> tuple[object, ...]:
        drawing = studio.desk.latest("trial")
        if drawing is None or drawing.id == before or drawing.is_unfinished:
            return gr.skip(), gr.skip(), gr.skip()
        if drawing.phase != "done":
            return drawing.id, gr.skip(), _said(drawing.message, bad=True)
        images: list[Image.Image] = []
        for path in drawing.pictures:
            if path is None or not path.is_file():
                return drawing.id, gr.skip(), gr.skip()
            with Image.open(path) as image:
                images.append(image.convert("RGB"))
        return (
            drawing.id,
            gr.ImageSlider(value=(images[0], images[1]), visible=True),
            _said(t("adapters.mix.preview.about")),
        )

    def latest_trial() -> int:
        drawing = studio.desk.latest("trial")
        return drawing.id if drawing is not None and not drawing.is_unfinished else 0

    demo.load(latest_trial, None, shown, **QUICK)
    gr.Timer(EVERY_S).tick(show_trial, shown, [shown, slider, said], **QUICK)


def _both(base: Base, text: str, mixed: str, merged: Path) -> list[Request]:
    """The adapters at their strengths, then the merged file at 1."""
    prompt, _ = take_out_tags(text)
    strengths = {item.name: item.strength for item in stack_of(mixed) if item.strength is not None}
    common = {"prompt": prompt, "seed": 7, "steps": 20, "cfg": 5.0, "size": base.sizes[0]}
    return [Request(**common, adapters=strengths), Request(**common, adapters={merged.stem: 1.0})]


def _ticket(mixed: str, method: str, rank: float | None, file: str) -> str:
    """What a preview was made of, and its file."""
    return f"{mixed}\n{method}\n{rank}\n{file}"


def _said(text: str, *, bad: bool = False) -> str:
    return str(html('<p class="said {kind}" role="status">{text}</p>', kind="bad" if bad else "good", text=text))

"""Settings that come from pictures: of the gallery, dropped files, and the newest one when the page opens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from dataclasses import fields as fields_of
from pathlib import Path

import gradio as gr

from lora_diffusion.errors import UserError
from lora_diffusion.generation.request import Request
from lora_diffusion.generation.samplers import SAMPLERS
from webui.components.html import said
from webui.pages.base_choice import offer_bases
from webui.pages.events import QUICK
from webui.pages.generate.layout import Controls, Fields, Results, add_choices, size_choices
from webui.pages.generate.ordering import Orders
from webui.pages.generate.prompt import show_stack
from webui.pages.kept import keep_fields
from webui.services.bases import Base, base_of_run, find_base
from webui.services.drawing_form import AXIS_FIELDS, FIRST_PROMPT, DrawingForm, fields_from_json
from webui.services.gallery import Picture
from webui.services.infotext_file import read_settings
from webui.services.library import Adapter
from webui.services.prompt_tags import set_strength, stack_of, without
from webui.services.site import Site
from webui.services.studio import with_tags
from webui.services.trash import move_to_trash
from webui.translate import Translator

NUM_FIELDS = len(fields_of(Fields))
_WIDTH, _HEIGHT = ([field.name for field in fields_of(Fields)].index(name) for name in ("width", "height"))
UNCHANGED: list[object] = [gr.skip()] * (NUM_FIELDS + 2)
"""Fields, stack and size as they are."""


def connect(site: Site, t: Translator, demo: gr.Blocks, controls: Controls, results: Results) -> None:
    """Whatever fills the fields."""
    handlers = Opening(site, t)
    filled = [*controls.fields.all(), controls.stack, controls.size]
    results.gallery.select(handlers.act_on_picture, [controls.base, controls.tab], [*filled, controls.said], **QUICK)
    controls.dropped.upload(
        handlers.open_png, [controls.dropped, controls.base], [*filled, controls.said, controls.dropped], **QUICK
    )
    axes = results.grid.axes()
    keep_fields(
        demo,
        "drawing",
        [controls.base, *controls.fields.all(), *axes],
        handlers.open_page,
        [controls.kept, controls.base, controls.fields.prompt],
        [*filled, *axes, controls.add, controls.base],
    )


@dataclass(frozen=True)
class Opening:
    """Handlers. All return the fields, the stack and the size first."""

    site: Site
    t: Translator

    def fill(self, request: Request, base: Base | None) -> list[object]:
        """The settings of `request`, with its seed kept; how many pictures are drawn is not one of them.

        A sampler that is not here leaves the field as it is. base: the chosen one, whose sizes are listed.
        """
        width, height = request.size or (gr.skip(), gr.skip())
        fields: dict[str, object] = {
            "prompt": request.prompt,
            "negative": request.negative,
            "steps": request.steps,
            "cfg": request.cfg,
            "sampler": request.sampler if request.sampler in SAMPLERS else gr.skip(),
            "clip_skip": request.clip_skip,
            "count": gr.skip(),
            "width": width,
            "height": height,
            "seed": request.seed,
            "seed_mode": "fixed",
        }
        return [
            *(fields[field.name] for field in fields_of(Fields)),
            show_stack(self.site, self.t, request.prompt),
            self._size_list(base, request.size) if base and request.size else gr.skip(),
        ]

    def act_on_picture(self, base_id: str, tab: str, event: gr.EventData) -> list[object]:
        """Draw it again with another seed, take its settings, or put it into the trash."""
        picture = self.site.studio.gallery.find(str(event._data.get("id", "")))
        if picture is None:
            return [*UNCHANGED, ""]
        match event._data.get("act"):
            case "delete":
                move_to_trash(self.site.workspace, self.site.places.resolve(picture.id))
                return [*UNCHANGED, said(self.t("generate.deleted", name=picture.name))]
            case "use" if picture.parameters:
                settled, unknown = self.site.studio.settle(picture.parameters)
                return [*self.fill(settled, self._base(base_id)), self._about(settled, unknown, picture.name)]
            case "again" if picture.parameters:
                return [*UNCHANGED, self.draw_again(base_id, picture, tab)]
        return [*UNCHANGED, ""]

    def draw_again(self, base_id: str, picture: Picture, tab: str) -> str:
        """Order it with a new seed and everything else as it was. Returns what is said."""
        assert picture.parameters is not None
        settled, unknown = self.site.studio.settle(picture.parameters)
        if settled.sampler not in SAMPLERS:
            return self._about(settled, unknown, "")
        form = DrawingForm(
            prompt=settled.prompt,
            negative=settled.negative,
            steps=settled.steps,
            cfg=settled.cfg,
            sampler=settled.sampler,
            clip_skip=settled.clip_skip,
            count=1,
            width=picture.width,
            height=picture.height,
            seed=0,
            seed_mode="random",
        )
        refused, _ = Orders(self.site, self.t).pictures(tab, base_id, *vars(form).values())
        return str(refused) or self._about(settled, unknown, "")

    def open_png(self, file: str | None, base_id: str | None) -> list[object]:
        """The settings in a picture that was dropped; the last value empties the field of files."""
        if not file:
            return [*UNCHANGED, gr.skip(), None]
        try:
            parameters = read_settings(Path(file))
        except UserError:
            return [*UNCHANGED, said(self.t("generate.open.none"), bad=True), None]
        request, unknown = self.site.studio.settle(parameters)
        return [*self.fill(request, self._base(base_id)), self._about(request, unknown, Path(file).name), None]

    def open_page(self, kept: str, base_id: str | None, text: str, request: gr.Request) -> list[object]:
        """With what the address names, and what the browser kept, or else the settings of the newest picture.

        Last: the axes of the grid, the adapters that can be added, and the bases.
        """
        studio = self.site.studio
        adapters = studio.library.adapters()
        names = [adapter.name for adapter in adapters if not adapter.facts.error]
        choices = gr.Dropdown(choices=add_choices(self.t, names), value="")
        wanted = request.query_params.get("adapter")
        adapter = next((it for it in adapters if it.id == wanted), None)
        newest = next((it for it in studio.gallery.newest(8) if it.parameters), None)
        fields = fields_from_json(kept)
        run = self.site.places.root / adapter.run if adapter and adapter.run else None
        trained_on = base_of_run(self.site.places, run) if run else ""
        bases, base = offer_bases(self.site, trained_on, str(fields.get("base")), base_id)
        values = list(UNCHANGED)
        if fields:
            values = self._fill_kept(fields, base)
            text = str(fields.get("prompt", text))
        elif adapter is None and newest is not None and newest.parameters is not None:
            settled, _ = studio.settle(newest.parameters)
            values, text = self.fill(settled, base), settled.prompt
            values[NUM_FIELDS - 1] = gr.skip()  # whether seeds are random stays as it was
        if adapter is not None:
            text = _call(adapter, str(fields.get("prompt", "")), adapters)
            values[0] = text
        if base is not None and base.id == trained_on and trained_on != fields.get("base"):
            values[_WIDTH], values[_HEIGHT] = base.sizes[0]
            values[-1] = self._size_list(base, base.sizes[0])
        values[NUM_FIELDS] = show_stack(self.site, self.t, text)
        return [*values, *(fields.get(name, gr.skip()) for name in AXIS_FIELDS), choices, bases]

    def _fill_kept(self, kept: Mapping[str, object], base: Base | None) -> list[object]:
        """As `fill`, from what the browser kept."""
        values = [kept.get(field.name, gr.skip()) for field in fields_of(Fields)]
        size = self._size_list(base, (kept.get("width"), kept.get("height"))) if base else gr.skip()
        return [*values, gr.skip(), size]

    def _base(self, id: str | None) -> Base | None:
        try:
            return find_base(self.site.places, id) if id else None
        except UserError:
            return None

    def _size_list(self, base: Base, size: tuple[object, object]) -> gr.Dropdown:
        value = f"{size[0]}x{size[1]}" if size in base.sizes else ""
        return gr.Dropdown(choices=size_choices(self.t, base), value=value)

    def _about(self, request: Request, unknown: Sequence[str], name: str) -> str:
        """What of the settings is not here: adapters, the sampler. Else what was opened, if it has a name."""
        missing: list[str] = []
        if unknown:
            missing.append(self.t("generate.open.unknown", names=", ".join(unknown)))
        if request.sampler not in SAMPLERS:
            missing.append(self.t("generate.open.sampler", name=request.sampler))
        if missing:
            return said("\n".join(missing), bad=True)
        return said(self.t("generate.open.done", name=name)) if name else ""


def _call(adapter: Adapter, kept: str, adapters: Sequence[Adapter]) -> str:
    """The prompt that was kept with `adapter` in it, in the place of other steps of its run; or else a first prompt."""
    if not kept.strip():
        words = [adapter.facts.trigger] if adapter.facts.trigger else []
        return with_tags(", ".join([*words, FIRST_PROMPT]), {adapter.name: 1.0})
    for other in adapters:
        if adapter.run and other.run == adapter.run and other.name != adapter.name:
            kept = without(kept, other.name)
    is_called = any(item.name == adapter.name for item in stack_of(kept))
    return kept if is_called else set_strength(kept, adapter.name, 1.0)

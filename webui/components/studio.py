"""Pieces of the page Generate: the adapter stack, what is being drawn, the pictures, the grid."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from urllib.parse import quote, urlencode

from markupsafe import Markup

from lora_diffusion.generation.request import format_number
from lora_diffusion.jobs.queue import Job
from webui.components.html import html, join, picture_url
from webui.components.job import title
from webui.services.drawings import Drawing
from webui.services.gallery import Picture
from webui.services.library import Adapter
from webui.services.prompt_tags import STEP, Tagged, has_words
from webui.translate import Translator

STRONGEST = 1.5


def render_stack(
    t: Translator, stack: Sequence[Tagged], known: Mapping[str, Adapter], prompt: str | None = None
) -> Markup:
    """A slider for each adapter, and its trigger words as switches if there is a prompt that they can stand in."""
    if not stack:
        return html('<p class="stack-empty">{text}</p>', text=t("generate.stack.empty"))
    return html(
        '<div class="stack">{rows}</div>', rows=join(_row(t, item, known.get(item.name), prompt) for item in stack)
    )


def _row(t: Translator, item: Tagged, adapter: Adapter | None, prompt: str | None) -> Markup:
    strength = item.strength if item.strength is not None else 0.0
    facts = adapter.facts if adapter else None
    note = t("generate.stack.unknown") if facts is None else facts.error
    chips = _chip(facts.trigger, prompt) if facts and facts.trigger and prompt is not None else ""
    return html(
        '<div class="stack-row {bad}"><strong title="{name}">{name}</strong>'
        '<input type="range" min="{low}" max="{high}" step="{step}" value="{value}" data-name="{name}" '
        'aria-label="{label}">'
        '<output>{value}</output><button type="button" class="icon" data-act="remove" data-name="{name}" '
        'title="{remove}" aria-label="{remove}">×</button><span class="chips">{chips}</span><em>{note}</em></div>',
        bad="bad" if note else "",
        name=item.name,
        low=format_number(min(0.0, strength)),
        high=format_number(max(STRONGEST, strength)),
        step=STEP,
        value="?" if item.strength is None else format_number(round(strength, 4)),
        label=t("generate.strength", name=item.name),
        remove=t("generate.remove", name=item.name),
        chips=chips,
        note=note,
    )


def _chip(words: str, prompt: str) -> Markup:
    return html(
        '<button type="button" class="chip" data-act="words" data-words="{words}" aria-pressed="{on}">{sign} '
        "{words}</button>",
        words=words,
        on="true" if has_words(prompt, words) else "false",
        sign="✓" if has_words(prompt, words) else "+",
    )


def render_status(
    t: Translator, drawings: Sequence[Drawing], last: Drawing | None, training: Job | None, tab: str
) -> Markup:
    """What is being drawn, or what there is to say of the last drawing.

    training: the job that has the device. tab: who looks.
    """
    if not drawings:
        if last is not None and last.phase == "failed":
            return html('<p class="said bad" role="alert">{text}</p>', text=last.message)
        if last is not None and last.warnings:
            return html('<p class="said bad" role="status">{text}</p>', text="; ".join(last.warnings))
        return Markup("")
    now = drawings[0]
    progress = now.progress
    waits_for_device = bool(progress.note) and now.phase == "in line"
    head = t(f"generate.phase.{now.phase.replace(' ', '_')}")
    if now.phase == "drawing" and progress.steps:
        head = t("generate.step", step=progress.step, steps=progress.steps)
    if now.phase == "in line" and progress.position > 1:
        head = t("generate.position", n=progress.position)
    count = t("generate.pictures_done", done=now.num_done, all=len(now.requests)) if len(now.requests) > 1 else ""
    return html(
        '<div class="card drawing" role="status">{preview}<div class="what"><strong>{head}</strong>'
        '<span>{count} {note}</span><i class="bar" style="--share:{share:.3f}"></i>{more}</div></div>{choices}',
        preview=_preview(progress.preview),
        head=head,
        count=count,
        note="" if waits_for_device and training else progress.note,
        share=now.share,
        more=_more(t, drawings, tab),
        choices=_choices(t, training) if waits_for_device and training else "",
    )


def _more(t: Translator, drawings: Sequence[Drawing], tab: str) -> Markup:
    """What is in line, and a button that ends it all where the tab's own does not."""
    number = len(drawings)
    more = html("<span>{text}</span>", text=t("generate.more", n=number - 1)) if number > 1 else Markup("")
    if tab and all(drawing.tab == tab for drawing in drawings):
        return more
    return more + html(
        '<span><button type="button" class="quiet" data-act="cancel" data-confirm="{ask}">{text}</button></span>',
        ask=t("generate.cancel_all.ask", n=number),
        text=t("generate.cancel_all"),
    )


def _preview(data: bytes) -> Markup:
    if not data:
        return Markup('<span class="spinner"></span>')
    return html('<img alt="" src="data:image/jpeg;base64,{data}">', data=base64.b64encode(data).decode())


def _choices(t: Translator, training: Job) -> Markup:
    """What can be done while a training, or a captioning, has the device."""
    acts = ("live", "pause", "wait") if training.kind == "train" else ("pause", "wait")
    buttons = join(
        html(
            '<button type="button" class="choice" data-act="{act}"><strong>{title}</strong>'
            "<span>{about}</span></button>",
            act=act,
            title=t(f"generate.busy.{act}"),
            about=t(f"generate.busy.{act}.about"),
        )
        for act in acts
    )
    return html(
        '<div class="card busy-device"><h3>{title}</h3><div class="choices three">{buttons}</div></div>',
        title=t("generate.busy", name=title(t, training)),
        buttons=buttons,
    )


def render_engine(t: Translator, base: str) -> Markup:
    """Which base an engine without work keeps in memory, with the button that ends it. base: "" if none does."""
    if not base:
        return Markup("")
    return html(
        '<p class="hint engine">{text} <button type="button" class="quiet" data-act="free">{free}</button></p>',
        text=t("generate.loaded", base=base),
        free=t("generate.free"),
    )


def render_gallery(t: Translator, pictures: Sequence[Picture]) -> Markup:
    if not pictures:
        return html(
            '<div class="card"><p class="empty"><strong>{a}</strong>{b}</p></div>',
            a=t("generate.empty"),
            b=t("generate.empty.hint"),
        )
    return html('<div class="gallery" data-row>{cards}</div>', cards=join(_card(t, picture) for picture in pictures))


def _card(t: Translator, picture: Picture) -> Markup:
    acts = (("again", "↻", ""), ("use", "⇤", ""), ("delete", "✕", t("generate.delete.ask", name=picture.name)))
    buttons = join(
        html(
            '<button type="button" class="icon" data-act="{act}" data-id="{id}" data-confirm="{confirm}" '
            'title="{title}" aria-label="{title}">{sign}</button>',
            act=act,
            id=picture.id,
            confirm=confirm,
            title=t(f"generate.{act}"),
            sign=sign,
        )
        for act, sign, confirm in acts
        if act == "delete" or picture.parameters is not None
    )
    return html(
        '<figure class="shot"><img loading="lazy" src="{small}" data-do="enlarge" data-large="{large}" '
        'data-caption="{text}" alt="{alt}" style="aspect-ratio:{width}/{height}"><figcaption><p>{prompt}</p>'
        '<small>{facts}</small><span class="tools">{buttons}<a class="icon" href="{file}" download title="{download}" '
        'aria-label="{download}">⤓</a></span></figcaption></figure>',
        small=picture_url("dataset", picture.id, 320),
        large=picture_url("dataset", picture.id, 2048),
        text=picture.text,
        alt=picture.parameters.request.prompt if picture.parameters else picture.name,
        width=picture.width,
        height=picture.height,
        prompt=_prompt(picture),
        facts=_facts(picture),
        buttons=buttons,
        file=f"/picture/original/{quote(picture.id)}",
        download=t("generate.download"),
    )


def _prompt(picture: Picture) -> str:
    return picture.parameters.request.prompt if picture.parameters else picture.name


def _facts(picture: Picture) -> str:
    if picture.parameters is None:
        return f"{picture.width} × {picture.height}"
    request = picture.parameters.request
    adapters = [f"{name} {format_number(strength)}" for name, strength in request.adapters.items()]
    return " · ".join(
        [
            *(adapters or ["–"]),
            f"seed {request.seed}",
            f"{request.steps} × {request.sampler}",
            f"cfg {format_number(request.cfg)}",
            f"{picture.width} × {picture.height}",
        ]
    )


def render_grid(t: Translator, drawing: Drawing | None, ids: Sequence[str | None], sheet_id: str | None) -> Markup:
    """The cells that there are, and the sheet as a file when all are. ids: of the cells' pictures."""
    if drawing is None or drawing.sheet is None:
        return html('<p class="empty">{text}</p>', text=t("generate.grid.empty"))
    sheet = drawing.sheet
    columns = [sheet.x.label(value) for value in sheet.x.values]
    rows = [sheet.y.label(value) for value in sheet.y.values] if sheet.y else [""]
    head = join(html("<th>{text}</th>", text=text) for text in columns)
    lines = join(
        html(
            "<tr>{label}{cells}</tr>",
            label=html('<th scope="row">{text}</th>', text=label),
            cells=join(
                _cell(ids[row * len(columns) + column], f"{columns[column]} · {label}".strip(" ·"))
                for column in range(len(columns))
            ),
        )
        for row, label in enumerate(rows)
    )
    if sheet_id:
        state = html(
            '<a class="quiet" id="generate-grid-download" href="{href}" download>⤓ {text}</a>',
            href=f"/picture/original/{quote(sheet_id)}",
            text=t("generate.grid.download"),
        )
    else:
        text = t("generate.pictures_done", done=drawing.num_done, all=len(drawing.requests))
        state = html('<span class="badge">{text}</span>', text=text)
    return html(
        '<div class="card"><div class="title"><h2>{title}</h2>{state}</div><div class="matrix" data-row><table>'
        "<thead><tr><td></td>{head}</tr></thead><tbody>{lines}</tbody></table></div></div>",
        title=sheet.request.prompt,
        state=state,
        head=head,
        lines=lines,
    )


def _cell(id: str | None, caption: str) -> Markup:
    if id is None:
        return Markup('<td><div class="none"></div></td>')
    return html(
        '<td><img loading="lazy" src="{small}" data-do="enlarge" data-large="{large}" data-caption="{caption}" '
        'alt="{caption}"></td>',
        small=picture_url("dataset", id, 240),
        large=picture_url("dataset", id, 2048),
        caption=caption,
    )


def generate_href(t: Translator, adapter_id: str) -> str:
    """The page Generate with this adapter in the prompt."""
    return f"{t.href('/generate')}?{urlencode({'adapter': adapter_id})}"

"""Pieces of the page Adapters: cards, the inspector, the heat map of overlaps."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from lora_diffusion.formats.families import FAMILY_NAMES
from webui.components.html import html, join, size
from webui.components.monitor import run_href
from webui.components.studio import generate_href
from webui.services.library import Adapter
from webui.translate import Translator

SHOWN = 120


def render_cards(
    t: Translator, adapters: Sequence[Adapter], num_all: int, chosen: str, pictured: Container[str]
) -> Markup:
    """The first ones as cards. chosen: the id of the one whose inspector is open. pictured: ids with a thumbnail."""
    if not adapters:
        return html(
            '<div class="card"><p class="empty"><strong>{a}</strong>{b}</p></div>',
            a=t("adapters.empty"),
            b=t("adapters.empty.hint"),
        )
    broken = sum(bool(adapter.facts.error) for adapter in adapters)
    return html(
        '<p class="hint counts">{count}{broken}</p><div class="library">{cards}</div>{more}',
        count=t("adapters.count", shown=len(adapters), all=num_all),
        broken=f" · {t('adapters.broken', n=broken)}" if broken else "",
        cards=join(_card(t, adapter, adapter.id == chosen, adapter.id in pictured) for adapter in adapters[:SHOWN]),
        more=html('<p class="hint">{text}</p>', text=t("adapters.more", n=len(adapters) - SHOWN))
        if len(adapters) > SHOWN
        else "",
    )


def _card(t: Translator, adapter: Adapter, is_chosen: bool, is_pictured: bool) -> Markup:
    facts = adapter.facts
    if facts.error:
        return html(
            '<article class="lora broken"><div class="art none">!</div><div class="words"><strong>{name}</strong>'
            "<small>{error}</small></div></article>",
            name=adapter.name,
            error=facts.error,
        )
    tags = join(html('<span class="tag">{tag}</span>', tag=tag) for tag in facts.tags[:3])
    details = (
        FAMILY_NAMES.get(facts.family, ""),
        facts.kind,
        f"{t('adapters.rank')} {facts.rank}" if facts.rank else "",
        size(adapter.size),
    )
    return html(
        '<article class="lora" data-act="choose" data-id="{id}" aria-current="{chosen}" tabindex="0" role="button">'
        '<div class="art" data-letter="{letter}">{picture}</div>'
        '<div class="words"><strong title="{id}">{name}</strong><small>{details}</small>'
        '<small class="from">{source}{trigger}</small><span class="tags">{tags}</span></div>'
        '<button type="button" class="icon add" data-act="mix" data-name="{name}" title="{add}" aria-label="{add}">+'
        "</button></article>",
        id=adapter.id,
        chosen="true" if is_chosen else "false",
        letter=adapter.name[:1].upper(),
        picture=html(
            '<img loading="lazy" alt="" src="{url}">',
            url=f"/picture/adapter/{quote(adapter.id)}?w=320&v={int(adapter.changed)}",
        )
        if is_pictured
        else "",
        name=adapter.name,
        details=" · ".join(filter(None, details)),
        source=_source(t, adapter),
        trigger=f" · {facts.trigger}" if facts.trigger else "",
        tags=tags,
        add=t("adapters.mix.add"),
    )


def _source(t: Translator, adapter: Adapter) -> str:
    if adapter.source == "run":
        run = adapter.run.rpartition("/")[2]
        return f"{run} · {t('adapters.step', n=adapter.step)}" if adapter.step is not None else run
    return t(f"adapters.source.{adapter.source}")


def render_head(t: Translator, adapter: Adapter | None) -> Markup:
    """Who it is and what can be done with it."""
    if adapter is None:
        return html('<div class="card"><p class="empty">{text}</p></div>', text=t("adapters.choose"))
    facts = adapter.facts
    rows = [
        (FAMILY_NAMES.get(facts.family, "?"), t("adapters.family")),
        (facts.kind or "?", t("adapters.kind")),
        (facts.rank or "?", t("adapters.rank")),
        (size(adapter.size), t("adapters.size")),
    ]
    links = [
        html(
            '<a class="go" id="adapters-generate" href="{href}">{text}</a>',
            href=generate_href(t, adapter.id),
            text=t("adapters.generate"),
        ),
        html(
            '<a class="quiet" href="/picture/adapter-file/{id}" download>{text}</a>',
            id=quote(adapter.id),
            text=t("adapters.download"),
        ),
    ]
    if adapter.source != "library":
        links.append(
            html(
                '<button type="button" class="quiet" data-act="copy" id="adapters-copy">{text}</button>',
                text=t("adapters.copy"),
            )
        )
    if adapter.source == "run":
        links.append(
            html(
                '<a class="quiet" href="{href}">{text}</a>',
                href=run_href(t, adapter.run),
                text=t("adapters.run"),
            )
        )
    if adapter.source != "sample":
        links.append(
            html(
                '<button type="button" class="quiet" data-act="delete" id="adapters-delete" data-confirm="{ask}">'
                "{text}</button>",
                ask=t("adapters.delete.ask", name=adapter.name),
                text=t("adapters.delete"),
            )
        )
    return html(
        '<div class="card adapter-head"><h2>{name}</h2><p class="hint">{title} <code>{id}</code></p>{about}'
        '<div class="facts">{facts}</div><div class="links">{links}</div></div>',
        name=adapter.name,
        title=facts.title if facts.title != adapter.name else "",
        id=adapter.id,
        about=html('<p class="about">{text}</p>', text=facts.description) if facts.description else "",
        facts=join(html("<div><strong>{a}</strong><span>{b}</span></div>", a=a, b=b) for a, b in rows),
        links=join(links),
    )


def render_inspection(t: Translator, report: Mapping[str, Any]) -> Markup:
    """Bars by block, what other programs do, notes and metadata. Everything in `report` is from the file."""
    blocks = report["blocks"]
    most = max((block["norm"] for block in blocks.values()), default=0.0) or 1.0
    bars = join(
        html(
            '<div class="bar-row"><span>{name}</span><i style="--share:{share:.3f}"></i><b>{norm:.2f}</b>'
            "<em>{rank:.1f}</em></div>",
            name=name,
            share=block["norm"] / most,
            norm=block["norm"],
            rank=block["effective_rank"],
        )
        for name, block in blocks.items()
    )
    readers = join(
        html(
            '<tr><td>{name}</td><td><span class="badge {kind}">{verdict}</span> {reasons}</td></tr>',
            name=name,
            kind="finished" if reading["verdict"] == "as trained" else "paused",
            verdict=reading["verdict"],
            reasons=" ".join(reading["reasons"]),
        )
        for name, reading in report["readers"].items()
    )
    notes = join(html('<p class="hint warn">{note}</p>', note=note) for note in report["notes"])
    metadata = join(
        html("<dt>{key}</dt><dd>{value}</dd>", key=key, value=value if len(value) < 400 else f"{value[:400]} …")
        for key, value in sorted(report["metadata"].items())
    )
    return html(
        '<div class="inspection"><h3>{a}</h3><p class="hint">{about}</p><div class="bars">{bars}</div>{notes}'
        '<h3>{b}</h3><table class="files readers">{readers}</table>'
        '<details class="more"><summary>{c}</summary><dl class="metadata">{metadata}</dl></details></div>',
        a=t("adapters.blocks"),
        about=t("adapters.blocks.about"),
        bars=bars,
        notes=notes,
        b=t("adapters.readers"),
        readers=readers,
        c=t("adapters.metadata"),
        metadata=metadata,
    )


def render_overlap(t: Translator, report: Mapping[str, Any]) -> Markup:
    """A table for the whole, and one row per block for each pair."""
    names = report["names"]
    pairs = [(i, j) for i in range(len(names)) for j in range(i)]
    head = join(html("<th>{a} × {b}</th>", a=names[j], b=names[i]) for i, j in pairs)
    rows = [(t("adapters.whole"), report["whole"]), *report["by_block"].items()]
    lines = join(
        html(
            '<tr><th scope="row">{name}</th>{cells}</tr>',
            name=name,
            cells=join(_heat(matrix[i][j]) for i, j in pairs),
        )
        for name, matrix in rows
    )
    return html(
        '<p class="hint">{about}</p><div class="heat"><table><thead><tr><td></td>{head}</tr></thead><tbody>{lines}'
        "</tbody></table></div>",
        about=t("adapters.mix.overlap.about"),
        head=head,
        lines=lines,
    )


def _heat(value: float | None) -> Markup:
    if value is None:
        return Markup("<td>–</td>")
    return html('<td style="--heat:{heat:.0f}%">{value:.2f}</td>', heat=min(abs(value), 1.0) * 85, value=value)

"""The table of all runs, and the comparison of those that are ticked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from urllib.parse import urlencode

from markupsafe import Markup

from lora_diffusion.jobs.condition import ACTIVE
from webui.components.chart import Line, render_chart, render_legend
from webui.components.html import duration, html, join, picture_url
from webui.components.job import title
from webui.components.monitor import badge, run_href, set_href, when
from webui.services.overview import RunRow
from webui.translate import Translator

COPY = Markup(
    '<svg viewBox="0 0 16 16" width="15" height="15" fill="none" stroke="currentColor" stroke-width="1.4" '
    'aria-hidden="true"><rect x="5.5" y="5.5" width="8" height="8" rx="1.5"/><path d="M10.5 3v-.5H2.5v8H3"/></svg>'
)


def render_runs(t: Translator, rows: Sequence[RunRow], now: float) -> Markup:
    if not rows:
        return html(
            '<div class="card"><p class="empty"><strong>{a}</strong>{b}</p></div>',
            a=t("runs.empty"),
            b=t("runs.empty.hint"),
        )
    num_waiting = sum(row.job.status == "queued" for row in rows)
    columns = ("status", "data", "base", "settings", "steps", "best", "time")
    return html(
        '<div class="card runs"><table id="runs-table"><thead><tr><th></th><th>{name}</th>{columns}<th></th></tr>'
        "</thead>"
        "<tbody>{rows}</tbody></table></div>",
        name=t("runs.name"),
        columns=join(
            html('<th class="{wide}">{title}</th>', title=t(f"runs.{column}"), wide=_wide(column)) for column in columns
        ),
        rows=join(_row(t, row, num_waiting, now) for row in rows),
    )


def _wide(column: str) -> str:
    return "" if column == "status" else "wide"


def _row(t: Translator, row: RunRow, num_waiting: int, now: float) -> Markup:
    job = row.job
    share = min(job.step / job.steps, 1.0) if job.steps else 0.0
    bar = html('<i class="mini" style="--share:{share:.3f}"></i>', share=share) if job.status in ACTIVE else ""
    picture = (
        html('<img class="thumb" src="{url}" alt="" loading="lazy">', url=picture_url("preview", row.picture, 96))
        if row.picture
        else html('<span class="thumb"></span>')
    )
    lasted = (job.ended or now) - job.started if job.started else None
    is_run = job.kind == "train"
    return html(
        '<tr data-id="{id}"><td>{tick}</td>'
        '<td><div class="who">{picture}<div><a class="name" href="{href}">{name}</a><div class="small">{created}</div>'
        '</div></div></td><td>{badge}{bar}{position}</td><td class="wide">{dataset}</td>'
        '<td class="wide">{base}</td><td class="wide">{kind}<div class="small">{rank}</div></td>'
        '<td class="wide">{steps}</td><td class="wide">{best}</td><td class="wide">{time}</td>'
        '<td><div class="bar">{actions}</div></td></tr>',
        id=row.id,
        tick=_tick(t, row) if is_run else "",
        picture=picture,
        href=run_href(t, row.id) if is_run else set_href(t, row.dataset_id),
        name=title(t, job),
        created=when(job.started or job.created),
        badge=badge(t, job),
        bar=bar,
        position=html(' <span class="small">#{n}</span>', n=job.position) if job.position else "",
        dataset=row.dataset,
        base=row.base,
        kind=row.kind,
        rank=f"{t('runs.rank', n=row.rank)} · {t('runs.lr', n=row.learning_rate)}" if is_run else "",
        steps=f"{job.step:,} / {job.steps:,}" if job.steps else f"{job.step:,}",
        best=html('{value:.4f}<div class="small">{at}</div>', value=row.best[0], at=t("runs.at", step=row.best[1]))
        if row.best
        else "",
        time=duration(lasted) if lasted is not None else "",
        actions=_actions(t, row, num_waiting),
    )


def _tick(t: Translator, row: RunRow) -> Markup:
    return html(
        '<input type="checkbox" data-tick="{id}" aria-label="{compare}">',
        id=row.id,
        compare=t("runs.compare.tick", name=row.job.name),
    )


def _actions(t: Translator, row: RunRow, num_waiting: int) -> Markup:
    position = row.job.position
    moves = (
        [("up", "↑", position == 1), ("down", "↓", position == num_waiting), ("cancel", "×", False)] if position else []
    )
    if row.job.status not in (*ACTIVE, "queued"):
        moves = [("forget", "×", False)]
    if row.job.kind == "caption" and row.job.status in ACTIVE:
        moves = [("stop", "■", False)]
    buttons = join(
        html(
            '<button type="button" class="icon" data-act="{act}" data-id="{id}" title="{title}" '
            'aria-label="{title}" {off}>'
            "{sign}</button>",
            act=act,
            id=row.id,
            title=t(f"runs.{act}"),
            sign=sign,
            off=Markup("disabled") if off else "",
        )
        for act, sign, off in moves
    )
    if row.job.kind != "train":
        return buttons
    return html(
        '<a class="icon" href="{href}?{query}" title="{title}" aria-label="{title}">{icon}</a>{buttons}',
        href=t.href("/"),
        query=urlencode({"copy": row.id}),
        title=t("runs.copy"),
        icon=COPY,
        buttons=buttons,
    )


def render_comparison_of_runs(
    t: Translator,
    names: Sequence[str],
    losses: Sequence[Sequence[tuple[float, float]]],
    differing: Mapping[str, Sequence[str]],
) -> Markup:
    """Loss curves over each other and the settings in which the runs differ."""
    lines = [Line(name, tone, points) for tone, (name, points) in enumerate(zip(names, losses, strict=True), 1)]
    rows = join(
        html(
            "<tr><td>{name}</td>{values}</tr>",
            name=name,
            values=join(html("<td>{v}</td>", v=value or "–") for value in values),
        )
        for name, values in differing.items()
    )
    head = join(
        html('<th><b class="tone-{tone}">●</b> {name}</th>', tone=tone, name=name) for tone, name in enumerate(names, 1)
    )
    table = html(
        '<div class="matrix"><table class="diff"><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table>'
        "</div>",
        head=head,
        rows=rows,
    )
    chart = render_chart(lines, step_word=t("run.step"), is_log=True, label=t("run.loss"))
    return html(
        '<div class="card chart"><h2>{title}</h2>{legend}{chart}</div>'
        '<div class="card"><h2>{settings}</h2>{table}</div>',
        title=t("runs.compare"),
        legend=render_legend(lines),
        chart=chart or html('<p class="empty">{text}</p>', text=t("run.no_loss")),
        settings=t("runs.differences"),
        table=table if differing else html('<p class="empty">{text}</p>', text=t("runs.same")),
    )

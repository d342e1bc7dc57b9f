"""The bar on top of every page: where one can go, and what the machine is doing."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from lora_diffusion.jobs.queue import Job
from webui.components.html import duration, html, join, size
from webui.components.job import title
from webui.components.monitor import run_href
from webui.services.machine import Machine
from webui.translate import LANGUAGES, Translator

LOGO = Markup(
    '<svg viewBox="0 0 24 24" width="22" height="22" aria-hidden="true"><path d="M4 19V5l8 9 8-9v14" fill="none" '
    'stroke="currentColor" stroke-width="2.6" stroke-linecap="round" stroke-linejoin="round"/></svg>'
)


def render_navigation(t: Translator, pages: Sequence[tuple[str, str]], active: str) -> Markup:
    """pages: (path, key of the title) of what is in the navigation."""
    links = join(
        html(
            '<a href="{href}" {current}>{title}</a>',
            href=t.href(path),
            current=Markup('aria-current="page"') if path == active else "",
            title=t(title),
        )
        for path, title in pages
    )
    other = next(language for language in LANGUAGES if language != t.language)
    return html(
        '<header class="top"><a class="brand" href="{home}">{logo}<span>lora<b>diffusion</b></span></a>'
        '<nav aria-label="{label}">{links}</nav><div class="tools"><a class="tool" href="{other}" hreflang="{code}" '
        'data-do="language" data-value="{code}" title="{name}">{short}</a>'
        '<button type="button" class="tool" data-do="theme" id="top-theme" title="{theme}" aria-label="{theme}">◐'
        "</button></div></header>",
        home=t.href("/"),
        logo=LOGO,
        label=t("nav.label"),
        links=links,
        other=Translator(other).href(active),
        code=other,
        name=LANGUAGES[other],
        short=other.upper(),
        theme=t("nav.theme"),
    )


def render_strip(t: Translator, machine: Machine, active: Sequence[tuple[str, Job]], num_queued: int) -> Markup:
    """active: (run id, job) of what trains now."""
    share = machine.memory_used / machine.memory_total if machine.memory_total else 0.0
    meters = html(
        '<span class="meter" title="{device}"><em>{device}</em><i style="--share:{share:.3f}"></i>'
        "<span>{used} / {total}</span></span>",
        device=machine.device,
        share=share,
        used=size(machine.memory_used),
        total=size(machine.memory_total),
    )
    runs = join(_active(t, id, job) for id, job in active)
    if not active:
        runs = html('<span class="idle">{text}</span>', text=t("strip.idle"))
    queued = html(
        '<a class="queued" href="{href}">{text}</a>', href=t.href("/runs"), text=t("strip.queue", n=num_queued)
    )
    return html('<div class="strip" id="strip">{meters}{runs}{queued}</div>', meters=meters, runs=runs, queued=queued)


def _active(t: Translator, id: str, job: Job) -> Markup:
    share = min(job.step / job.steps, 1.0) if job.steps else 0.0
    left = (job.steps - job.step) * job.seconds_per_step if job.seconds_per_step and job.steps else None
    return html(
        '<a class="active" href="{href}"><b class="dot {status}"></b><em>{name}</em>'
        '<i style="--share:{share:.3f}"></i><span>{percent}{eta}</span></a>',
        href=run_href(t, id) if job.kind == "train" else t.href("/runs"),
        status=job.status,
        name=title(t, job),
        share=share,
        percent=f"{share:.0%}" if job.steps else t("status.starting"),
        eta=f" · {t('strip.left', time=duration(left))}" if left is not None else "",
    )

"""The parts of the page that follows one run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import PurePath
from urllib.parse import quote, urlencode

from markupsafe import Markup

from lora_diffusion.jobs.follow import AdapterEntry
from lora_diffusion.jobs.queue import Job
from webui.components.html import duration, html, join, picture_url, size, with_code
from webui.components.studio import generate_href
from webui.translate import Translator

THUMB_PX, LARGE_PX = 240, 2048


def render_head(
    t: Translator, job: Job, folder: str, now: float, remedy: Mapping[str, tuple[str, str]] | None = None
) -> Markup:
    """Name, status, how far and how fast, and why it ended if it did not end well.

    remedy: key → before and after, of settings with which the run may fit into memory.
    """
    share = min(job.step / job.steps, 1.0) if job.steps else 0.0
    facts = [(t("run.step"), f"{job.step:,} / {job.steps:,}" if job.steps else f"{job.step:,}")]
    if job.seconds_per_step:
        facts.append((t("run.speed"), speed(job.seconds_per_step)))
        facts.append((t("run.left"), duration((job.steps - job.step) * job.seconds_per_step)))
    if job.started:
        facts.append((t("run.time"), duration((job.ended or now) - job.started)))
    if job.position:
        facts.append((t("run.position"), str(job.position)))
    return html(
        '<div class="card"><div class="run-head"><h1>{name}</h1>{badge}<span class="folder">{folder}</span></div>'
        '<div class="progress" role="progressbar" aria-valuenow="{percent}" aria-valuemin="0" aria-valuemax="100" '
        'style="--share:{share:.4f}"></div><div class="facts" id="run-facts">{facts}</div>{why}{remedy}</div>',
        name=job.name,
        badge=badge(t, job),
        folder=folder,
        percent=round(share * 100),
        share=share,
        facts=join(html("<div><strong>{b}</strong><span>{a}</span></div>", a=a, b=b) for a, b in facts),
        why=_why(job),
        remedy=_remedy(t, remedy) if remedy else "",
    )


def badge(t: Translator, job: Job) -> Markup:
    status = "captioning" if job.kind == "caption" and job.status == "running" else job.status
    return html('<span class="badge {status}">{text}</span>', status=job.status, text=t(f"status.{status}"))


def speed(seconds_per_step: float) -> str:
    return f"{1 / seconds_per_step:.2f} it/s" if seconds_per_step < 1 else f"{seconds_per_step:.2f} s/it"


def _why(job: Job) -> Markup | str:
    if job.error is None:
        return ""
    return html(
        '<div class="why" role="alert"><strong>{message}</strong>{hint}</div>',
        message=with_code(job.error.message),
        hint=with_code(job.error.hint),
    )


def _remedy(t: Translator, changes: Mapping[str, tuple[str, str]]) -> Markup:
    rows = join(
        html("<tr><td>{key}</td><td>{before}</td><td>{after}</td></tr>", key=key, before=before, after=after)
        for key, (before, after) in changes.items()
    )
    return html(
        '<div class="remedy" id="run-remedy"><table class="diff"><thead><tr><th></th><th>{before}</th><th>{after}</th>'
        '</tr></thead><tbody>{rows}</tbody></table><button type="button" class="go" data-act="remedy" '
        'id="run-remedy-start">{text}</button></div>',
        before=t("run.remedy.before"),
        after=t("run.remedy.after"),
        rows=rows,
        text=t("run.remedy.start"),
    )


def render_matrix(
    t: Translator,
    prompts: Sequence[str],
    steps: Sequence[int],
    pictures: dict[tuple[int, int], str],
    asked: Sequence[str],
    starred: int | None,
    releasable: frozenset[int],
) -> Markup:
    """pictures: (prompt, step) → id. releasable: steps with an adapter file, which get a star."""
    if not steps and not asked:
        return html(
            '<div class="card"><h2>{title}</h2><p class="empty"><strong>{a}</strong>{b}</p></div>',
            title=t("run.samples"),
            a=t("run.no_samples"),
            b=t("run.no_samples.hint"),
        )
    head = join(
        html('<th scope="col">{star}{step}</th>', step=f"{step:,}", star=_star(t, step, starred, releasable))
        for step in steps
    )
    rows = join(
        html(
            '<tr data-row><th scope="row">{prompt}</th>{cells}</tr>',
            prompt=prompt,
            cells=join(
                html("<td>{picture}</td>", picture=_picture(pictures.get((index, step)), f"{step:,} · {prompt}"))
                for step in steps
            ),
        )
        for index, prompt in enumerate(prompts)
        if any((index, step) in pictures for step in steps)
    )
    extra = html(
        '<h3>{title}</h3><div class="matrix"><table><tr data-row>{cells}</tr></table></div>',
        title=t("run.asked"),
        cells=join(html("<td>{picture}</td>", picture=_picture(id, PurePath(id).stem)) for id in asked),
    ) if asked else ""  # fmt: skip
    return html(
        '<div class="card"><h2>{title}</h2><div class="matrix" tabindex="0"><table id="run-matrix"><thead>'
        "<tr><th></th>{head}</tr></thead>"
        "<tbody>{rows}</tbody></table></div>{hint}{extra}</div>",
        title=t("run.samples"),
        head=head,
        rows=rows,
        hint=html('<p class="hint">{text}</p>', text=t("run.star.hint")) if releasable else "",
        extra=extra,
    )


def _star(t: Translator, step: int, starred: int | None, releasable: frozenset[int]) -> Markup | str:
    if step not in releasable:
        return ""
    return html(
        '<button type="button" class="star" data-star="{step}" aria-pressed="{on}" title="{title}" '
        'aria-label="{title}">★</button>',
        step=step,
        on="true" if step == starred else "false",
        title=t("run.star", step=step),
    )


def _picture(id: str | None, caption: str) -> Markup:
    if id is None:
        return Markup('<div class="none"></div>')
    return html(
        '<img src="{url}" data-large="{large}" data-caption="{caption}" data-do="enlarge" alt="{caption}" '
        'loading="lazy">',
        url=picture_url("preview", id, THUMB_PX),
        large=picture_url("preview", id, LARGE_PX),
        caption=caption,
    )


def render_comparison(
    t: Translator, prompts: Sequence[str], steps: Sequence[int], pictures: dict[tuple[int, int], str]
) -> Markup:
    """Two steps of one prompt under a slider. Empty with fewer than two."""
    if len(steps) < 2:
        return Markup("")
    urls = {
        index: {
            step: picture_url("preview", pictures[index, step], 1024) for step in steps if (index, step) in pictures
        }
        for index in range(len(prompts))
    }
    present = [index for index in range(len(prompts)) if urls[index]]

    def options(chosen: int) -> Markup:
        return join(
            html(
                '<option value="{step}" {selected}>{step}</option>',
                step=step,
                selected=Markup("selected") if step == chosen else "",
            )
            for step in steps
        )

    return html(
        '<div class="card"><h2>{title}</h2><div class="compare" id="run-compare" data-pictures="{urls}" '
        'style="--cut:50%">'
        '<div class="bar"><label>{prompt}<select name="prompt" id="run-compare-prompt">{prompts}</select></label>'
        '<label>{left}<select name="a" id="run-compare-a">{first}</select></label>'
        '<label>{right}<select name="b" id="run-compare-b">{last}</select></label></div>'
        '<div class="view"><img class="a" alt="{left}"><img class="b" alt="{right}"><b class="a">{left}</b>'
        '<b class="b">{right}</b><input type="range" min="0" max="100" value="50" step="0.5" aria-label="{title}" '
        'id="run-compare-cut"></div></div></div>',
        title=t("run.compare"),
        urls=json.dumps(urls),
        prompt=t("run.prompt"),
        prompts=join(
            html('<option value="{i}">{prompt}</option>', i=i, prompt=prompts[i] or str(i + 1)) for i in present
        ),
        left=t("run.before"),
        right=t("run.after"),
        first=options(steps[0]),
        last=options(steps[-1]),
    )


def render_log(t: Translator, lines: Sequence[str]) -> Markup:
    """The newest line last, errors marked."""
    if not lines:
        return Markup("")
    marked = join(
        html("<span{kind}>{line}\n</span>", kind=Markup(' class="error"') if _is_error(line) else "", line=line)
        for line in lines
    )
    return html(
        '<div class="card log"><h2>{title}</h2><pre id="run-log-text" tabindex="0">{lines}</pre></div>',
        title=t("run.log"),
        lines=marked,
    )


def _is_error(line: str) -> bool:
    return any(word in line for word in ("Error", "error:", "Traceback", "not finite"))


def render_files(t: Translator, run: str, adapters: Sequence[AdapterEntry], checkpoints: Sequence[int]) -> Markup:
    """run: id of the run."""
    if not adapters and not checkpoints:
        return Markup("")
    rows = join(
        html(
            '<tr><td><a href="/download/{url}" download>{name}</a>{mark}</td><td>{size}</td>'
            '<td><a class="quiet" data-step="{step}" href="{draw}">{text}</a></td></tr>',
            step="" if entry.step is None else entry.step,
            draw=generate_href(t, f"{run}/{entry.path.name}"),
            text=t("run.draw"),
            url=quote(f"{run}/{entry.path.name}"),
            name=entry.path.name,
            mark=html(' <span class="badge finished">{text}</span>', text=t("run.released"))
            if entry.is_released
            else "",
            size=size(entry.size),
        )
        for entry in adapters
    )
    kept = (
        html(
            '<p class="hint">{text}</p>',
            text=t("run.checkpoints", steps=", ".join(f"{step:,}" for step in checkpoints)),
        )
        if checkpoints
        else ""
    )
    return html(
        '<div class="card"><h2>{title}</h2><table class="files">{rows}</table>{kept}</div>',
        title=t("run.files"),
        rows=rows,
        kept=kept,
    )


def when(seconds: float | None) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M") if seconds else ""


def set_href(t: Translator, id: str) -> str:
    """The page of a data set."""
    return f"{t.href('/dataset')}?{urlencode({'set': id})}"


def run_href(t: Translator, id: str) -> str:
    return f"{t.href('/run')}?{urlencode({'id': id})}"

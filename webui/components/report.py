"""What is known about a run before it starts: problems, the report of the check, the pictures, the TOML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from webui.components.html import duration, html, join, picture_url, with_code
from webui.services.glance import Glance
from webui.services.preflight import Preflight
from webui.translate import Translator

LISTED = 50  # items of one finding; the terminal lists all


def render_problems(t: Translator, problems: Sequence[tuple[str, str]]) -> Markup:
    """(key, message) of each. app.js also writes them below their fields."""
    if not problems:
        return html('<div class="verdict good"><b>✓</b> {text}</div>', text=t("train.valid"))
    items = join(
        html('<li data-key="{key}"><a href="#" data-do="show">{message}</a></li>', key=key, message=with_code(message))
        for key, message in problems
    )
    title = t("train.problem") if len(problems) == 1 else t("train.problems", n=len(problems))
    return html('<div class="verdict bad"><b>!</b> {title}<ul>{items}</ul></div>', title=title, items=items)


def render_report(t: Translator, result: Preflight | None) -> Markup:
    """None while the check runs."""
    if result is None:
        return html('<div class="card report"><p class="busy">{text}</p></div>', text=t("check.running"))
    if result.report is None:
        return html(
            '<div class="card report"><h3>{title}</h3><p class="said bad">{error}</p></div>',
            title=t("check.title"),
            error=result.error,
        )
    report = result.report
    findings = [_finding(finding) for finding in report.get("findings", ()) if finding.get("items")]
    if warnings := report.get("warnings"):
        findings.insert(0, _finding({"what": t("check.warnings"), "items": warnings}, is_open=True))
    return html(
        '<div class="card report"><h3>{title}</h3><div class="facts">{facts}</div><dl>{rows}</dl>{findings}</div>',
        title=t("check.title"),
        facts=join(_fact(label, value) for label, value in _headline(t, report)),
        rows=join(html("<dt>{a}</dt><dd>{b}</dd>", a=label, b=value) for label, value in _rows(t, report)),
        findings=join(findings) if findings else html('<p class="said good">{text}</p>', text=t("check.nothing")),
    )


def _fact(label: str, value: str) -> Markup:
    return html("<div><strong>{value}</strong><span>{label}</span></div>", value=value, label=label)


def _headline(t: Translator, report: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (t("check.time"), duration(float(report["training_seconds"]))),
        (t("check.memory"), f"{float(report['memory_bytes']) / 2**30:.1f} GB"),
        (t("check.images"), str(report["images"])),
        (t("check.steps"), f"{report['steps']:,}"),
    ]


def _rows(t: Translator, report: Mapping[str, Any]) -> list[tuple[str, str]]:
    buckets = ", ".join(f"{size} ({count})" for size, count in report["buckets"].items())
    return [
        (t("check.base"), f"{report['base']} · {report['family']} · {report['prediction']}"),
        (t("check.device"), f"{report['device']} · {report['precision']} · {report['seconds_per_step']:.2f} s"),
        (
            t("check.pictures"),
            t(
                "check.pictures.value",
                used=report["images"],
                out=report["images_left_out"],
                held=report["images_for_validation"],
            ),
        ),
        (
            t("check.captions"),
            t(
                "check.captions.value",
                missing=report["captions_missing"],
                cut=report["captions_cut"],
                longest=report["longest_caption_tokens"],
            ),
        ),
        (t("check.buckets"), buckets),
        (t("check.crop"), f"{report['largest_crop_loss']:.0%}"),
        (t("check.epochs"), f"{report['epochs']:.1f}"),
        (t("check.adapter"), f"{report['adapter_layers']} · {report['adapter_parameters']:,}"),
    ]


def _finding(finding: Mapping[str, Any], *, is_open: bool = False) -> Markup:
    items = [str(item) for item in finding["items"]]
    more = html("<li>… + {n}</li>", n=len(items) - LISTED) if len(items) > LISTED else ""
    return html(
        '<details class="finding"{open}><summary><b>{n}</b> {what}</summary><ul>{items}{more}</ul></details>',
        open=html(" open") if is_open else "",
        n=len(items),
        what=finding["what"],
        items=join(html("<li>{item}</li>", item=item) for item in items[:LISTED]),
        more=more,
    )


def render_toml(t: Translator, toml: str, name: str) -> Markup:
    """The config and the command for it, to copy and to keep."""
    file = f"{name or 'run'}.toml"
    command = f'lora-diffusion train --config "{file}"'
    return html(
        '<details class="card toml" id="train-config"><summary><strong>{title}</strong><span>{about}</span></summary>'
        '<div class="bar"><button type="button" class="quiet" id="train-copy" data-do="copy" '
        'data-from="train-toml-text">{copy}</button><button type="button" class="quiet" id="train-download" '
        'data-do="download" data-from="train-toml-text" data-name="{file}">{download}</button></div>'
        '<pre id="train-toml-text" tabindex="0">{toml}</pre><p class="hint">{command_title}</p>'
        '<pre class="command" id="train-command">{command}</pre></details>',
        title=t("train.toml"),
        about=file,
        copy=t("train.copy"),
        download=t("train.download"),
        file=file,
        toml=toml,
        command_title=t("train.command"),
        command=command,
    )


def render_glances(t: Translator, glances: Sequence[tuple[str, Glance | None]]) -> Markup:
    """(folder as it was typed, what is in it) of each data set; app.js puts them where the data sets are."""
    return join(
        html(
            '<div hidden data-index="{index}" data-path="{path}">{content}</div>',
            index=index,
            path=path,
            content=_glance(t, look),
        )
        for index, (path, look) in enumerate(glances)
    )


def _glance(t: Translator, look: Glance | None) -> Markup:
    if look is None:
        return Markup("")
    if not look.num_images:
        return html('<p class="hint warn">{text}</p>', text=t("train.no_images"))
    pictures = join(
        html('<img src="{url}" alt="{caption}" title="{caption}" loading="lazy">', url=_thumb(id), caption=caption)
        for id, caption in look.pictures
    )
    missing = look.num_images - look.num_captioned
    note = html('<em class="warn">{text}</em>', text=t("train.uncaptioned", n=missing)) if missing else ""
    return html(
        '<div class="thumbs">{pictures}</div><p class="hint">{count} {note}</p>',
        pictures=pictures,
        count=t("train.images", n=look.num_images),
        note=note,
    )


def _thumb(id: str) -> str:
    return picture_url("dataset", id, 160)

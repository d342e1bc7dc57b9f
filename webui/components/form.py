"""The settings of a run as a form, made from the schema."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from webui.components.html import html, join, with_code
from webui.services.form_values import Fields, num_tables
from webui.services.presets import Preset
from webui.services.schema import REPEATED, Setting, settings, summary
from webui.translate import Translator

DATA_FIRST = ("path", "resolution", "repeats", "caption_prefix")
ESSENTIAL = ("run.name", "run.steps", "run.epochs", "run.batch_size", "adapter.rank", "optimizer.lr", "preview.prompts")
SHOWN_ELSEWHERE = {*ESSENTIAL, "model.path"}
GOALS = ("style", "character", "object")


@dataclass(frozen=True)
class Choices:
    """What fields of paths suggest, and the presets."""

    datasets: Sequence[str]
    models: Sequence[str]
    presets: Mapping[str, Preset]


def render_form(t: Translator, fields: Fields, choices: Choices, preset: str = "") -> Markup:
    """The whole form. app.js reads it back, by the attributes `data-field` and `data-table`."""
    steps = [
        ("data", _data_step(t, fields)),
        ("base", _base_step(t, fields)),
        ("preset", _preset_step(t, fields, choices.presets, preset)),
        ("all", _all_step(t, fields)),
    ]
    return html(
        '<div class="form" id="train-fields" data-drawn="{drawn}">{before}{steps}{lists}</div>',
        drawn=secrets.token_hex(8),
        before=_before(t),
        steps=join(_step(t, number, key, content) for number, (key, content) in enumerate(steps, 1)),
        lists=join(
            [_options("train-datasets", choices.datasets), _options("train-models", _models(choices))],
        ),
    )


def _before(t: Translator) -> Markup:
    """Shown by app.js where a copy has taken the place of a form."""
    return html(
        '<p class="hint" id="train-before" hidden>{text} <button type="button" class="quiet" data-do="before">{other}'
        "</button></p>",
        text=t("train.before"),
        other=t("train.before.other"),
    )


def _models(choices: Choices) -> list[str]:
    shipped = (preset.fields["model.path"] for preset in choices.presets.values())
    return list(
        dict.fromkeys([*choices.models, *(path for path in shipped if not path.startswith(("models/", "samples/")))])
    )


def _step(t: Translator, number: int, key: str, content: Markup) -> Markup:
    return html(
        '<section class="card step" id="train-step-{key}"><header><span class="number">{number}</span>'
        "<div><h2>{title}</h2><p>{about}</p></div></header>{content}</section>",
        key=key,
        number=number,
        title=t(f"train.step.{key}"),
        about=t(f"train.step.{key}.about"),
        content=content,
    )


def _data_step(t: Translator, fields: Fields) -> Markup:
    tables = [_table(t, fields, index) for index in range(max(num_tables(fields), 1))]
    return html(
        '<div id="train-tables">{tables}</div><template id="train-table-template">{template}</template>'
        '<button type="button" class="quiet" id="train-add-table" data-do="add-table">+ {add}</button>',
        tables=join(tables),
        template=_table(t, {}, 0),
        add=t("train.add_folder"),
    )


def _table(t: Translator, fields: Fields, index: int) -> Markup:
    rows = settings()[REPEATED]
    prefix = f"{REPEATED}.{index}"
    first = [_field(t, row, fields.get(f"{prefix}.{row.key}", row.default)) for row in rows if row.key in DATA_FIRST]
    rest = [_field(t, row, fields.get(f"{prefix}.{row.key}", row.default)) for row in rows if row.key not in DATA_FIRST]
    return html(
        '<fieldset class="table" data-table><button type="button" class="remove" data-do="remove-table" '
        'aria-label="{remove}" title="{remove}">×</button><div class="grid data-grid">{first}</div>'
        '<div class="glance" data-glance></div>'
        '<details class="more"><summary>{more}</summary><div class="grid">{rest}</div></details></fieldset>',
        remove=t("train.remove_folder"),
        first=join(first),
        more=t("train.more_data"),
        rest=join(rest),
    )


def _base_step(t: Translator, fields: Fields) -> Markup:
    goals = join(
        html(
            '<button type="button" class="choice" id="train-goal-{goal}" data-do="goal" data-value="{goal}" '
            'aria-pressed="false"><strong>{title}</strong><span>{about}</span></button>',
            goal=goal,
            title=t(f"train.goal.{goal}"),
            about=t(f"train.goal.{goal}.about"),
        )
        for goal in GOALS
    )
    return html(
        '<div class="grid one">{base}</div><h3>{title}</h3><div class="choices three">{goals}</div>'
        '<div class="grid"><div class="field"><label for="train-word">{word}</label>'
        '<input id="train-word" type="text" placeholder="sks" autocomplete="off" spellcheck="false" maxlength="40">'
        '<p class="hint">{word_hint}</p></div></div>',
        base=join(_fields(t, fields, ["model.path"])),
        title=t("train.goal"),
        goals=goals,
        word=t("train.word"),
        word_hint=t("train.word.hint"),
    )


def _preset_step(t: Translator, fields: Fields, presets: Mapping[str, Preset], chosen: str) -> Markup:
    cards = join(
        html(
            '<button type="button" class="choice preset" id="train-preset-{id}" data-do="preset" data-value="{id}" '
            'aria-pressed="{pressed}"><strong>{title}</strong><span>{about}</span><em>{facts}</em></button>',
            id=preset.id,
            pressed="true" if preset.id == chosen else "false",
            title=preset.title,
            about=preset.description,
            facts=" · ".join(preset.facts),
        )
        for preset in presets.values()
    )
    return html(
        '<div class="choices presets">{cards}</div><div class="grid">{fields}</div>',
        cards=cards,
        fields=join(_fields(t, fields, ESSENTIAL)),
    )


def _all_step(t: Translator, fields: Fields) -> Markup:
    groups = [
        html(
            '<details class="group" id="train-group-{section}"><summary><strong>{section}</strong><span>{about}</span>'
            '<b class="count" hidden></b></summary><div class="grid">{fields}</div></details>',
            section=section,
            about=t.setting(section, section, summary(section))[1],
            fields=join(_fields(t, fields, [row.name for row in rows if row.name not in SHOWN_ELSEWHERE])),
        )
        for section, rows in settings().items()
        if section != REPEATED and any(row.name not in SHOWN_ELSEWHERE for row in rows)
    ]
    return html(
        '<div class="filter"><input id="train-search" type="search" placeholder="{search}" aria-label="{search}" '
        'autocomplete="off" spellcheck="false"><label class="check"><input type="checkbox" id="train-changed"> '
        '{changed}</label></div><p class="empty" id="train-no-match" hidden>{nothing}</p>{groups}',
        search=t("train.search"),
        changed=t("train.changed_only"),
        nothing=t("train.no_match"),
        groups=join(groups),
    )


def _fields(t: Translator, fields: Fields, names: Sequence[str]) -> list[Markup]:
    rows = {row.name: row for section in settings().values() for row in section}
    return [_field(t, rows[name], fields.get(name, rows[name].default)) for name in names]


def _field(t: Translator, row: Setting, text: str) -> Markup:
    """One setting. In a repeated table the name lacks the number: app.js counts."""
    name = row.key if row.section == REPEATED else row.name
    title, about = t.setting(row.name, _label(row), row.description)
    words = f"{row.name} {title} {about} {' '.join(row.values)}".lower()
    return html(
        '<div class="field {wide}" data-name="{name}" data-default="{default}" data-optional="{optional}" '
        'data-search="{words}">{label}{control}<p class="hint">{about} <span class="range">{range}</span></p>'
        '<p class="wrong" role="alert"></p></div>',
        wide="wide" if row.kind in ("list", "pairs", "choice-or-list") or row.name == "model.path" else "",
        name=name,
        default=row.default,
        optional=str(row.is_optional).lower(),
        words=words,
        label=html('<div class="label"><span>{label}</span><code>{name}</code></div>', label=title, name=row.name),
        control=_control(t, row, name, text),
        about=with_code(about),
        range="" if row.kind in ("switch", "choice", "text", "path") else row.range,
    )


def _control(t: Translator, row: Setting, name: str, text: str) -> Markup:
    common = html(
        'data-field="{name}" aria-label="{label}" {id}',
        name=name,
        label=row.name,
        id=html('id="train-{id}"', id=row.name.replace(".", "-").replace("_", "-")) if row.section != REPEATED else "",
    )
    if row.kind == "switch":
        checked = Markup("checked") if text == "true" else ""
        return html(
            '<label class="switch"><input type="checkbox" role="switch" {common} {checked}><i></i></label>',
            common=common,
            checked=checked,
        )
    if row.kind == "choice":
        values = row.values if text in row.values else (*row.values, text)
        return html("<select {common}>{options}</select>", common=common, options=_select_options(values, text))
    if row.kind == "choice-or-list":
        own = text not in row.values
        options = _select_options(row.values, text) + html(
            '<option value="" {selected}>{own}</option>',
            selected=Markup("selected") if own else "",
            own=t("train.own_list"),
        )
        return html(
            '<select data-do="choose" aria-label="{label}">{options}</select>'
            '<textarea rows="3" spellcheck="false" {common} {hidden}>\n{text}</textarea>',
            label=row.name,
            options=options,
            common=common,
            hidden="" if own else Markup("hidden"),
            text=text,
        )
    if row.kind in ("list", "pairs"):
        rows = min(max(text.count("\n") + 2, 3 if row.kind == "list" else 2), 10)
        placeholder = t("train.one_per_line") if row.kind == "list" else r"down_blocks\.1 = 8"
        return html(
            '<textarea rows="{rows}" spellcheck="false" placeholder="{placeholder}" {common}>\n{text}</textarea>',
            rows=rows,
            placeholder=placeholder,
            common=common,
            text=text,
        )
    return html(
        '<input type="text" {mode} {list} placeholder="{placeholder}" value="{text}" autocomplete="off" '
        'spellcheck="false" {common}>',
        mode=Markup('inputmode="decimal"') if row.kind == "number" and not row.values else "",
        list=_suggestions(row),
        placeholder=t("train.required") if row.is_required else t("train.not_given") if row.is_optional else "",
        text=text,
        common=common,
    )


def _suggestions(row: Setting) -> Markup | str:
    names = {"dataset.path": "train-datasets", "model.path": "train-models"}
    return html('list="{id}"', id=names[row.name]) if row.name in names else ""


def _select_options(values: Sequence[str], chosen: str) -> Markup:
    return join(
        html(
            '<option value="{value}" {selected}>{value}</option>',
            value=value,
            selected=Markup("selected") if value == chosen else "",
        )
        for value in values
    )


def _options(id: str, values: Sequence[str]) -> Markup:
    options = join(html('<option value="{value}"></option>', value=value) for value in values)
    return html('<datalist id="{id}">{options}</datalist>', id=id, options=options)


def _label(row: Setting) -> str:
    own = {"dataset.path": "Folder", "model.path": "Base model", "preview.prompts": "Preview prompts"}
    if row.name in own:
        return own[row.name]
    words = row.key.replace("_", " ")
    short = {"lr": "learning rate", "cfg": "guidance (CFG)", "eps": "epsilon", "rslora": "rsLoRA"}
    words = short.get(row.key, words.replace(" lr", " learning rate").replace("lr ", "learning rate "))
    return words if words[0].isupper() or row.key == "rslora" else words[0].upper() + words[1:]

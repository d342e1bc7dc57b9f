"""What is wrong with a config, in the user's words: every problem at once, each with its place and what was meant."""

from __future__ import annotations

import copy
import json
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

import annotated_types
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from lora_diffusion.errors import UserError

KeyPath = tuple[str | int, ...]
Tree = dict[str, Any]

OTHER_NAMES = {
    "learning_rate": "lr",
    "unet_lr": "lr",
    "network_dim": "rank",
    "dim": "rank",
    "network_alpha": "alpha",
    "max_train_steps": "run.steps",
    "max_train_epochs": "epochs",
    "num_epochs": "epochs",
    "train_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation",
    "mixed_precision": "precision",
    "output_dir": "output",
    "output_name": "run.name",
    "pretrained_model_name_or_path": "model.path",
    "base_model": "model.path",
    "image_dir": "dataset.path",
    "num_repeats": "repeats",
    "save_every_n_steps": "save_every",
    "optimizer_type": "optimizer.name",
    "lr_scheduler": "schedule.name",
    "lr_warmup_steps": "warmup_steps",
    "quantize": "quantise",
    "max_token_length": "max_tokens",
    "shuffle_caption": "shuffle_tags",
    "flip_aug": "flip",
    "guidance_scale": "cfg",
    "negative_prompt": "negative",
    "network_dropout": "dropout",
    "scale_weight_norms": "max_norm",
    "network_weights": "start_from",
    "base_weights": "merge",
    "unet_lr_weight": "lr_pattern",
    "use_rslora": "rslora",
    "decompose_factor": "lokr_factor",
    "save_model_as": "save_format",
}
"""What other programs call our keys: `table.key` where several tables have such a key."""


@dataclass(frozen=True)
class Problem:
    """One thing to change. `key` leads to it, from the top of the file; `where` is a line or a command-line option."""

    key: KeyPath
    message: str
    where: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" if self.where else self.message


MAX_PROBLEMS = 100  # more come from a file that is no config at all


class ConfigError(UserError):
    """The config cannot be used. `problems` holds all of them, of a hopeless file the first hundred."""

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems[:MAX_PROBLEMS])
        if len(problems) == 1:
            where = f", {problems[0].where}" if problems[0].where else ""
            super().__init__(f"{source}{where}: {problems[0].message}")
        else:
            lines = "".join(f"\n  {problem}" for problem in self.problems)
            number = f"at least {MAX_PROBLEMS}" if len(problems) > MAX_PROBLEMS else len(problems)
            super().__init__(f"{source} has {number} problems:{lines}")


def explain(error: ValidationError, data: Tree, model: type[BaseModel]) -> list[Problem]:
    """Pydantic's errors about `data` as ours, one per key, in the order of the fields."""
    problems: dict[KeyPath, Problem] = {}
    for detail in error.errors(include_url=False)[: 2 * MAX_PROBLEMS]:
        path, kind = detail["loc"], detail["type"]
        if kind == "default_factory_not_called":  # the value it is made from is wrong, and reported
            continue
        if kind == "extra_forbidden":
            problems[path] = Problem(path, _unknown(path, detail["input"], model))
            continue
        path, field = field_at(model, path)
        if kind == "too_short" and value_at(data, path):  # the list's items are wrong, and reported
            continue
        message = _missing(path, field) if kind == "missing" else _wrong(path, value_at(data, path), field)
        if kind == "value_error":  # says more than what the other members of a union expected
            message = f"`{dotted(path)}` is {shown(value_at(data, path))}: {detail.get('ctx', {}).get('error')}"
        if kind == "value_error" or path not in problems:
            problems[path] = Problem(path, message)
    return list(problems.values())


def field_at(model: type[BaseModel], path: Sequence[str | int]) -> tuple[KeyPath, FieldInfo | None]:
    """The beginning of `path` that leads to a key of the file (to a list item, where one follows), and its field."""
    taken: list[str | int] = []
    field: FieldInfo | None = None
    section: type[BaseModel] | None = model
    for part in path:
        if section is None:
            if isinstance(part, int) and len(taken) == len(path) - 1:
                taken.append(part)
            break
        taken.append(part)
        if isinstance(part, int):
            continue
        field = section.model_fields.get(part)
        section = section_of(field)
    return tuple(taken), field


def section_of(field: FieldInfo | None) -> type[BaseModel] | None:
    """The model of a field that holds a table or a list of tables."""
    annotation: Any = field.annotation if field else None
    if get_origin(annotation) is tuple:
        annotation = get_args(annotation)[0]
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def sections(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """The tables of a file by name."""
    found = {name: section_of(field) for name, field in model.model_fields.items()}
    return {name: section for name, section in found.items() if section}


def repaired(data: Tree, problems: Iterable[Problem], required: Tree) -> Tree:
    """A copy of `data` without what is wrong and with `required` where it is missing: what is left can be checked."""
    draft = copy.deepcopy(data)
    for problem in problems:
        table: Any = draft
        for part in problem.key[:-1]:
            table = table[part] if _has(table, part) else {}
        if isinstance(table, list):  # an item of a list: the list has to go
            table, key = value_at(draft, problem.key[:-2]), problem.key[-2]
        else:
            key = problem.key[-1] if problem.key else ""
        if isinstance(table, dict):
            cast("Tree", table).pop(cast("str", key), None)
    for name, keys in required.items():
        tables: Any = draft.setdefault(name, copy.deepcopy(keys))
        for table in cast("list[Tree]", tables if isinstance(tables, list) else [tables]):
            for key, value in (keys[0] if isinstance(keys, list) else keys).items():
                table.setdefault(key, value)
    return draft


def value_at(data: object, path: Sequence[str | int]) -> Any:
    """The value that `path` leads to; None where it leads nowhere."""
    value: Any = data
    for part in path:
        if not _has(value, part):
            return None
        value = value[part]
    return value


def _has(container: object, part: str | int) -> bool:
    if isinstance(part, int):
        return isinstance(container, list) and part < len(cast("list[object]", container))
    return isinstance(container, dict) and part in container


def dotted(path: KeyPath) -> str:
    """A path as `--set` takes it: `dataset.0.path`."""
    return ".".join(printable(str(part)) for part in path)


def shown(value: object) -> str:
    """A value about as TOML writes it, at most 60 characters, safe to print."""
    if isinstance(value, (str, bool)):
        text = json.dumps(value, ensure_ascii=False)
    elif isinstance(value, list):
        text = "[" + ", ".join(shown(item) for item in cast("list[object]", value)[:10]) + "]"
    elif isinstance(value, dict):
        text = "a table"
    elif isinstance(value, int) and abs(value) >= 10**50:
        text = "a huge number"
    else:
        text = str(value)
    return printable(text)


def printable(text: str) -> str:
    """At most 60 characters; what would move the cursor or turn the text around is escaped."""
    text = text if len(text) <= 60 else text[:57] + "…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _missing(path: KeyPath, field: FieldInfo | None) -> str:
    section = section_of(field)
    if section is None:
        return f"`{dotted(path)}` is missing; expected {describe_field(field)}"
    header = f"[[{path[-1]}]]" if field and get_origin(field.annotation) is tuple else f"[{path[-1]}]"
    needed = [f"`{name}`" for name, inner in section.model_fields.items() if inner.is_required()]
    return f"the table {header} is missing; it needs at least {' and '.join(needed)}"


def _wrong(path: KeyPath, value: object, field: FieldInfo | None) -> str:
    if section_of(field) and not isinstance(path[-1], int):
        is_list = field is not None and get_origin(field.annotation) is tuple
        if is_list and isinstance(value, dict):
            return f"[{path[-1]}] is a list of tables: write [[{path[-1]}]] in two brackets"
        if is_list and isinstance(value, list):
            return f"[[{path[-1]}]] must be given at least once, and at most 1000 times"
        header = f"[[{path[-1]}]]" if is_list else f"[{path[-1]}]"
        return f"`{dotted(path)}` is {shown(value)}; expected a table {header}"
    expected = describe_field(field)
    if isinstance(path[-1], int) and field and get_origin(field.annotation) is tuple:
        expected = _describe(get_args(field.annotation)[0])
    hint = " (without quotes)" if isinstance(value, str) and _is_number(value) and "number" in expected else ""
    return f"`{dotted(path)}` is {shown(value)}; expected {expected}{hint}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def describe_field(field: FieldInfo | None) -> str:
    """What a field takes: "a whole number from 1 to 1024"."""
    return _describe(field.annotation, field.metadata) if field else "a table"


def _describe(annotation: Any, metadata: Sequence[object] = ()) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        extra = [
            inner for item in arguments[1:] for inner in (item.metadata if isinstance(item, FieldInfo) else [item])
        ]
        return _describe(arguments[0], [*metadata, *extra])
    if origin is Literal:
        values = [shown(value) for value in arguments]
        return values[0] if len(values) == 1 else "one of " + ", ".join(values)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(item, metadata) for item in arguments if item is not type(None))
    if origin is dict:
        return f"a table from regular expressions to {_describe(arguments[1])}"
    if origin is tuple:
        if arguments[-1] is ...:
            return f"a list, each item {_describe(arguments[0])}"
        return f"a list of {len(arguments)}, each {_describe(arguments[0])}"
    names = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text in quotes",
        Path: "a path in quotes",
    }
    return names[annotation] + (_range(metadata) if annotation in (int, float) else "")


def _range(metadata: Sequence[object]) -> str:
    at_least = [item.ge for item in metadata if isinstance(item, annotated_types.Ge)]
    at_most = [item.le for item in metadata if isinstance(item, annotated_types.Le)]
    above = [item.gt for item in metadata if isinstance(item, annotated_types.Gt)]
    below = [item.lt for item in metadata if isinstance(item, annotated_types.Lt)]
    if at_least and at_most:
        return f" from {at_least[0]} to {at_most[0]}"
    words = {"above": above, "at least": at_least, "below": below, "at most": at_most}
    parts = [f"{word} {bounds[0]}" for word, bounds in words.items() if bounds]
    return " " + " and ".join(parts) if parts else ""


def _unknown(path: KeyPath, value: object, model: type[BaseModel]) -> str:
    tables = sections(model)
    key = printable(str(path[-1]))
    if len(path) == 1:
        if isinstance(value, (dict, list)):
            close = nearest(key, tables)
            hint = f"did you mean [{close}]?" if close else "there are " + ", ".join(f"[{name}]" for name in tables)
            return f"unknown table [{key}]; {hint}"
        return f"unknown key `{key}` outside of all tables; {_suggestion(key, '', tables)}"
    return f"unknown key `{key}` in [{path[0]}]; {_suggestion(key, str(path[0]), tables)}"


def _suggestion(key: str, table: str, tables: Mapping[str, type[BaseModel]]) -> str:
    known = tables[table].model_fields if table in tables else {}
    home, _, other_name = OTHER_NAMES.get(key, "").rpartition(".")
    if home in tables and home != table:
        return f"`{key}` is `{other_name}` of [{home}]"
    for name in (key, other_name):
        if name in known:
            return f"did you mean `{name}`?"
        homes = [f"[{table}]" for table, section in tables.items() if name in section.model_fields]
        if homes:
            return f"`{name}` belongs to {' or '.join(homes)}"
    if close := nearest(key, known):
        return f"did you mean `{close}`?"
    everywhere = {name: table for table, section in tables.items() for name in section.model_fields}
    if close := nearest(key, everywhere):
        return f"did you mean `{close}` of [{everywhere[close]}]?"
    return "known are " + ", ".join(f"`{name}`" for name in known or tables)


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word with the fewest typing errors from `word`, if they are few for its length."""
    limit = 1 + len(word) // 4
    near = (name for name in known if abs(len(name) - len(word)) <= limit)
    distance, name = min(((edit_distance(word.lower(), name), name) for name in near), default=(limit + 1, ""))
    return name if distance <= limit else None


def edit_distance(a: str, b: str) -> int:
    """Letters to insert, delete, replace or swap with a neighbour to turn `a` into `b`."""
    a, b = a[:64], b[:64]  # no key is longer; keeps nonsense from costing time
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        previous, row = row, [i]
        for j, other in enumerate(b, 1):
            cost = min(previous[j] + 1, row[j - 1] + 1, previous[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == b[j - 2] and a[i - 2] == other:
                cost = min(cost, before[j - 2] + 1)
            row.append(cost)
        before = previous
    return row[-1]

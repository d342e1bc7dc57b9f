"""What was read as a commented config, and as a report for the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import tomlkit

from lora_diffusion.config import INSTEAD_OF, TrainConfig
from lora_diffusion.config_errors import ConfigError, KeyPath, Problem, Tree, printable, sections
from lora_diffusion.config_file import Draft, apply_overrides
from lora_diffusion.kohya.ledger import Ledger
from lora_diffusion.kohya.read import read_source
from lora_diffusion.kohya.translate import translate

_REQUIRED: Mapping[KeyPath, tuple[str, str]] = {
    ("model",): ("`pretrained_model_name_or_path`, the base model", "model.path=BASE"),
    ("model", "path"): ("`pretrained_model_name_or_path`, the base model", "model.path=BASE"),
    ("dataset",): ("the folder of the pictures", "dataset.0.path=FOLDER"),
}


@dataclass(frozen=True)
class Imported:
    """text: the config, which loads. ledger: what became of each setting."""

    text: str
    ledger: Ledger

    def report(self) -> str:
        """What a person should know, what cannot be translated first; nothing about settings that need nothing."""
        ledger = self.ledger
        parts = list(_sections(ledger))
        count = len(set(ledger.translated))
        parts.append(f"{count} settings translated; {len(ledger.off)} are off or empty and need nothing.")
        return "\n".join(parts)


def import_settings(path: Path, overrides: Sequence[str] = ()) -> Imported:
    """Translate a file of sd-scripts or kohya_ss. overrides: `section.key=value`, as of `--set`.

    Raises ConfigError (a UserError) with everything in the file that is wrong or missing.
    """
    ledger = translate(read_source(path))
    if ledger.problems:
        raise ConfigError(str(path), ledger.problems)
    draft = Draft(ledger.values, "")
    problems = apply_overrides(draft, overrides, TrainConfig, instead_of=INSTEAD_OF)
    if problems:
        raise ConfigError(str(path), draft.placed(problems))
    if "path" not in ledger.values.get("dataset", [{}])[0]:
        ledger.values.pop("dataset", None)  # its other settings are of no folder
    text = f"{_head(ledger)}\n{_tables(ledger, overrides)}"
    try:
        TrainConfig.parse(text, str(path))
    except ConfigError as error:
        raise ConfigError(str(path), [_explained(ledger, problem) for problem in error.problems]) from None
    return Imported(text, ledger)


def _explained(ledger: Ledger, problem: Problem) -> Problem:
    """A problem of the translated config, in terms of the file it comes from."""
    if missing := _REQUIRED.get(problem.key):
        what, remedy = missing
        return Problem(problem.key, f"the file does not name {what}. Add --set {remedy}")
    origins = ", ".join(f"`{origin}`" for origin in ledger.origins.get(problem.key, ()))
    remedy = f"--set {'.'.join(map(str, problem.key))}=…" if problem.key else "--set"
    source = f" (from {origins})" if origins else ""
    return Problem(problem.key, f"{problem.message}{source}. Correct it there, or with {remedy}")


def _sections(ledger: Ledger) -> Iterator[str]:
    """The accounts that a person has to look at, each as a heading and lines."""
    for heading, lines in (
        ("Without equal here:", [f"{name} = {reason}" for name, reason in ledger.without_equal.items()]),
        ("Unknown, also to sd-scripts:", [f"{name} = {value}" for name, value in ledger.unknown.items()]),
        ("Different from there:", ledger.differences),
        ("Without effect here:", _by_reason(ledger.without_effect)),
    ):
        if lines:
            yield "\n".join([heading, *(f"  {printed(line)}" for line in lines)])


def _by_reason(reasons: Mapping[str, str]) -> list[str]:
    """Settings that share a reason on one line."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return [f"{', '.join(names)}: {reason}" for reason, names in names.items()]


def printed(line: str) -> str:
    """A line without characters that move the cursor."""
    return "".join(letter if letter.isprintable() else printable(letter) for letter in line)


def _head(ledger: Ledger) -> str:
    """The whole account as comments."""
    origin = "settings of kohya_ss" if ledger.source.is_gui else "settings of sd-scripts"
    lines = [
        f"Made by `lora-diffusion import` from {ledger.source.path.name}, {origin}.",
        "Behind a value: the setting that it comes from, or what sd-scripts takes where nothing is given.",
        "",
    ]
    for section in _sections(ledger):
        lines += [*section.splitlines(), ""]
    if ledger.off:
        lines += [f"Off or empty there: {', '.join(ledger.off)}", ""]
    wrapped = [piece for line in lines[:-1] for piece in _wrapped(printed(line))]
    return "".join(f"# {line}".rstrip() + "\n" for line in wrapped)


def _wrapped(line: str) -> list[str]:
    indent = "    " if line.startswith(" ") else "  "
    return textwrap.wrap(line, 118, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False) or [""]


def _tables(ledger: Ledger, overrides: Sequence[str]) -> str:
    """The values in the order of config.py, each with the setting that it comes from."""
    comments = dict(ledger.comments)
    for override in overrides:
        key = override.partition("=")[0].strip()
        comments[tuple(int(part) if part.isdecimal() else part for part in key.split("."))] = f"--set {key}"
    blocks: list[str] = []
    for name in TrainConfig.model_fields:
        value: object = ledger.values.get(name)
        if isinstance(value, list):
            tables = cast("list[Tree]", value)
            blocks += [
                _table(f"[[{name}]]", _sorted(name, table), (name, i), comments) for i, table in enumerate(tables)
            ]
        elif isinstance(value, dict):
            blocks.append(_table(f"[{name}]", _sorted(name, cast("Tree", value)), (name,), comments))
    return "\n".join(blocks)


def _sorted(section: str, table: Tree) -> Tree:
    order = list(sections(TrainConfig)[section].model_fields)
    return dict(sorted(table.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))


def _table(header: str, table: Tree, path: KeyPath, comments: Mapping[KeyPath, str]) -> str:
    lines = [header]
    for key, value in table.items():
        comment = printed(comments.get((*path, key), ""))
        line = f"{key} = {_toml(value)}"
        if comment and len(line) + len(comment) > 116:
            lines += [f"# {piece}" for piece in textwrap.wrap(comment, 116)]
            comment = ""
        lines.append(f"{line}  # {comment}" if comment else line)
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        table = tomlkit.inline_table()
        table.update(cast("Tree", value))
        return table.as_string()
    return tomlkit.item(value).as_string()

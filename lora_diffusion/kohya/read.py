"""Files of sd-scripts and kohya_ss as flat settings: `network_args.conv_dim`, `datasets.0.subsets.1.image_dir`."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from lora_diffusion.config_errors import ConfigError, Problem, Tree, shown
from lora_diffusion.config_file import parse_toml, read_text
from lora_diffusion.kohya.gui import as_scripts

ARGUMENT_LISTS = ("network_args", "optimizer_args", "lr_scheduler_args")


@dataclass(frozen=True)
class Setting:
    """A value, and how its file calls the setting."""

    value: object
    origin: str


@dataclass
class Source:
    """All settings by the names of sd-scripts, those in lists and tables with dots, and what else the file said."""

    path: Path
    is_gui: bool = False
    settings: dict[str, Setting] = field(default_factory=dict[str, Setting])
    without_effect: dict[str, str] = field(default_factory=dict[str, str])
    """By the names of the file, with the reason; "" if a setting is off."""
    num_subsets: tuple[int, ...] = ()
    """Subsets of each table [[datasets]] of a dataset config."""

    def add(self, name: str, value: object, origin: str = "") -> None:
        self.settings[name] = Setting(value, origin or name)


def read_source(path: Path) -> Source:
    """Read a `--config_file` or a dataset config of sd-scripts, or the settings of kohya_ss.

    A dataset config that the file names is read too. Raises ConfigError, a UserError.
    """
    data = _read(path)
    if isinstance(data.get("datasets"), list):
        source = Source(path)
        _add_datasets(source, data, path)
        return source
    if isinstance(data.get("dataset"), list):
        raise ConfigError(str(path), [Problem((), "this is a config of this program already; use it as it is")])
    is_gui = path.suffix.lower() == ".json"
    source = Source(path, is_gui)
    if is_gui:
        _add_gui(source, data)
    else:
        for name, value in _flattened(data):
            _add(source, name, value)
    named = source.settings.pop("dataset_config", None)
    if named is not None and not named.value:
        source.without_effect[named.origin] = ""
    elif named is not None:
        if not isinstance(named.value, str):
            raise ConfigError(str(path), [Problem((), f"`{named.origin}` is {shown(named.value)}; expected a path")])
        place = Path(named.value)
        if not place.exists() and (path.parent / place).exists():
            place = path.parent / place
        source.without_effect[named.origin] = f"its settings are read from {named.value}"
        _add_datasets(source, _read(place), place)
    return source


def _read(path: Path) -> Tree:
    """The content of a TOML or JSON file. Raises ConfigError."""
    text = read_text(path)
    if path.suffix.lower() != ".json":
        return parse_toml(text, str(path)).data
    try:
        data: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = f"line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        message = f"not valid JSON: {reason}. Save it again in kohya_ss, or mend it with an editor"
        raise ConfigError(str(path), [Problem((), message, line)]) from None
    if not isinstance(data, dict):
        raise ConfigError(
            str(path), [Problem((), "expected a JSON object with settings by name, as kohya_ss saves it")]
        )
    return cast("Tree", data)


def _flattened(data: Tree) -> Iterator[tuple[str, object]]:
    """What sd-scripts makes of its config file: the tables are left out, what is in them stays."""
    for name, value in data.items():
        if isinstance(value, dict):
            yield from cast("Tree", value).items()
        else:
            yield name, value


def _add(source: Source, name: str, value: object, origin: str = "") -> None:
    """Add a setting; lists of `key=value` texts are opened."""
    if name not in ARGUMENT_LISTS:
        source.add(name, value, origin)
        return
    items = cast("list[object]", value) if isinstance(value, list) else [] if not value else [value]
    for item in items:
        key, equals, text = str(item).partition("=")
        if not equals:
            message = f'`{name}` holds {shown(item)}; expected texts like "key=value"'
            raise ConfigError(str(source.path), [Problem((), message)])
        source.add(f"{name}.{key.strip()}", text.strip().strip("\"'"))


def _add_gui(source: Source, data: Tree) -> None:
    """Add the settings of kohya_ss, then what was typed into "additional parameters", which counts more."""
    fields = dict(data)
    typed = fields.pop("additional_parameters", None)
    for name in ARGUMENT_LISTS:
        text = fields.pop(name, None)
        _add(source, name, _words(source.path, name, text) if isinstance(text, str) else text)
        if name in data:
            source.without_effect[name] = "its settings are read one by one" if text else ""
    translated = as_scripts(fields)
    source.without_effect |= translated.without_effect
    for name, (value, origin) in translated.settings.items():
        source.add(name, value, origin)
    if typed is not None:
        source.without_effect["additional_parameters"] = "its options are read one by one" if typed else ""
        for name, value in _options(source.path, str(typed)):
            if name in source.settings:
                source.without_effect[source.settings[name].origin] = "`additional_parameters` says otherwise"
            _add(source, name, value, f"additional_parameters --{name}")


def _options(path: Path, typed: str) -> Iterator[tuple[str, object]]:
    """`--name value`, `--name=value` and `--name` of a command line; the last is true."""
    words = _words(path, "additional_parameters", typed)
    while words:
        name, equals, value = words.pop(0).partition("=")
        if not re.fullmatch(r"--\w+", name):
            message = f"`additional_parameters` holds {shown(name)}, where an option like --min_snr_gamma was expected"
            raise ConfigError(str(path), [Problem((), message)])
        values = [value] if equals else []
        while words and not equals and not re.match(r"--[a-z]", words[0]):
            values.append(words.pop(0))
        yield name[2:], True if not values else values if name[2:] in ARGUMENT_LISTS or len(values) > 1 else values[0]


def _words(path: Path, name: str, text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        message = f"`{name}` is {shown(text)}, which cannot be split into words ({error}). Mend its quotes"
        raise ConfigError(str(path), [Problem((), message)]) from None


def _add_datasets(source: Source, data: Mapping[str, object], path: Path) -> None:
    """Add [general], [[datasets]] and [[datasets.subsets]]."""

    def tables(value: object, name: str) -> list[Tree]:
        items = cast("list[object]", value) if isinstance(value, list) else [value]
        if not items or not all(isinstance(item, dict) for item in items):
            message = f"`{name}` is {shown(value)}; expected a table, as in a dataset config of sd-scripts"
            raise ConfigError(str(path), [Problem((), message)])
        return cast("list[Tree]", items)

    numbers: list[int] = []
    for name, value in data.items():
        if name == "general":
            for key, setting in tables(value, name)[0].items():
                source.add(f"general.{key}", setting)
        elif name != "datasets":
            source.add(name, value)
    for i, dataset in enumerate(tables(data.get("datasets"), "datasets")):
        subsets = tables(dataset.get("subsets"), f"datasets.{i}.subsets")
        numbers.append(len(subsets))
        for key, setting in dataset.items():
            if key != "subsets":
                source.add(f"datasets.{i}.{key}", setting)
        for j, subset in enumerate(subsets):
            for key, setting in subset.items():
                source.add(f"datasets.{i}.subsets.{j}.{key}", setting)
    source.num_subsets = tuple(numbers)

"""The runs of a sweep: a config and lists of values, or configs written out by hand. Nothing here imports torch."""

from __future__ import annotations

import itertools
import json
import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

from lora_diffusion.config import TrainConfig
from lora_diffusion.config_errors import ConfigError
from lora_diffusion.errors import UserError

MAX_MEMBERS = 64
"""A typo in a grid should not fill the memory."""

_OF_THE_BASE = re.compile(r"run\.(device|precision)|model\.(?!clip_skip$|max_tokens$).*")
"""Settings that all members share, because they share the base."""


@dataclass(frozen=True)
class Member:
    """One run of a sweep. label: how it differs from the others, in a few words."""

    label: str
    config: TrainConfig

    @property
    def name(self) -> str:
        return self.config.run.name


@dataclass(frozen=True)
class Variation:
    """A setting and its values, as TOML texts: "optimizer.lr" with ("1e-4", "3e-4")."""

    key: str
    values: tuple[str, ...]

    @property
    def short_key(self) -> str:
        return self.key.rpartition(".")[2]

    def label(self, value: str) -> str:
        """Such as "lr 1e-4" or "rank 8"; a path is called by its folder."""
        text = value.strip("\"'")
        if "/" in text or "\\" in text:
            return re.split(r"[/\\]", text.rstrip("/\\"))[-1]
        return f"{self.short_key} {text}"


def parse_variation(text: str) -> Variation:
    """`optimizer.lr=1e-4,3e-4`, or the values as one TOML list: `dataset.0.resolution=[[64, 96], 64]`.

    Raises UserError for anything else, for a value that comes twice, and for keys that each member gets of its own.
    """
    key, _, raw = (part.strip() for part in text.partition("="))
    values = tuple(_values(raw)) if raw else ()
    if not values or not re.fullmatch(r"\w+(\.\w+)+", key) or not all(values):
        raise UserError(f"--vary {text}: write a setting and its values, as in --vary optimizer.lr=1e-4,3e-4.")
    if key in ("run.name", "run.output"):
        raise UserError(f"--vary {text}: each run of a sweep gets its own name and folder from what varies.")
    if twice := [value for value, count in Counter(values).items() if count > 1]:
        raise UserError(f"--vary {text}: the value {twice[0]} is given twice.")
    return Variation(key, values)


def grid(config: Path, overrides: Sequence[str], variations: Sequence[Variation]) -> list[Member]:
    """One member for each combination of values, in the order in which they are written; the last key runs fastest.

    A member's name and folder are those of the config with what varies behind them: `ink-lr1e-4-rank8`.
    Raises UserError (ConfigError for one member alone) with all that is wrong.
    """
    if len({variation.key for variation in variations}) < len(variations):
        raise UserError("--vary: a setting is varied twice. Give all its values in one --vary.")
    cells = list(itertools.product(*(variation.values for variation in variations)))
    if len(cells) > MAX_MEMBERS:
        raise UserError(f"The sweep would have {len(cells)} runs; at most {MAX_MEMBERS} go together. Use fewer values.")
    members: list[Member] = []
    errors: dict[str, str] = {}
    for cell in cells:
        chosen = list(zip(variations, cell, strict=True))
        labels = [variation.label(value) for variation, value in chosen]
        varied = [f"{variation.key}={value}" for variation, value in chosen]
        try:
            run = TrainConfig.load(config, [*overrides, *varied]).run
            addition = "-".join(["", *map(_name_part, labels)])
            output = run.output.with_name(run.output.name + addition)
            own = [f"run.name={_toml(run.name + addition)}", f"run.output={_toml(output.as_posix())}"]
            members.append(Member(", ".join(labels), TrainConfig.load(config, [*overrides, *varied, *own])))
        except ConfigError as error:
            # The config knows no other options; what is typed here is called --vary.
            told = reduce(lambda text, one: text.replace(f"--set {one}", f"--vary {one}"), varied, str(error))
            errors[", ".join(labels)] = told
    _raise_all(errors, len(cells))
    return members


def written_out(configs: Sequence[Path], overrides: Sequence[str]) -> list[Member]:
    """One member for each config. Raises UserError (ConfigError for one member alone) with all that is wrong."""
    if len(configs) > MAX_MEMBERS:
        raise UserError(f"{len(configs)} configs are given; at most {MAX_MEMBERS} go together.")
    members: list[Member] = []
    errors: dict[str, str] = {}
    for path in configs:
        try:
            config = TrainConfig.load(path, overrides)
            members.append(Member(config.run.name, config))
        except ConfigError as error:
            errors[str(path)] = str(error)
    _raise_all(errors, len(configs))
    return members


def check_together(members: Sequence[Member]) -> None:
    """Raises UserError unless the members can be trained together: one base, each its own name and folder."""
    if len(members) < 2:
        raise UserError("A sweep needs two runs or more: give --vary a key with several values, or several --config.")
    for what, values in (
        ("name", [member.name for member in members]),
        ("output", [str(member.config.run.output.absolute()) for member in members]),
    ):
        if twice := [value for value, count in Counter(values).items() if count > 1]:
            raise UserError(
                f"run.{what} is {twice[0]!r} in {values.count(twice[0])} runs of the sweep; they would overwrite each "
                "other. Give every run its own."
            )
    first, *others = members
    if first.config.model.compile:
        raise UserError("model.compile is true; the joint layers of a sweep cannot be compiled. Set it to false.")
    expected = dict(_settings(first.config))
    for member in others:
        for key, value in _settings(member.config):
            if _OF_THE_BASE.fullmatch(key) and value != expected[key]:
                raise UserError(
                    f"{key} is {value!r} in {member.name} and {expected[key]!r} in {first.name}: runs of a sweep share "
                    "one base. Make them equal, or train them in sweeps of their own."
                )


def _raise_all(errors: Mapping[str, str], count: int) -> None:
    """Raise UserError with each member's error. What is wrong with all of them alike is said once."""
    if len(errors) == count and len(set(errors.values())) == 1:
        raise UserError(next(iter(errors.values())))
    if errors:
        raise UserError("\n".join(f"{label}: {error}" for label, error in errors.items()))


def _values(raw: str) -> Iterator[str]:
    """The values of a TOML list, or of one without its brackets, each as it is written."""
    if _is_list(raw):
        raw = raw[1:-1]
    start = depth = 0
    quote = ""
    for position, character in enumerate(raw):
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        elif character == "," and depth == 0:
            yield raw[start:position].strip()
            start = position + 1
    yield raw[start:].strip()


def _is_list(raw: str) -> bool:
    try:
        return isinstance(tomllib.loads(f"value = {raw}").get("value"), list)
    except ValueError:
        return False


def _name_part(label: str) -> str:
    """What a label adds to names: "lr1e-4", "rank8", "kind-loha"."""
    key, _, value = label.rpartition(" ")
    joined = f"{key}{value}" if value[:1].isdigit() or not key else f"{key}-{value}"
    return re.sub(r"[^\w.+-]+", "-", joined).strip("-.")


def _toml(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _settings(config: TrainConfig) -> Iterator[tuple[str, object]]:
    for section in ("run", "model"):
        for key, value in getattr(config, section).model_dump(mode="json").items():
            yield f"{section}.{key}", value

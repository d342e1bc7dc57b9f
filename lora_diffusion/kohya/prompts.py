"""Prompts of previews, from a file of sd-scripts or the text that kohya_ss keeps, as our table [preview]."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from lora_diffusion.config_errors import Tree, printable
from lora_diffusion.kohya.keys import spoken
from lora_diffusion.kohya.ledger import Ledger
from lora_diffusion.kohya.length import Length

SAMPLERS = {
    "ddim": "ddim",
    "euler": "euler",
    "k_euler": "euler",
    "euler_a": "euler-a",
    "k_euler_a": "euler-a",
    "heun": "heun",
    "lms": "lms",
    "k_lms": "lms",
    "dpmsolver++": "dpm++2m",
}
FLAGS = {
    "negative_prompt": "n",
    "width": "w",
    "height": "h",
    "seed": "d",
    "sample_steps": "s",
    "scale": "l",
    "guidance_scale": "g",
    "controlnet_image": "cn",
    "cfg_trunc_ratio": "ctr",
    "renorm_cfg": "rcfg",
    "flow_shift": "fs",
    "sample_sampler": "ss",
}
"""Keys of prompts in TOML and JSON → their options in a line of text."""

_WHOLE = r"\d{1,20}"  # as many digits as a seed may have
_OF_OTHER_MODELS = ("g", "ctr", "rcfg", "fs")


def translate_previews(ledger: Ledger, length: Length) -> None:
    """Fill [preview] if there are prompts."""
    found = _prompts(ledger)
    lines = [line for line in found if line.get("prompt", "").strip()]
    if found and not lines:
        ledger.refuse("sample_prompts", "none of its entries has a text: write `preview.prompts`")
    if not lines:
        return
    if without := len(found) - len(lines):
        ledger.differ(f"previews: of {len(found)} entries of `sample_prompts`, {without} without a text are left out")
    ledger.put("preview.prompts", [line["prompt"] for line in lines], "sample_prompts")
    every = length.interval("sample_every_n_steps", "sample_every_n_epochs")
    if every.steps is not None:
        ledger.put("preview.every", every.steps, *every.names, note=every.note)
    width, height = (int(_same(ledger, lines, flag, "512")) for flag in "wh")
    # sd-scripts rounds sides down to multiples of 8 and draws at least 64 pixels.
    ledger.put("preview.size", [max(64, side // 8 * 8) for side in (width, height)], note="512 if not given")
    ledger.put("preview.steps", int(_same(ledger, lines, "s", "30")), note="30 if not given")
    ledger.put("preview.cfg", max(1.0, float(_same(ledger, lines, "l", "7.5"))), note="7.5 if not given")
    if negative := _same(ledger, lines, "n", ""):
        ledger.put("preview.negative", negative, note="--n")
    if seeds := list(_seeds(ledger, lines)):
        ledger.put("preview.seed", seeds[0], note="--d")
        if seeds != list(range(seeds[0], seeds[0] + len(lines))):
            ledger.differ("seeds of previews: that of the first prompt is used; those of the others count up")
    name = _same(ledger, lines, "ss", ledger.text("sample_sampler") or "ddim")
    is_given = ledger.is_on("sample_sampler")
    if name in SAMPLERS:
        ledger.put("preview.sampler", SAMPLERS[name], "sample_sampler", note="" if is_given else "ddim if not given")
    elif is_given:
        ledger.refuse("sample_sampler", f"choose a `preview.sampler`; `{SAMPLERS['ddim']}` is used")
    else:
        ledger.differ(f"previews: there is no sampler {name!r}; ddim is used")
    for line in lines:
        for flag in line.keys() - {"prompt", *"nwhdsl", "ss"}:
            reason = "is for other models" if flag in _OF_OTHER_MODELS else "has no equal"
            ledger.differ(f"previews: `{spoken(f'sample_prompts.{flag}')} {line[flag]}` {reason}")


def _prompts(ledger: Ledger) -> list[dict[str, str]]:
    """The prompts with their options by letter."""
    text = ledger.text("sample_prompts")
    if not text:
        return []
    if ledger.source.is_gui and not _is_file(text):
        return [_parsed(line) for line in _lines(text)]
    path = Path(text)
    try:
        content = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            items = cast("list[object]", json.loads(content))
            if not isinstance(items, list):
                raise TypeError
        elif path.suffix == ".toml":
            shared = cast("Tree", tomllib.loads(content)["prompt"])
            subsets = cast("list[Tree]", shared.pop("subset"))
            items = [shared | subset for subset in subsets]
        else:
            items = list(_lines(content))
        return [_parsed(item) if isinstance(item, str) else _from_table(cast("Tree", item)) for item in items]
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        ledger.refuse("sample_prompts", "the file cannot be read: write `preview.prompts`, or import again where it is")
        return []


def _is_file(text: str) -> bool:
    return "\n" not in text and text.endswith((".txt", ".toml", ".json"))


def _lines(text: str) -> Iterator[str]:
    return (line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#"))


def _parsed(line: str) -> dict[str, str]:
    """`a cat --n dog --w 512` as its prompt and its options."""
    prompt, *options = line.split(" --")
    found = {"prompt": prompt.strip()}
    for option in options:
        if match := re.match(r"([a-z]+) (.+)", option.strip(), re.IGNORECASE):
            found.setdefault(match[1].lower(), match[2].strip())
    return found


def _from_table(table: Tree) -> dict[str, str]:
    return {FLAGS.get(key, key): str(value) for key, value in table.items() if key != "enum" and value is not None}


def _seeds(ledger: Ledger, lines: list[dict[str, str]]) -> Iterator[int]:
    for value in [line["d"] for line in lines if "d" in line]:
        if re.fullmatch(_WHOLE, value):
            yield int(value)
        else:
            ledger.differ(f"previews: `--d {printable(value)}` is no whole number; it is left out")


def _same(ledger: Ledger, lines: list[dict[str, str]], flag: str, default: str) -> str:
    """The option of the first prompt; whether the others differ is told."""
    values = [line.get(flag, default) for line in lines]
    if flag not in ("n", "ss"):
        for value in values:
            if not re.fullmatch(rf"{_WHOLE}(\.\d*)?" if flag == "l" else _WHOLE, value):
                ledger.differ(f"previews: `--{flag} {printable(value)}` is no number; {default} is used")
                return default
    if len(set(values)) > 1:
        ledger.differ(f"previews: `--{flag}` differs from prompt to prompt; {values[0]!r} is used for all")
    return values[0]

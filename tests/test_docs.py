"""What the pages say can be typed: configs load, commands parse, links lead somewhere, maps show what is there."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tomlkit
import typer.main

from lora_diffusion.cli import app
from lora_diffusion.config import TrainConfig
from lora_diffusion.config_errors import sections
from lora_diffusion.config_sweep import check_together, grid, parse_variation
from tests.test_architecture import FOUNDATION, MAY_IMPORT

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [path for path in (ROOT / "README.md", *DOCS, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md") if path.exists()]

MINIMAL: dict[str, Any] = {
    "run": {"name": "x", "steps": 1000},
    "model": {"path": "samples/base"},
    "dataset": [{"path": "samples/neon"}],
}
"""What a block that shows only some keys is laid over."""

FILE_ENDINGS = {"py", "toml", "json", "jsonl", "txt", "md", "png", "safetensors"}  # `model.safetensors` is no key
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r'!?\[[^\]]*\]\(([^)\s]+)[^)]*\)|<(?:img|source)[^>]*?\bsrc(?:set)?="([^"]+)"')
KEY = re.compile(r"`((?:\w+)\.(?:\w+))(?: = ([^`]+))?`")
OUR_COMMAND = re.compile(r"(?:\S*[/\\])?lora-diffusion(?:\.exe)? (.+)")
LAUNCH = re.compile(r"(?:\S*[/\\])?accelerate launch (.*?) ?\btrain\.py (.+)")
MAKE = re.compile(r"make(?: (.+))?")
ENVIRONMENT = re.compile(r"^(?:\$ )?(?:[A-Z_]+=\S+ )*")


@dataclass(frozen=True)
class Snippet:
    """A block or a line of a page, with where it stands, for messages."""

    page: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(*languages: str) -> list[Snippet]:
    """Fenced blocks of all pages in these languages; a fence without a language is a shell's."""
    return [
        Snippet(path.name, text.count("\n", 0, match.start()) + 1, match[2])
        for path in PAGES
        for text in [path.read_text(encoding="utf-8")]
        for match in FENCE.finditer(text)
        if (match[1] or "sh") in languages
    ]


def shell_lines() -> Iterator[Snippet]:
    """Lines of shell blocks without prompt and environment; a line that ends with a backslash goes on in the next."""
    for block in blocks("sh", "bash", "shell", "console", "powershell", "bat"):
        joined = re.sub(r"\\\n\s*", " ", block.text)
        for line in joined.splitlines():
            yield Snippet(block.page, block.line, ENVIRONMENT.sub("", line.strip()))


def matching(pattern: re.Pattern[str]) -> list[tuple[Snippet, re.Match[str]]]:
    return [(line, match) for line in shell_lines() if (match := pattern.fullmatch(line.text))]


def where(value: object) -> str:
    return str(value) if isinstance(value, Snippet) else ""


def overlaid(block: str) -> str:
    """The block's tables laid over a minimal config, as TOML."""
    shown = tomllib.loads(block)
    merged: dict[str, Any] = {name: dict(table) for name, table in MINIMAL.items() if isinstance(table, dict)}
    for name, table in shown.items():
        assert isinstance(table, dict | list), f"{name} stands outside a table"
        if name == "dataset":
            merged["dataset"] = [{**MINIMAL["dataset"][0], **entry} for entry in table]
        else:
            merged[name] = merged.get(name, {}) | table
    merged.setdefault("dataset", MINIMAL["dataset"])
    if "epochs" in merged["run"] and "steps" not in shown.get("run", {}):
        del merged["run"]["steps"]
    return tomlkit.dumps(merged)


def parse_command(arguments: str) -> dict[str, Any]:
    """The values of a `lora-diffusion` command line. Nothing is run; what is wrong with it is raised."""
    group = typer.main.get_command(app)
    name, *rest = shlex.split(arguments, comments=True)
    command = getattr(group, "commands", {}).get(name)
    assert command is not None, f"there is no command {name!r}"
    if commands := getattr(command, "commands", {}):
        name, *rest = rest
        command = commands.get(name)
        assert command is not None, f"there is no such command {name!r}"
    return command.make_context(name, rest).params


def check_settings(values: dict[str, Any]) -> None:
    """Read the config that a command names, if it ships, with the command's overrides."""
    config, overrides = values.get("config"), values.get("overrides") or ()
    if isinstance(config, list):
        check_sweep(config, values["vary"] or (), overrides)
    elif config is None:
        return
    elif config.parts[0] == "configs":
        TrainConfig.load(ROOT / config, overrides)
    else:
        TrainConfig.parse(tomlkit.dumps(MINIMAL), overrides=overrides)


def check_sweep(configs: list[Path], vary: Sequence[str], overrides: Sequence[str]) -> None:
    """Make the members of a sweep that a command names; configs that do not ship are only counted."""
    if vary:
        check_together(grid(ROOT / configs[0], overrides, [parse_variation(text) for text in vary]))
    else:
        assert len(configs) > 1


def test_there_are_pages_to_check() -> None:
    assert (ROOT / "README.md").exists()
    assert len(DOCS) >= 6
    assert {page.name for page in PAGES} >= {"CONTRIBUTING.md", "CHANGELOG.md"}


def test_the_pages_show_configs_and_commands() -> None:
    readme = [block for block in blocks("sh", "bash", "powershell", "bat", "toml") if block.page == "README.md"]

    assert len(readme) >= 2
    assert len(blocks("toml")) >= 3
    assert len(matching(OUR_COMMAND)) >= 8
    assert len(matching(LAUNCH)) >= 1
    assert len(matching(MAKE)) >= 2
    assert len(blocks("python")) >= 2


@pytest.mark.parametrize("block", blocks("toml"), ids=str)
def test_a_config_on_a_page_loads_without_a_warning(block: Snippet) -> None:
    is_whole = tomllib.loads(block.text).keys() >= MINIMAL.keys()
    config = TrainConfig.parse(block.text if is_whole else overlaid(block.text), str(block))

    assert config.warnings() == ()


@pytest.mark.parametrize(("line", "match"), matching(OUR_COMMAND), ids=where)
def test_a_command_on_a_page_is_one_that_we_have(line: Snippet, match: re.Match[str]) -> None:
    values = parse_command(match[1])
    check_settings(values)
    assert values.keys() >= {"debug"}, "every command of ours has --debug"


@pytest.mark.parametrize(("line", "match"), matching(LAUNCH), ids=where)
def test_a_launch_on_a_page_has_options_that_accelerate_and_we_know(line: Snippet, match: re.Match[str]) -> None:
    from accelerate.commands.launch import launch_command_parser

    launch_command_parser().parse_args([*shlex.split(match[1]), "train.py"])
    values = parse_command(f"train {match[2]}")
    check_settings(values)
    assert values["config"] is not None


def test_one_process_is_started_without_accelerate_which_would_give_it_one_thread() -> None:
    alone = [str(line) for line, match in matching(LAUNCH) if not re.search(r"--num_processes [2-9]", match[1])]

    assert alone == []


def test_a_make_line_on_a_page_names_a_target() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][\w-]*):", makefile, re.MULTILINE))
    variables = set(re.findall(r"^([A-Z]+) \??:?=", makefile, re.MULTILINE))
    wrong = []
    for line, match in matching(MAKE):
        for word in shlex.split(match[1] or "", comments=True):
            name, equals, _ = word.partition("=")
            if name not in (variables if equals else targets):
                wrong.append(f"{line}: make {word}")

    assert {"train", "test"} <= targets
    assert wrong == []


@pytest.mark.parametrize("arguments", ["paint --config x.toml", "train --confg x.toml", "generate --base x"])
def test_the_check_finds_a_command_that_we_lack(arguments: str) -> None:
    with pytest.raises(Exception, match=r"no command|No such option|Missing"):
        parse_command(arguments)


def test_a_key_named_on_a_page_exists_and_takes_the_value_it_is_given() -> None:
    keys = sections(TrainConfig)
    found = 0
    wrong: list[str] = []
    for path in PAGES:
        for match in KEY.finditer(path.read_text(encoding="utf-8")):
            section, key = match[1].split(".")
            if section not in keys or key in FILE_ENDINGS:
                continue
            found += 1
            override = f"{section}.{'0.' if section == 'dataset' else ''}{key}"
            if key not in keys[section].model_fields:
                wrong.append(f"{path.name}: {match[1]}")
            elif match[2]:
                TrainConfig.parse(tomlkit.dumps(MINIMAL), path.name, [f"{override}={match[2]}"])

    assert found >= 60
    assert wrong == []


def test_relative_links_and_pictures_lead_somewhere() -> None:
    found = 0
    wrong: list[str] = []
    for path in PAGES:
        text = FENCE.sub("", path.read_text(encoding="utf-8"))
        for match in LINK.finditer(text):
            target, _, anchor = (match[1] or match[2]).partition("#")
            if re.match(r"[a-z]+:", target):
                continue
            found += 1
            there = (path.parent / target).resolve() if target else path
            if not there.exists() or not there.is_relative_to(ROOT):
                wrong.append(f"{path.name}: {target}")
            elif anchor and there.suffix == ".md" and anchor not in _anchors(there):
                wrong.append(f"{path.name}: {target}#{anchor}")

    assert found >= 6
    assert wrong == []


def _anchors(page: Path) -> set[str]:
    """The names that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_on_a_page_imports_what_exists(block: Snippet) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lora_diffusion"):
            spec = importlib.util.find_spec(node.module or "")
            assert spec is not None and spec.origin is not None
            defined = Path(spec.origin).read_text(encoding="utf-8")
            assert all(re.search(rf"^(class|def) {alias.name}\b", defined, re.MULTILINE) for alias in node.names)


def test_the_map_shows_every_module_and_no_other() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = next(match[2] for match in FENCE.finditer(page) if "lora_diffusion/\n" in match[2])
    shown: set[str] = set()
    folder = ""
    for line in tree.partition("lora_diffusion/\n")[2].splitlines():
        name = line.split()[0]
        folder = "" if line.startswith("  ") and line[2] != " " else folder
        if name.endswith("/"):
            folder = name
        else:
            shown.add(folder + name)
    package = ROOT / "lora_diffusion"
    real = {path.relative_to(package).as_posix() for path in package.rglob("*.py") if path.name != "__init__.py"}

    assert len(shown) > 50
    assert shown == real


def test_the_import_table_on_the_map_is_the_one_that_is_tested() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table: dict[str, set[str]] = {}
    for group, cell in re.findall(r"^\| `(\w+)` \|(.*)\|$", page, re.MULTILINE):
        table[group] = set(re.findall(r"`(\w+)`", cell)) | (FOUNDATION if "*foundation*" in cell else set())

    assert table == MAY_IMPORT

"""TOML → form → TOML, and what the form says of each setting."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from lora_diffusion.config import TrainConfig
from lora_diffusion.config_errors import ConfigError, sections
from webui.services import goals
from webui.services.field_text import to_text, to_value
from webui.services.form_values import (
    default_fields,
    fields_from_json,
    fields_from_toml,
    num_tables,
    problems_of,
    toml_from_fields,
    with_dataset,
)
from webui.services.presets import PLAIN, apply, presets
from webui.services.schema import settings

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))
MINIMAL = '[run]\nname = "x"\nsteps = 5\n[model]\npath = "base"\n[[dataset]]\npath = "data"\n'

AWKWARD = r"""
[run]
name = "ten = 10 # 'x'"
steps = 5
[model]
path = ' base '
merge = ["a.safetensors:0.8", " b,\nc.safetensors"]
zero_terminal_snr = true
max_tokens = 150
[adapter]
targets = ["down_blocks\\.1 = .*attn", "\"up\""]
rank_pattern = { "a = b" = 4, '"c\.d"' = 8, "" = 1 }
lr_pattern = { "x" = 0.0 }
alpha = 0.00025
[[dataset]]
path = "first"
resolution = [768, 512]
caption_prefix = " two\nlines "
default_caption = ""
bucket_step = 64
[[dataset]]
path = "second"
caption_suffix = '"'
[optimizer]
lr = 1e-4
betas = [0.95, 0.9999]
eps = 1e-12
[preview]
prompts = ["one", "  two  ", "three\nfour", "\"five\""]
size = 320
"""


def round_trip(text: str) -> str:
    fields, problems = fields_from_toml(text)
    assert problems == ()
    return toml_from_fields(fields)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_goes_through_the_form_unchanged(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    written = round_trip(text)

    assert TrainConfig.parse(written) == TrainConfig.parse(text)
    assert round_trip(written) == written


def test_there_are_configs_to_try() -> None:
    assert len(CONFIGS) >= 10


def test_awkward_texts_go_through_the_form_unchanged() -> None:
    assert TrainConfig.parse(round_trip(AWKWARD)) == TrainConfig.parse(AWKWARD)


def test_a_config_with_all_values_written_out_goes_through_the_form_unchanged() -> None:
    text = TrainConfig.parse(AWKWARD).to_toml()

    assert TrainConfig.parse(round_trip(text)) == TrainConfig.parse(text)


def test_the_file_holds_only_what_differs_from_the_defaults() -> None:
    assert tomllib.loads(round_trip(MINIMAL)) == tomllib.loads(MINIMAL)


def test_every_key_of_the_config_is_a_field_with_its_description() -> None:
    keys = {
        f"{name}.{key}": field
        for name, section in sections(TrainConfig).items()
        for key, field in section.model_fields.items()
    }
    rows = {row.name: row for section in settings().values() for row in section}

    assert rows.keys() == keys.keys()
    assert len(rows) > 75
    for name, field in keys.items():
        assert rows[name].description == " ".join((field.description or "").split()) != ""
        assert rows[name].range != ""


def test_every_default_is_read_as_it_is_shown() -> None:
    for rows in settings().values():
        for row in rows:
            if row.default:
                value = to_value(row.kind, row.default, row.values)
                assert to_text(row.kind, value) == row.default, row.name


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("adapter.rank", "many", "a whole number from 1 to 1024"),
        ("run.steps", "1.5", "a whole number"),
        ("optimizer.lr", "nan", "a number above 0"),
        ("optimizer.betas", "0.9", "a list of 2"),
        ("adapter.rank_pattern", "down", "a table from regular expressions"),
        ("adapter.targets", "[", "not a regular expression"),
        ("preview.size", "wide", "a list of 2"),
        ("run.name", "a/b", "file name"),
        ("dataset.0.bucket_step", "0", "a whole number from 1"),
    ],
)
def test_a_wrong_value_is_told_at_its_field(name: str, text: str, said: str) -> None:
    fields = fields_from_toml(MINIMAL)[0] | {name: text}
    problems = {".".join(map(str, problem.key)): problem.message for problem in problems_of(toml_from_fields(fields))}

    key = next(key for key in problems if key.startswith(name))
    assert said in problems[key]


def test_what_is_missing_is_told_at_its_field() -> None:
    problems = {".".join(map(str, problem.key)) for problem in problems_of(toml_from_fields(default_fields()))}

    assert {"run.name", "model.path", "dataset.0.path"} <= problems


def test_a_file_with_unknown_keys_is_loaded_and_the_keys_are_told() -> None:
    fields, problems = fields_from_toml(MINIMAL.replace("steps = 5", "steps = 5\nlerning_rate = 1"))

    assert fields["run.steps"] == "5"
    assert any("lerning_rate" in problem.message for problem in problems)


@pytest.mark.parametrize("text", ["[run", "x" * 2_000_000, "a = " + "[" * 10_000])
def test_what_is_no_toml_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        fields_from_toml(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "{",
        '{"values": []}',
        '{"values": {"run.name": 5}}',
        '{"values": {"run.__class__": "x", "nothing.at.all": "x", "dataset.x.path": "x"}}',
        '{"values": {"dataset.99999999.path": "x"}}',
        "[" * 100_000,
    ],
)
def test_what_a_browser_should_not_send_is_left_out(text: str) -> None:
    assert fields_from_json(text)[0] == {}


def test_removed_folders_leave_no_gap() -> None:
    sent = json.dumps({"values": {"dataset.3.path": "b", "dataset.1.path": "a"}, "word": "ink"})
    fields, rest = fields_from_json(sent)

    assert fields == {"dataset.0.path": "a", "dataset.1.path": "b"}
    assert rest == {"word": "ink"}
    assert num_tables(fields) == 2


def test_every_shipped_config_is_a_preset_and_there_is_one_without_them(tmp_path: Path) -> None:
    assert presets().keys() == {path.stem for path in CONFIGS}
    assert next(iter(presets())) == "quickstart"
    assert all(preset.description and len(preset.facts) == 3 for preset in presets().values())
    assert [preset.toml for preset in presets(tmp_path).values()] == [PLAIN]


def test_a_preset_keeps_what_the_user_set_of_the_subject() -> None:
    mine = fields_from_toml(MINIMAL)[0] | {"adapter.rank": "3"}
    chosen = presets()["sdxl-style"].fields
    merged = apply(chosen, mine, mine | {"run.name": "", "adapter.rank": "16"})

    assert merged["run.name"] == "x"
    assert merged["adapter.rank"] == chosen["adapter.rank"]
    assert merged["model.path"] == chosen["model.path"]


@pytest.mark.parametrize("goal", ["style", "character", "object"])
def test_a_goal_puts_its_word_before_every_caption(goal: str) -> None:
    fields = goals.apply(goal, ' ink"wash\n', fields_from_toml(AWKWARD)[0])
    config = TrainConfig.parse(toml_from_fields(fields))

    assert all("inkwash" in dataset.caption_prefix for dataset in config.dataset)
    assert len(config.preview.prompts) == 3
    assert goals.apply("nothing", "x", fields) == fields


def test_training_with_a_data_set_replaces_all_others_and_keeps_how_the_first_is_read() -> None:
    fields = default_fields(2) | {"dataset.0.path": "a", "dataset.0.repeats": "3", "dataset.1.path": "b"}

    now = with_dataset(fields, "data/mine")

    assert num_tables(now) == 1
    assert (now["dataset.0.path"], now["dataset.0.repeats"]) == ("data/mine", "3")
    assert {name for name in now if not name.startswith("dataset")} == {n for n in fields if not n.startswith("data")}

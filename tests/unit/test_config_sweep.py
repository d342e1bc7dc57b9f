"""What a sweep's command line means."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tomlkit

from lora_diffusion.cli import app
from lora_diffusion.config_sweep import Variation, check_together, grid, parse_variation, written_out
from lora_diffusion.errors import UserError

CONFIG = {
    "run": {"name": "ink", "output": "runs/ink", "steps": 10},
    "model": {"path": "base"},
    "dataset": [{"path": "pictures"}],
}


def write(folder: Path, name: str = "base", **sections: dict[str, object]) -> Path:
    content = {key: value for key, value in CONFIG.items() if key not in sections}
    content |= {key: (CONFIG.get(key, {}) | values) for key, values in sections.items()}
    path = folder / f"{name}.toml"
    path.write_text(tomlkit.dumps(content), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("optimizer.lr=1e-4,3e-4", ("1e-4", "3e-4")),
        ("optimizer.lr = [1e-4, 3e-4]", ("1e-4", "3e-4")),
        ("adapter.kind=lora,loha", ("lora", "loha")),
        ("dataset.0.resolution=[64, 96],64", ("[64, 96]", "64")),
        ("dataset.0.resolution=[[64, 96], 64]", ("[64, 96]", "64")),
        ('dataset.0.caption_prefix="a, b",""', ('"a, b"', '""')),
        ("run.seed=7", ("7",)),
    ],
)
def test_values_are_separated_by_commas_or_a_toml_list(text: str, values: tuple[str, ...]) -> None:
    variation = parse_variation(text)
    assert variation.values == values
    assert variation.key == text.partition("=")[0].strip()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("optimizer.lr", "write a setting and its values"),
        ("lr=1,2", "write a setting and its values"),
        ("optimizer.lr=", "write a setting and its values"),
        ("optimizer.lr=1,,2", "write a setting and its values"),
        ("optimizer.lr=1,2,1", "1 is given twice"),
        ("run.name=a,b", "its own name and folder"),
        ("run.output=a,b", "its own name and folder"),
    ],
)
def test_a_variation_that_says_nothing_is_refused(text: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        parse_variation(text)


def test_a_grid_has_a_member_for_each_combination_with_a_name_a_folder_and_a_label(tmp_path: Path) -> None:
    members = grid(
        write(tmp_path),
        ["run.steps=20"],
        [Variation("optimizer.lr", ("1e-4", "3e-4")), Variation("adapter.rank", ("8", "16"))],
    )

    assert [member.name for member in members] == [
        "ink-lr1e-4-rank8",
        "ink-lr1e-4-rank16",
        "ink-lr3e-4-rank8",
        "ink-lr3e-4-rank16",
    ]
    assert [member.config.run.output for member in members] == [Path("runs") / member.name for member in members]
    assert members[2].label == "lr 3e-4, rank 8"
    assert (members[2].config.optimizer.lr, members[2].config.adapter.rank, members[2].config.run.steps) == (
        3e-4,
        8,
        20,
    )
    check_together(members)


def test_names_are_made_of_words_paths_and_lists(tmp_path: Path) -> None:
    variations = [
        "dataset.0.path=samples/ink,samples/neon/",
        "adapter.kind=lora,dora",
        "adapter.text_encoder=true,false",
    ]
    members = grid(write(tmp_path), [], [parse_variation(text) for text in variations])

    assert members[0].name == "ink-ink-kind-lora-text_encoder-true"
    assert members[-1].name == "ink-neon-kind-dora-text_encoder-false"
    assert members[-1].label == "neon, kind dora, text_encoder false"
    assert (
        grid(write(tmp_path), [], [parse_variation("dataset.0.resolution=[64, 96],64")])[0].name
        == "ink-resolution-64-96"
    )


def test_every_member_that_is_wrong_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)lr 0: .*optimizer\.lr.*lr -1: ") as told:
        grid(write(tmp_path), [], [parse_variation("optimizer.lr=0,1e-4,-1")])
    assert "1e-4" not in str(told.value)


def test_what_is_wrong_with_all_members_is_said_once(tmp_path: Path) -> None:
    with pytest.raises(UserError) as told:
        grid(write(tmp_path, run={"steps": 0}), [], [parse_variation("run.seed=1,2,3")])
    assert str(told.value).count("run.steps") == 1


def test_too_many_members_and_a_key_given_twice_are_refused(tmp_path: Path) -> None:
    seeds = Variation("run.seed", tuple(map(str, range(9))))
    with pytest.raises(UserError, match="81 runs; at most 64"):
        grid(write(tmp_path), [], [seeds, Variation("adapter.rank", tuple(map(str, range(1, 10))))])
    with pytest.raises(UserError, match="varied twice"):
        grid(write(tmp_path), [], [seeds, seeds])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"run": {"name": "b", "output": "b", "precision": "bf16"}},
            r"run\.precision is 'bf16' in b and 'auto' in ink",
        ),
        ({"run": {"name": "b", "output": "b", "device": "cpu"}}, r"run\.device"),
        ({"model": {"path": "other"}, "run": {"name": "b", "output": "b"}}, r"model\.path is 'other' in b and 'base'"),
        ({"model": {"quantise": "nf4"}, "run": {"name": "b", "output": "b"}}, r"model\.quantise"),
        ({"run": {"output": "b"}}, r"run\.name is 'ink' in 2 runs"),
        ({"run": {"name": "b"}}, r"run\.output is .* in 2 runs"),
    ],
)
def test_members_must_share_the_base_and_nothing_else(tmp_path: Path, changes: dict, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        check_together(written_out([write(tmp_path), write(tmp_path, "b", **changes)], []))


def test_settings_of_the_text_that_leave_the_base_alone_may_differ(tmp_path: Path) -> None:
    other = write(tmp_path, "b", model={"clip_skip": 2, "max_tokens": 150}, run={"name": "b", "output": "b"})
    members = written_out([write(tmp_path), other], [])
    check_together(members)

    assert [member.config.model.clip_skip for member in members] == [1, 2]


def test_one_run_is_no_sweep(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="two runs or more"):
        check_together(grid(write(tmp_path), [], [parse_variation("run.seed=1")]))


def test_a_member_written_back_as_toml_is_the_same_run(tmp_path: Path) -> None:
    from lora_diffusion.config import TrainConfig

    member = grid(write(tmp_path, run={"name": "tinte ä"}), [], [parse_variation("optimizer.lr=1e-4,3e-4")])[1]
    assert member.name == "tinte ä-lr3e-4"
    assert TrainConfig.parse(member.config.to_toml()) == member.config
    assert json.loads(member.config.model_dump_json())["optimizer"]["lr"] == 3e-4


def test_the_command_tells_errors_before_it_loads_torch(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    config = str(write(tmp_path))
    told = CliRunner().invoke(app, ["sweep", "--config", config, "--vary", "adapter.rnk=1,2"])
    assert told.exit_code == 2 and "--vary adapter.rnk=1: unknown key" in told.output
    told = CliRunner().invoke(app, ["sweep", "--config", config, "--config", config, "--vary", "run.seed=1,2"])
    assert told.exit_code == 2 and "use one" in told.output


def test_a_sweep_is_not_compiled(tmp_path: Path) -> None:
    members = grid(write(tmp_path, model={"compile": True}), [], [parse_variation("run.seed=1,2")])
    with pytest.raises(UserError, match=r"model\.compile is true"):
        check_together(members)

"""What a config file may say, and what is answered when it says something else."""

from __future__ import annotations

import os
import string
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import get_args

import pytest

from lora_diffusion.config import TrainConfig
from lora_diffusion.config_errors import OTHER_NAMES, ConfigError, edit_distance, printable, sections
from lora_diffusion.config_file import MAX_BYTES, key_lines

MINIMAL = """[run]
name = "ink"
steps = 10

[model]
path = "base"

[[dataset]]
path = "pictures"
"""
NASTY = (
    *(
        '""',
        '"x"',
        '"1e-4"',
        "yes",
        "0",
        "-1",
        "1.5",
        "nan",
        "inf",
        "-inf",
        "1e400",
        "true",
        "[]",
        "[[]]",
        "{}",
        "[1, 2]",
    ),
    *("9" * 400, "0x" + "f" * 6000, '"\\u0000"', '["("]', "1979-05-27", "2.0", '"~nobody-here/x"'),
)


def problems_of(text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        TrainConfig.parse(text, "x.toml", overrides)
    return [str(problem) for problem in caught.value.problems]


def all_keys() -> list[str]:
    return [f"{name}.{key}" for name, section in sections(TrainConfig).items() for key in section.model_fields]


def batched(pairs: list[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    """Few enough for one config to be told about all of them."""
    return [pairs[start : start + 80] for start in range(0, len(pairs), 80)]


def one_edit(word: str) -> list[str]:
    """Every way to leave out, double, replace or swap letters of `word` once, with one sample letter where any fits."""
    cut = [word[:i] + word[i + 1 :] for i in range(len(word))]
    doubled = [word[:i] + word[i] + word[i:] for i in range(len(word))]
    replaced = [word[:i] + "q" + word[i + 1 :] for i in range(len(word))]
    swapped = [word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(len(word) - 1)]
    return sorted({typo for typo in (*cut, *doubled, *replaced, *swapped) if typo and typo != word})


def test_a_minimal_config_has_defaults_for_everything_else() -> None:
    config = TrainConfig.parse(MINIMAL)

    assert config.run.output == Path("runs/ink")
    assert config.adapter.rank == 16
    assert config.adapter.alpha == 16
    assert config.optimizer.lr == 1e-4
    assert config.preview.every == 100
    assert config.warnings() == ()


def test_alpha_follows_the_rank_when_it_is_not_given() -> None:
    assert TrainConfig.parse(MINIMAL + "[adapter]\nrank = 4").adapter.alpha == 4


def test_previews_have_no_more_steps_than_every_sampler_can_draw() -> None:
    assert "expected a whole number from 1 to 998" in problems_of(MINIMAL, "preview.steps=999")[0]


def test_a_written_config_reads_back_as_the_same_config() -> None:
    text = MINIMAL.replace("steps", "epochs") + (
        '[[dataset]]\npath = "b \\" \\\\ ü"\nresolution = [64, 128]\nflip = true\n'
        'default_caption = "\\t \\u0001 \\u007f"\n'
        '[adapter]\ntargets = ["attn1\\\\.to_[qk]$"]\nrank = 3\n[optimizer]\nlr = 3e-05\neps = 1e-16\n'
        '[preview]\nprompts = ["a\\nb", \'"\']\nsize = 64\n'
    )
    config = TrainConfig.parse(text)

    assert TrainConfig.parse(config.to_toml()) == config
    assert TrainConfig.parse(config.to_toml()).to_toml() == config.to_toml()


def test_a_written_config_explains_every_key() -> None:
    lines = TrainConfig.parse(MINIMAL).to_toml().splitlines()
    keys = [number for number, line in enumerate(lines) if " = " in line and not line.startswith("#")]

    assert len(keys) > 60
    assert all(lines[number - 1].startswith("# ") for number in keys)


def test_all_problems_are_told_at_once_in_the_order_of_the_file() -> None:
    text = (
        '[run]\nname = "a/b"\nsteps = "9"\nrank = 4\n\n[modle]\n[[dataset]]\npath = "x"\nrepeats = 0\n'
        "[loss]\ntimestep_min = 999\ntimestep_max = 9\n"
    )
    found = problems_of(text, "optimizer.lr=-1")

    assert [problem.partition(":")[0] for problem in found[:6]] == [f"line {n}" for n in (2, 3, 4, 6, 9, 11)]
    assert 'run.name` is "a/b"' in found[0]
    assert "expected a whole number from 1 to 10000000 (without quotes)" in found[1]
    assert "`rank` belongs to [adapter]" in found[2]
    assert "did you mean [model]?" in found[3]
    assert "`loss.timestep_max` (9)" in found[5]
    assert {problem.partition(":")[0] for problem in found[6:]} == {
        "the table [model] is missing; it needs at least `path`",
        "--set optimizer.lr=-1",
    }


def test_the_message_names_file_line_key_value_and_range() -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig.parse(MINIMAL + "[adapter]\nrank = 9999\n", "x.toml")

    assert str(caught.value) == "x.toml, line 11: `adapter.rank` is 9999; expected a whole number from 1 to 1024"


def test_a_typo_in_a_key_is_told_with_the_key_that_was_meant() -> None:
    known = {key for section in sections(TrainConfig).values() for key in section.model_fields}
    typos = [(*path.split("."), typo) for path in all_keys() for typo in one_edit(path.partition(".")[2])]
    typos = [(table, key, typo) for table, key, typo in typos if typo not in known]
    right = 0
    for table in sections(TrainConfig):
        ours = {(key, typo) for of, key, typo in typos if of == table}
        header = f"[[{table}]]" if table == "dataset" else f"[{table}]"
        for chunk in batched(sorted(ours, key=lambda pair: pair[1])):
            text = "\n".join([header, *sorted({f"{typo} = 1" for _, typo in chunk})])
            answers = "\n".join(problems_of(text))
            right += sum(f"`{typo}` in [{table}]; did you mean `{key}`?" in answers for key, typo in chunk)

    assert len(typos) > 1000
    assert right / len(typos) >= 0.95


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("learning_rate", "`lr`"),
        ("network_dim", "`rank` belongs to [adapter]"),
        ("num_repeats", "`repeats` belongs to [dataset]"),
    ],
)
def test_the_names_of_other_programs_lead_to_ours(name: str, meant: str) -> None:
    assert meant in problems_of(f"{MINIMAL}[optimizer]\n{name} = 1")[0]


@pytest.mark.parametrize(
    ("table", "name", "meant"),
    [
        ("optimizer", "lr_scheduler", "; `lr_scheduler` is `name` of [schedule]"),
        ("schedule", "lr_scheduler", "; did you mean `name`?"),
        ("run", "optimizer_type", "; `optimizer_type` is `name` of [optimizer]"),
        ("dataset.0", "output_name", "; `output_name` is `name` of [run]"),
        ("preview", "max_train_steps", "; `max_train_steps` is `steps` of [run]"),
        ("dataset.0", "base_model", "; `base_model` is `path` of [model]"),
        ("model", "image_dir", "; `image_dir` is `path` of [dataset]"),
    ],
)
def test_another_programs_name_leads_to_the_table_that_is_meant(table: str, name: str, meant: str) -> None:
    assert problems_of(MINIMAL, f"{table}.{name}=1")[0].endswith(meant)


def test_every_name_of_another_program_leads_to_one_key() -> None:
    assert len(OTHER_NAMES) > 30
    for name in OTHER_NAMES.values():
        assert [key for key in all_keys() if key == name or key.partition(".")[2] == name] != []
        assert "." in name or len([key for key in all_keys() if key.partition(".")[2] == name]) == 1


@pytest.mark.parametrize("path", all_keys())
def test_no_value_of_a_key_gives_anything_but_a_config_or_a_config_error(path: str) -> None:
    """A wrong value is named with its key; an accepted one survives being written and read."""
    table, _, key = path.partition(".")
    for value in NASTY:
        override = f"{'dataset.0' if table == 'dataset' else table}.{key}={value}"
        try:
            config = TrainConfig.parse(MINIMAL, "x.toml", [override])
        except ConfigError as error:
            assert key in str(error)
            assert len(str(error)) < 7000
        else:
            assert TrainConfig.parse(config.to_toml()) == config


@pytest.mark.parametrize("path", all_keys())
def test_every_key_has_a_docstring(path: str) -> None:
    table, _, key = path.partition(".")
    description = sections(TrainConfig)[table].model_fields[key].description

    assert description is not None
    assert len(description) > 10


@pytest.mark.parametrize(
    ("settings", "keys"),
    [
        ("run.epochs = 3", ("run.steps", "run.epochs")),
        ("schedule.warmup_steps = 10", ("schedule.warmup_steps", "run.steps")),
        ("loss.timestep_min = 600\nloss.timestep_max = 600", ("loss.timestep_min", "loss.timestep_max")),
        ('run.device = "cpu"\nrun.precision = "fp16"', ("run.precision", "run.device")),
        ('run.device = "cpu"\nmodel.attention = "xformers"', ("model.attention", "run.device")),
        ('model.zero_terminal_snr = true\nmodel.prediction = "epsilon"', ("zero_terminal_snr", "model.prediction")),
        ('adapter.kind = "loha"\nadapter.init = "pissa"', ("adapter.init", "loha")),
        ('adapter.kind = "lokr"\nadapter.init = "gaussian"', ("adapter.init", "lokr")),
        ('adapter.kind = "loha"\nadapter.dropout = 0.1', ("adapter.dropout", "loha")),
        ('adapter.kind = "lokr"\nadapter.rank_dropout = 0.1', ("adapter.rank_dropout", "module_dropout")),
        ('adapter.kind = "lokr"\nadapter.rslora = true', ("adapter.rslora", "lokr")),
        ('adapter.init = "pissa"\nadapter.max_norm = 1.0', ("adapter.max_norm", 'init "pissa"')),
        ('adapter.init = "olora"\nadapter.max_norm = 1.0', ("adapter.max_norm", 'init "olora"')),
        ('adapter.init = "pissa"\nadapter.start_from = "a"', ("adapter.start_from", "adapter.init")),
        ('run.save_format = "peft"\nadapter.kind = "dora"', ("run.save_format", "adapter.kind")),
        ('run.save_format = "peft"\nadapter.kind = "lokr"', ("run.save_format", "adapter.kind")),
        ("dataset.bucket_min = 600", ("bucket_min", "resolution")),
        ("dataset.bucket_max = 400", ("bucket_max", "resolution")),
    ],
)
def test_values_that_contradict_each_other_are_told_with_both_keys(settings: str, keys: tuple[str, str]) -> None:
    tables = {"run": 'name = "x"\nsteps = 10\n', "model": 'path = "x"\n', "dataset": 'path = "x"\n'}
    for line in settings.splitlines():
        table, _, assignment = line.partition(".")
        tables[table] = tables.get(table, "") + assignment + "\n"
    text = "".join(f"{'[[dataset]]' if name == 'dataset' else f'[{name}]'}\n{body}" for name, body in tables.items())
    (problem,) = problems_of(text)

    assert all(key in problem for key in keys)
    place, _, message = problem.partition(": ")
    named = {key.rpartition(".")[2] for key in message.split("`")[1::2]}
    line = text.splitlines()[int(place.removeprefix("line ")) - 1]
    assert line.partition(" =")[0] in named


PATTERNS = """[adapter]
rank = 8
alpha = 4.0

[adapter.rank_pattern]
"up_blocks\\\\.1\\\\..*to_q$" = 4
'mid_block' = 16

[adapter.alpha_pattern]
"a \\"quoted\\" = [#] name" = 2.5

[adapter.lr_pattern]
"^down_blocks" = 0.0
"attn2" = 0.5
"""


def test_patterns_survive_writing_and_reading_in_their_order() -> None:
    config = TrainConfig.parse(MINIMAL + PATTERNS)
    assert list(config.adapter.rank_pattern.items()) == [(r"up_blocks\.1\..*to_q$", 4), ("mid_block", 16)]
    again = TrainConfig.parse(config.to_toml())
    assert again == config
    for name in ("rank_pattern", "alpha_pattern", "lr_pattern"):
        assert list(getattr(again.adapter, name).items()) == list(getattr(config.adapter, name).items())
        assert getattr(again.adapter, name)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('rank_pattern = {"(" = 4}', "'(' is not a regular expression"),
        ('rank_pattern = {"to_q" = 0}', "rank_pattern"),
        ('rank_pattern = {"to_q" = 1.5}', "rank_pattern"),
        ('alpha_pattern = {"to_q" = 0}', "alpha_pattern"),
        ('lr_pattern = {"to_q" = -1.0}', "lr_pattern"),
    ],
)
def test_a_wrong_pattern_is_told_with_its_line_and_key(line: str, told: str) -> None:
    (problem,) = problems_of(f"{MINIMAL}[adapter]\n{line}\n")

    assert told in problem
    assert problem.startswith(f"line {len(MINIMAL.splitlines()) + 2}:")


def test_settings_of_adapters_without_effect_are_warnings() -> None:
    text = MINIMAL + "[adapter]\nlokr_factor = 8\n[optimizer]\ntext_encoder_steps = 3\ntext_encoder_2_lr = 1e-5\n"
    warnings = TrainConfig.parse(text).warnings()

    assert [warning.split()[0] for warning in warnings] == [
        "optimizer.text_encoder_2_lr",
        "optimizer.text_encoder_steps",
        "adapter.lokr_factor",
    ]


def test_a_run_without_a_length_is_told_to_give_one() -> None:
    (problem,) = problems_of(MINIMAL.replace("steps = 10", ""))

    assert "`run.steps` is missing; give it or `run.epochs`" in problem


def test_settings_without_effect_are_warnings() -> None:
    text = (
        MINIMAL + 'keep_tokens = 1\n[optimizer]\ntext_encoder_lr = 1e-5\n[preview]\nevery = 50\nprompts = ["a cat"]\n'
        '[schedule]\nname = "constant"\nmin_lr_ratio = 0.1\n[validation]\nfraction = 0.2\n'
        '[cache]\nenabled = false\nfolder = "elsewhere"\n'
    )
    config = TrainConfig.parse(text.replace("steps = 10", "steps = 10\nsave_every = 20"))

    assert [warning.split()[0] for warning in config.warnings()] == [
        "run.save_every",
        "preview.every",
        "optimizer.text_encoder_lr",
        "schedule.min_lr_ratio",
        "validation.fraction",
        "cache.folder",
        "dataset.0.keep_tokens",
    ]


def test_previews_without_a_prompt_are_a_warning_where_one_has_said_how_often() -> None:
    (warning,) = TrainConfig.parse(MINIMAL + "[preview]\nevery = 50\n").warnings()
    assert warning.startswith("preview.every has no effect without preview.prompts")
    for nothing in ("", "[preview]\nsteps = 20\n", "[preview]\nevery = 0\n", "[preview]\nevery = 100\n"):
        assert TrainConfig.parse(MINIMAL + nothing).warnings() == ()


def test_defaults_that_a_run_has_written_out_are_no_reason_to_warn() -> None:
    config = TrainConfig.parse(MINIMAL.replace("steps = 10", "steps = 1000") + "[cache]\nenabled = false\n")

    assert TrainConfig.parse(config.to_toml()).warnings() == ()


@pytest.mark.parametrize(("blank", "shown"), [("", '""'), ('"  "', '"  "')])
@pytest.mark.parametrize(
    "key", ["dataset.0.path", "run.output", "cache.folder", "adapter.start_from", "model.configs", "model.path"]
)
def test_an_empty_path_is_not_the_current_folder(key: str, blank: str, shown: str) -> None:
    (problem,) = problems_of(MINIMAL, f"{key}={blank}")
    assert f"`{key}` is {shown}: it must not be blank" in problem


# --set


def test_an_override_wins_over_the_file_and_may_add_tables_and_items() -> None:
    overrides = [
        "adapter.rank=4",
        "optimizer.lr = 2e-3",
        "dataset.0.flip=true",
        "dataset.1.path=more",
        'preview.prompts=["a, b"]',
    ]
    config = TrainConfig.parse(MINIMAL, "x.toml", overrides)

    assert (config.adapter.rank, config.optimizer.lr, config.dataset[0].flip) == (4, 2e-3, True)
    assert config.dataset[1].path == Path("more")
    assert config.preview.prompts == ("a, b",)


@pytest.mark.parametrize("text", ["neon", "2024", "true", "a b", "a=b", '"quoted"'])
def test_an_override_of_a_text_needs_no_quotes(text: str) -> None:
    assert TrainConfig.parse(MINIMAL, "x.toml", [f"run.name={text}"]).run.name == text.strip('"')


def test_overriding_epochs_takes_the_place_of_steps_in_the_file() -> None:
    run = TrainConfig.parse(MINIMAL, "x.toml", ["run.epochs=3"]).run

    assert (run.steps, run.epochs) == (None, 3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapter.rnk=4", "did you mean `rank`?"),
        ("adptr.rank=4", "unknown table [adptr]; did you mean [adapter]?"),
        ("rank=4", "expected section.key=value"),
        ("adapter.rank", "expected section.key=value"),
        ("dataset.5.path=x", "`dataset.5` is too far: the next one is `dataset.1`"),
        ("dataset.path=x", "`dataset` is a list: a number can follow it, not `path`"),
        ("run.name.0=x", "`run.name` is a value: no number can follow it, not `0`"),
        ("adapter.rank=1\nalpha = 3", "expected a whole number"),
    ],
)
def test_a_wrong_override_is_told_as_it_was_typed(override: str, message: str) -> None:
    problem = next(problem for problem in problems_of(MINIMAL, override) if problem.startswith("--set"))

    assert problem.startswith(f"--set {printable(override)}: ")
    assert message in problem


# Files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the table [run] is missing"),
        ("[run]\nname = 'a'\nname = 'b'\n", "line 3: not valid TOML: this key or table is given twice"),
        ("[run]\n[run]\n", "line 2: not valid TOML: this key or table is given twice"),
        ("[run]\nname = yes\n", "line 2: not valid TOML: a value is missing or not TOML; texts need quotes"),
        ("[run]\nname = 'a", "line 2: not valid TOML"),
        ("run: name", "line 1: not valid TOML"),
        ("x = " + "[" * 100_000, "nested too deeply"),
        ("x = " + "9" * 5000, "not valid TOML"),
        ("[dataset]\npath = 'x'", "write [[dataset]] in two brackets"),
        ("run = 3", "expected a table [run]"),
        ("rank = 3", "`rank` belongs to [adapter]"),
        ('"\\u202e\\u001b[31m" = 1', "unknown key `\\u202e\\x1b[31m`"),
    ],
)
def test_text_that_is_no_config_is_told_with_its_line(text: str, message: str) -> None:
    assert any(message in problem for problem in problems_of(text))


def test_tabs_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_bytes(b"\xef\xbb\xbf" + MINIMAL.replace(" = ", "\t=\t").replace("\n", "\r\n").encode())

    assert TrainConfig.load(file) == TrainConfig.parse(MINIMAL)


def test_text_that_is_not_utf8_is_told_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_bytes(b"[run]\n\nname = '\xfc'\n")

    with pytest.raises(ConfigError, match="line 3: byte 0xfc is not UTF-8"):
        TrainConfig.load(file)


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    with file.open("wb") as handle:
        handle.truncate(50 * MAX_BYTES)

    with pytest.raises(ConfigError, match=r"50\.0 MB"):
        TrainConfig.load(file)


def test_a_large_file_of_unknown_keys_is_answered_at_once_with_the_first_hundred() -> None:
    text = "[run]\n" + "".join(f"{letter}{number} = 1\n" for letter in string.ascii_letters for number in range(200))
    started = time.perf_counter()

    assert len(problems_of(text)) == 100
    assert time.perf_counter() - started < 10  # about 0.5 s on a free core


def test_a_missing_file_is_told_with_the_file_that_was_meant(tmp_path: Path) -> None:
    (tmp_path / "quickstart.toml").write_text(MINIMAL)

    with pytest.raises(ConfigError, match=r"no such file; did you mean .*quickstart\.toml\?"):
        TrainConfig.load(tmp_path / "quikstart.toml")
    with pytest.raises(ConfigError, match="this is a folder"):
        TrainConfig.load(tmp_path)


def test_a_named_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.toml")

    with pytest.raises(ConfigError, match="no config file"):
        TrainConfig.load(tmp_path / "x.toml")


def test_lines_are_found_behind_strings_and_lists_of_many_lines() -> None:
    text = 'a = """\n[b]\nc = 1\n"""\n[d]\ne = [ # ]\n  "]",\n]\nf.g = {h = 1}\n[[i]]\nj = 1\n[[i]]\n  j = \'#\'\n'
    lines = key_lines(text)

    assert lines == {
        **{("a",): 1, ("d",): 5, ("d", "e"): 6, ("d", "f"): 9, ("d", "f", "g"): 9},
        **{("i",): 10, ("i", 0): 10, ("i", 0, "j"): 11, ("i", 1): 12, ("i", 1, "j"): 13},
    }


@pytest.mark.parametrize(
    ("a", "b", "distance"), [("rank", "rank", 0), ("rnak", "rank", 1), ("", "lr", 2), ("abc", "xyz", 3)]
)
def test_edit_distance_counts_a_swap_of_neighbours_once(a: str, b: str, distance: int) -> None:
    assert edit_distance(a, b) == distance


# The names that plug-in dicts must have too


@pytest.mark.parametrize(
    ("path", "dictionary"),
    [
        ("optimizer.name", "lora_diffusion.training.optimizers:OPTIMIZERS"),
        ("preview.sampler", "lora_diffusion.generation.samplers:SAMPLERS"),
        ("adapter.kind", "lora_diffusion.adapters.kinds:ADAPTERS"),
        ("adapter.init", "lora_diffusion.adapters.initialise:INITS"),
        ("loss.kind", "lora_diffusion.diffusion.loss:LOSSES"),
        ("model.family", "lora_diffusion.models.families:FAMILIES"),
    ],
)
def test_the_names_a_config_takes_are_those_of_the_plug_ins(path: str, dictionary: str) -> None:
    table, _, key = path.partition(".")
    module, _, name = dictionary.partition(":")
    plug_ins = getattr(import_module(module), name)

    assert set(get_args(sections(TrainConfig)[table].model_fields[key].annotation)) - {"auto"} == set(plug_ins)


def test_reading_a_config_needs_neither_torch_nor_a_second_of_computing(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text(MINIMAL)
    script = (
        "import sys, time; from lora_diffusion.config import TrainConfig\n"
        f"TrainConfig.load({str(file)!r}); print('torch' in sys.modules, time.process_time())"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    has_torch, seconds = result.stdout.split()

    assert has_torch == "False"
    assert float(seconds) < 2  # 0.3 on a free core; processor time grows with the machine's load too

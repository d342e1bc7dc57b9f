"""Settings of sd-scripts and kohya_ss as ours: what is translated, and that every setting is accounted for."""

from __future__ import annotations

import importlib.util
import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomlkit
from torch import nn
from typer.testing import CliRunner

from lora_diffusion.adapters.inject import select_layers
from lora_diffusion.adapters.lokr import LoKr
from lora_diffusion.cli import app
from lora_diffusion.config import TrainConfig
from lora_diffusion.config_errors import OTHER_NAMES, ConfigError, sections
from lora_diffusion.errors import UserError
from lora_diffusion.kohya.blocks import NUM_BLOCKS, block_pattern, named_weights
from lora_diffusion.kohya.gui import GUI_ROWS, KINDS
from lora_diffusion.kohya.keys import NEEDS, TRANSLATED, WITHOUT_EFFECT, WITHOUT_EQUAL, by_name, spoken
from lora_diffusion.kohya.read import ARGUMENT_LISTS
from lora_diffusion.kohya.write import Imported, import_settings
from tests.kohya_settings import GUI, OPTIONS
from tests.true_models import make_unet

ROOT = Path(__file__).parents[2]
MINIMAL: dict[str, Any] = {"pretrained_model_name_or_path": "base", "train_data_dir": "pictures"}

Import = Callable[..., tuple[Imported, TrainConfig]]


@pytest.fixture
def importing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Import:
    """Import settings of sd-scripts, added to minimal ones, or those of kohya_ss, in a working directory of its own."""
    monkeypatch.chdir(tmp_path)

    def run(settings: dict[str, Any] | str, *overrides: str, gui: bool = False) -> tuple[Imported, TrainConfig]:
        path = tmp_path / ("theirs.json" if gui else "theirs.toml")
        if isinstance(settings, str):
            path.write_text(settings, encoding="utf-8")
        elif gui:
            path.write_text(json.dumps(settings), encoding="utf-8")
        else:
            path.write_text(tomlkit.dumps(MINIMAL | settings), encoding="utf-8")
        imported = import_settings(path, overrides)
        return imported, TrainConfig.parse(imported.text)

    return run


def accounted(imported: Imported) -> dict[str, str]:
    """Each setting and the account that it is in."""
    ledger = imported.ledger
    accounts = {
        "translated": ledger.translated,
        "without effect": ledger.without_effect,
        "without equal": ledger.without_equal,
        "unknown": ledger.unknown,
        "off": ledger.off,
    }
    return {name: account for account, names in accounts.items() for name in names}


def pictures(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number}.png").touch()
    return folder


# --- sd-scripts ------------------------------------------------------------------------------------------------------

SD_SCRIPTS = """
[model_arguments]
v2 = false
pretrained_model_name_or_path = "sd15.safetensors"

[dataset_arguments]
train_data_dir = "data"
resolution = "512,768"
enable_bucket = true
min_bucket_reso = 320
max_bucket_reso = 960
caption_extension = ".txt"
shuffle_caption = true
keep_tokens = 1
caption_prefix = "in sks style,"
cache_latents = true

[training_arguments]
output_dir = "out"
output_name = "my-style"
max_train_steps = 2000
train_batch_size = 4
gradient_accumulation_steps = 2
mixed_precision = "bf16"
save_precision = "fp16"
save_every_n_steps = 500
seed = 7
clip_skip = 2
xformers = true
min_snr_gamma = 5
noise_offset = 0.05
unknown_thing = 3

[network_arguments]
network_module = "networks.lora"
network_dim = 16
network_alpha = 8
network_args = ["conv_dim=4", "conv_alpha=2"]
scale_weight_norms = 1.0

[optimizer_arguments]
optimizer_type = "AdamW8bit"
optimizer_args = ["weight_decay=0.1", "betas=.9,.99"]
learning_rate = 1e-4
text_encoder_lr = 5e-5
lr_scheduler = "cosine_with_restarts"
lr_warmup_steps = 0.05
"""


def test_a_config_of_sd_scripts_trains_the_same_here(importing: Import) -> None:
    imported, config = importing(SD_SCRIPTS)

    assert config.run.model_dump(include={"name", "steps", "batch_size", "gradient_accumulation", "seed"}) == {
        "name": "my-style",
        "steps": 2000,
        "batch_size": 4,
        "gradient_accumulation": 2,
        "seed": 7,
    }
    assert (config.run.output, config.run.precision, config.run.save_precision) == (Path("out"), "bf16", "fp16")
    assert (config.run.save_every, config.model.path, config.model.clip_skip) == (500, "sd15.safetensors", 2)
    (dataset,) = config.dataset
    assert (dataset.path, dataset.resolution, dataset.buckets) == (Path("data"), (512, 768), True)
    assert (dataset.bucket_min, dataset.bucket_max, dataset.bucket_step) == (320, 960, 64)
    assert (dataset.shuffle_tags, dataset.keep_tokens, dataset.caption_prefix) == (True, 1, "in sks style, ")
    adapter = config.adapter
    assert (adapter.kind, adapter.rank, adapter.alpha, adapter.targets) == ("lora", 16, 8.0, "full")
    assert (list(adapter.rank_pattern.values()), list(adapter.alpha_pattern.values())) == ([4], [2.0])
    assert (adapter.text_encoder, adapter.max_norm) == (True, 1.0)
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.lr, optimizer.text_encoder_lr) == ("adamw8bit", 1e-4, 5e-5)
    assert (optimizer.weight_decay, optimizer.betas) == (0.1, (0.9, 0.99))
    assert (config.schedule.name, config.schedule.warmup_steps) == ("cosine", 100)
    assert (config.loss.min_snr_gamma, config.loss.noise_offset) == (5.0, 0.05)
    assert imported.ledger.without_equal == {}
    assert list(imported.ledger.unknown) == ["unknown_thing"]
    assert config.warnings() == ()


def test_what_sd_scripts_takes_by_itself_is_written_out(importing: Import) -> None:
    imported, config = importing({})

    assert (config.run.steps, config.run.batch_size, config.run.save_every) == (1600, 1, 0)
    assert (config.run.precision, config.run.save_precision, config.run.name) == ("fp32", "fp32", "last")
    assert (config.adapter.rank, config.adapter.alpha, config.adapter.targets) == (4, 1.0, "attention-mlp")
    assert config.adapter.text_encoder
    assert (config.optimizer.lr, config.optimizer.text_encoder_lr, config.optimizer.name) == (2e-6, 2e-6, "adamw")
    assert (config.schedule.name, config.loss.min_snr_gamma, config.dataset[0].buckets) == ("constant", 0.0, False)
    assert "alpha = 1.0  # 1 if not given" in imported.text
    assert "resolution: not given, which sd-scripts refuses; 512 here" in imported.ledger.differences
    _, with_buckets = importing({"enable_bucket": True})
    dataset = with_buckets.dataset[0]
    assert (dataset.bucket_min, dataset.bucket_max, dataset.bucket_step) == (256, 1024, 64)


@pytest.mark.parametrize(
    ("settings", "text_encoder", "rates"),
    [
        ({"learning_rate": 1e-4}, True, (1e-4, 1e-4)),
        ({"unet_lr": 2e-4, "text_encoder_lr": [5e-5]}, True, (2e-4, 5e-5)),
        ({"unet_lr": 2e-4, "network_train_unet_only": True}, False, (2e-4, None)),
        ({"unet_lr": 2e-4, "text_encoder_lr": 0}, False, (2e-4, None)),
        ({"learning_rate": 1e-4, "cache_text_encoder_outputs": True}, False, (1e-4, None)),
    ],
)
def test_the_parts_are_trained_at_their_rates(
    importing: Import, settings: dict[str, Any], text_encoder: bool, rates: tuple[float, float | None]
) -> None:
    _, config = importing(settings)

    assert config.adapter.text_encoder == text_encoder
    assert (config.optimizer.lr, config.optimizer.text_encoder_lr) == rates


def test_a_rate_of_an_optimiser_that_is_not_here_is_not_taken_over(importing: Import) -> None:
    imported, config = importing({"optimizer_type": "Prodigy", "unet_lr": 1.0, "optimizer_args": ["decouple=True"]})

    assert (config.optimizer.name, config.optimizer.lr) == ("adamw", 1e-4)
    assert set(imported.ledger.without_equal) == {"optimizer_type", "unet_lr"}
    assert "lr = 0.0001  # of AdamW: rates of prodigy are of another size" in imported.text


def test_alpha_0_is_the_rank_as_in_sd_scripts(importing: Import) -> None:
    _, config = importing({"network_dim": 8, "network_alpha": 0, "network_args": ["conv_dim=4", "conv_alpha=0"]})

    assert config.adapter.alpha == 8
    assert list(config.adapter.alpha_pattern.values()) == [4.0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["algo=loha", "conv_dim=8"], ("loha", "full")),
        (["algo=lokr", "factor=8", "preset=attn-mlp"], ("lokr", "attention-mlp")),
        (["algo=locon", "dora_wd=True"], ("dora", "full")),
        (["preset=attn-only"], ("lora", "attention")),
    ],
)
def test_networks_of_lycoris(importing: Import, arguments: list[str], expected: tuple[str, str]) -> None:
    imported, config = importing({"network_module": "lycoris.kohya", "network_args": arguments, "network_dim": 8})

    assert (config.adapter.kind, config.adapter.targets) == expected
    assert config.adapter.lokr_factor == (8 if expected[0] == "lokr" else None)
    assert imported.ledger.without_equal == {}


LARGEST = 10240
"""Channels of the widest layer of any family, the feed-forward's in the deepest blocks of SD 1.x, 2.x and SDXL."""


@pytest.mark.parametrize("factor", [-1, 5, 16])
def test_a_rank_of_lokr_beyond_any_layer_is_the_highest_and_leaves_both_factors_whole(
    importing: Import, factor: int
) -> None:
    arguments = ["algo=lokr", f"factor={factor}", "conv_dim=100000", "conv_alpha=7"]
    lokr = {
        "network_module": "lycoris.kohya",
        "network_args": arguments,
        "network_dim": 100000,
        "network_alpha": 100000,
    }
    imported, config = importing(lokr)

    assert (config.adapter.rank, config.adapter.alpha) == (1024, 1024)
    assert list(config.adapter.rank_pattern.values()) == list(config.adapter.alpha_pattern.values()) == [1024]
    assert "rank = 1024  # network_dim: 100000 there; from 1024 on both factors are whole" in imported.text
    assert not any("network_dim" in text for text in imported.ledger.differences)
    layer = nn.Linear(1280, LARGEST, device="meta")
    assert LoKr(layer, config.adapter.rank, 1.0, factor=factor).lokr_w2 is not None


def test_a_lokr_of_whole_factors_with_short_convolutions_keeps_their_alpha(importing: Import) -> None:
    arguments = ["algo=lokr", "conv_dim=8"]
    lokr = {"network_module": "lycoris.kohya", "network_args": arguments, "network_dim": 100000, "network_alpha": 4}
    _, config = importing(lokr)

    assert list(config.adapter.rank_pattern.values()) == [8]
    assert list(config.adapter.alpha_pattern.values()) == [4.0]


def test_a_factor_with_which_the_highest_rank_is_too_low_for_whole_factors_is_told(importing: Import) -> None:
    lokr = {"network_module": "lycoris.kohya", "network_args": ["algo=lokr", "factor=4"], "network_dim": 100000}
    imported, config = importing(lokr)

    assert (config.adapter.rank, config.adapter.alpha) == (1024, 1024)
    assert any("with a factor below 5 the largest layers" in text for text in imported.ledger.differences)


@pytest.mark.parametrize("algorithm", ["lora", "loha"])
def test_a_rank_that_no_other_kind_has_is_an_error(importing: Import, algorithm: str) -> None:
    lycoris = {"network_module": "lycoris.kohya", "network_args": [f"algo={algorithm}"], "network_dim": 100000}
    with pytest.raises(UserError, match="1 to 1024"):
        importing(lycoris)


def test_what_lycoris_alone_has_is_told(importing: Import) -> None:
    arguments = ["algo=oft", "use_tucker=True", "loraplus_lr_ratio=4"]
    imported, config = importing({"network_module": "lycoris.kohya", "network_args": arguments, "seed": 1})

    assert config.adapter.kind == "lora"
    assert set(imported.ledger.without_equal) == {f"network_args {name.partition('=')[0]}" for name in arguments}
    assert 'network_args algo = "oft": a plain lora is trained' in imported.text


# --- epochs and shares -----------------------------------------------------------------------------------------------


def test_epochs_and_shares_become_steps_where_the_pictures_can_be_counted(importing: Import, tmp_path: Path) -> None:
    pictures(tmp_path / "pictures" / "3_sks cat", 5)
    settings = {"max_train_epochs": 10, "save_every_n_epochs": 2, "train_batch_size": 2}
    imported, config = importing(settings | {"lr_scheduler": "linear", "lr_warmup_steps": 0.1})

    assert (config.run.epochs, config.run.steps) == (10, None)
    assert config.run.save_every == 16  # 5 pictures, 3 times each, in batches of 2 are 8 steps
    assert config.schedule.warmup_steps == 8
    assert imported.ledger.without_equal == {}


def test_where_they_cannot_be_counted_it_is_told_what_to_set(importing: Import) -> None:
    settings = {"max_train_epochs": 10, "save_every_n_epochs": 2, "lr_scheduler": "cosine", "lr_warmup_steps": 0.1}
    imported, config = importing(settings)

    assert config.schedule.warmup_steps == 0
    assert set(imported.ledger.without_equal) == {"save_every_n_epochs", "lr_warmup_steps"}
    assert any("pictures is not there now" in text for text in imported.ledger.differences)


def test_pictures_that_only_this_program_trains_on_are_named(importing: Import, tmp_path: Path) -> None:
    data = tmp_path / "pictures"
    pictures(data / "2_ink", 2)
    pictures(data / "2_ink" / "old", 3)
    pictures(data / "unsorted" / "deep", 1)
    (data / "loose.png").touch()
    (data / "2_ink" / "a.gif").touch()
    imported, config = importing({"max_train_epochs": 1, "save_every_n_epochs": 1})
    told = (
        "pictures: pictures that are trained on here and that sd-scripts leaves out: 1 in 2_ink (.gif), 3 in "
        "2_ink/old, 1 in the folder itself, 1 in unsorted/deep; move elsewhere what shall not be trained"
    )

    assert told in imported.ledger.differences
    assert config.run.save_every == 14, "6 pictures twice, 2 once"


def test_of_a_subset_only_the_folder_itself_is_read_by_sd_scripts(importing: Import, tmp_path: Path) -> None:
    pictures(tmp_path / "a", 1)
    pictures(tmp_path / "a" / "x" / "y", 2)
    for number in range(10):
        pictures(tmp_path / "a" / f"z{number}", 1)
    text = '[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = "a"\nnum_repeats = 3\n'
    (tmp_path / "data.toml").write_text(text, encoding="utf-8")
    imported, config = importing({"dataset_config": "data.toml", "max_train_epochs": 1, "save_every_n_epochs": 1})
    (told,) = [text for text in imported.ledger.differences if text.startswith("a: ")]

    assert "1 in z0, 1 in z1, " in told and told.endswith(
        ", the rest in 3 more; move elsewhere what shall not be trained"
    )
    assert config.run.save_every == 39


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("10", "10 repeats from its name, which says nothing here: rename it to `10_name`"),
        ("10_", "10 repeats from its name, which says nothing here: rename it to `10_name`"),
        ("010_cat", "10 repeats and the caption 'cat' from its name, which says nothing here: rename it to `10_cat`"),
        ("2024_summer", "2024 repeats and the caption 'summer' from its name, which says nothing here: move it out of"),
        ("10_cat", ""),
        ("1", ""),
        ("0_cat", ""),
        ("cat", ""),
    ],
)
def test_a_folder_name_that_is_read_in_another_way_is_told(
    importing: Import, tmp_path: Path, name: str, told: str
) -> None:
    pictures(tmp_path / "pictures" / name, 1)
    differences = [text for text in importing({})[0].ledger.differences if "from its name" in text]

    assert len(differences) == bool(told)
    assert all(text.startswith(f"{Path('pictures', name)}: sd-scripts reads {told}") for text in differences)


def captioned(folder: Path, *suffixes: str) -> None:
    """A picture with a caption file of each suffix."""
    pictures(folder, 1)
    for suffix in suffixes:
        (folder / f"0{suffix}").write_text(f"from {suffix}", encoding="utf-8")


@pytest.mark.parametrize(
    ("extension", "suffixes", "told"),
    [
        ("", (".txt", ".caption"), "the `.caption` files, and here the `.txt` files are read: move the `.txt` files"),
        (".caption", (".txt", ".caption"), "the `.caption` files, and here the `.txt` files are read"),
        ("", (".txt",), "no caption files, and here the `.txt` files are read: move the `.txt` files elsewhere"),
        (".txt", (".caption",), "no caption files, and here the `.caption` files are read"),
        (".tags", (".tags",), "the `.tags` files, and here no caption files are read: rename the `.tags` files"),
        (".txt", (".txt", ".caption"), ""),
        (".txt", (".txt",), ""),
        ("", (".caption",), ""),
        ("", (), ""),
    ],
)
def test_captions_that_are_read_from_other_files_than_by_sd_scripts_are_told(
    importing: Import, tmp_path: Path, extension: str, suffixes: tuple[str, ...], told: str
) -> None:
    for name in ("1_a", "2_b"):
        captioned(tmp_path / "pictures" / name, *suffixes)
    imported, _ = importing({"caption_extension": extension} if extension else {})
    differences = [text for text in imported.ledger.differences if text.startswith("pictures: of ")]

    assert len(differences) == bool(told)
    assert all(text.startswith(f"pictures: of 2 pictures sd-scripts reads {told}") for text in differences)


# --- dataset configs -------------------------------------------------------------------------------------------------

DATASETS = """
[general]
shuffle_caption = true
keep_tokens = 2
flip_aug = true

[[datasets]]
resolution = 512
batch_size = 3
enable_bucket = true

[[datasets.subsets]]
image_dir = "a"
num_repeats = 4
class_tokens = "sks cat"
flip_aug = false

[[datasets.subsets]]
image_dir = "reg"
is_reg = true

[[datasets]]
resolution = [768, 512]
batch_size = 2
color_aug = true

[[datasets.subsets]]
image_dir = "b"
caption_dropout_rate = 0.1
"""


def test_a_subset_takes_what_its_data_set_and_general_say(importing: Import, tmp_path: Path) -> None:
    (tmp_path / "data.toml").write_text(DATASETS, encoding="utf-8")
    imported, config = importing({"dataset_config": "data.toml"})
    first, second = config.dataset

    assert (first.path, first.repeats, first.default_caption, first.flip) == (Path("a"), 4, "sks cat", False)
    assert (first.resolution, first.buckets, first.shuffle_tags, first.keep_tokens) == (512, True, True, 2)
    assert (second.path, second.resolution, second.buckets) == (Path("b"), (768, 512), False)
    assert (second.flip, second.caption_dropout) == (True, 0.1)
    assert config.run.batch_size == 3
    accounts = accounted(imported)
    assert accounts["datasets.0.subsets.1.is_reg"] == "without equal"
    assert accounts["datasets.1.batch_size"] == "without equal"
    assert accounts["datasets.1.color_aug"] == "without equal"
    assert accounts["train_data_dir"] == accounts["dataset_config"] == "without effect"


def test_a_dataset_config_alone_needs_a_base(importing: Import) -> None:
    with pytest.raises(ConfigError, match=r"Add --set model\.path=BASE"):
        importing(DATASETS)
    _, config = importing(DATASETS, "model.path=base", "run.epochs=3")

    assert (config.model.path, config.run.epochs, config.run.steps, len(config.dataset)) == ("base", 3, None, 2)


# --- kohya_ss --------------------------------------------------------------------------------------------------------


def test_settings_of_kohya_ss_train_the_same_here(importing: Import, tmp_path: Path) -> None:
    pictures(tmp_path / "img" / "10_sks cat", 4)
    imported, config = importing(GUI | {"train_data_dir": "img"}, gui=True)

    assert (config.run.name, config.run.output, config.run.epochs) == ("my style", Path("out"), 10)
    assert (config.run.precision, config.run.save_every, config.model.clip_skip) == ("fp16", 40, 2)
    assert (config.adapter.kind, config.adapter.rank, config.adapter.alpha) == ("lora", 8, 8.0)
    assert (config.adapter.targets, config.adapter.text_encoder) == ("attention-mlp", True)
    assert (config.optimizer.name, config.optimizer.lr, config.optimizer.text_encoder_lr) == ("adamw8bit", 1e-4, 1e-4)
    assert (config.schedule.name, config.schedule.warmup_steps) == ("cosine", 40)  # 10 % of 4 * 10 * 10
    assert (config.dataset[0].resolution, config.dataset[0].caption_dropout) == (512, 0.05)
    assert (config.loss.min_snr_gamma, config.loss.noise_offset) == (0.0, 0.05)
    assert set(imported.ledger.without_equal) == {"bucket_no_upscale"}
    assert imported.ledger.unknown == {}


def test_every_setting_of_a_file_is_in_an_account(importing: Import) -> None:
    imported, _ = importing(GUI | {"train_data_dir": "img", "optimizer_args": "weight_decay=1", "typo": 1}, gui=True)
    accounts = accounted(imported)

    assert set(accounts) == GUI.keys() | {"typo", "optimizer_args weight_decay"}
    for name in accounts:
        assert name in imported.text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"text_encoder_lr": 0, "unet_lr": 1e-4}, (False, 1e-4, None)),
        ({"text_encoder_lr": 0, "unet_lr": "0", "learning_rate": 3e-4}, (True, 3e-4, 3e-4)),
        ({"text_encoder_lr": 5e-5, "unet_lr": 1e-4, "learning_rate": 3e-4}, (True, 1e-4, 5e-5)),
    ],
)
def test_a_rate_of_0_means_in_kohya_ss_not_to_train_a_part(
    importing: Import, changes: dict[str, Any], expected: tuple[bool, float, float | None]
) -> None:
    _, config = importing(GUI | {"train_data_dir": "img"} | changes, gui=True)

    assert (config.adapter.text_encoder, config.optimizer.lr, config.optimizer.text_encoder_lr) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"max_train_steps": 500, "epoch": 3}, (500, None)),
        ({"max_train_steps": "500", "max_train_epochs": "4"}, (None, 4)),
        ({"max_train_steps": 0, "epoch": "3"}, (None, 3)),
    ],
)
def test_the_length_of_a_run_of_kohya_ss(
    importing: Import, changes: dict[str, Any], expected: tuple[int | None, int | None]
) -> None:
    _, config = importing(GUI | {"train_data_dir": "img", "lr_warmup": 0} | changes, gui=True)

    assert (config.run.steps, config.run.epochs) == expected


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_kohya_ss_is_translated_or_told(importing: Import, name: str) -> None:
    imported, config = importing(GUI | {"train_data_dir": "img", "LoRA_type": name, "conv_dim": 4}, gui=True)

    kind = {"LyCORIS/LoHa": "loha", "LyCORIS/LoKr": "lokr"}.get(name, "lora")
    is_here = name in ("Standard", "Kohya LoCon", "LyCORIS/LoCon", "LyCORIS/LoHa", "LyCORIS/LoKr")
    assert config.adapter.kind == kind
    assert ("LoRA_type" in imported.ledger.without_equal) == (not is_here)
    assert bool(config.adapter.rank_pattern) == (name in ("Kohya LoCon", "LoRA-FA", "Kohya DyLoRA") or "Ly" in name)


def test_additional_parameters_count_more_than_the_fields(importing: Import) -> None:
    typed = (
        '--min_snr_gamma 1 --training_comment "two words" --optimizer_args weight_decay=0.2 eps=1e-6 --max_grad_norm=2'
    )
    imported, config = importing(GUI | {"train_data_dir": "img", "additional_parameters": typed}, gui=True)

    assert (config.loss.min_snr_gamma, config.optimizer.max_grad_norm) == (1.0, 2.0)
    assert (config.optimizer.weight_decay, config.optimizer.eps) == (0.2, 1e-6)
    assert "two words" in imported.ledger.without_equal["additional_parameters --training_comment"]
    assert imported.ledger.without_effect["min_snr_gamma"] == "`additional_parameters` says otherwise"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_prompts_and_their_options_become_previews(importing: Import, tmp_path: Path, encoding: str) -> None:
    (tmp_path / "p.txt").write_text(
        "# comment\na cat --n dog --w 520 --h 768 --d 3 --s 20 --l 6\n"
        "a tree --n dog --w 520 --h 768 --d 4 --s 20 --l 6\n",
        encoding=encoding,
    )
    settings = {"sample_prompts": "p.txt", "sample_every_n_steps": 50, "sample_sampler": "k_euler_a"}
    imported, config = importing(settings)
    typed = GUI | {"train_data_dir": "img", "sample_prompts": "a cat --d 9\na tree --d 2", "sample_every_n_steps": 5}
    from_gui, other = importing(typed, gui=True)
    preview = config.preview

    assert (preview.prompts, preview.negative, preview.size) == (("a cat", "a tree"), "dog", (520, 768))
    assert (preview.seed, preview.steps, preview.cfg, preview.every, preview.sampler) == (3, 20, 6.0, 50, "euler-a")
    assert not any("previews" in text for text in imported.ledger.differences)
    assert (other.preview.prompts, other.preview.seed, other.preview.steps) == (("a cat", "a tree"), 9, 30)
    assert (other.preview.size, other.preview.cfg) == ((512, 512), 7.5)
    assert any("seeds of previews" in text for text in from_gui.ledger.differences)


# --- the table -------------------------------------------------------------------------------------------------------

VALUES: dict[str, Any] = {
    "network_module": "networks.lora",
    "network_args.algo": "locon",
    "network_args.preset": "attn-mlp",
    "network_args.block_dims": ",".join(["4"] * 25),
    "network_args.block_alphas": ",".join(["2"] * 25),
    "network_args.conv_block_dims": ",".join(["4"] * 25),
    "network_args.conv_block_alphas": ",".join(["2"] * 25),
    "network_args.down_lr_weight": ",".join(["0.5"] * 12),
    "network_args.up_lr_weight": ",".join(["0.5"] * 12),
    "network_args.mid_lr_weight": "0.5",
    "network_args.block_lr_zero_threshold": "0.1",
    "optimizer_args.betas": "0.9,0.99",
    "resolution": 512,
    "optimizer_type": "AdamW8bit",
    "lr_scheduler": "cosine_with_min_lr",
    "loss_type": "huber",
    "mixed_precision": "fp16",
    "save_precision": "bf16",
    "sample_sampler": "euler",
    "pretrained_model_name_or_path": "base",
    "max_token_length": 150,
    "max_bucket_reso": 1024,
    "min_timestep": 10,
    "max_timestep": 900,
    "base_weights": ["a.safetensors"],
    "base_weights_multiplier": [0.5],
    "validation_split": 0.1,
}
"""A value that each setting can have; the others are switched on, or texts."""
TEXTS = {
    *("train_data_dir", "image_dir", "caption_prefix", "caption_suffix", "class_tokens", "network_weights"),
    *("output_dir", "output_name"),
}
SHARES = {name for name in by_name(TRANSLATED) if "dropout" in name or name.endswith(("_lr", "learning_rate"))} | {
    *("noise_offset", "lr_scheduler_min_lr_ratio"),
    *("optimizer_args.eps", "optimizer_args.weight_decay"),
}
SWITCHES = {
    *("v2", "sdxl", "v_parameterization", "zero_terminal_snr", "gradient_checkpointing", "fp8_base", "fp8_base_unet"),
    *("shuffle_caption", "flip_aug", "enable_bucket", "network_train_unet_only", "cache_text_encoder_outputs"),
    *("use_8bit_adam", "no_metadata", "network_args.dora_wd", "network_args.rs_lora"),
}
WITH: dict[str, dict[str, Any]] = {
    "network_args.factor": {"network_module": "lycoris.kohya", "network_args.algo": "lokr"},
    "network_args.algo": {"network_module": "lycoris.kohya"},
    "network_args.dora_wd": {"network_module": "lycoris.kohya"},
    "network_args.preset": {"network_module": "lycoris.kohya"},
    "network_args.conv_alpha": {"network_args.conv_dim": "4"},
    "network_args.block_alphas": {"network_args.block_dims": VALUES["network_args.block_dims"]},
    "network_args.conv_block_alphas": {"network_args.conv_block_dims": VALUES["network_args.conv_block_dims"]},
    "network_args.block_lr_zero_threshold": {"network_args.down_lr_weight": VALUES["network_args.down_lr_weight"]},
    "lr_warmup_steps": {"lr_scheduler": "cosine"},
    "lr_scheduler_min_lr_ratio": {"lr_scheduler": "cosine_with_min_lr"},
    "base_weights_multiplier": {"base_weights": ["a.safetensors"]},
    **{name: {"enable_bucket": True} for name in ("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps")},
    **{name: {"sample_prompts": "p.txt"} for name in by_name(TRANSLATED) if name.startswith("sample_e")},
    "sample_sampler": {"sample_prompts": "p.txt"},
    **{name: {"validation_split": 0.1} for name in by_name(TRANSLATED) if name.startswith("validate_")},
}
OF_TEXT = {"caption_extension", "caption_extention", "huber_schedule"}
SUBSET = {"image_dir", "num_repeats", "batch_size", "class_tokens"}


def value_of(name: str) -> Any:
    if name in VALUES:
        return VALUES[name]
    if name in TEXTS:
        return "text"
    return True if name in SWITCHES else 0.1 if name in SHARES else 256 if name == "min_bucket_reso" else 2


def import_one(importing: Import, folder: Path, name: str) -> Imported:
    """Import a file with one setting, and those without which it does nothing."""
    if not (folder / "pictures").exists():
        pictures(folder / "pictures" / "1_x", 3)
    (folder / "p.txt").write_text("a cat\n", encoding="utf-8")
    if name == "sample_prompts":
        return importing({name: "p.txt"})[0]
    if name in SUBSET:
        subset = {"image_dir": "pictures", name: value_of(name)}
        return importing(tomlkit.dumps({"datasets": [{"subsets": [subset]}]}), "model.path=base")[0]
    if name == "dataset_repeats":
        (folder / "data.toml").write_text('[[datasets]]\n[[datasets.subsets]]\nimage_dir = "pictures"\n')
        return importing({"dataset_config": "data.toml", name: 2})[0]
    if name.startswith("sample_prompts."):
        (folder / "p.txt").write_text(f"a cat --{name[-1]} 64\n", encoding="utf-8")
        return importing({"sample_prompts": "p.txt"})[0]
    settings: dict[str, Any] = {"resolution": 512}
    for key, value in {name: value_of(name), **WITH.get(name, {})}.items():
        whole, _, part = key.partition(".")
        if part:
            settings.setdefault(whole, []).append(f"{part}={value}")
        else:
            settings[key] = value
    return importing(settings)[0]


@pytest.mark.parametrize("name", by_name(TRANSLATED))
def test_what_the_table_calls_translated_sets_the_keys_it_names(importing: Import, tmp_path: Path, name: str) -> None:
    imported = import_one(importing, tmp_path, name)
    ledger = imported.ledger
    allowed = by_name(TRANSLATED)[name].ours
    if name.startswith("sample_prompts."):
        assert set(allowed) & {f"preview.{key}" for key in ledger.values["preview"]}
        return
    origin = f"datasets.0.subsets.0.{name}" if name in SUBSET else spoken(name)
    found = {f"{path[0]}.{path[-1]}" for path, origins in ledger.origins.items() if origin in origins}

    assert origin in ledger.translated
    assert found
    assert found <= set(allowed)


def test_the_table_names_only_keys_that_exist_and_no_setting_twice() -> None:
    keys = {f"{name}.{key}" for name, section in sections(TrainConfig).items() for key in section.model_fields}
    named = [name for rows in (TRANSLATED, WITHOUT_EFFECT, WITHOUT_EQUAL) for row in rows for name in row.theirs]

    assert len(named) > 200
    assert {key for row in (*TRANSLATED, *GUI_ROWS) for key in row.ours} <= keys
    assert sorted(named) == sorted(set(named))
    assert NEEDS.keys() | set(NEEDS.values()) <= set(named)


def test_all_options_of_sd_scripts_are_known() -> None:
    known = {name for rows in (TRANSLATED, WITHOUT_EFFECT, WITHOUT_EQUAL) for name in by_name(rows)}

    assert len(OPTIONS) > 150
    assert set(OPTIONS) - known == {"dataset_config", *ARGUMENT_LISTS}  # which are opened


@pytest.mark.parametrize(("rows", "account"), [(WITHOUT_EFFECT, "without effect"), (WITHOUT_EQUAL, "without equal")])
def test_a_setting_without_effect_or_equal_is_told_with_its_reason(
    importing: Import, rows: tuple[Any, ...], account: str
) -> None:
    names = [name for name in by_name(rows) if not name.startswith("sample_prompts.")]
    for name in names:
        settings: dict[str, Any] = {"enable_bucket": True, "loss_type": "huber", "lr_scheduler": "cosine"}
        for key, value in ((NEEDS.get(name, ""), 0.5), (name, "x" if name in OF_TEXT else 0.3)):
            whole, _, part = key.partition(".")
            if key:
                settings |= {whole: [f"{part}={value}"]} if part else {whole: value}
        if name == "keep_tokens_separator":
            settings["shuffle_caption"] = True
        imported, _ = importing(settings)

        assert accounted(imported)[spoken(name)] == account, name
        assert by_name(rows)[name].note.split(";")[0] in imported.text.replace("\n#     ", " "), name


def test_the_page_shows_the_tables_that_import_goes_by() -> None:
    spec = importlib.util.spec_from_file_location("make_kohya_tables", ROOT / "docs" / "make_kohya_tables.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    text = script.PAGE.read_text(encoding="utf-8")

    assert len(script.PLACE.findall(text)) == len(script.TABLES) == 4
    assert script.page(text) == text, "run python docs/make_kohya_tables.py"


def test_the_recipe_on_the_page_is_translated_as_the_page_says(importing: Import) -> None:
    page = (ROOT / "docs" / "from-sd-scripts.md").read_text(encoding="utf-8").partition("## A recipe")[2]
    command, config = re.findall(r"```\w*\n(.*?)```", page, re.DOTALL)
    words = command.replace("\\\n", " ").split()[3:]
    options: dict[str, Any] = {}
    for word in words:
        if word.startswith("--"):
            options[word[2:]] = True
        else:
            name = list(options)[-1]
            options[name] = word
    imported, _ = importing(options)

    translated = tomllib.loads(imported.text)
    shown = tomllib.loads(config)
    assert shown.pop("dataset") == translated.pop("dataset")
    for section, table in shown.items():
        assert table == {key: translated[section][key] for key in table}, section


# --- blocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("version", "family"), [("sd1", "sd"), ("sdxl", "sdxl")])
@pytest.mark.parametrize("targets", ["attention-mlp", "full"])
def test_the_blocks_together_are_the_layers_and_none_is_in_two(version: str, family: str, targets: str) -> None:
    paths = list(select_layers(make_unet(version), targets))
    blocks = [block_pattern(family, block, targets) for block in range(NUM_BLOCKS[family])]
    patterns = [re.compile(pattern) for pattern in blocks if pattern]
    found = [[path for path in paths if pattern.search(path)] for pattern in patterns]

    assert all(found)
    assert sorted(path for names in found for path in names) == sorted(paths)
    # Blocks of the original UNets that hold an attention: 6 + 1 + 9 in SD, 4 + 1 + 6 in SDXL.
    assert (
        len(patterns)
        == {("sd", False): 16, ("sdxl", False): 11, ("sd", True): 24, ("sdxl", True): 20}[family, targets == "full"]
    )


def test_blocks_have_their_ranks_alphas_and_rates(importing: Import) -> None:
    dims = ["4"] * 25
    dims[12], dims[1] = "8", "0"
    rates = ",".join(["1"] * 11 + ["0.5"])
    arguments = [f"block_dims={','.join(dims)}", f"up_lr_weight={rates}"]
    imported, config = importing({"network_dim": 4, "network_args": arguments})
    adapter = config.adapter

    assert adapter.rank_pattern[r"^mid_block\."] == 8
    assert adapter.alpha_pattern[r"^mid_block\."] == 1.0
    assert adapter.lr_pattern == {r"^down_blocks\.0\.attentions\.0\.": 0.0, r"^up_blocks\.3\.attentions\.2\.": 0.5}
    assert imported.ledger.without_equal == {}


def test_convolutions_have_their_own_rank_in_a_block(importing: Import) -> None:
    dims, own = ["4"] * 25, ["2"] * 25
    arguments = [f"block_dims={','.join(dims)}", f"conv_block_dims={','.join(own)}"]
    _, config = importing({"network_args": arguments})
    ranks = config.adapter.rank_pattern

    def rank(path: str) -> int:
        return next(number for pattern, number in ranks.items() if re.search(pattern, path))

    assert rank("down_blocks.0.resnets.0.conv1") == rank("up_blocks.0.upsamplers.0.conv") == 2
    assert rank("down_blocks.0.downsamplers.0.conv") == 2
    assert rank("down_blocks.0.resnets.0.time_emb_proj") == rank("mid_block.attentions.0.proj_in") == 4
    layers = list(select_layers(make_unet("sd1"), "full"))
    assert all(any(re.search(pattern, path) for path in layers) for pattern in ranks)


def test_curves_have_the_values_that_they_are_named_for() -> None:
    assert named_weights("linear", 3) == [0.0, 0.5, 1.0]
    assert named_weights("reverse_linear+0.5", 3) == [1.5, 1.0, 0.5]
    assert named_weights("sine", 3) == [0.0, 0.707107, 1.0]
    assert named_weights("cosine", 3) == [1.0, 0.707107, 0.0]
    assert named_weights("bump", 3) is None


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"network_dim": "many"}, '`network_dim` is "many"; expected a number. Correct it in this file'),
        ({"network_dim": 1.5}, "`network_dim` is 1.5; expected a whole number"),
        ({"network_dim": 5000}, r"`adapter.rank` is 5000; .*from `network_dim`\). .* --set adapter.rank="),
        ({"network_args": ["conv_dim"]}, '`network_args` holds "conv_dim"; expected texts like'),
        (
            {"network_args": ["block_dims=1,2", f"up_lr_weight={','.join('1' * 12)}"]},
            "expected 25 numbers, one for each block",
        ),
        ({"dataset_config": "gone.toml"}, "gone.toml: there is no such file"),
    ],
)
def test_a_wrong_value_is_told_with_file_key_and_remedy(
    importing: Import, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        importing(settings)


def test_what_is_no_json_is_told_with_its_line(importing: Import) -> None:
    with pytest.raises(ConfigError, match=r"theirs.json, line 2: not valid JSON"):
        importing('{"a": 1,\n b}', gui=True)


def test_a_config_of_our_own_is_recognised() -> None:
    with pytest.raises(ConfigError, match="use it as it is"):
        import_settings(ROOT / "configs" / "ink.toml")


def test_secrets_are_not_written_anywhere(importing: Import) -> None:
    settings = {"huggingface_token": "hf_abc", "wandb_api_key": "abc123", "my_token": "hf_xyz"}
    imported, _ = importing(settings)

    assert not any(secret in imported.text + imported.report() for secret in settings.values())
    assert accounted(imported)["my_token"] == "unknown"


# --- the command -----------------------------------------------------------------------------------------------------


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def test_the_command_writes_a_config_that_check_accepts_on_the_shipped_base(tmp_path: Path) -> None:
    settings = {
        "pretrained_model_name_or_path": str(ROOT / "samples/base"),
        "train_data_dir": str(ROOT / "samples/ink"),
        "resolution": 64,
        "max_train_steps": 10,
        "network_train_unet_only": True,
        "unet_lr": 1e-3,
        "output_dir": str(tmp_path / "out"),
        "reg_data_dir": "reg",
    }
    source, out = tmp_path / "theirs.toml", tmp_path / "ours.toml"
    source.write_text(tomlkit.dumps(settings), encoding="utf-8")
    result = run("import", source, "--out", out)
    check = run("check", "--config", out, "--json", "--set", f"cache.folder={tmp_path / 'cache'}")

    assert result.exit_code == 0
    assert 'reg_data_dir = "reg": there are no regularisation pictures' in result.stdout
    assert check.exit_code == 0
    assert json.loads(check.stdout)["steps"] == 10


def test_the_command_overwrites_only_when_told(tmp_path: Path) -> None:
    source, out = tmp_path / "theirs.toml", tmp_path / "ours.toml"
    source.write_text(tomlkit.dumps(MINIMAL), encoding="utf-8")
    out.write_text("mine", encoding="utf-8")

    refused = run("import", source, "--out", out)
    assert refused.exit_code == 2 and "there is something of this name already" in refused.stderr
    assert out.read_text(encoding="utf-8") == "mine"
    assert run("import", source, "--out", source, "--overwrite").exit_code == 2
    assert run("import", source, "--out", out, "--overwrite").exit_code == 0
    assert TrainConfig.load(out).adapter.alpha == 1.0


def test_messages_about_keys_name_the_same_equals() -> None:
    """A config of ours that holds a name of sd-scripts is told the key that `import` would write."""
    ours = {name: row.ours for row in TRANSLATED for name in row.theirs}
    for name, key in OTHER_NAMES.items():
        if name in ours:
            assert any(equal == key or equal.endswith(f".{key}") for equal in ours[name]), name
    assert len(ours.keys() & OTHER_NAMES.keys()) > 20

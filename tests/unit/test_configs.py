"""Each config that ships can be used as it is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lora_diffusion.config import TrainConfig

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))


def test_the_configs_folder_is_not_empty() -> None:
    assert {path.stem for path in CONFIGS} >= {"quickstart", "ink", "sd15-style", "sd15-character", "sd15-lowvram"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_loads_without_a_warning(path: Path) -> None:
    config = TrainConfig.load(path)

    assert config.warnings() == ()
    assert config.preview.prompts


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_is_the_same_after_being_written_and_read_again(path: Path) -> None:
    config = TrainConfig.load(path)

    assert TrainConfig.parse(config.to_toml()) == config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_is_commented(path: Path) -> None:
    text = path.read_text(encoding="utf-8")

    assert text.startswith("# ")
    assert len(re.findall(r"# \w", text)) >= 5


def test_the_sample_configs_train_on_what_ships() -> None:
    for name in ("quickstart", "ink"):
        config = TrainConfig.load(ROOT / "configs" / f"{name}.toml")
        assert config.model.path == "samples/base"
        assert [dataset.path for dataset in config.dataset] == [Path("samples") / config.run.name]
        assert config.dataset[0].resolution == 64

"""Every config that ships trains: two steps on a tiny model of its family, with small pictures, all else as it is."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tomlkit

from lora_diffusion.config import TrainConfig
from lora_diffusion.formats.adapter_file import AdapterFile
from lora_diffusion.training_run import run_training
from tests.tiny import make_tiny_sd1, make_tiny_sd2, make_tiny_sdxl
from tests.training_runs import draw_pictures

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))


@dataclass(frozen=True)
class Case:
    """The tiny model that stands for a config's base, and what its adapter must turn out to be."""

    family: str
    kind: str = "lora"
    prediction: str = "epsilon"
    zero_terminal_snr: bool = False
    parts: tuple[str, ...] = ("lora_unet",)
    notes: tuple[str, ...] = ()


CASES = {
    "quickstart": Case("sd1"),
    "ink": Case("sd1"),
    "sd15-style": Case("sd1"),
    "sd15-character": Case("sd1", parts=("lora_unet", "lora_te")),
    "sd15-lowvram": Case("sd1"),
    "sd21-v": Case("sd2", prediction="v"),
    "sdxl-style": Case("sdxl"),
    "sdxl-low-memory": Case("sdxl"),
    "sdxl-v-pred": Case(
        "sdxl",
        prediction="v",
        zero_terminal_snr=True,
        parts=("lora_unet", "lora_te1", "lora_te2"),
        # SDXL reads the first encoder's last but one layer: the last one's six adapters are never asked.
        notes=("the weights are all 0 in 6 of 338 modules: they change nothing",),
    ),
    "dora": Case("sd1", kind="dora", parts=("lora_unet", "lora_te")),
    "lokr": Case("sd1", kind="lokr"),
}
MAKERS = {"sd1": make_tiny_sd1, "sd2": make_tiny_sd2, "sdxl": make_tiny_sdxl}


def shrunk(config: Path, base: Path, data: Path, folder: Path) -> str:
    """The config's text with paths, sizes and lengths for a test; whatever else it says stays."""
    document: Any = tomlkit.parse(config.read_text(encoding="utf-8"))
    document["run"] |= {"output": str(folder / "run"), "device": "cpu", "save_every": 0}
    document["run"].pop("epochs", None)
    document["run"]["steps"] = 2
    document["model"]["path"] = str(base)
    for table in document["dataset"]:
        table |= {"path": str(data), "resolution": 64}
    document.setdefault("schedule", {})["warmup_steps"] = 1
    if "text_encoder_steps" in document["optimizer"]:
        document["optimizer"]["text_encoder_steps"] = 1
    document["preview"] |= {"every": 0, "steps": 1, "size": [64, 64], "prompts": document["preview"]["prompts"][:1]}
    document["cache"] = {"folder": str(folder / "cache")}
    return tomlkit.dumps(document)


def test_every_config_has_a_case_and_every_family_a_config() -> None:
    assert {path.stem for path in CONFIGS} == CASES.keys()
    assert {case.family for case in CASES.values()} == MAKERS.keys()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_trains_on_a_tiny_model_of_its_family(config: Path, tmp_path: Path) -> None:
    case = CASES[config.stem]
    options = {"prediction": case.prediction, "zero_terminal_snr": case.zero_terminal_snr}
    base = MAKERS[case.family](tmp_path / "base", **options)
    data = draw_pictures(tmp_path / "data", count=6)
    settings = TrainConfig.parse(shrunk(config, base, data, tmp_path), config.name)

    file = AdapterFile.read(run_training(settings, resume=False))

    assert set(file.kinds) == {case.kind}
    assert file.family == case.family
    assert file.notes == case.notes
    assert {re.match(r"lora_(unet|te[12]?)", name)[0] for name in file.modules} == set(case.parts)  # pyright: ignore
    assert file.metadata["modelspec.prediction_type"] == case.prediction
    assert file.metadata["ss_steps"] == "2"
    assert list((tmp_path / "run" / "previews").glob("000002-0.png"))

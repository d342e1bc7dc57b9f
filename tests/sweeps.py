"""Sweeps on a toy base for tests: members trained together and each of them alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from lora_diffusion.config import TrainConfig
from lora_diffusion.config_sweep import Member, grid, parse_variation
from lora_diffusion.sweep_run import run_sweep
from tests.training_runs import draw_pictures, write_config


def make_config(folder: Path, base: Path, **sections: dict[str, object]) -> Path:
    """Five steps at batch 2; the whole adapter is in the file at full precision, and nothing is drawn.

    AdamW's `eps` is as large as the gradients. With the usual one it makes steps as long as any of those entries whose
    gradients are nothing but rounding, and two ways to add the same numbers end up to 3e-3 apart (see `distance`);
    with this one up to 1e-5.
    """
    run = {"steps": 5, "save_precision": "fp32"} | sections.pop("run", {})
    optimizer = {"eps": 1e-4} | sections.pop("optimizer", {})
    pictures = draw_pictures(folder / "pictures")
    return write_config(folder / "base.toml", base, pictures, run=run, optimizer=optimizer, **sections)


def members_of(config: Path, *variations: str, overrides: Sequence[str] = ()) -> list[Member]:
    return grid(config, overrides, [parse_variation(text) for text in variations])


def changed(member: Member, *overrides: str) -> Member:
    """The member with further settings of its own."""
    text = member.config.to_toml()
    return replace(member, config=TrainConfig.parse(text, member.name, overrides))


def train_together(members: Sequence[Member], folder: Path, *, resume: bool = False) -> None:
    run_sweep(members, folder, resume=resume)


def weights_of(member: Member, folder: Path | None = None) -> dict[str, Tensor]:
    return load_file((folder or member.config.run.output) / f"{member.name}.safetensors")

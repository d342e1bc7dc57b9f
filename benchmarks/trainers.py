"""How each trainer is told to do the same: AdamW at a constant rate on one folder of pictures, one picture a step.

Adapters are of rank 8. Two sets of layers: diffusers' script trains the attention's projections ("attention"),
sd-scripts also the layers around them ("attention-mlp"); this trainer is measured with either. Text encoders are left
alone. What can be cached is: latents in sd-scripts; latents and texts here; diffusers' script cannot.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

RANK = 8
SEED = 1
LR = 1e-4


@dataclass(frozen=True)
class Task:
    """What all trainers are given. precision: "bf16" or "fp32". folder: for what a run writes, new for each run."""

    base: Path
    is_reduced: bool
    pictures: Path
    size: int
    precision: str
    batch_size: int
    steps: int
    folder: Path


@dataclass(frozen=True)
class Trainer:
    """name: as charts show it. arguments: the command that does a task. folder: where it must be started."""

    name: str
    arguments: Callable[[Task], list[str]]
    folder: Path


def own_config(task: Task, targets: str, *more: str) -> str:
    """This trainer's config for a task. more: lines of TOML with dotted keys, such as 'model.quantise = "nf4"'."""
    lines = [
        f'run = {{ name = "speed", output = "{task.folder.as_posix()}/run", steps = {task.steps}, '
        f'batch_size = {task.batch_size}, seed = {SEED}, precision = "{task.precision}", save_every = 0 }}',
        f'model.path = "{task.base.as_posix()}"',
        f'adapter = {{ rank = {RANK}, targets = "{targets}" }}',
        f"optimizer.lr = {LR}",
        'schedule.name = "constant"',
        f'cache.folder = "{task.folder.as_posix()}/cache"',
        *more,
        "[[dataset]]",
        f'path = "{task.pictures.as_posix()}"',
        f"resolution = {task.size}",
        "buckets = false",
    ]
    return "\n".join(lines) + "\n"


def own(targets: str) -> Trainer:
    def arguments(task: Task) -> list[str]:
        config = task.folder / "config.toml"
        config.write_text(own_config(task, targets))
        return [sys.executable, "-m", "lora_diffusion", "train", "--config", str(config)]

    return Trainer(f"ours, {targets}", arguments, Path.cwd())


def diffusers_script(checkout: Path, python: Path) -> Trainer:
    """checkout: of huggingface/diffusers. python: of an environment that its scripts run in."""
    folder = checkout.resolve() / "examples" / "text_to_image"

    def arguments(task: Task) -> list[str]:
        is_sdxl = (task.base / "text_encoder_2").exists()
        script = folder / ("train_text_to_image_lora_sdxl.py" if is_sdxl else "train_text_to_image_lora.py")
        return [
            *(str(python), str(script)),
            *("--pretrained_model_name_or_path", str(task.base), "--train_data_dir", str(task.pictures)),
            *("--cache_dir", str(task.folder / "cache"), "--output_dir", str(task.folder / "out")),
            *("--resolution", str(task.size), "--train_batch_size", str(task.batch_size)),
            *("--max_train_steps", str(task.steps), "--checkpointing_steps", "100000", "--rank", str(RANK)),
            *("--learning_rate", str(LR), "--lr_scheduler", "constant", "--lr_warmup_steps", "0"),
            *("--seed", str(SEED), "--mixed_precision", _mixed(task.precision), "--dataloader_num_workers", "0"),
            *("--report_to", "tensorboard"),
        ]

    return Trainer("diffusers", arguments, checkout)


def sd_scripts(checkout: Path, python: Path) -> Trainer:
    """checkout: of kohya-ss/sd-scripts. python: of an environment that it runs in."""
    checkout = checkout.resolve()

    def arguments(task: Task) -> list[str]:
        tokenizer = task.folder / "tokenizers" / "openai_clip-vit-large-patch14"
        shutil.copytree(task.base / "tokenizer", tokenizer)
        dataset = task.folder / "dataset.toml"
        dataset.write_text(
            f"[[datasets]]\nresolution = {task.size}\nbatch_size = {task.batch_size}\n[[datasets.subsets]]\n"
            f'image_dir = "{task.pictures.as_posix()}"\ncaption_extension = ".txt"\nnum_repeats = 1\n'
        )
        script = "sdxl_train_network.py" if (task.base / "text_encoder_2").exists() else "train_network.py"
        return [
            *(str(python), *(_narrow() if task.is_reduced else [script])),
            *("--pretrained_model_name_or_path", str(task.base), "--dataset_config", str(dataset)),
            *("--tokenizer_cache_dir", str(tokenizer.parent), "--output_dir", str(task.folder / "out")),
            *("--output_name", "speed", "--max_train_steps", str(task.steps), "--network_module", "networks.lora"),
            *("--network_dim", str(RANK), "--network_alpha", str(RANK), "--network_train_unet_only"),
            *("--learning_rate", str(LR), "--lr_scheduler", "constant", "--optimizer_type", "AdamW"),
            *("--seed", str(SEED), "--mixed_precision", _mixed(task.precision), "--save_model_as", "safetensors"),
            *("--cache_latents", "--sdpa", "--max_data_loader_n_workers", "0"),
        ]

    return Trainer("sd-scripts", arguments, checkout)


def _mixed(precision: str) -> str:
    return "no" if precision == "fp32" else precision


def _narrow() -> list[str]:
    """sd-scripts has the widths of SD 1.5 as constants; this sets those of the reduced base before it starts."""
    from benchmarks.bases import REDUCED

    widths = tuple(REDUCED["unet"]["block_out_channels"])
    code = (
        "import runpy, sys; sys.path.insert(0, '.'); import library.original_unet as unet; "
        f"unet.BLOCK_OUT_CHANNELS = {widths}; unet.TIMESTEP_INPUT_DIM = {widths[0]}; "
        f"unet.TIME_EMBED_DIM = {4 * widths[0]}; sys.argv[0] = 'train_network.py'; "
        "runpy.run_path('train_network.py', run_name='__main__')"
    )
    return ["-c", code]

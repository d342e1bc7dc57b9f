"""What a step of four adapters trained at once costs, against four trainings of their own.

    python -m benchmarks.many --out benchmarks/results

Per case a base, four LoRA adapters of rank 8 at batch 1, each with its own seed. The base is the shipped one, and with
--unet sd15 its UNet is replaced by one of SD 1.5's architecture with random weights (3.4 GB in float32). First each
adapter is trained alone on the base, then all together, launched as users' steps are. A round is 20 steps on a GPU and
two on a CPU, and the time is that of the wall clock, per step, the median of the rounds; the first steps, in which
kernels are chosen and steps captured or recorded, do not count. SD 1.5 at 512 px, that is with latents of 64 x 64, is

    python -m benchmarks.many --unet sd15 --precision bf16 --resolution 256
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import date
from pathlib import Path

import diffusers
import psutil
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn

from benchmarks.engine import hardware
from lora_diffusion.adapters.inject import eject, join
from lora_diffusion.adapters.joint import JointLayout
from lora_diffusion.config import TrainConfig
from lora_diffusion.models.base import DiffusionModel
from lora_diffusion.models.load import choose_kernels, load_model
from lora_diffusion.models.precision import DTYPES, resolve_device
from lora_diffusion.recipe import build_on, make_accelerator
from lora_diffusion.recipe_data import SharedBase
from lora_diffusion.runs import RunFolder
from lora_diffusion.training.joint import JointTrainer
from lora_diffusion.training.trainer import Trainer

SD15 = {
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
}  # of the published model's unet/config.json
STEPS, WARM_UP = {"cuda": 20, "cpu": 2}, {"cuda": 8, "cpu": 4}  # of a round, and before the first
CONFIG = """
[run]
name = "bench-{seed}"
output = "{folder}/bench-{seed}"
steps = 10000
batch_size = 1
seed = {seed}
precision = "{precision}"
save_every = 0
[model]
path = "{base}"
[adapter]
rank = 8
alpha = 8
targets = "{targets}"
[[dataset]]
path = "samples/neon"
resolution = {resolution}
buckets = false
[preview]
every = 0
[cache]
folder = "{folder}/cache"
"""


def make_model(base: str, unet: str, dtype: torch.dtype) -> DiffusionModel:
    """The base; with `unet` "sd15" the UNet alone is another one, which sees the same text and latents."""
    device = resolve_device("auto")
    model = load_model(base, dtype=dtype, device=device)
    if unet == "sd15":
        sizes = {"cross_attention_dim": model.unet.config["cross_attention_dim"], "sample_size": 32}
        with torch.device("meta"):
            large = UNet2DConditionModel(**SD15, **sizes)
        large = large.to_empty(device=device)
        nn.Module.to(large, dtype)
        generator = torch.Generator(device).manual_seed(0)
        with torch.no_grad():
            for name, parameter in large.named_parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
                else:
                    parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        model.unet = large.requires_grad_(False).eval()
        choose_kernels(model.unet, "auto", device)
    return model


def make_trainers(model: DiffusionModel, configs: list[TrainConfig]) -> tuple[list[Trainer], JointLayout]:
    """Trainers on one base, as `lora-diffusion sweep` makes them."""
    layout, base, trainers = JointLayout(), SharedBase(model, len(configs)), list[Trainer]()
    for config in configs:
        run = RunFolder(config.run.output)
        run.path.mkdir(parents=True)
        trainers.append(build_on(base, config, run, make_accelerator(config), resume=False, is_shared=True))
        eject(model.unet, trainers[-1].exporter.adapters["unet"])
    join(model.unet, [trainer.exporter.adapters["unet"] for trainer in trainers], layout)
    return trainers, layout


def measure(model: DiffusionModel, configs: list[TrainConfig], rounds: int) -> dict[str, object]:
    """Seconds of a step of each alone, summed, and of all together, launched as in `train` and in `sweep`."""
    apart: list[list[float]] = []
    for config in configs:
        run = RunFolder(config.run.output.with_name(f"{config.run.name}-alone"))
        run.path.mkdir(parents=True)
        trainer = build_on(SharedBase(model), config, run, make_accelerator(config), resume=False, is_shared=True)
        trainer.begin()
        apart.append(_seconds_per_step(trainer.train_step, rounds))
        trainer.end_steps()
        eject(model.unet, trainer.exporter.adapters["unet"])
        del trainer
        gc.collect()  # the graph's memory, too
    peak_apart_gb = _peak_gb()
    trainers, layout = make_trainers(model, configs)
    together = JointTrainer(trainers, layout, lambda _: nullcontext(), lambda *_: None, _refuse)
    together.begin()
    seconds = _seconds_per_step(together.train_step, rounds)
    together.end()
    apart_s, together_s = sum(statistics.median(own) for own in apart), statistics.median(seconds)
    return {
        "launch": trainers[0].plan.launch,
        "apart_wall_s": apart_s,
        "together_wall_s": together_s,
        "ratio_wall_s": together_s / apart_s,
        "peak_gb": {"one alone": peak_apart_gb, "together": _peak_gb()} if torch.cuda.is_available() else None,
        "rounds": {"apart": apart, "together": seconds},
    }


def _refuse(_: Trainer, error: BaseException) -> None:
    """A member that leaves early would make the others look fast."""
    raise error


def _seconds_per_step(train_step: Callable[[], None], rounds: int) -> list[float]:
    """Of each round."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for _ in range(WARM_UP[device]):
        train_step()

    def take_steps() -> None:
        for _ in range(STEPS[device]):
            train_step()

    return [_seconds(take_steps) / STEPS[device] for _ in range(rounds)]


def _peak_gb() -> float:
    """What torch's allocator held at most since the last call."""
    if not torch.cuda.is_available():
        return 0.0
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return peak


def _seconds(work: Callable[[], None]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="samples/base")
    parser.add_argument("--unet", choices=("own", "sd15"), default="own")
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--resolution", type=int, default=64, help="pixels; latents have a quarter of it")
    parser.add_argument("--targets", default="attention")
    parser.add_argument("--precision", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = make_model(arguments.base, arguments.unet, DTYPES[arguments.precision])
    num_parameters = sum(parameter.numel() for parameter in model.unet.parameters())
    values = {"base": arguments.base, "targets": arguments.targets, "resolution": arguments.resolution}
    values["precision"] = arguments.precision
    with tempfile.TemporaryDirectory() as folder:
        configs = [
            TrainConfig.parse(CONFIG.format(seed=seed, folder=folder, **values)) for seed in range(arguments.members)
        ]
        measured = measure(model, configs, arguments.rounds)
    result = {
        "date": date.today().isoformat(),
        "hardware": hardware(resolve_device("auto")),
        "versions": {
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        },
        "settings": {key: str(value) for key, value in vars(arguments).items() if key != "out"},
        "unet_parameters": num_parameters,
        "peak_rss_gb": psutil.Process().memory_info().rss / 2**30,
        **measured,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = f"many-{arguments.unet}-gpu.json" if torch.cuda.is_available() else f"many-{arguments.unet}.json"
    (arguments.out / name).write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "rounds"}, indent=2))


if __name__ == "__main__":
    main()

"""Whether the fast path of training computes what the plain one does: the same draws by both, losses side by side.

Plain is float32 throughout, the layers of torch and diffusers as they are, attention as products and a softmax, a LoRA
as two more products beside its layer, and AdamW parameter by parameter.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.trainers import Task, own_config
from lora_diffusion import recipe_base
from lora_diffusion.adapters.lora import LoRA
from lora_diffusion.config import TrainConfig
from lora_diffusion.models import load
from lora_diffusion.models.matmul_conv import MatmulConv2d
from lora_diffusion.models.packed_conv import PackedConv2d
from lora_diffusion.recipe import build, make_accelerator
from lora_diffusion.runs import RunFolder
from lora_diffusion.training.tracking import read_metrics
from lora_diffusion.training.trainer import Trainer

PLAIN = ('run.precision="fp32"', 'model.attention="eager"', "run.cuda_graph=false")
TARGETS = "attention-mlp"  # all layers that are trained when speed is measured


@dataclass(frozen=True)
class Learned:
    """What a training came to. losses, grad_norms: of each step. factors: (scale · up, down) of each LoRA, by path."""

    losses: NDArray[np.float64]
    grad_norms: NDArray[np.float64]
    factors: Mapping[str, tuple[Tensor, Tensor]]
    num_packed: int
    """Convolutions with packed weights."""

    def inner(self, other: Learned) -> float:
        """The inner product of both changes of the weights, all layers as one vector."""
        pairs = ((*self.factors[path], *other.factors[path]) for path in self.factors)
        # ⟨U D, U' D'⟩ = tr(UᵀU' · D'Dᵀ), of size rank x rank
        return sum(float(((up.T @ up2) * (down @ down2.T)).sum()) for up, down, up2, down2 in pairs)

    def norm(self) -> float:
        return math.sqrt(self.inner(self))


@dataclass(frozen=True)
class Parity:
    """The fast path against the plain one. window: steps that the losses are averaged over before they are compared.

    loss, grad_norm: the largest difference at any step, of the plain one's value. cosine: between the trained changes.
    """

    steps: int
    window: int
    loss: float
    grad_norm: float
    cosine: float
    num_packed: int


def compare_paths(task: Task, threads: int) -> dict[str, Any]:
    """Train `task` both ways, one after the other; a `Parity` as JSON. Its folder must be there."""
    torch.set_num_threads(threads)
    fast_config, plain_config = (
        TrainConfig.parse(own_config(replace(task, folder=task.folder / path), TARGETS)) for path in ("fast", "plain")
    )
    fast = train(fast_config)
    gc.collect()  # two bases need not be in memory at once
    plain = train_plainly(plain_config)
    return asdict(compare(fast, plain, window=min(10, max(1, task.steps // 2))))


def compare(fast: Learned, plain: Learned, window: int) -> Parity:
    assert fast.factors.keys() == plain.factors.keys() and len(fast.losses) == len(plain.losses)
    return Parity(
        steps=len(plain.losses),
        window=window,
        loss=_largest_difference(_smooth(fast.losses, window), _smooth(plain.losses, window)),
        grad_norm=_largest_difference(fast.grad_norms, plain.grad_norms),
        cosine=fast.inner(plain) / (fast.norm() * plain.norm()),
        num_packed=fast.num_packed,
    )


def train(config: TrainConfig) -> Learned:
    """One training of LoRAs from start to end, as `lora-diffusion train` builds it."""
    return _fit(_build(config))


def train_plainly(config: TrainConfig) -> Learned:
    """The same training by the plain path. Raises AssertionError if anything of the other one is left in it."""
    with _plain_layers():
        trainer = _build(TrainConfig.parse(config.to_toml(), overrides=PLAIN))
        for group in trainer.optimizer.param_groups:
            group.update(fused=False, foreach=False)
        modules = list(trainer.loss.model.unet.modules())
        kinds = {type(module) for module in modules if not isinstance(module, nn.Linear | nn.Conv2d)}
        assert {kind for kind in kinds if kind.__module__.startswith("lora_diffusion")} == {LoRA}, kinds
        assert not any(isinstance(module, PackedConv2d | MatmulConv2d) for module in modules)
        assert trainer.plan.launch == "eager"
        assert {parameter.dtype for module in modules for parameter in module.parameters()} == {torch.float32}
        return _fit(trainer)


@contextmanager
def _plain_layers() -> Iterator[None]:
    """Inside, bases are left as diffusers loads them, and LoRAs add two products to their layer's output."""
    with (
        mock.patch.object(load, "multiply_convolutions", lambda unet: None),
        mock.patch.object(recipe_base, "suit_to_device", lambda *_: None),
        mock.patch.object(LoRA, "forward", _plain_forward),
        torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
    ):
        yield


def _plain_forward(adapter: LoRA, x: Tensor) -> Tensor:
    assert adapter.start_down is None and adapter.dropout_seed is None
    return adapter.base(x) + adapter.alpha / adapter.rank * adapter.lora_up(adapter.lora_down(x))


def _build(config: TrainConfig) -> Trainer:
    run = RunFolder(config.run.output)
    run.path.mkdir(parents=True)
    return build(config, run, make_accelerator(config), resume=False)


def _fit(trainer: Trainer) -> Learned:
    trainer.fit()
    modules = dict(trainer.loss.model.unet.named_modules())
    loras = {path: module for path, module in modules.items() if isinstance(module, LoRA)}
    lines = read_metrics(trainer.run.metrics)
    return Learned(
        losses=np.array([line["loss"] for line in lines]),
        grad_norms=np.array([line["grad_norm"] for line in lines], dtype=np.float64),
        factors={path: (lora.scale * _matrix(lora.lora_up), _matrix(lora.lora_down)) for path, lora in loras.items()},
        num_packed=sum(isinstance(module, PackedConv2d) for module in modules.values()),
    )


def _matrix(layer: nn.Linear | nn.Conv2d) -> Tensor:
    """float64: cosines are told from 1 by less than float32's rounding."""
    return layer.weight.detach().flatten(1).double()


def _smooth(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    return np.convolve(values, np.ones(window) / window, mode="valid")


def _largest_difference(values: NDArray[np.float64], expected: NDArray[np.float64]) -> float:
    return float(np.max(np.abs(values / expected - 1)))

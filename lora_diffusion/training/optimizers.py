"""Optimisers by name, and the learning rate as a pure function of the step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import nn

from lora_diffusion.errors import UserError

OPTIMIZERS: dict[str, str] = {
    "adamw": "torch.optim:AdamW",
    "adamw8bit": "bitsandbytes.optim:AdamW8bit",
}
"""Name in the config → `package.module:Class`."""


class OptimizerError(UserError):
    """The optimiser's package is missing."""


def parameter_group(
    parameters: Sequence[nn.Parameter], lr: float, *, until: int | None = None, decays: bool = True
) -> dict[str, Any]:
    """`peak_lr` stays in the group beside the learning rate of the current step.

    until: the number of steps that the group is trained for; None is the whole run. decays: whether the optimiser's
    weight decay is for this group too.
    """
    group = {"params": list(parameters), "lr": lr, "peak_lr": lr, "until": until}
    return group if decays else group | {"weight_decay": 0.0}


def build_optimizer(
    name: str,
    groups: Sequence[dict[str, Any]],
    *,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> torch.optim.Optimizer:
    """An optimiser over `groups` (see `parameter_group`). Raises OptimizerError naming the package to install."""
    # One fused kernel for all parameters, on CPU and on CUDA; other optimisers bring their own.
    options: dict[str, Any] = {"fused": True} if name == "adamw" else {}
    return _load_class(name)(list(groups), betas=betas, eps=eps, weight_decay=weight_decay, **options)


def check_optimizer(name: str) -> None:
    """Raises OptimizerError naming the package to install, if `build_optimizer` would."""
    _load_class(name)


def _load_class(name: str) -> Callable[..., torch.optim.Optimizer]:
    module, _, attribute = OPTIMIZERS[name].partition(":")
    try:
        return getattr(import_module(module), attribute)
    except ImportError as error:
        package = module.partition(".")[0]
        raise OptimizerError(
            f"[optimizer] name = {name!r} needs the package {package}: pip install {package} ({error})"
        ) from error


def learning_rate_curve(
    name: str, *, warmup_steps: int, steps: int, min_lr_ratio: float = 0.0
) -> Callable[[int], float]:
    """Factor of the peak learning rate at a step: rises from 0 to 1 during the warm-up, then follows `name`.

    name: a schedule of diffusers (`constant`, `linear`, `cosine`, …). min_lr_ratio: where a fall from 1 to 0 is to end
    instead; the curve is compressed and keeps its shape, as in the schedules of transformers with a lowest rate.
    """
    from diffusers.optimization import get_scheduler

    # diffusers ties its schedules to an optimiser; only the curve is wanted, so a dummy carries it.
    dummy = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    library_name = "constant_with_warmup" if name == "constant" else name
    scheduler: Any = get_scheduler(library_name, dummy, num_warmup_steps=warmup_steps, num_training_steps=steps)
    curve: Callable[[int], float] = scheduler.lr_lambdas[0]

    def factor(step: int) -> float:
        # Step 0 of a warm-up would have rate 0 and teach nothing: count the steps from 1 while warming up.
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        return min_lr_ratio + (1 - min_lr_ratio) * float(curve(step))

    return factor


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float, step: int) -> None:
    """Every group's rate becomes `factor` times its peak, or 0 after its last step.

    Nothing but the step is needed to resume it.
    """
    for group in optimizer.param_groups:
        group["lr"] = 0.0 if has_ended(group, step) else group["peak_lr"] * factor


def drop_ended_gradients(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Take the gradients off groups that are trained no more: they neither move nor count in the gradient's norm."""
    for group in optimizer.param_groups:
        if has_ended(group, step):
            for parameter in group["params"]:
                parameter.grad = None


def part_has_ended(optimizer: torch.optim.Optimizer, step: int) -> bool:
    """Whether there are groups that are not trained to the end of the run, and all of them have ended."""
    groups = [group for group in optimizer.param_groups if group.get("until") is not None]
    return bool(groups) and all(has_ended(group, step) for group in groups)


def has_ended(group: dict[str, Any], step: int) -> bool:
    """Whether `step`, counted from 0, comes after the last one that trains this group."""
    return group.get("until") is not None and step >= group["until"]


def load_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Go on with moments and step counts that another start reached; settings stay the optimiser's own."""
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)

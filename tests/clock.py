"""A clock that goes on in the UNet's passes only, so that what is told of their time can be known beforehand."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from lora_diffusion.models.libraries import UNet2DConditionModel


def count_passes(monkeypatch: pytest.MonkeyPatch, *, without_gradients_s: float) -> None:
    """A second passes in each pass of a step, `without_gradients_s` in each that learns nothing."""
    now, forward = 0.0, UNet2DConditionModel.forward

    def timed(*arguments: Any, **options: Any) -> Any:
        nonlocal now
        now += 1.0 if torch.is_grad_enabled() else without_gradients_s
        return forward(*arguments, **options)

    monkeypatch.setattr(UNet2DConditionModel, "forward", timed)
    monkeypatch.setattr(time, "perf_counter", lambda: now)

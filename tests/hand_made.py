"""Adapter files made by hand, module by module, and what they change, computed densely in float64 from the papers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

Module = dict[str, Tensor]


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lora(out: int, inputs: int, rank: int, *, alpha: float, seed: int, kernel: tuple[int, ...] = ()) -> Module:
    ones = (1,) * len(kernel)
    return {
        "lora_down.weight": randn(rank, inputs, *kernel, seed=seed) / inputs**0.5,
        "lora_up.weight": 0.1 * randn(out, rank, *ones, seed=seed + 1),
        "alpha": torch.tensor(float(alpha)),
    }


def locon(out: int, inputs: int, rank: int, *, alpha: float, seed: int) -> Module:
    """With a Tucker core that holds the 3x3 kernel."""
    plain = lora(out, inputs, rank, alpha=alpha, seed=seed, kernel=(1, 1))
    return plain | {"lora_mid.weight": 0.3 * randn(rank, rank, 3, 3, seed=seed + 2)}


def loha(out: int, inputs: int, rank: int, *, alpha: float, seed: int) -> Module:
    shapes = {"w1_a": (out, rank), "w1_b": (rank, inputs), "w2_a": (out, rank), "w2_b": (rank, inputs)}
    factors = {f"hada_{key}": 0.3 * randn(*shape, seed=seed + i) for i, (key, shape) in enumerate(shapes.items())}
    return factors | {"alpha": torch.tensor(float(alpha))}


def lokr(a: int, b: int, out: int, inputs: int, rank: int | None, *, alpha: float, seed: int) -> Module:
    """w1 (a, b) with a w2 of (out / a, inputs / b), whole without a rank."""
    side = (out // a, inputs // b)
    if rank is None:
        w2 = {"lokr_w2": 0.3 * randn(*side, seed=seed + 1)}
    else:
        w2 = {
            "lokr_w2_a": 0.3 * randn(side[0], rank, seed=seed + 1),
            "lokr_w2_b": 0.3 * randn(rank, side[1], seed=seed + 2),
        }
    return {"lokr_w1": randn(a, b, seed=seed), **w2, "alpha": torch.tensor(float(alpha))}


def dense(module: Mapping[str, Tensor]) -> Tensor:
    """ΔW (out, in·k·k), float64."""
    m = {part: tensor.double() for part, tensor in module.items()}
    if "lora_mid.weight" in m:
        down = torch.einsum("abkl,bi->aikl", m["lora_mid.weight"], m["lora_down.weight"].flatten(1))
        return m["alpha"] / len(down) * m["lora_up.weight"].flatten(1) @ down.flatten(1)
    if "lora_up.weight" in m:
        down = m["lora_down.weight"].flatten(1)
        return m["alpha"] / len(down) * m["lora_up.weight"].flatten(1) @ down
    if "hada_w1_a" in m:
        product = (m["hada_w1_a"] @ m["hada_w1_b"]) * (m["hada_w2_a"] @ m["hada_w2_b"])
        return m["alpha"] / len(m["hada_w1_b"]) * product
    if "lokr_w2" in m:
        return torch.kron(m["lokr_w1"], m["lokr_w2"])  # nothing is factored: alpha does not count
    return m["alpha"] / len(m["lokr_w2_b"]) * torch.kron(m["lokr_w1"], m["lokr_w2_a"] @ m["lokr_w2_b"])


def save_kohya(path: Path, modules: Mapping[str, Mapping[str, Tensor]], metadata: dict[str, str] | None = None) -> Path:
    tensors = {
        f"{name}.{part}": tensor.contiguous() for name, parts in modules.items() for part, tensor in parts.items()
    }
    save_file(tensors, path, metadata)
    return path


def relative(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖ in float64."""
    expected = expected.double().flatten(1)
    return float((found.double().flatten(1) - expected).norm() / expected.norm())

"""Every adapter kind against its formula, written out in float64, and against PEFT where that has the kind too.

Changes are read from tensors as files hold them. float32 sums of some hundred terms agree with float64 to 1e-5 of the
largest value.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lora_diffusion.adapters.base import Adapter, Layer
from lora_diffusion.adapters.dora import DoRA
from lora_diffusion.adapters.kinds import ADAPTERS, adapter_from_tensors
from lora_diffusion.adapters.loha import LoHa
from lora_diffusion.adapters.lokr import LoKr, split
from lora_diffusion.streams import stream

IN, OUT, RANK, ALPHA = 12, 20, 3, 2.0
SCALE = ALPHA / RANK
RELATIVE = 1e-5
KERNELS = {"linear": (), "conv1x1": (1, 1), "conv3x3": (3, 3), "conv3x3-stride2": (3, 3)}
layers = pytest.mark.parametrize("layer", KERNELS)
Array = np.ndarray


def make_layer(name: str, bias: bool = True) -> Layer:
    layer: Layer
    if name == "linear":
        layer = nn.Linear(IN, OUT, bias=bias)
    elif name == "conv1x1":
        layer = nn.Conv2d(IN, OUT, 1, bias=bias)
    else:
        layer = nn.Conv2d(IN, OUT, 3, stride=2 if name.endswith("stride2") else 1, padding=1, bias=bias)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.3 * random_tensor("base", *parameter.shape))
    return layer


def random_tensor(name: str, *shape: int) -> Tensor:
    return torch.randn(shape, generator=stream(0, name))


def make_input(layer: Layer) -> Tensor:
    return random_tensor("x", 2, 5, IN) if isinstance(layer, nn.Linear) else random_tensor("x", 2, IN, 6, 6)


def assert_close(ours: Tensor, theirs: Array | Tensor, relative: float = RELATIVE) -> None:
    expected = torch.as_tensor(theirs).to(torch.float64)
    assert ours.shape == expected.shape
    assert expected.any()
    assert (ours.detach().double() - expected).abs().max() <= relative * expected.abs().max()


# The formulas. `t` holds float64 arrays under the names of a file.


def lora(t: Mapping[str, Array], kernel: tuple[int, ...]) -> Array:
    down, up = t["lora_down.weight"], t["lora_up.weight"]
    delta = np.zeros((OUT, IN, *kernel))
    for o, i, r in itertools.product(range(OUT), range(IN), range(RANK)):
        delta[o, i] += SCALE * up.reshape(OUT, RANK)[o, r] * down[r, i]
    return delta


def locon_tucker(t: Mapping[str, Array], kernel: tuple[int, ...]) -> Array:
    down, mid, up = t["lora_down.weight"], t["lora_mid.weight"], t["lora_up.weight"]
    delta = np.zeros((OUT, IN, *kernel))
    for o, i, r, s in itertools.product(range(OUT), range(IN), range(RANK), range(RANK)):
        delta[o, i] += SCALE * up[o, r, 0, 0] * mid[r, s] * down[s, i, 0, 0]
    return delta


def loha(t: Mapping[str, Array], kernel: tuple[int, ...]) -> Array:
    delta = np.zeros((OUT, IN * int(np.prod(kernel))))
    for o, c in np.ndindex(*delta.shape):
        first = sum(t["hada_w1_a"][o, r] * t["hada_w1_b"][r, c] for r in range(RANK))
        second = sum(t["hada_w2_a"][o, r] * t["hada_w2_b"][r, c] for r in range(RANK))
        delta[o, c] = SCALE * first * second
    return delta.reshape(OUT, IN, *kernel)


def loha_tucker(t: Mapping[str, Array], kernel: tuple[int, ...]) -> Array:
    halves = []
    for half in "12":
        core, a, b = t[f"hada_t{half}"], t[f"hada_w{half}_a"], t[f"hada_w{half}_b"]
        made = np.zeros((OUT, IN, *kernel))
        for o, c, i, j in itertools.product(range(OUT), range(IN), range(RANK), range(RANK)):
            made[o, c] += core[i, j] * b[j, c] * a[i, o]
        halves.append(made)
    return SCALE * halves[0] * halves[1]


def lokr(t: Mapping[str, Array], kernel: tuple[int, ...]) -> Array:
    w1 = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    if "lokr_w2" in t:
        w2 = t["lokr_w2"]
    elif "lokr_t2" in t:
        w2 = np.einsum("ijkl,ip,jq->pqkl", t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
    else:
        w2 = t["lokr_w2_a"] @ t["lokr_w2_b"]
    w2 = w2.reshape(OUT // w1.shape[0], IN // w1.shape[1], *kernel)
    delta = np.zeros((OUT, IN, *kernel))
    for i, j, p, q in np.ndindex(*w1.shape, *w2.shape[:2]):
        delta[i * w2.shape[0] + p, j * w2.shape[1] + q] = w1[i, j] * w2[p, q]
    is_factored = any(name.endswith("_b") for name in t)
    return (SCALE if is_factored else 1.0) * delta


def dora(t: Mapping[str, Array], kernel: tuple[int, ...], weight: Array, inside: Array) -> Array:
    """The change m · (W + Δ) / ‖W + Δ‖ - W, with the norm of each slice that one magnitude belongs to."""
    turned, magnitudes = weight + inside, t["dora_scale"].flatten()
    eps = np.finfo(np.float32).eps
    changed = np.zeros_like(turned)
    if t["dora_scale"].shape[0] == 1:
        for i in range(IN):
            changed[:, i] = magnitudes[i] * turned[:, i] / (np.sqrt((turned[:, i] ** 2).sum()) + eps)
    else:
        for o in range(OUT):
            changed[o] = magnitudes[o] * turned[o] / (np.sqrt((turned[o] ** 2).sum()) + eps)
    return changed - weight


LORA = {"lora_down.weight": (RANK, IN), "lora_up.weight": (OUT, RANK)}
CONV3 = {"lora_down.weight": (RANK, IN, 3, 3), "lora_up.weight": (OUT, RANK, 1, 1)}
CONV1 = {"lora_down.weight": (RANK, IN, 1, 1), "lora_up.weight": (OUT, RANK, 1, 1)}
LOCON = {**CONV1, "lora_mid.weight": (RANK, RANK, 3, 3)}
LOHA = {"hada_w1_a": (OUT, RANK), "hada_w1_b": (RANK, IN), "hada_w2_a": (OUT, RANK), "hada_w2_b": (RANK, IN)}
LOHA3 = LOHA | {"hada_w1_b": (RANK, IN * 9), "hada_w2_b": (RANK, IN * 9)}
LOHA_TUCKER = {f"hada_w{half}_{side}": (RANK, n) for half in "12" for side, n in (("a", OUT), ("b", IN))} | {
    "hada_t1": (RANK, RANK, 3, 3),
    "hada_t2": (RANK, RANK, 3, 3),
}
W1, W1_FACTORS = {"lokr_w1": (4, 3)}, {"lokr_w1_a": (4, RANK), "lokr_w1_b": (RANK, 3)}
W2, W2_FACTORS = {"lokr_w2": (5, 4)}, {"lokr_w2_a": (5, RANK), "lokr_w2_b": (RANK, 4)}
W2_CONV, W2_CONV_FACTORS = {"lokr_w2": (5, 4, 3, 3)}, {"lokr_w2_a": (5, RANK), "lokr_w2_b": (RANK, 36)}
W2_TUCKER = {"lokr_t2": (RANK, RANK, 3, 3), "lokr_w2_a": (RANK, 5), "lokr_w2_b": (RANK, 4)}

CASES = {
    "lora linear": ("linear", LORA, lora),
    "lora 1x1": ("conv1x1", CONV1, lora),
    "lora 3x3": ("conv3x3", CONV3, lora),
    "lora 3x3 stride 2": ("conv3x3-stride2", CONV3, lora),
    "locon tucker": ("conv3x3", LOCON, locon_tucker),
    "loha linear": ("linear", LOHA, loha),
    "loha 1x1": ("conv1x1", LOHA, loha),
    "loha 3x3": ("conv3x3", LOHA3, loha),
    "loha tucker": ("conv3x3-stride2", LOHA_TUCKER, loha_tucker),
    "lokr whole": ("linear", W1 | W2, lokr),
    "lokr w2 factored": ("linear", W1 | W2_FACTORS, lokr),
    "lokr w1 factored": ("linear", W1_FACTORS | W2, lokr),
    "lokr both factored": ("linear", W1_FACTORS | W2_FACTORS, lokr),
    "lokr 1x1": ("conv1x1", W1 | W2_FACTORS, lokr),
    "lokr 3x3 whole": ("conv3x3", W1 | W2_CONV, lokr),
    "lokr 3x3 factored": ("conv3x3-stride2", W1 | W2_CONV_FACTORS, lokr),
    "lokr 3x3 both factored": ("conv3x3", W1_FACTORS | W2_CONV_FACTORS, lokr),
    "lokr tucker": ("conv3x3", W1 | W2_TUCKER, lokr),
    "lokr tucker w1 factored": ("conv3x3", W1_FACTORS | W2_TUCKER, lokr),
}
cases = pytest.mark.parametrize("case", CASES)


def file_tensors(case: str) -> dict[str, Tensor]:
    _, shapes, _ = CASES[case]
    tensors = {part: 0.4 * random_tensor(part, *shape) for part, shape in shapes.items()}
    return tensors | {"alpha": torch.tensor(ALPHA)}


def formula(case: str, tensors: Mapping[str, Tensor]) -> Array:
    layer, _, function = CASES[case]
    return function({n: t.double().numpy() for n, t in tensors.items() if n != "alpha"}, KERNELS[layer])


def with_magnitudes(case: str, axis: int) -> tuple[Layer, dict[str, Tensor], Array]:
    """A DoRA around the case: layer, the file's tensors, the expected change."""
    layer = make_layer(CASES[case][0])
    tensors = file_tensors(case)
    shape = [1] * layer.weight.ndim
    shape[axis] = layer.weight.shape[axis]
    scale = 1.5 + 0.5 * random_tensor("magnitude", *shape)
    values = {"dora_scale": scale.double().numpy()}
    weight = layer.weight.detach().double().numpy()
    expected = dora(values, KERNELS[CASES[case][0]], weight, formula(case, tensors))
    return layer, tensors | {"dora_scale": scale}, expected


def dense_output(layer: Layer, x: Tensor, delta: Array, strength: float = 1.0) -> Tensor:
    """The layer in float64 with its weight changed."""
    weight = layer.weight.detach().double() + strength * torch.from_numpy(delta)
    bias = layer.bias.detach().double()
    if isinstance(layer, nn.Linear):
        return nn.functional.linear(x.double(), weight, bias)
    return nn.functional.conv2d(x.double(), weight, bias, stride=layer.stride, padding=layer.padding)


@cases
def test_change_and_output_follow_the_formula(case: str) -> None:
    layer, tensors = make_layer(CASES[case][0]), file_tensors(case)
    adapter = adapter_from_tensors(layer, tensors)
    expected = formula(case, tensors)
    assert_close(adapter.delta(), expected)
    assert_close(adapter.delta_norm(), np.sqrt((expected**2).sum()))
    x = make_input(layer)
    assert_close(adapter(x), dense_output(layer, x, expected))
    adapter.strength = -0.6
    assert_close(adapter(x), dense_output(layer, x, expected, -0.6))
    assert (adapter(x) - layer(x)).abs().max() > 0.1


@pytest.mark.parametrize("axis", [0, 1], ids=["per output", "per input"])
@cases
def test_dora_follows_the_formula_whatever_is_inside(case: str, axis: int) -> None:
    layer, tensors, expected = with_magnitudes(case, axis)
    adapter = adapter_from_tensors(layer, tensors)
    assert_close(adapter.delta(), expected)
    x = make_input(layer)
    assert_close(adapter(x), dense_output(layer, x, expected))
    adapter.strength = 0.3  # between W and W', as ComfyUI and Forge do it: not a DoRA of a smaller Δ
    assert_close(adapter(x), dense_output(layer, x, expected, 0.3))


@cases
def test_without_alpha_the_scale_is_1(case: str) -> None:
    tensors = file_tensors(case)
    del tensors["alpha"]
    is_unscaled = case in ("lokr whole", "lokr 3x3 whole")
    expected = formula(case, tensors) / (1.0 if is_unscaled else SCALE)
    assert_close(adapter_from_tensors(make_layer(CASES[case][0]), tensors).delta(), expected)


@pytest.mark.parametrize("case", ["lokr whole", "lokr 3x3 whole"])
@pytest.mark.parametrize("alpha", [0.0, 7.0])
def test_a_lokr_without_factors_ignores_alpha(case: str, alpha: float) -> None:
    tensors = file_tensors(case) | {"alpha": torch.tensor(alpha)}
    assert_close(adapter_from_tensors(make_layer(CASES[case][0]), tensors).delta(), formula(case, tensors))


def test_a_dora_of_a_layer_whose_weights_cancel_stays_finite() -> None:
    """The eps that readers add to the norm: without it W + Δ = 0 would be 0 / 0."""
    layer = make_layer("linear")
    with torch.no_grad():
        layer.weight.zero_()
    tensors = {"lora_down.weight": torch.zeros(RANK, IN), "lora_up.weight": torch.zeros(OUT, RANK)}
    adapter = adapter_from_tensors(layer, tensors | {"dora_scale": torch.ones(1, IN)})
    assert torch.equal(adapter.delta(), torch.zeros(OUT, IN))
    assert adapter(make_input(layer)).isfinite().all()


@cases
@pytest.mark.parametrize("axis", [None, 0, 1], ids=["plain", "dora per output", "dora per input"])
def test_gradients_are_those_of_the_dense_formula(case: str, axis: int | None) -> None:
    """Through the factors, as they are trained, and through the whole changed weight."""
    layer, tensors = make_layer(CASES[case][0]), file_tensors(case)
    if axis is not None:
        layer, tensors, _ = with_magnitudes(case, axis)
    gradients: list[dict[str, Tensor]] = []
    for is_dense in (False, True):
        adapter = adapter_from_tensors(layer, tensors)
        x = make_input(layer).requires_grad_()
        changed = {"weight": layer.weight + adapter.delta()}
        output = functional_call(layer, changed, (x,)) if is_dense else adapter(x)
        output.square().mean().backward()
        assert x.grad is not None
        gradients.append({"x": x.grad} | {n: p.grad for n, p in adapter.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    num_trained = len(adapter_from_tensors(layer, tensors).trained())
    assert len(gradients[0]) == 1 + num_trained > 2
    for name, gradient in gradients[0].items():
        assert_close(gradient, gradients[1][name], relative=2e-5)  # both sides are float32


@layers
def test_the_norm_of_a_dora_counts_as_a_constant_in_backward(layer: str) -> None:
    base = make_layer(layer)
    adapter = DoRA(base, RANK, ALPHA, generator=stream(0, "init"))
    with torch.no_grad():
        adapter.direction.lora_up.weight.copy_(random_tensor("up", *adapter.direction.lora_up.weight.shape))
    x = make_input(base)
    adapter(x).square().mean().backward()
    turned = base.weight + adapter.direction.delta()
    norm = turned.detach().square().sum([i for i in range(turned.ndim) if i != 1], keepdim=True).sqrt()
    weight = adapter.dora_scale.detach() / norm * turned
    functional_call(base, {"weight": weight}, (x,)).square().mean().backward()
    # both passes added to the same gradient
    up = adapter.direction.lora_up.weight
    assert up.grad is not None
    both = up.grad.clone()
    up.grad = None
    adapter(x).square().mean().backward()
    assert_close(both, 2 * up.grad, relative=2e-5)


# PEFT


def peft_layer(config: peft.PeftConfig, base: Layer) -> nn.Module:
    with torch.random.fork_rng():  # PEFT's start draws from the global generator
        return peft.inject_adapter_in_model(config, nn.Sequential(base))[0]


def fill(layer: nn.Module) -> None:
    """Other values for all that PEFT trains."""
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if parameter.requires_grad:
                noise = random_tensor(name, *parameter.shape)
                parameter.copy_(parameter + 0.3 * noise if "magnitude" in name else 0.3 * noise)


@layers
def test_dora_per_output_is_pefts(layer: str) -> None:
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"], use_dora=True)
    theirs = peft_layer(config, make_layer(layer))
    fill(theirs)
    base, x = make_layer(layer), make_input(make_layer(layer))
    magnitude = theirs.lora_magnitude_vector["default"].weight
    tensors = {
        "lora_down.weight": theirs.lora_A["default"].weight,
        "lora_up.weight": theirs.lora_B["default"].weight,
        "alpha": torch.tensor(ALPHA),
        "dora_scale": magnitude.reshape(OUT, *(1,) * (base.weight.ndim - 1)),
    }
    adapter = adapter_from_tensors(base, {name: tensor.detach().clone() for name, tensor in tensors.items()})
    assert_close(adapter(x), theirs(x).detach())
    before = base.weight.detach().clone()
    theirs.merge()
    assert_close(adapter.delta(), theirs.base_layer.weight.detach() - before, relative=2e-5)
    assert (adapter(x) - base(x)).abs().max() > 0.1


@pytest.mark.parametrize("tucker", [False, True])
@layers
def test_loha_is_pefts(layer: str, tucker: bool) -> None:
    config = peft.LoHaConfig(r=RANK, alpha=ALPHA, target_modules=["0"], use_effective_conv2d=tucker)
    theirs = peft_layer(config, make_layer(layer))
    fill(theirs)
    tensors = {}
    for part in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"):
        if "default" in (stored := getattr(theirs, part)):
            tensors[part] = stored["default"].detach().clone()
    assert ("hada_t1" in tensors) == (tucker and layer.startswith("conv3x3"))
    adapter = adapter_from_tensors(make_layer(layer), tensors | {"alpha": torch.tensor(ALPHA)})
    assert isinstance(adapter, LoHa)
    assert_close(adapter.delta(), theirs.get_delta_weight("default").detach())


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("tucker", [False, True])
@pytest.mark.parametrize("rank", [1, 64])
@layers
def test_lokr_is_pefts(layer: str, rank: int, tucker: bool, both: bool) -> None:
    config = peft.LoKrConfig(
        r=rank, alpha=ALPHA, target_modules=["0"], use_effective_conv2d=tucker, decompose_both=both
    )
    theirs = peft_layer(config, make_layer(layer))
    fill(theirs)
    tensors = {}
    for part in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"):
        if "default" in (stored := getattr(theirs, part)):
            tensors[part] = stored["default"].detach().clone()
    adapter = adapter_from_tensors(make_layer(layer), tensors | {"alpha": torch.tensor(ALPHA)})
    assert isinstance(adapter, LoKr)
    expected = theirs.get_delta_weight("default").detach()
    if not any(part.endswith("_b") for part in tensors):
        expected = expected / (ALPHA / rank)  # PEFT scales where every reader of files does not
    assert_close(adapter.delta(), expected)


@pytest.mark.parametrize(
    ("size", "factor", "expected"),
    # what LyCORIS 4.1's own function gives
    [
        (320, -1, (16, 20)),
        (320, 8, (8, 40)),
        (320, 12, (10, 32)),
        (320, 40, (8, 40)),
        (320, 35, (16, 20)),
        (30, 16, (5, 6)),
        (4, 5, (2, 2)),
        (7, -1, (1, 7)),
        (1, 8, (1, 1)),
        (768, 768, (1, 768)),
    ],
)
def test_lokr_splits_sizes_as_lycoris_does(size: int, factor: int, expected: tuple[int, int]) -> None:
    assert split(size, factor) == expected


@pytest.mark.parametrize("kind", ADAPTERS)
@layers
def test_scaling_the_change_scales_it_and_limiting_its_norm_gets_below_the_limit(kind: str, layer: str) -> None:
    adapter = ADAPTERS[kind](make_layer(layer), RANK, ALPHA, generator=stream(0, "init"))
    with torch.no_grad():
        for index, parameter in enumerate(adapter.trained()):
            parameter += 0.3 * random_tensor(str(index), *parameter.shape)
    inside: Adapter = adapter.direction if isinstance(adapter, DoRA) else adapter
    before = inside.delta().detach()
    adapter.scale_delta(0.37)
    assert_close(inside.delta(), 0.37 * before)
    for share in (0.9, 0.5, 0.123):
        limit = share * adapter.delta_norm().item()
        assert adapter.limit_norm(limit)
        norm = inside.delta().double().square().sum().sqrt()
        assert limit * (1 - 1e-4) < norm <= limit
        assert not adapter.limit_norm(limit), "a change at its limit stays as it is"

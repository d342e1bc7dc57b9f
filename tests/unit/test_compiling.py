"""Compiled transformer blocks: the same numbers, compiled once for each shape, and readable failures."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from lora_diffusion.adapters.inject import inject, select_layers
from lora_diffusion.adapters.lora import LoRA
from lora_diffusion.config import ConfigError, TrainConfig
from lora_diffusion.models.attention import FasterOnCPU, FasterOnGPU
from lora_diffusion.models.compiling import check_compiler, compile_blocks
from lora_diffusion.models.errors import ModelError
from lora_diffusion.training.working_copies import WorkingCopies

WIDTH, TOKENS = 16, 12
has_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")


class Blocks(nn.Module):
    """Transformer blocks one after the other, with a LoRA in each of their attention's projections."""

    def __init__(self, count: int, processor: type = FasterOnCPU, rank: int = 2) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            blocks = [BasicTransformerBlock(WIDTH, 2, WIDTH // 2, cross_attention_dim=WIDTH) for _ in range(count)]
        for module in (module for block in blocks for module in block.modules()):
            if hasattr(module, "set_processor"):
                module.set_processor(processor())
        self.blocks = nn.ModuleList(blocks).requires_grad_(False)
        generator = torch.Generator().manual_seed(1)
        adapters = inject(self, select_layers(self, [r"attn[12]\.to_"]), lambda _, layer: LoRA(layer, rank, 2.0))
        for adapter in adapters.values():
            nn.init.normal_(adapter.lora_up.weight, std=0.1, generator=generator)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, encoder_hidden_states=text)
        return x

    def learn(self, num_tokens: int = TOKENS) -> dict[str, Tensor]:
        """The output and all gradients."""
        generator = torch.Generator().manual_seed(2)
        x, text = (torch.randn(2, size, WIDTH, generator=generator) for size in (num_tokens, 7))
        self.zero_grad()
        output = self(x, text)
        output.square().sum().backward()
        gradients = {name: p.grad.clone() for name, p in self.named_parameters() if p.grad is not None}
        assert len(gradients) == 16 * len(self.blocks)
        return {"output": output.detach()} | gradients


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Number of operations of each graph that is compiled, by a backend that computes them as they are."""
    import torch._dynamo as dynamo
    from torch._dynamo.backends.debugging import aot_eager

    found: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor], **options: Any) -> Callable[..., Any]:
        compiled = aot_eager(graph, inputs, **options)
        found.append(len(graph.graph.nodes))
        return compiled

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    dynamo.reset()
    with dynamo.config.patch():
        yield found
    dynamo.reset()


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():  # sums in another order: some roundings of float32 of the largest term
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5 * float(tensor.abs().max()), msg=name)


def test_blocks_of_one_shape_share_what_is_compiled(kinds: list[int]) -> None:
    model = Blocks(3)
    expected = model.learn()
    assert compile_blocks(model) == 3
    assert_close(model.learn(), expected)
    assert len(kinds) == 2, "the first block's input needs no gradient"
    assert_close(model.learn(), expected)
    with torch.no_grad():
        model(torch.zeros(1, 5, WIDTH), torch.zeros(1, 7, WIDTH))
    assert len(kinds) == 2, "a second step and a preview compile nothing"


@pytest.mark.parametrize("processor", [FasterOnCPU, FasterOnGPU])
def test_what_steps_of_a_gpu_compute_together_is_compiled_as_well(processor: type, kinds: list[int]) -> None:
    """The factors' copies in half precision, and the projections that are one product."""
    model = Blocks(2, processor, rank=8)
    for module in model.modules():
        if not isinstance(module, LoRA | nn.ModuleList | Blocks):
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(parameter.to(torch.bfloat16), requires_grad=False))
    for lora in (module for module in model.modules() if isinstance(module, LoRA)):
        for layer in (lora.lora_down, lora.lora_up):
            layer.weight = nn.Parameter(layer.weight.float())
    copies = WorkingCopies(model)
    gradients = torch.zeros(sum(parameter.numel() for parameter in copies.parameters))

    def step() -> dict[str, Tensor]:
        gradients.zero_()
        with copies:
            output = model(*inputs)
            output.float().square().sum().backward()
            copies.gather(gradients)
        return {"output": output.detach(), "gradients": gradients.clone()}

    generator = torch.Generator().manual_seed(2)
    inputs = [torch.randn(2, size, WIDTH, generator=generator).to(torch.bfloat16) for size in (TOKENS, 7)]
    expected = step()
    assert expected["gradients"].count_nonzero() > 0.9 * gradients.numel()
    compile_blocks(model)
    for _ in range(2):
        found = step()
        for name, tensor in expected.items():  # one rounding of bfloat16 of the largest, where sums change their order
            atol = 2**-8 * float(tensor.abs().max())
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=atol, msg=name)
    assert len(kinds) == 2


def test_shapes_beyond_the_limit_are_computed_as_before_and_the_log_says_so(
    kinds: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    import torch._dynamo as dynamo

    model = Blocks(1)
    expected = [model.learn(size) for size in (8, 9)]
    compile_blocks(model)
    with dynamo.config.patch(recompile_limit=1), caplog.at_level(logging.WARNING):
        found = [model.learn(size) for size in (8, 9)]
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other)
    assert len(kinds) == 1
    assert "computed without being compiled from now on" in caplog.text


@pytest.mark.slow
@has_compiler
def test_a_compiled_block_learns_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = Blocks(1)
    expected = model.learn()
    check_compiler(torch.device("cpu"))
    compile_blocks(model)
    assert_close(model.learn(), expected)
    assert list(tmp_path.rglob("*.so")), "nothing was compiled"


def test_without_a_compiler_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(config.cpp, "cxx", (None, "/nowhere/g++"))
    torch._dynamo.reset()
    with config.patch(force_disable_caches=True), pytest.raises(ModelError) as error:
        check_compiler(torch.device("cpu"))
    assert "model.compile = true: torch cannot compile" in str(error.value)
    assert "Install a C++ compiler" in str(error.value) and "set model.compile = false" in str(error.value)


@pytest.mark.parametrize(
    "setting",
    ['model.quantise="int8"', 'model.attention="xformers"', "adapter.dropout=0.1", "adapter.module_dropout=0.1"],
)
def test_what_cannot_be_compiled_is_refused(setting: str) -> None:
    text = (
        'run = { name = "a", steps = 200 }\nmodel = { path = "base", compile = true }\n[[dataset]]\npath = "pictures"\n'
    )
    assert TrainConfig.parse(text).model.compile
    with pytest.raises(ConfigError, match=r"`model\.compile` is true and"):
        TrainConfig.parse(text, overrides=[setting])

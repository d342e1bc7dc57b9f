from __future__ import annotations

import torch

from lora_diffusion.streams import stream, stream_seed


def test_the_same_arguments_give_the_same_seed_in_every_version() -> None:
    """A change of this number would change every run and break every resume."""
    assert stream_seed(42, "noise", 3, "a1b2") == 7_891_353_858_467_637_986


def test_every_argument_matters() -> None:
    calls = [
        (0, "noise"),
        (1, "noise"),
        (0, "caption"),
        (0, "noise", 0),
        (0, "noise", 1),
        (0, "noise", "1"),
        (0, "noise", 0, 1),
        (0, "noise", 1, 0),
        (0, "noise", "ab"),
        (0, "noise", "a", "b"),
        (0, "noise", -1),
        (0, "noisea", "b"),
    ]
    assert len({stream_seed(*call) for call in calls}) == len(calls)


def test_seeds_have_63_bits() -> None:
    seeds = [stream_seed(0, "noise", i) for i in range(1000)]
    assert min(seeds) >= 0 and 2**62 < max(seeds) < 2**63


def test_neighbouring_streams_are_uncorrelated() -> None:
    draws = torch.stack([torch.randn(4096, generator=stream(0, "noise", i)) for i in range(64)])
    correlation = torch.corrcoef(draws) - torch.eye(64)
    # 2016 pairs with standard deviation 1/sqrt(4096) = 0.0156: five of those is once in 3 million
    assert correlation.abs().max() < 5 / 64


def test_a_stream_is_on_the_cpu_and_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    generator = stream(0, "noise")
    torch.rand(10, generator=generator)
    assert generator.device.type == "cpu"
    assert torch.equal(torch.get_rng_state(), before)


def test_the_state_after_a_draw_does_not_leak_into_the_next_call() -> None:
    torch.rand(10, generator=stream(0, "noise"))
    assert torch.equal(torch.rand(3, generator=stream(0, "noise")), torch.rand(3, generator=stream(0, "noise")))

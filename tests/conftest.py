"""Settings of the whole suite: nothing is downloaded, arithmetic is repeatable, GPU tests run where there is a GPU."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from lora_diffusion.launch import spin_briefly

spin_briefly()  # as every command does: several tests run at once
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is repeatable only with a fixed workspace


DEVICE = os.environ.get("LORA_TEST_DEVICE", "cuda")
"""Where the tests of tests/gpu run that use the fixture `device`: "cpu" tries them out where there is no GPU."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]  # keywords hold the names of folders too
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            if DEVICE == "cpu" and "device" in getattr(item, "fixturenames", ()):
                continue
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def repeatable_arithmetic() -> None:
    """One thread, so that sums are added in one order. Tests that do not use torch do not wait for its import."""
    if "torch" not in sys.modules:
        return
    import torch

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)


@pytest.fixture(scope="session")
def tiny_sd1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random SD 1.x folder, made once. Tests must not write into it."""
    from tests.tiny import make_tiny_sd1

    return make_tiny_sd1(tmp_path_factory.mktemp("models") / "tiny-sd1")

"""Many clients with many adapters at once: nobody gets what another asked for, and the base stays what it was."""

from __future__ import annotations

import hashlib
import io
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lora_diffusion.generation.engine import Engine, Request
from lora_diffusion.generation.library import AdapterLibrary
from lora_diffusion.models.base import DiffusionModel
from lora_diffusion.models.load import load_model
from lora_diffusion.serving.device import DeviceLock
from lora_diffusion.serving.orders import Order, OrderBook, QueueFull
from lora_diffusion.serving.worker import Worker
from tests.random_adapters import random_adapter

NUM_CLIENTS = 16
NUM_ADAPTERS = 8
NUM_SEEDS = 4
NUM_REQUESTS = 1000
ROUNDING = 2
"""Levels of 255 by which another batch size may round differently, also with the same adapter for all."""


@dataclass
class Served:
    model: DiffusionModel
    engine: Engine
    library: AdapterLibrary
    book: OrderBook
    batches: list[int]


@pytest.fixture
def served(tiny_sd1: Path, tmp_path: Path) -> Iterator[Served]:
    model = load_model(tiny_sd1)
    for seed in range(NUM_ADAPTERS):
        file = random_adapter(model, seed=seed, targets="full" if seed % 2 else "attention", rank=2 + seed, size=1.0)
        file.write(tmp_path / f"adapter-{seed}.safetensors", dtype=torch.float32)
    engine = Engine(model)
    batches: list[int] = []
    generate = engine.generate
    engine.generate = lambda requests, **options: (batches.append(len(requests)), generate(requests, **options))[1]
    library = AdapterLibrary(engine, [tmp_path], budget_bytes=1)
    yield Served(model, engine, library, OrderBook(max_images=10 * NUM_REQUESTS), batches)


def request_of(adapter: int, seed: int) -> Request:
    return Request("a cat", seed=seed, steps=2, cfg=1.0, size=(32, 32), adapters={f"adapter-{adapter}": 1.0})


def hash_of(model: DiffusionModel) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.slow
def test_a_thousand_pictures_for_sixteen_clients_are_each_the_one_drawn_alone(served: Served) -> None:
    before = hash_of(served.model)
    alone: dict[tuple[int, int], np.ndarray] = {}
    for adapter in range(NUM_ADAPTERS):
        served.library.need([f"adapter-{adapter}"])
        for seed in range(NUM_SEEDS):
            alone[adapter, seed] = np.asarray(served.engine.generate([request_of(adapter, seed)])[0]).astype(int)
    keys = list(alone)
    apart = min(np.abs(alone[a] - alone[b]).max() for i, a in enumerate(keys) for b in keys[:i])
    assert apart > 20 * ROUNDING, "or a mix-up would not show"
    served.batches.clear()
    worker = Worker(served.engine, served.library, served.book, DeviceLock(None), "tiny")

    def ask(number: int) -> tuple[tuple[int, int], Order]:
        chosen = random.Random(number)
        key = (chosen.randrange(NUM_ADAPTERS), chosen.randrange(NUM_SEEDS))
        order = Order((served.engine.checked(request_of(*key)),))
        wait = threading.Event()
        while True:
            try:
                served.book.add(order)
                break
            except QueueFull:
                wait.wait(0.01)
        while not order.has_ended:
            wait.wait(0.005)
        return key, order

    worker.start()
    with ThreadPoolExecutor(NUM_CLIENTS) as clients:
        answers = list(clients.map(ask, range(NUM_REQUESTS)))
    worker.stop()

    assert len(answers) == NUM_REQUESTS
    worst = 0
    for key, order in answers:
        assert order.status == "done", order.error
        data = order.images[0]
        assert data is not None
        worst = max(worst, int(np.abs(np.asarray(Image.open(io.BytesIO(data))).astype(int) - alone[key]).max()))
    assert worst <= ROUNDING
    assert sum(served.batches) == NUM_REQUESTS
    assert len(served.batches) < NUM_REQUESTS / 3, "clients share batches"
    for name in served.engine.adapters:
        served.engine.unload_adapter(name)
    assert hash_of(served.model) == before


@pytest.mark.slow
def test_after_a_thousand_swaps_the_base_is_bit_for_bit_what_it_was(served: Served) -> None:
    before = hash_of(served.model)
    for swap in range(1000):
        served.library.need([f"adapter-{swap % NUM_ADAPTERS}"])
    assert len(served.engine.adapters) == 1
    served.engine.unload_adapter(served.engine.adapters[0])
    assert hash_of(served.model) == before

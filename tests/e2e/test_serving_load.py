"""Many clients with many adapters at once: nobody gets what another asked for, and the base stays what it was."""

from __future__ import annotations

import hashlib
import io
import random
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lora_diffusion.files import write_bytes_atomically
from lora_diffusion.formats.adapter_file import AdapterFile
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
ROUNDING = 1
"""Levels of 255 by which a picture may differ from the one drawn alone. Matrix products of another batch size add their
sums in another order, so that a pixel between two levels may become the other one, also with the same adapter for all.
In a batch of one nothing may differ."""


Batch = tuple[tuple[Request, ...], list[Image.Image]]
"""What the engine was asked to draw together, and what it drew."""


@dataclass
class Served:
    model: DiffusionModel
    engine: Engine
    library: AdapterLibrary
    book: OrderBook
    batches: list[Batch]

    def worker(self) -> Worker:
        return Worker(self.engine, self.library, self.book, DeviceLock(None), "tiny")


@pytest.fixture
def served(tiny_sd1: Path, tmp_path: Path) -> Iterator[Served]:
    model = load_model(tiny_sd1)
    for seed in range(NUM_ADAPTERS):
        file = random_adapter(model, seed=seed, targets="full" if seed % 2 else "attention", rank=2 + seed, size=1.0)
        file.write(tmp_path / f"adapter-{seed}.safetensors", dtype=torch.float32)
    engine = Engine(model)
    batches: list[Batch] = []
    generate = engine.generate

    def noted(requests: Sequence[Request], **options: Any) -> list[Image.Image]:
        images = generate(requests, **options)
        batches.append((tuple(requests), images))
        return images

    engine.generate = noted
    library = AdapterLibrary(engine, [tmp_path], budget_bytes=1)
    yield Served(model, engine, library, OrderBook(max_images=10 * NUM_REQUESTS), batches)


def request_of(adapter: int, seed: int) -> Request:
    return Request("a cat", seed=seed, steps=2, cfg=1.0, size=(32, 32), adapters={f"adapter-{adapter}": 1.0})


def hash_of(model: DiffusionModel) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def drawn_alone(served: Served) -> dict[tuple[int, int], np.ndarray]:
    """Every picture that clients ask for, from the engine with nothing else to do."""
    alone: dict[tuple[int, int], np.ndarray] = {}
    for adapter in range(NUM_ADAPTERS):
        served.library.need([f"adapter-{adapter}"])
        for seed in range(NUM_SEEDS):
            alone[adapter, seed] = np.asarray(served.engine.generate([request_of(adapter, seed)])[0]).astype(int)
    served.batches.clear()
    return alone


def pixels(order: Order) -> np.ndarray:
    assert order.status == "done", order.error
    assert order.images[0] is not None
    return np.asarray(Image.open(io.BytesIO(order.images[0]))).astype(int)


def ask(served: Served, key: tuple[int, int]) -> Order:
    """As a client does: order, again while the queue is full, and wait."""
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
    return order


@pytest.mark.slow
def test_a_thousand_pictures_for_sixteen_clients_are_each_the_one_drawn_alone(served: Served) -> None:
    before = hash_of(served.model)
    alone = drawn_alone(served)
    keys = list(alone)
    apart = min(np.abs(alone[a] - alone[b]).max() for i, a in enumerate(keys) for b in keys[:i])
    assert apart > 20 * ROUNDING, "or a mix-up would not show"
    worker = served.worker()

    def client(number: int) -> tuple[tuple[int, int], Order]:
        chosen = random.Random(number)
        key = (chosen.randrange(NUM_ADAPTERS), chosen.randrange(NUM_SEEDS))
        return key, ask(served, key)

    worker.start()
    with ThreadPoolExecutor(NUM_CLIENTS) as clients:
        answers = list(clients.map(client, range(NUM_REQUESTS)))
    worker.stop()

    assert len(answers) == NUM_REQUESTS
    worst = max(int(np.abs(pixels(order) - alone[key]).max()) for key, order in answers)
    print(f"the largest difference is {worst} of 255")
    assert worst <= ROUNDING
    assert sum(len(requests) for requests, _ in served.batches) == NUM_REQUESTS
    assert len(served.batches) < NUM_REQUESTS / 3, "clients share batches"
    assert any(len({name for it in requests for name in it.adapters}) >= 4 for requests, _ in served.batches), "mixed"
    for name in served.engine.adapters:
        served.engine.unload_adapter(name)
    assert hash_of(served.model) == before


@pytest.mark.parametrize("budget_bytes", [1, 2**30], ids=["swapped each time", "all in memory"])
def test_in_a_batch_of_one_a_picture_is_bit_for_bit_the_one_drawn_alone(
    served: Served, tiny_sd1: Path, tmp_path: Path, budget_bytes: int
) -> None:
    """Whatever was drawn or loaded before, and between batches of several."""
    fresh = Engine(load_model(tiny_sd1))
    served.library = AdapterLibrary(served.engine, [tmp_path], budget_bytes=budget_bytes)
    alone: dict[tuple[int, int], np.ndarray] = {}
    for adapter in range(NUM_ADAPTERS):
        file = AdapterFile.read(tmp_path / f"adapter-{adapter}.safetensors")
        fresh.load_adapter(f"adapter-{adapter}", file)
        alone[adapter, 0] = np.asarray(fresh.generate([request_of(adapter, 0)])[0]).astype(int)
        fresh.unload_adapter(f"adapter-{adapter}")
    worker = served.worker()
    worker.start()
    for number in range(24):
        key = (number * 5 % NUM_ADAPTERS, 0)
        if number % 8 == 7:  # several together, with other adapters
            with ThreadPoolExecutor(4) as clients:
                list(clients.map(lambda adapter: ask(served, (adapter, 1)), range(4)))
        assert np.array_equal(pixels(ask(served, key)), alone[key])
    worker.stop()

    assert sum(len(requests) == 1 for requests, _ in served.batches) >= 24
    assert any(len(requests) > 1 for requests, _ in served.batches)


@pytest.mark.slow
def test_after_a_thousand_swaps_the_base_is_bit_for_bit_what_it_was(served: Served, tmp_path: Path) -> None:
    """Loaded, drawn with, exchanged under the same name while loaded, and unloaded."""
    before = hash_of(served.model)
    bare = np.asarray(served.engine.generate([replace(request_of(0, 0), adapters={})])[0])
    for swap in range(1000):
        name = f"adapter-{swap % NUM_ADAPTERS}"
        if swap % 50 == 49:  # the file of the loaded adapter is written anew
            name = f"adapter-{(swap - 1) % NUM_ADAPTERS}"
            content = (tmp_path / f"adapter-{swap // 50 % NUM_ADAPTERS}.safetensors").read_bytes()
            write_bytes_atomically(tmp_path / f"{name}.safetensors", content)
        served.library.need([name])
        if swap % 100 == 0:
            served.engine.generate([request_of(swap % NUM_ADAPTERS, 0)])
    assert len(served.engine.adapters) == 1
    assert np.array_equal(np.asarray(served.engine.generate([replace(request_of(0, 0), adapters={})])[0]), bare)
    served.engine.unload_adapter(served.engine.adapters[0])
    assert hash_of(served.model) == before

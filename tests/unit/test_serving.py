"""The engine over HTTP: what it draws, in what order, and what it refuses."""

from __future__ import annotations

import io
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image

from lora_diffusion.container import with_metadata
from lora_diffusion.errors import UserError
from lora_diffusion.generation.engine import Engine, Request
from lora_diffusion.generation.infotext import read_parameters
from lora_diffusion.generation.library import AdapterLibrary
from lora_diffusion.jobs.device_lock import device_lock
from lora_diffusion.models.base import DiffusionModel
from lora_diffusion.models.load import load_model
from lora_diffusion.serving import worker
from lora_diffusion.serving.app import Service, create_app
from lora_diffusion.serving.catalogue import Catalogue
from lora_diffusion.serving.device import DeviceLock
from lora_diffusion.serving.orders import DroppedOrder, Order, OrderBook, Unit
from lora_diffusion.serving.process import check_exposure
from lora_diffusion.serving.worker import Worker
from tests.random_adapters import ODD_NOTES, random_adapter, write_odd

ROUNDING = 1
"""Matrix products of another batch size may round differently: at most one level of 255."""

ORDER = {"prompt": "a cat", "negative": "blurry", "seed": 1, "steps": 2, "cfg": 5.0, "size": [32, 32]}
REQUEST = Request("a cat", "blurry", seed=1, steps=2, cfg=5.0, size=(32, 32))
TIMEOUT_S = 60


@pytest.fixture(scope="module")
def model(tiny_sd1: Path) -> DiffusionModel:
    return load_model(tiny_sd1)


@pytest.fixture(scope="module")
def solo(tiny_sd1: Path) -> Engine:
    """Another copy of the model, which draws one picture at a time."""
    return Engine(load_model(tiny_sd1))


@pytest.fixture(scope="module")
def folder(model: DiffusionModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library")
    (folder / "deeper").mkdir()
    random_adapter(model, seed=1, targets="full").write(folder / "ink.safetensors", dtype=torch.float32)
    random_adapter(model, seed=2).write(folder / "neon.safetensors", dtype=torch.float32)
    random_adapter(model, seed=3).write(folder / "deeper" / "ink.safetensors", dtype=torch.float32)
    (folder / "broken.safetensors").write_bytes(b"nothing")
    return folder


@dataclass
class Running:
    """A server, and the means to hold its engine back."""

    client: TestClient
    service: Service
    gate: threading.Event
    solo: Engine
    folder: Path

    def order(self, path: str = "images", **changes: Any) -> dict[str, Any]:
        answer = self.client.post(f"/v1/{path}", json={**ORDER, **changes})
        assert answer.status_code == 202, answer.text
        return answer.json()

    def done(self, url: str) -> dict[str, Any]:
        """The order's status once it has ended."""
        until = time.monotonic() + TIMEOUT_S
        while time.monotonic() < until:
            status = self.client.get(url).json()
            if status["status"] in ("done", "failed", "cancelled"):
                return status
            time.sleep(0.01)
        raise AssertionError(f"still {status}")

    def picture(self, url: str) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(self.client.get(url).content))).astype(int)

    def draw_alone(self, request: Request) -> np.ndarray:
        library = AdapterLibrary(self.solo, [self.folder], budget_bytes=2**30)
        library.need(list(request.adapters))
        image = np.asarray(self.solo.generate([request])[0]).astype(int)
        for name in self.solo.adapters:
            self.solo.unload_adapter(name)
        return image


class GatedEngine(Engine):
    """Waits at each step until the gate is open, and remembers how large its batches were and when it made way."""

    gate: threading.Event
    batches: list[int]
    made_way: queue.Queue[None]

    def make_way(self) -> None:
        self.made_way.put(None)

    def generate(self, requests: Any, *, on_step: Any = None, on_preview: Any = None) -> list[Image.Image]:
        self.batches.append(len(requests))

        def gated(done: int, total: int) -> None:
            assert self.gate.wait(TIMEOUT_S)
            on_step(done, total)

        return super().generate(requests, on_step=gated, on_preview=on_preview)


def start(
    model: DiffusionModel,
    solo: Engine,
    folder: Path,
    lock: Path | None = None,
    *,
    idle_s: float = 300.0,
    when_idle: Callable[[], None] | None = None,
    **limits: int,
) -> Running:
    engine = GatedEngine(model)
    engine.gate, engine.batches, engine.made_way = threading.Event(), [], queue.Queue()
    engine.gate.set()
    library = AdapterLibrary(engine, [folder], budget_bytes=2**30)
    book = OrderBook(**limits)
    thread = Worker(engine, library, book, DeviceLock(lock), "tiny", idle_s=idle_s, when_idle=when_idle)
    service = Service(engine, library, book, thread, "tiny", "float32", lambda: None, "own-token")
    client = TestClient(create_app(service), base_url="http://127.0.0.1")
    return Running(client, service, engine.gate, solo, folder)


@pytest.fixture
def running(model: DiffusionModel, solo: Engine, folder: Path) -> Iterator[Running]:
    server = start(model, solo, folder, max_waiting=8, max_images=12)
    with server.client:
        yield server
        server.gate.set()
    for name in server.service.engine.adapters:
        server.service.engine.unload_adapter(name)


# Pictures


def test_a_picture_is_the_one_that_the_engine_draws_alone_and_says_how(running: Running) -> None:
    status = running.done(running.order(prompt="a cat <lora:ink:0.8>")["url"])
    data = running.client.get(status["images"][0]).content
    expected = replace(REQUEST, adapters={"ink": 0.8})
    assert np.array_equal(running.picture(status["images"][0]), running.draw_alone(expected))
    assert read_parameters(Image.open(io.BytesIO(data)).text["parameters"]).request == expected
    assert status["progress"] == {"step": 2, "steps": 2}
    assert status["seconds"] > 0


def test_an_order_tells_what_of_its_adapters_has_no_effect(model: DiffusionModel, solo: Engine, tmp_path: Path) -> None:
    for name in ("ink", "neon"):
        random_adapter(model, seed=1).write(tmp_path / f"{name}.safetensors", dtype=torch.float32)
    write_odd(random_adapter(model, seed=2), tmp_path / "odd.safetensors")
    server = start(model, solo, tmp_path)
    with server.client:
        plain, odd = server.order(adapters={"ink": 1.0}), server.order(adapters={"neon": 0.5, "odd": 0.5}, count=2)
        assert server.done(plain["url"])["notes"] == []
        assert server.done(odd["url"])["notes"] == [f"odd: {note}" for note in ODD_NOTES]
    for name in server.service.engine.adapters:
        server.service.engine.unload_adapter(name)


def test_waiting_orders_of_several_clients_share_a_batch_and_each_gets_its_own_pictures(running: Running) -> None:
    running.gate.clear()
    blocker = running.order(steps=1)
    while not running.service.engine.batches:  # the blocker is being drawn alone
        time.sleep(0.01)
    orders = [
        (running.order(adapters={"ink": 1.0}), replace(REQUEST, adapters={"ink": 1.0})),
        (running.order(adapters={"neon": 0.5, "ink 2": 1.0}), replace(REQUEST, adapters={"neon": 0.5, "ink 2": 1.0})),
        (running.order(seed=9, count=2), replace(REQUEST, seed=9)),
    ]
    running.gate.set()
    running.done(blocker["url"])
    for order, request in orders:
        status = running.done(order["url"])
        assert np.abs(running.picture(status["images"][0]) - running.draw_alone(request)).max() <= ROUNDING
    assert running.service.engine.batches == [1, 4]


def test_a_seed_that_is_not_given_is_drawn_and_told(running: Running) -> None:
    first, second = running.order(seed=None, count=2), running.order(seed=None)
    status = running.done(first["url"])
    assert status["seeds"] == [first["seed"], first["seed"] + 1]
    assert first["seed"] != second["seed"]


def test_a_preview_is_there_while_it_is_drawn(running: Running) -> None:
    running.gate.clear()
    order = running.order(steps=3)
    assert running.client.get(f"{order['url']}/preview.jpg").status_code == 404  # nothing yet, and now it is wanted
    running.gate.set()
    seen = b""
    running.service.book.get(order["id"]).want_preview()
    worker_order = running.service.book.get(order["id"])
    while not worker_order.has_ended:
        seen = worker_order.preview or seen
    assert Image.open(io.BytesIO(seen)).size == (256, 256)


def test_a_sheet_fills_cell_by_cell_and_ends_as_one_picture(running: Running) -> None:
    axes = {"x": {"axis": "strength", "values": ["0", "1"]}, "y": {"axis": "checkpoint", "values": ["ink", "neon"]}}
    order = running.order("sheets", **axes)
    assert (order["columns"], order["rows"], order["count"]) == (2, 2, 4)
    status = running.done(order["url"])
    assert status["status"] == "done", status
    assert status["axes"]["y"] == {"axis": "checkpoint", "values": ["ink", "neon"]}
    alone = running.draw_alone(replace(REQUEST, adapters={"neon": 1.0}))
    assert np.abs(running.picture(status["images"][3]) - alone).max() <= ROUNDING
    assert running.picture(status["sheet"]).shape[1] > 2 * 192
    assert running.client.get(order["url"].replace("sheets", "images")).status_code == 404


# The queue


def test_a_cancelled_order_frees_the_engine_and_the_next_picture_is_as_ever(running: Running) -> None:
    running.gate.clear()
    order, after = running.order(steps=50), running.order(seed=5)
    assert running.client.delete(order["url"]).json()["status"] == "cancelled"
    running.gate.set()
    status = running.done(after["url"])
    assert running.client.get(order["url"]).json()["progress"]["step"] < 50
    assert running.client.get(order["url"]).json()["images"] == [None]
    assert np.array_equal(running.picture(status["images"][0]), running.draw_alone(replace(REQUEST, seed=5)))


def test_positions_count_up_and_a_full_queue_says_when_to_come_back(running: Running) -> None:
    running.gate.clear()
    orders = [running.order(seed=seed) for seed in range(8)]
    assert [order["position"] for order in orders] == list(range(8))
    refused = running.client.post("/v1/images", json=ORDER)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "5")
    assert "queue is full" in refused.json()["error"]
    running.gate.set()
    assert all(running.done(order["url"])["status"] == "done" for order in orders)


def test_a_long_order_does_not_hold_up_a_short_one(running: Running) -> None:
    running.gate.clear()
    long, short = running.order(count=40, steps=1), running.order(steps=2)
    running.gate.set()
    running.done(short["url"])
    assert running.client.get(long["url"]).json()["status"] == "running"


def test_the_oldest_pictures_make_room_and_are_gone(running: Running) -> None:
    first = running.order(count=10, steps=1)
    running.done(first["url"])
    running.done(running.order(count=8, steps=1)["url"])
    gone = running.client.get(first["url"])
    assert (gone.status_code, running.client.get("/v1/images/never").status_code) == (410, 404)
    assert "dropped" in gone.json()["error"]


def test_room_is_made_by_what_ended_first_not_by_what_was_ordered_first() -> None:
    book = OrderBook(max_bytes=100)
    old, young = Order((REQUEST,)), Order((REQUEST,))
    for order in (old, young):
        book.add(order)
    for order in (young, old):
        book.finish(Unit(order, 0), bytes(60))
        book.end(order, "done")
    assert book.get(old.id) is old
    with pytest.raises(DroppedOrder):
        book.get(young.id)


def test_one_wrong_picture_fails_alone(running: Running) -> None:
    running.gate.clear()
    running.order()
    wrong, right = running.order(adapters={"ink": 100.0, "broken": 1.0}), running.order(adapters={"ink": 1.0})
    running.gate.set()
    status = running.done(wrong["url"])
    assert status["status"] == "failed"
    assert "broken.safetensors" in status["error"]
    assert str(running.service.library.paths["broken"].parent) not in status["error"], "folders are private"
    assert running.done(right["url"])["status"] == "done"


# Adapters and facts


def test_adapters_are_listed_by_name_without_paths(running: Running, folder: Path) -> None:
    answer = running.client.get("/v1/adapters")
    entries = {entry["name"]: entry for entry in answer.json()["adapters"]}
    assert entries.keys() == {"ink", "ink 2", "neon", "broken"}
    assert entries["ink"].items() >= {"file": "ink.safetensors", "kind": "lora", "rank": 4}.items()
    assert len(entries["ink"]["hash"]) == 64
    assert entries["broken"]["error"]
    assert str(folder) not in answer.text


@pytest.mark.parametrize("tags", ['{"a": {"t": 1e400}}', "[" * 200_000, "[1]", '{"a": {"t": "x"}}'])
def test_an_adapter_with_odd_metadata_is_listed_without_triggers(tags: str, folder: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd.safetensors"
    odd.write_bytes(with_metadata((folder / "ink.safetensors").read_bytes(), {"ss_tag_frequency": tags}))
    entries = Catalogue().list({"odd": odd, "neon": folder / "neon.safetensors"})
    assert [(entry["name"], entry["kind"], entry["triggers"]) for entry in entries] == [
        ("neon", "lora", []),
        ("odd", "lora", []),
    ]


def test_a_file_that_was_added_is_found_after_a_refresh(running: Running, folder: Path) -> None:
    path = folder / "later.safetensors"
    random_adapter(running.solo.model, seed=8).write(path)
    try:
        assert running.client.post("/v1/images", json={**ORDER, "adapters": {"later": 1}}).status_code == 400
        names = [entry["name"] for entry in running.client.post("/v1/adapters/refresh").json()["adapters"]]
        assert "later" in names
        assert running.done(running.order(adapters={"later": 1})["url"])["status"] == "done"
    finally:
        path.unlink()


def test_health_and_samplers_tell_what_a_page_needs(running: Running) -> None:
    health = running.client.get("/v1/health").json()
    assert health.items() >= {"base": "tiny", "family": "sd1", "device": "cpu", "queue": 0}.items()
    assert health["memory"]["process_bytes"] > 0
    assert {"name": "dpm++2m-karras", "label": "DPM++ 2M Karras"} in running.client.get("/v1/samplers").json()[
        "samplers"
    ]


# What is refused


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"prompt": "x" * 10_001}, 422, "prompt.*10001 bytes"),
        ({"size": [4096, 32]}, 422, "size"),
        ({"size": [40, 32]}, 400, "multiples of 32"),
        ({"steps": 201}, 422, "steps"),
        ({"steps": 10**9}, 422, "steps"),
        ({"count": 65}, 422, "count"),
        ({"seed": -1}, 422, "seed"),
        ({"seed": 2**63}, 422, "seed"),
        ({"cfg": "NaN"}, 422, "cfg"),
        ({"sampler": "eular"}, 400, "mean 'euler'"),
        ({"adapters": {"inks": 1}}, 400, "mean 'ink'"),
        ({"adapters": {"ink": 1e30}}, 422, "adapters"),
        ({"adapters": {"../ink": 1}}, 400, "no adapter '../ink'"),
        ({"adapters": {"/etc/passwd": 1}}, 400, "no adapter"),
        ({"prompt": "<lora:..\\ink:1>"}, 400, "no adapter"),
        ({"prompt": "<lora:ink:101>"}, 422, "adapters.ink.*less than or equal to 100"),
        ({"prompt": "".join(f"<lora:{i}:1>" for i in range(33))}, 422, "adapters.*at most 32"),
        ({"path": "x"}, 422, "path"),
    ],
)
def test_a_wrong_order_is_refused_with_the_reason(
    running: Running, change: dict[str, Any], status: int, message: str
) -> None:
    answer = running.client.post("/v1/images", json={**ORDER, **change})
    assert answer.status_code == status
    assert re.search(message, answer.json()["error"]), answer.text


@pytest.mark.parametrize(
    ("axis", "values", "status", "message"),
    [
        ("prompt", ["a", "b" * 10_000], 400, "has 100000000 characters; at most 10000"),
        ("prompt", ["a", "é"], 422, "prompt.*20000 bytes"),
        ("prompt", ["aaaaa" * 2000, "<lora:ink:101>"], 422, "adapters.ink"),
        ("steps", ["1", "201"], 422, "steps.*less than or equal to 200"),
        ("cfg", ["1", "101"], 422, "cfg"),
        ("cfg", ["1", "inf"], 422, "cfg"),
        ("strength", ["-101"], 422, "adapters.ink"),
        ("adapter", ["ink:101"], 422, "adapters.ink"),
        ("adapter", ["none", "+".join(map(str, range(33)))], 422, "adapters.*at most 32"),
        ("seed", [str(2**63)], 422, "seed"),
    ],
)
def test_the_limits_of_an_order_hold_for_every_cell_of_a_sheet(
    running: Running, axis: str, values: list[str], status: int, message: str
) -> None:
    order = {**ORDER, "prompt": "a" * 10_000, "adapters": {"ink": 1}, "x": {"axis": axis, "values": values}}
    answer = running.client.post("/v1/sheets", json=order)
    assert answer.status_code == status, answer.text
    assert re.search(message, answer.json()["error"]), answer.text
    assert not running.service.book.num_waiting


def test_requests_for_other_hosts_from_other_sites_or_too_large_are_refused(running: Running) -> None:
    client = running.client
    assert client.get("/v1/health", headers={"Host": "evil.example"}).status_code == 400
    assert client.get("/v1/health", headers={"Host": "127.0.0.1.evil.example:80"}).status_code == 400
    assert client.get("/v1/health", headers={"Host": "[::1]:7861"}).status_code == 200
    assert client.post("/v1/images", json=ORDER, headers={"Origin": "http://evil.example"}).status_code == 403
    assert client.post("/v1/images", json=ORDER, headers={"Origin": "null"}).status_code == 403
    assert client.get("/v1/health", headers={"Origin": "http://127.0.0.1"}).status_code == 200
    assert client.post("/v1/images", content=b"x" * (2**20 + 1)).status_code == 413
    assert client.post("/v1/images", content=iter([b"x" * 2**19] * 3)).status_code == 413


def test_only_the_owner_ends_the_engine(running: Running) -> None:
    assert running.client.post("/v1/shutdown").status_code == 401
    assert running.client.post("/v1/shutdown", headers={"Authorization": "Bearer guess"}).status_code == 401
    assert running.client.post("/v1/shutdown", headers={"Authorization": "Bearer own-token"}).status_code == 202


def test_with_a_token_every_route_asks_for_it(running: Running) -> None:
    app = create_app(running.service, token="secret")
    client = TestClient(app, base_url="http://127.0.0.1")
    paths = [(route.path, next(iter(route.methods))) for route in app.routes]
    assert len(paths) >= 12
    for path, method in paths:
        url = path.replace("{number}", "0").replace("{id}", "x").replace("{kind}", "images")
        assert client.request(method, url).status_code == 401, path
    assert client.get("/v1/samplers", headers={"Authorization": "Bearer secret"}).status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "my-machine"])
def test_a_host_that_others_reach_needs_a_token_or_a_clear_word(host: str) -> None:
    with pytest.raises(UserError, match=r"--token.*--open"):
        check_exposure(host, None, False)
    check_exposure(host, "secret", False)
    check_exposure(host, None, True)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_loopback_needs_none(host: str) -> None:
    assert check_exposure(host, None, False) is None  # and raises nothing


# The device


def test_while_another_process_has_the_device_orders_wait_and_say_for_whom(
    model: DiffusionModel, solo: Engine, folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "cpu.lock"
    server = start(model, solo, folder, lock=path)
    other = DeviceLock(path)
    with server.client:
        with other.held():
            order = server.order()
            until = time.monotonic() + TIMEOUT_S
            while not (message := server.client.get(order["url"]).json()["message"]) and time.monotonic() < until:
                time.sleep(0.02)
            assert message.startswith("waiting for the device (the picture engine, process ")
            assert server.client.get(order["url"]).json()["status"] == "queued"
        assert server.done(order["url"])["status"] == "done"
        signature = path.with_name("cpu.lock.json")
        until = time.monotonic() + TIMEOUT_S  # an order is done a moment before the device is given back
        while signature.exists() and time.monotonic() < until:
            time.sleep(0.02)
        assert not signature.exists(), "between batches nobody has signed"


def test_an_engine_that_may_end_does_so_when_another_has_the_device_and_nothing_is_left_to_draw(
    model: DiffusionModel, solo: Engine, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "_POLL_S", 0.01)
    path = tmp_path / "cpu.lock"
    ended = threading.Event()
    server = start(model, solo, folder, lock=path, when_idle=ended.set)
    other = DeviceLock(path)
    with server.client:
        with other.held():
            assert not ended.wait(0.2), "who started it is about to ask"
            order = server.order()
            assert not ended.wait(0.2), "this one is waited for"
        assert server.done(order["url"])["status"] == "done"
        assert not ended.wait(0.2)
        with other.held():
            assert ended.wait(TIMEOUT_S)


def test_the_base_makes_way_for_a_process_that_takes_the_device_between_two_batches(
    model: DiffusionModel, solo: Engine, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "_LONGEST_HOLD_S", 0.0)
    path = tmp_path / "cpu.lock"
    server = start(model, solo, folder, lock=path)
    engine = server.service.engine
    assert isinstance(engine, GatedEngine)
    with server.client:
        orders = [server.order(size=[side, 32], adapters={"ink": 0.8}) for side in (32, 64)]
        with device_lock(path, "a training"):
            engine.made_way.get(timeout=TIMEOUT_S)
            until = time.monotonic() + TIMEOUT_S
            while not (last := server.client.get(orders[-1]["url"]).json())["message"] and time.monotonic() < until:
                time.sleep(0.02)
            assert last["message"].startswith("waiting for the device (a training, process ")
            assert last["status"] == "queued"
        pictures = [server.picture(server.done(order["url"])["images"][0]) for order in orders]
    for picture, side in zip(pictures, (32, 64), strict=True):
        assert np.array_equal(picture, server.draw_alone(replace(REQUEST, size=(side, 32), adapters={"ink": 0.8})))


def test_the_base_makes_way_once_for_each_process_that_takes_the_device_while_nothing_is_drawn(
    model: DiffusionModel, solo: Engine, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "_POLL_S", 0.01)
    path = tmp_path / "cpu.lock"
    server = start(model, solo, folder, lock=path)
    engine = server.service.engine
    assert isinstance(engine, GatedEngine)
    with server.client:
        for _ in range(2):
            assert server.done(server.order()["url"])["status"] == "done"
            with device_lock(path, "a training"):
                engine.made_way.get(timeout=TIMEOUT_S)
                order = server.order()
                with pytest.raises(queue.Empty):
                    engine.made_way.get(timeout=0.2)
            assert server.done(order["url"])["status"] == "done"


def test_freed_memory_is_given_back_once_after_some_time_without_work_and_when_another_has_the_device(
    model: DiffusionModel, solo: Engine, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_back: queue.Queue[None] = queue.Queue()
    monkeypatch.setattr(worker, "_POLL_S", 0.01)
    monkeypatch.setattr(worker, "trim_heap", lambda: given_back.put(None))
    path = tmp_path / "cpu.lock"
    server = start(model, solo, folder, lock=path, idle_s=0.3)
    with server.client:
        assert server.done(server.order()["url"])["status"] == "done"
        given_back.get(timeout=TIMEOUT_S)
        with pytest.raises(queue.Empty):
            given_back.get(timeout=0.5)

    server = start(model, solo, folder, lock=path)
    with server.client:
        assert server.done(server.order()["url"])["status"] == "done"
        with pytest.raises(queue.Empty):
            given_back.get(timeout=0.5)
        with DeviceLock(path).held():
            order = server.order()
            given_back.get(timeout=TIMEOUT_S)
        assert server.done(order["url"])["status"] == "done"


def test_an_engine_that_may_end_does_so_after_some_time_without_work(
    model: DiffusionModel, solo: Engine, folder: Path
) -> None:
    ended = threading.Event()
    server = start(model, solo, folder, idle_s=0.1, when_idle=ended.set)
    with server.client:
        assert ended.wait(TIMEOUT_S)

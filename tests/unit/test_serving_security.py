"""The engine's API, asked for what it must not give: each parameter of each route, as the app itself lists them."""

from __future__ import annotations

import json
import random
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import torch
from fastapi.testclient import TestClient
from pydantic import BaseModel

from lora_diffusion.container import with_metadata
from lora_diffusion.generation.engine import Engine
from lora_diffusion.models.load import load_model
from lora_diffusion.serving.schemas import ImageOrder, SheetOrder
from tests.probes import CANARY, probes
from tests.random_adapters import random_adapter
from tests.unit.test_serving import Running, start

ORDER = {"prompt": "a cat", "seed": 1, "steps": 1, "cfg": 1.0, "size": [32, 32]}
X = {"axis": "seed", "values": ["1"]}
BODIES: dict[str, tuple[type[BaseModel], dict[str, Any]]] = {
    "/v1/images": (ImageOrder, ORDER),
    "/v1/sheets": (SheetOrder, {**ORDER, "x": X}),
}
"""What a route with a body takes, and a good one."""

PLAIN_TEXT = {"prompt", "negative"}
"""Fields that may say anything; what they say is drawn and named in no path."""


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outside")
    (folder / "secret.txt").write_text(CANARY)
    return folder


@pytest.fixture(scope="module")
def server(tiny_sd1: Path, secret: Path) -> Iterator[Running]:
    """A library with links that lead out, beside an adapter that it must not use."""
    model = load_model(tiny_sd1)
    folder = secret / "library"
    folder.mkdir()
    random_adapter(model, seed=1).write(folder / "ink.safetensors", dtype=torch.float32)
    content = with_metadata((folder / "ink.safetensors").read_bytes(), {"modelspec.trigger_phrase": CANARY})
    (secret / "secret.safetensors").write_bytes(content)
    (folder / "link.safetensors").symlink_to(secret / "secret.safetensors")
    (folder / "out").symlink_to(secret)
    running = start(model, Engine(model), folder, max_waiting=8, max_images=8)
    with running.client:
        yield running


def routes(server: Running) -> list[Any]:
    app: Any = server.client.app
    return [route for route in app.routes if route.path.startswith("/v1")]


def test_no_parameter_of_an_address_leads_out(server: Running, secret: Path) -> None:
    asked = 0
    for route in routes(server):
        names = [parameter.name for parameter in route.dependant.path_params]
        assert not route.dependant.query_params, f"{route.path}: give its query parameters probes"
        for name in names:
            for probe in [*probes(secret, "secret.txt"), *probes(secret, "secret.safetensors")]:
                for said in (quote(probe, safe=""), quote(probe)):
                    values = {other: "images" if other == "kind" else "0" for other in names} | {name: said}
                    answer = server.client.request(next(iter(route.methods)), route.path.format(**values))

                    assert answer.status_code in (307, 400, 404, 405, 422), (route.path, probe)
                    assert CANARY not in answer.text
                    asked += 1
    assert asked > 500


def places(model: type[BaseModel], good: dict[str, Any], probe: object) -> Iterator[tuple[str, dict[str, Any]]]:
    """Bodies with the probe in each field, in the place of its value, its keys and its items."""
    for name, field in model.model_fields.items():
        inner = [it for it in typing.get_args(field.annotation) if isinstance(it, type) and issubclass(it, BaseModel)]
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            inner = [field.annotation]
        if inner:
            for key, value in places(inner[0], X, probe):
                yield f"{name}.{key}", good | {name: value}
        yield name, good | {name: probe}
        yield name, good | {name: {probe: 1.0}} if isinstance(probe, str) else good | {name: {"ink": probe}}
        yield name, good | {name: [probe]}
    for axis in ("checkpoint", "adapter", "sampler") if "x" in good else ():
        yield f"x.{axis}", good | {"x": {"axis": axis, "values": [probe]}}


def test_no_field_of_an_order_leads_out(server: Running, secret: Path) -> None:
    with_body = {route.path for route in routes(server) if route.body_field is not None}
    assert with_body == BODIES.keys(), "a route with a body needs a line in BODIES"
    asked = 0
    server.gate.clear()  # what is accepted need not be drawn
    for path, (model, good) in BODIES.items():
        assert server.client.post(path, json=good).status_code == 202
        for probe in [*probes(secret, "secret.safetensors"), *probes(secret, "secret"), "link", "out/secret"]:
            for field, body in places(model, good, probe):
                answer = server.client.post(path, json=body)
                server.service.book.end_all()

                is_text = field in PLAIN_TEXT and body[field] == probe
                assert answer.status_code in ((202, 422) if is_text else (400, 422)), (field, probe, answer.text)
                assert CANARY not in answer.text
                asked += 1
    assert asked > 1000
    assert server.service.library.paths.keys() == {"ink"}
    assert CANARY not in server.client.post("/v1/adapters/refresh").text
    server.gate.set()


JUNK = [None, True, -1, 10**30, 1e308, float("nan"), "", "\ud800", "\0", "x" * 20_000, [], {}, [[]], {"a": {"b": []}}]


def test_nonsense_is_refused_in_words_and_the_engine_goes_on(server: Running) -> None:
    chance = random.Random(4)
    server.gate.clear()
    for path, (model, good) in BODIES.items():
        for junk in JUNK:
            for field, body in places(model, good, junk):
                answer = server.client.post(
                    path, content=json.dumps(body), headers={"Content-Type": "application/json"}
                )
                server.service.book.end_all()
                assert answer.status_code in (202, 400, 422), (field, junk, answer.text)
                assert answer.status_code == 202 or answer.json()["error"]
        for _ in range(60):
            garbage = bytes(chance.randrange(256) for _ in range(chance.randrange(60)))
            assert server.client.post(path, content=garbage).status_code == 422
    server.gate.set()

    assert server.done(server.order()["url"])["status"] == "done"


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", "", "[::2]"])
def test_every_route_refuses_another_host_name(server: Running, host: str) -> None:
    answers = of_every_route(server, {"Host": host})
    assert set(answers.values()) == {400}, answers


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:1", "file://", "http://127.0.0.1@x"]
)
def test_every_route_refuses_the_pages_of_others(server: Running, origin: str) -> None:
    answers = of_every_route(server, {"Origin": origin})
    assert set(answers.values()) == {403}, answers


def of_every_route(server: Running, headers: dict[str, str]) -> dict[tuple[str, str], int]:
    """(method, path) → the status of the answer."""
    listed = routes(server)
    assert len(listed) >= 12
    places = [(m, route.path.format(kind="images", id="x", number="0")) for route in listed for m in route.methods]
    return {(m, path): server.client.request(m, path, headers=headers).status_code for m, path in places}


def test_without_a_browser_no_origin_is_needed(server: Running) -> None:
    client: TestClient = server.client
    assert client.get("/v1/health").status_code == 200


# Faults of ours


def test_a_picture_that_cannot_be_written_fails_with_a_reason(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lora_diffusion.serving.worker.png_bytes", full)
    status = server.done(server.order()["url"])
    assert status["status"] == "failed"
    assert "OSError" in status["error"]
    monkeypatch.undo()
    assert server.done(server.order()["url"])["status"] == "done"


def test_a_prompt_that_the_tokenizer_cannot_read_fails_alone(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = server.service.engine
    count = engine.model.count_tokens

    def counting(text: str) -> int:
        if "unreadable" in text:
            raise RuntimeError("no such token")
        return count(text)

    monkeypatch.setattr(engine.model, "count_tokens", counting)
    server.gate.clear()
    held, wrong, right = server.order(), server.order(prompt="unreadable"), server.order(seed=3)
    server.gate.set()

    assert server.done(wrong["url"])["status"] == "failed"
    assert [server.done(order["url"])["status"] for order in (held, right)] == ["done", "done"]

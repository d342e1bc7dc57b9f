"""Texts that no UTF-8 can hold, and requests that say too little: the server answers in words and goes on."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from lora_diffusion.cli import app as command
from lora_diffusion.container import with_metadata
from lora_diffusion.errors import UserError
from lora_diffusion.generation.engine import Engine
from lora_diffusion.models.load import load_model
from lora_diffusion.serving.catalogue import Catalogue
from lora_diffusion.serving.process import serve
from tests.random_adapters import random_adapter
from tests.unit.test_serving import ORDER, Running, start

NOT_UTF8 = os.fsdecode(b"caf\xe9.safetensors")
HALF = "\ud83d"


@pytest.fixture(scope="module")
def server(tiny_sd1: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """With an adapter, the same under a name that is not UTF-8, and two that hold odd texts."""
    folder = tmp_path_factory.mktemp("library")
    model = load_model(tiny_sd1)
    random_adapter(model, seed=1).write(folder / "ink.safetensors", dtype=torch.float32)
    content = (folder / "ink.safetensors").read_bytes()
    (folder / NOT_UTF8).write_bytes(content)
    phrase = {"modelspec.trigger_phrase": f"red {HALF}", "sshs_model_hash": f"ab{HALF}"}
    (folder / "phrase.safetensors").write_bytes(in_ascii(content, phrase))
    tags = json.dumps({"a": {f"red {HALF}": 3, "blue": 2}})
    (folder / "tags.safetensors").write_bytes(with_metadata(content, {"ss_tag_frequency": tags}))
    running = start(model, Engine(model), folder)
    with running.client:
        yield running


def in_ascii(content: bytes, metadata: dict[str, str]) -> bytes:
    """The adapter file with these metadata, written with escapes for all that is not ASCII."""
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + length]) | {"__metadata__": metadata}).encode()
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def listed(answer: Any) -> dict[str, dict[str, Any]]:
    assert answer.status_code == 200, answer.text
    return {entry["name"]: entry for entry in answer.json()["adapters"]}


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems refuse such names")
def test_a_file_whose_name_is_not_utf8_is_listed_with_the_reason_and_hides_no_other(server: Running) -> None:
    for answer in (server.client.post("/v1/adapters/refresh"), server.client.get("/v1/adapters")):
        entries = listed(answer)
        assert len(entries) == 4
        assert entries["ink"]["kind"] == "lora"
        assert entries["caf_"] == {
            "name": "caf_",
            "file": "caf\ufffd.safetensors",
            "error": "caf\ufffd.safetensors: the name is not valid UTF-8; rename it.",
        }

    refused = server.client.post("/v1/images", json={**ORDER, "adapters": {"caf_": 1}})
    assert (refused.status_code, "rename it" in refused.json()["error"]) == (400, True)


def test_trigger_words_are_listed_without_halves_of_surrogate_pairs(server: Running) -> None:
    entries = listed(server.client.get("/v1/adapters"))
    assert (entries["phrase"]["triggers"], entries["phrase"]["hash"]) == (["red \ufffd"], "ab\ufffd")
    assert entries["tags"]["triggers"] == ["red \ufffd", "blue"]


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems refuse such names")
def test_generate_asks_to_rename_a_file_whose_name_is_not_utf8(tiny_sd1: Path, server: Running, tmp_path: Path) -> None:
    adapter = server.folder / NOT_UTF8
    arguments = ["--adapter", str(adapter), "--prompt", "x", "--steps", "1", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(command, ["generate", "--base", str(tiny_sd1), *arguments])
    assert result.exit_code == 2, result.output
    assert "not valid UTF-8; rename it" in result.output


def test_an_unexpected_error_is_answered_in_json_too(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Catalogue, "list", fail)
    client = TestClient(server.client.app, base_url="http://127.0.0.1", raise_server_exceptions=False)
    answer = client.get("/v1/adapters")
    assert answer.status_code == 500
    assert answer.json() == {"error": "The engine made a mistake (ZeroDivisionError). Its log has the details."}
    with pytest.raises(ZeroDivisionError):
        server.client.get("/v1/adapters")  # what the server gets to see, and logs


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": f"a {HALF} cat"},
        {"negative": HALF},
        {"sampler": f"ddim{HALF}"},
        {"adapters": {f"ink{HALF}": 1}},
        {"x": {"axis": "prompt", "values": ["a", HALF]}},
        {HALF: 1},
    ],
    ids=["prompt", "negative", "sampler", "adapters", "values", "field"],
)
def test_half_of_a_surrogate_pair_is_refused_wherever_it_stands(server: Running, change: dict[str, Any]) -> None:
    path = "/v1/sheets" if "x" in change else "/v1/images"
    body = json.dumps({**ORDER, **change})
    answer = server.client.post(path, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422, answer.text
    assert answer.json()["error"]


def test_an_order_without_the_header_for_json_is_told_so(server: Running) -> None:
    form = "application/x-www-form-urlencoded"  # what curl says with -d
    for headers in ({"Content-Type": form}, {}):
        answer = server.client.post("/v1/images", content=json.dumps(ORDER), headers=headers)
        assert answer.status_code == 422
        assert "Content-Type: application/json" in answer.json()["error"]
    answer = server.client.post("/v1/images", content="[]", headers={"Content-Type": "application/json"})
    assert "Content-Type" not in answer.json()["error"]
    answer = server.client.get("/v1/images/none/first.png")
    assert answer.status_code == 422 and "Content-Type" not in answer.json()["error"]


@pytest.mark.parametrize("token", ["gehéim", "秘密", "", " a", "a\n", "a\x7f"])
def test_a_token_that_clients_cannot_send_alike_is_refused_before_anything_is_loaded(
    token: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="--token"):
        serve("no base", [tmp_path], port=0, token=token)


@pytest.mark.parametrize("token", [None, "secret", "a-_.~+/==", "two words"])
def test_a_token_of_ascii_may_be_any(token: str | None, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such folder"):  # which is looked at next
        serve("no base", [tmp_path / "none"], port=0, token=token)

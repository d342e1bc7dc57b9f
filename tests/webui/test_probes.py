"""Every parameter of every route and event, as the app itself lists them, asked for what lies outside."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import pytest
from fastapi.testclient import TestClient
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lora_diffusion.container import read_header, with_metadata
from lora_diffusion.errors import UserError
from lora_diffusion.jobs.queue import Queue
from tests.probes import CANARY, probes, walk
from tests.webui.conftest import make_workspace
from webui.server import make_app
from webui.services.file_tools import FileTools
from webui.services.site import Site, make_site

BASE = "http://127.0.0.1:7860"
INK = Path(__file__).parents[2] / "samples" / "adapters" / "ink.safetensors"
OURS = ("/picture/", "/download/", "/static-ui/")
STREAMS = ("heartbeat", "queue/data", "/call/", "upload_progress")
"""Answers that go on until the client leaves. What they take names a session, never a file."""

GOOD = {
    "adapters-chosen": "adapters/ink.safetensors",
    "adapters-mixed": "<lora:ink:1> <lora:neon:1>",
    "adapters-new-name": "new",
    "adapters-merge-name": "both",
    "adapters-base": "models/tiny",
    "generate-base": "models/tiny",
    "generate-prompt": "a house <lora:ink:1>",
}
"""What the other fields hold while one is probed, so that its event gets as far as it can."""

PATHS_OF_THE_FORM = ("dataset.0.path", "run.output", "model.path", "adapter.start_from", "cache.folder", "run.name")
ACTS = ("copy", "delete", "mix", "choose", "remove", "words", "use", "again", "up", "cancel", "forget", "pause", "live")
FILES = ("secret.safetensors", "secret.png", "secret.txt")
REPORT = {"blocks": {}, "readers": {}, "notes": [], "metadata": {}, "names": [], "whole": [], "by_block": {}}


class RefusingEngine:
    """Draws nothing, and notes the bases it was asked for."""

    bases: list[str]

    def draw(self, base: str, *_: object) -> Iterator[bytes]:
        self.bases.append(base)
        raise UserError("not here")


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What must stay unread and unchanged, beside the workspace."""
    folder = tmp_path_factory.mktemp("probes")
    (folder / "secret.txt").write_text(CANARY)
    texts = PngInfo()
    texts.add_text("parameters", f"{CANARY}\nSteps: 1, Sampler: Euler, CFG scale: 1, Seed: 1, Size: 8x8")
    Image.new("RGB", (8, 8)).save(folder / "secret.png", pnginfo=texts)
    metadata = {"modelspec.title": CANARY, "modelspec.trigger_phrase": CANARY}
    (folder / "secret.safetensors").write_bytes(with_metadata(INK.read_bytes(), metadata))
    (folder / "secret.toml").write_text(f"[run]\nname = '{CANARY}'\n")
    return folder


@pytest.fixture(scope="module")
def site(secret: Path) -> Site:
    workspace = make_workspace(secret / "workspace")
    root = workspace.root
    (root / "adapters").mkdir()
    (root / "models" / "tiny").mkdir(parents=True)
    (root / "models" / "tiny" / "model_index.json").write_text("{}")
    for name in ("ink", "neon"):
        shutil.copyfile(INK.with_name(f"{name}.safetensors"), root / "adapters" / f"{name}.safetensors")
    for folder in ("data", "runs", "adapters", "runs/done", "runs/done/previews"):
        (root / folder / "link.png").symlink_to(secret / "secret.png")
        (root / folder / "link.safetensors").symlink_to(secret / "secret.safetensors")
        (root / folder / "folder").symlink_to(secret)
    site = make_site(root, queue=Queue(workspace, start_runner=lambda _: None))
    engine = RefusingEngine()
    engine.bases = []
    site.studio.desk.engine = engine  # pyright: ignore[reportAttributeAccessIssue]
    return site


@pytest.fixture(scope="module")
def client(site: Site) -> Iterator[TestClient]:
    app = make_app(site)
    with TestClient(app, base_url=BASE, raise_server_exceptions=False, follow_redirects=False) as client:
        yield client


def all_routes(client: TestClient) -> list[tuple[str, Any]]:
    app: Any = client.app
    found = list(walk(app.routes))
    assert sum("/gradio_api/" in path for path, _ in found) > 40, "Gradio's own are among them, in each language"
    return found


def outside(secret: Path) -> list[str]:
    return list(dict.fromkeys(probe for name in FILES for probe in probes(secret, name)))


def fingerprint(secret: Path) -> str:
    """Of every file outside the workspace."""
    files = [path for path in sorted(secret.iterdir()) if path.name != "workspace"]
    return hashlib.sha256(b"".join(f"{path}".encode() + path.read_bytes() for path in files)).hexdigest()


def check_answer(answer: Any, where: object) -> None:
    assert CANARY.encode() not in answer.content, where
    assert not answer.headers.get("content-type", "").startswith("image/"), where


@pytest.mark.slow
def test_no_parameter_of_an_address_leads_out(client: TestClient, secret: Path) -> None:
    before, asked = fingerprint(secret), 0
    for path, route in all_routes(client):
        dependant = getattr(route, "dependant", None)
        names = [parameter.name for parameter in dependant.path_params] if dependant else []
        queries = [parameter.name for parameter in dependant.query_params] if dependant else []
        if any(part in path for part in STREAMS):
            assert not any("path" in name or "file" in name for name in (*names, *queries)), path
            continue
        good = {"kind": "dataset", "id": "data/shapes/0.png"}
        for name in (*names, *queries):
            for probe in outside(secret):
                for said in {quote(probe, safe=""), quote(probe)} if name in names else {quote(probe, safe="")}:
                    values = {other: good.get(other, "x") for other in names} | {name: said}
                    address = path.replace(":path}", "}").format(**values) if names else path
                    query = f"?{name}={said}" if name in queries else ""
                    for method in route.methods:
                        answer = client.request(method, address + query)
                        is_ours = path.startswith(OURS) and name in names
                        if is_ours:
                            assert answer.status_code in (400, 404, 405, 422), (address, answer.status_code)
                        if is_ours or not path.startswith(OURS):
                            check_answer(answer, (method, address, query))
                        asked += 1
    assert asked > 5000
    assert fingerprint(secret) == before


def described(client: TestClient) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Each event that runs on the server, with its inputs; of one language, as both are built alike."""
    config, german = client.get("/config").json(), client.get("/de/config").json()
    ours = [item for item in config["dependencies"] if item["backend_fn"]]
    public = [item for item in ours if item["api_visibility"] == "public"]
    assert len(ours) - len(public) == sum(item["backend_fn"] for item in german["dependencies"])
    components = {component["id"]: component for component in config["components"]}
    for item in ours:
        yield item, [components[id] for id in item["inputs"]]


def says(component: dict[str, Any], probe: str) -> list[object]:
    """Ways to put a probe into an input."""
    id = component["props"].get("elem_id") or ""
    match component["type"], id:
        case _, "train-values":
            return [json.dumps({"values": {"run.steps": "5", **FORM, field: probe}}) for field in PATHS_OF_THE_FORM]
        case _, "runs-ticked":
            return [json.dumps([probe, "runs/done"])]
        case _, "train-paste":
            return [f"[run]\nname = 'x'\n[model]\npath = {json.dumps(probe)}\n", probe]
        case ("textbox", _):
            return [probe, f"<lora:{probe}:1> <lora:ink:1>"]
        case ("dropdown" | "radio" | "number" | "slider" | "checkbox" | "api", _):
            return [probe]
        case ("file", _):
            meta = {"_type": "gradio.FileData"}
            return [{"path": probe, "meta": meta}, {"path": probe, "url": probe, "orig_name": probe, "meta": meta}]
        case ("state", _):
            return []  # stays on the server
    raise AssertionError(f"{component['type']} {id}: say here how a probe is put into it")


def file_for(component: dict[str, Any]) -> str:
    """What its page would read, if it read what it must not."""
    page = str(component["props"].get("elem_id")).partition("-")[0]
    return {"adapters": "secret.safetensors", "generate": "secret.png"}.get(page, "secret.txt")


FORM = {"model.path": "models/tiny", "dataset.0.path": "data/shapes", "run.name": "probed"}


def usual(component: dict[str, Any]) -> object:
    return GOOD.get(component["props"].get("elem_id"), component["props"].get("value"))


@pytest.mark.slow
def test_no_input_of_an_event_leads_out(
    client: TestClient, site: Site, secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[str, ...]] = []
    monkeypatch.setattr(FileTools, "_run", lambda _, *words: (ran.append(words), json.dumps(REPORT))[1])
    monkeypatch.setattr("webui.services.preflight.check", lambda *_: pytest.fail("a config that leads out was checked"))
    before, asked, seen = fingerprint(secret), 0, set[object]()
    for item, inputs in described(client):
        kind = (item["api_name"].rstrip("0123456789_"), tuple(item["inputs"]))
        is_acted = any(target[1] in ("select", "input") for target in item["targets"])
        if kind in seen and not is_acted:
            continue  # the same function again, behind another button
        seen.add(kind)
        data = [usual(component) for component in inputs]
        bodies = [
            (probe, [*data[:slot], value, *data[slot + 1 :]], None)
            for slot, component in enumerate(inputs)
            for probe in probes(secret, file_for(component))
            for value in says(component, probe)
        ]
        bodies += [(probe, data, None) for probe in probes(secret, "secret.txt")]  # for those that read the address
        if is_acted:
            bodies += [
                (probe, data, dict.fromkeys(("id", "name", "words", "step"), probe) | {"act": act, "strength": 1})
                for act, name in zip(ACTS, FILES * len(ACTS), strict=False)
                for probe in probes(secret, name)
            ]
        for probe, values, event in bodies:
            body = {"data": values, "fn_index": item["id"], "session_hash": "probe", "event_data": event}
            query = urlencode(dict.fromkeys(("id", "adapter", "copy", "set"), probe))
            answer = client.post(f"/gradio_api/run/predict?{query}", json=body)
            check_answer(answer, (item["api_name"], values, event))
            asked += 1
    print(f"{asked} requests to {len(seen)} events")
    assert len(seen) > 50 and asked > 8_000
    assert fingerprint(secret) == before
    root = site.workspace.root
    for words in ran:
        paths = [Path(word.partition(":")[0]) for word in words if word.startswith("/")]
        assert all(path.resolve().is_relative_to(root) for path in paths), words
    assert {job.run.resolve().is_relative_to(root) for job in site.queue.jobs()} == {True}
    assert set(site.studio.desk.engine.bases) <= {"models/tiny"}  # pyright: ignore[reportAttributeAccessIssue]
    assert read_header(secret / "secret.safetensors").metadata["modelspec.title"] == CANARY


@pytest.mark.slow
def test_no_question_of_the_data_set_page_leads_out(client: TestClient, secret: Path) -> None:
    """The one function that the page calls itself: each thing that it does, each value that it takes."""
    from webui.pages.dataset import _answers
    from webui.services.captioning import Captioning
    from webui.services.datasets import Datasets

    config = client.get("/config").json()
    page = next(one for one in config["components"] if one["props"].get("elem_id") == "dataset-page")
    doings = list(_answers(Datasets(None), Captioning(None, None)))  # pyright: ignore[reportArgumentType]
    good = {
        **{"set": "data/shapes", "name": "0.png", "names": ["0.png"], "filter": {}, "resolution": 0, "step": 0},
        **{"before": None, "text": "x", "edit": {"kind": "prefix", "text": "x"}, "digest": "", "without": []},
        **{"options": {"name": "copy"}, "piece": "", "offset": 0, "last": True, "back": False},
        **{"chosen": [{"name": "0.png", "before": None, "text": "x"}]},
    }
    before, asked = fingerprint(secret), 0
    for doing in doings:
        for key in good:
            for probe in probes(secret, "secret.txt" if key == "text" else "secret.png"):
                told = dict.fromkeys(("name", "text", "check", "before", "captioner", "prefix"), probe)
                for value in (probe, [told] if key == "chosen" else [probe], told):
                    question = {**good, "do": doing, key: value}
                    body = {"data": question, "component_id": page["id"], "fn_name": "ask", "session_hash": "probe"}
                    answer = client.post("/gradio_api/component_server", json=body)
                    assert answer.status_code == 200, (question, answer.text)
                    check_answer(answer, question)
                    asked += 1
    assert asked > 10_000
    assert fingerprint(secret) == before


HEADERS = [
    {"Host": "evil.example"},
    {"Host": "127.0.0.1.evil.example:7860"},
    {"Host": ""},
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://127.0.0.1:7861"},
    {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
    {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "cors"},
]


@pytest.mark.parametrize("headers", HEADERS, ids=str)
def test_every_route_refuses_forged_headers(client: TestClient, headers: dict[str, str]) -> None:
    for path, route in all_routes(client):
        for method in {*route.methods, "GET", "POST"}:
            answer = client.request(method, path.replace("{", "").replace("}", ""), headers=headers)
            assert answer.status_code == (400 if "Host" in headers else 403), (method, path)
            assert "access-control-allow-origin" not in answer.headers


def test_a_link_of_another_page_may_be_clicked(client: TestClient) -> None:
    clicked = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}

    assert client.get("/runs", headers=clicked).status_code == 200
    assert client.post("/gradio_api/run/predict", json={}, headers=clicked).status_code == 403

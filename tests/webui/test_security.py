"""What a stranger's web page, a forged request or a curious user could try against the server."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from lora_diffusion.errors import UserError
from lora_diffusion.jobs.queue import Queue
from lora_diffusion.workspace import Workspace
from tests.probes import CANARY, probes, walk
from tests.webui.conftest import make_workspace
from webui.guard import Limits
from webui.launch import Options, login_of
from webui.login import Login
from webui.server import MAX_UPLOAD_BYTES, make_app
from webui.services.site import make_site

BASE = "http://127.0.0.1:7860"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files beside the workspace that must never be answered with."""
    folder = tmp_path_factory.mktemp("security")
    (folder / "secret.txt").write_text(CANARY)
    Image.new("RGB", (8, 8)).save(folder / "secret.png")
    return folder


@pytest.fixture(scope="module")
def workspace(secret: Path) -> Workspace:
    return make_workspace(secret / "workspace")


@pytest.fixture(scope="module")
def client(workspace: Workspace, secret: Path) -> Iterator[TestClient]:
    links = workspace.root / "runs" / "done" / "previews"
    (links / "000900-0.png").symlink_to(secret / "secret.png")
    (workspace.root / "data" / "link.png").symlink_to(secret / "secret.png")
    (workspace.root / "data" / "folder").symlink_to(secret)
    (workspace.root / "data" / "text.png").write_text(f"<script>{CANARY}</script>")
    (workspace.private).mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(workspace.private / "hidden.png")
    queue = Queue(workspace, start_runner=lambda _: None)
    with TestClient(make_app(make_site(workspace.root, queue=queue)), base_url=BASE) as client:
        yield client


def addresses(secret: Path, name: str) -> list[str]:
    """As a path in an address; what is encoded already stays so."""
    return [quote(probe, safe="/%:~\\") for probe in probes(secret, name)]


def test_pictures_of_the_workspace_are_drawn_anew(client: TestClient) -> None:
    answer = client.get("/picture/dataset/data/shapes/0.png?w=96")

    assert answer.status_code == 200
    assert answer.headers["content-type"] == "image/webp"
    assert answer.content[8:12] == b"WEBP"
    again = client.get("/picture/dataset/data/shapes/0.png?w=96", headers={"If-None-Match": answer.headers["etag"]})
    assert again.status_code == 304


@pytest.mark.parametrize("kind", ["dataset", "preview", "secret", ".."])
def test_a_picture_route_answers_nothing_from_outside(client: TestClient, secret: Path, kind: str) -> None:
    for probe in [*addresses(secret, "secret.png"), *addresses(secret, "secret.txt")]:
        answer = client.get(f"/picture/{kind}/{probe}")

        assert answer.status_code in (404, 400, 422), probe
        assert CANARY not in answer.text


@pytest.mark.parametrize(
    "id",
    [
        "preview/runs/done/previews/000900-0.png",
        "dataset/data/link.png",
        "dataset/data/folder/secret.png",
        "dataset/data/text.png",
        "dataset/data/shapes/1.txt",
        "dataset/.lora-diffusion/hidden.png",
        "preview/data/shapes/0.png",
        "dataset/data/shapes",
        "dataset/",
    ],
)
def test_links_out_texts_and_private_files_are_no_pictures(client: TestClient, id: str) -> None:
    answer = client.get(f"/picture/{id}")

    assert answer.status_code == 404
    assert CANARY not in answer.text


def test_only_files_to_take_of_runs_are_downloaded(client: TestClient, workspace: Workspace, secret: Path) -> None:
    (workspace.runs / "done" / "link.safetensors").symlink_to(secret / "secret.txt")
    answer = client.get("/download/runs/done/done.safetensors")
    assert answer.content == b"adapter"
    assert answer.headers["content-disposition"] == 'attachment; filename="done.safetensors"'

    own = ["state.json", "link.safetensors", "previews/000000-0.png", "checkpoints", "", "../../data/shapes/1.txt"]
    for id in [*(f"runs/done/{name}" for name in own), "data/shapes/1.txt", *addresses(secret, "secret.txt")]:
        answer = client.get(f"/download/{id}")
        assert answer.status_code in (400, 404), id
        assert CANARY not in answer.text


def test_static_files_are_three_by_name(client: TestClient, secret: Path) -> None:
    assert client.get("/static-ui/app.js").status_code == 200
    for probe in [*addresses(secret, "secret.txt"), "../server.py", "..%2fserver.py", "app.js/../../server.py"]:
        answer = client.get(f"/static-ui/{probe}")
        assert answer.status_code in (404, 400)
        assert CANARY not in answer.text


def test_gradio_serves_no_file_of_the_workspace_or_the_program(
    client: TestClient, secret: Path, workspace: Workspace
) -> None:
    program = Path(__file__).resolve().parents[2] / "webui" / "server.py"
    own = [str(workspace.root / "runs" / "done" / "config.toml"), str(program), "webui/server.py", "pyproject.toml"]
    for probe in [*own, *addresses(secret, "secret.txt")]:
        for route in ("/gradio_api/file=", "/gradio_api/file/", "/file=", "/file/", "/static/", "/assets/", "/svelte/"):
            answer = client.get(route + probe)
            assert answer.status_code in (400, 403, 404, 405, 422), (route, probe)
            assert CANARY not in answer.text
            assert "make_app" not in answer.text


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/proxy=http://127.0.0.1:22/",
        "/gradio_api/vibe-edit/",
        "/gradio_api/vibe-code",
        "/gradio_api/process_recording",
        "/gradio_api/dev/reload",
        "/gradio_api/run-history/buckets",
        "/gradio_api/mcp/",
        "/gradio_api/openapi.json",
        "/monitoring/summary",
        "/docs",
        "/openapi.json",
    ],
)
def test_what_the_pages_do_not_use_is_not_there(client: TestClient, path: str) -> None:
    assert client.get(path).status_code in (404, 405)
    assert client.post(path, json={}).status_code in (404, 405)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", "", "10.0.0.7:7860"])
def test_a_name_that_was_bound_to_this_machine_is_refused(client: TestClient, host: str) -> None:
    for path in ("/", "/config", "/picture/dataset/data/shapes/0.png", "/healthz"):
        assert client.get(path, headers={"Host": host}).status_code == 400


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:7860", "localhost:7860", "[::1]:7860"])
def test_this_machine_s_own_names_are_answered(client: TestClient, host: str) -> None:
    assert client.get("/healthz", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:7861"},
        {"Origin": "http://127.0.0.1:7860.evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_a_request_that_another_page_sends_is_refused(client: TestClient, headers: dict[str, str]) -> None:
    files = {"files": ("x.toml", b"[run]", "text/plain")}

    assert client.post("/gradio_api/upload", files=files, headers=headers).status_code == 403
    assert client.post("/gradio_api/run/predict", json={"data": []}, headers=headers).status_code == 403
    assert client.post("/gradio_api/queue/join", content="{}", headers=headers).status_code == 403
    assert client.post("/de/gradio_api/run/predict", content="{}", headers=headers).status_code == 403


def test_an_upload_is_limited_in_size_and_number(client: TestClient) -> None:
    large = {"files": ("x.toml", b"x" * (MAX_UPLOAD_BYTES + 1), "text/plain")}
    assert client.post("/gradio_api/upload", files=large).status_code == 413

    many = [("files", (f"{index}.toml", b"x", "text/plain")) for index in range(Limits(1).files + 1)]
    assert client.post("/gradio_api/upload", files=many).status_code == 413

    def unannounced() -> Iterator[bytes]:  # goes without a content-length
        for _ in range(MAX_UPLOAD_BYTES // 1_000_000 + 2):
            yield b"x" * 1_000_000

    assert client.post("/gradio_api/run/predict", content=unannounced()).status_code == 413


def test_every_answer_has_the_security_headers(client: TestClient) -> None:
    for path in ("/", "/runs", "/de/", "/picture/dataset/data/shapes/0.png", "/static-ui/app.js", "/nothing/here"):
        headers = client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert "object-src 'none'" in headers["content-security-policy"]


def test_no_page_names_another_host(client: TestClient) -> None:
    for path in ("/", "/runs", "/run?id=runs/done"):
        page = client.get(path).text
        links = re.findall(r"""(?:src|href)=["'](https?:)?//([^"'/]+)""", page)
        assert [host for _, host in links if not host.startswith("127.0.0.1")] == []


def call(client: TestClient, name: str, data: list[object], query: str = "") -> str:
    """What a handler answers, called as the browser does. name: the first part of its function's name."""
    config = client.get("/config").json()
    index = next(item["id"] for item in config["dependencies"] if item.get("api_name", "").startswith(name))
    body = {"data": data, "fn_index": index, "session_hash": "test", "event_data": None, "trigger_id": None}
    return client.post(f"/gradio_api/run/predict?{query}", content=json.dumps(body), headers=JSON).text


@pytest.mark.parametrize("field", ["dataset.0.path", "run.output", "model.path", "adapter.start_from", "cache.folder"])
def test_a_path_of_the_form_that_leads_out_starts_nothing(
    client: TestClient, workspace: Workspace, secret: Path, field: str
) -> None:
    good = {"run.name": "x", "run.steps": "5", "model.path": "base", "dataset.0.path": "data/shapes"}
    for probe in ("../elsewhere", str(secret), "data/folder", "/etc"):
        values = json.dumps({"values": good | {field: probe}})
        text = call(client, "add", [values, None])

        assert "is outside of" in text or "Mend what" in text, (probe, text)
    assert [job for job in Queue(workspace).jobs() if job.name == "x"] == []


def test_texts_of_the_form_reach_no_shell(client: TestClient, workspace: Workspace, secret: Path) -> None:
    for index, text in enumerate(("$(touch pwned)", "`touch pwned`", "; touch pwned", "x' || touch pwned #")):
        values = {"run.name": f"shell{index}", "run.steps": "5", "model.path": text, "dataset.0.path": f"data/{text}"}
        call(client, "add", [json.dumps({"values": values}), None])

    assert list(secret.rglob("pwned")) == []
    assert sum(job.name.startswith("shell") for job in Queue(workspace).jobs()) >= 1


@pytest.mark.parametrize("id", ["../..", "/etc", "runs", "runs/done/../../../secret.txt", "%00", "runs/none"])
def test_a_run_s_address_shows_runs_of_the_workspace_only(client: TestClient, id: str) -> None:
    answer = call(client, "refresh", [None, True, 0.9], f"id={quote(id, safe='')}")

    assert CANARY not in answer


def test_hostile_texts_of_files_are_escaped(client: TestClient) -> None:
    config = client.get("/config").json()
    values = {component["id"]: component["props"].get("value") for component in config["components"]}
    answers: list[object] = []
    for item in config["dependencies"]:
        if item.get("api_name", "").startswith("refresh"):
            data = [values[id] for id in item["inputs"]]
            body = {"data": data, "fn_index": item["id"], "session_hash": "x", "event_data": None, "trigger_id": None}
            for id in ("runs/done", "runs/broken"):
                answers.append(
                    client.post(f"/gradio_api/run/predict?id={id}", content=json.dumps(body), headers=JSON).json()
                )
    shown = json.dumps(answers)

    assert "&lt;img src=x onerror=alert(1)&gt;" in shown
    assert "<img src=x" not in shown
    assert "<script>alert" not in shown


@pytest.fixture()
def locked(workspace: Workspace) -> Iterator[TestClient]:
    site = make_site(workspace.root, queue=Queue(workspace, start_runner=lambda _: None))
    with TestClient(make_app(site, login=Login("me", "secret")), base_url=BASE, follow_redirects=False) as client:
        yield client


def test_with_a_login_every_route_asks_for_it(locked: TestClient) -> None:
    app = locked.app
    paths = {path for path, _ in walk(app.routes)}  # pyright: ignore
    paths = {re.sub(r"\{[^}]*\}", "x", path) or "/" for path in paths} | {"/picture/dataset/data/shapes/0.png"}
    assert len(paths) > 80

    for path in sorted(paths - {"/login", "/healthz", "/static-ui/x"}):
        assert locked.get(path).status_code in (401, 404), path
        assert locked.post(path, content="{}").status_code in (401, 404), path
    assert locked.get("/", headers={"Accept": "text/html"}).headers["location"] == "/login"


def test_the_right_password_opens_and_logging_out_closes(locked: TestClient) -> None:
    assert locked.post("/login", data={"username": "me", "password": "guess"}).status_code == 401
    assert locked.get("/runs").status_code == 401

    answer = locked.post("/login", data={"username": "me", "password": "secret"})

    assert answer.status_code == 303
    assert "HttpOnly" in answer.headers["set-cookie"]
    assert "SameSite=strict" in answer.headers["set-cookie"]
    assert locked.get("/runs").status_code == 200
    assert locked.get("/picture/dataset/data/shapes/0.png").status_code == 200
    locked.get("/logout")
    assert locked.get("/runs").status_code == 401


def test_guessing_is_slow(locked: TestClient) -> None:
    for _ in range(10):
        locked.post("/login", data={"username": "me", "password": "guess"})

    assert locked.post("/login", data={"username": "me", "password": "secret"}).status_code == 401


def test_others_reach_the_server_only_if_that_was_said() -> None:
    with pytest.raises(UserError, match="--auth"):
        login_of(Options(host="0.0.0.0"))
    with pytest.raises(UserError, match="--auth"):
        login_of(Options(host="192.168.1.5"))
    with pytest.raises(UserError, match="colon"):
        login_of(Options(auth="me"))

    assert login_of(Options(host="0.0.0.0", is_open=True)) is None
    assert login_of(Options(host="0.0.0.0", auth="me:a:b")) == Login("me", "a:b")
    assert login_of(Options()) is None

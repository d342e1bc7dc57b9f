"""A new user's afternoon in a real browser, with the real server, queue, trainer and engine.

`SCREENSHOTS=docs/images pytest tests/webui/test_story.py` keeps the pictures of the pages there.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops, ImageStat

from lora_diffusion.jobs.queue import Queue
from lora_diffusion.runs import RunFolder, RunState
from lora_diffusion.workspace import Workspace
from tests.webui.conftest import Pages, wait_for

expect = pytest.importorskip("playwright.sync_api").expect
pytestmark = pytest.mark.browser

PROJECT = Path(__file__).parents[2]
STEPS = 160
WAIT_MS = 40_000
ENGINE_MS = 180_000  # the first picture waits for the engine's imports and its base
TRAIN_S = 900.0  # a minute on two quiet cores
PROMPT = "a photo of a yellow cat, ink style"


class Server:
    """`lora-diffusion ui` as a process of its own."""

    def __init__(self, root: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.root = root
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        options = ["ui", "--no-browser", "--port", str(self.port), "--root", str(self.root)]
        environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
        command = [sys.executable, "-m", "lora_diffusion", *options]
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        wait_for(self._answers, 60)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)

    def _answers(self) -> bool:
        assert self.process.poll() is None, "the server ended"
        try:
            return urllib.request.urlopen(f"{self.url}/", timeout=5).status == 200
        except urllib.error.URLError:
            return False


@pytest.fixture()
def server(tmp_path: Path) -> Iterator[Server]:
    """A server over a folder with what a checkout has in samples/."""
    for name in ("base", "adapters", "ink", "neon"):
        shutil.copytree(PROJECT / "samples" / name, tmp_path / "samples" / name)
    server = Server(tmp_path)
    yield server
    server.kill()
    _end_all(Workspace(tmp_path))


def _end_all(workspace: Workspace) -> None:
    """No trainer, runner or engine outlives the test."""
    import psutil

    for process in psutil.process_iter(["cmdline"]):
        if any(str(workspace.root) in part for part in process.info["cmdline"] or ()) and process.pid != os.getpid():
            process.send_signal(signal.SIGKILL)


class Keep:
    """Saves what a page shows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, page: Any, name: str) -> Path:
        page.wait_for_timeout(400)  # pictures fade in
        path = self.folder / f"{name}.png"
        page.screenshot(path=path)
        return path

    def side_by_side(self, paths: list[Path], name: str) -> None:
        """One picture in place of these."""
        images = [Image.open(path).convert("RGB") for path in paths]
        sheet = Image.new("RGB", (sum(image.width for image in images), images[0].height))
        for index, image in enumerate(images):
            sheet.paste(image, (index * image.width, 0))
        sheet.reduce(2).save(self.folder / f"{name}.png")
        for path in paths:
            path.unlink()


@pytest.fixture()
def keep(tmp_path: Path) -> Keep:
    return Keep(Path(os.environ.get("SCREENSHOTS", tmp_path / "screenshots")).absolute())


def test_from_pictures_to_a_merged_adapter(server: Server, open_page: Pages, keep: Keep) -> None:
    page = open_page(server.url)
    start_ink(page, keep)
    run = RunFolder(server.root / "runs" / "my-ink")
    watch_and_reload(page)
    restart_while_it_trains(page, server, run)
    open_page.forgive_lost_connections()
    finish(page, server, run, keep)
    off, half, full = compare_strengths(page, server, keep)
    assert colour(full) < 0.5 * colour(off)  # ink is black on white
    assert ImageChops.difference(off, half).getbbox() and ImageChops.difference(half, full).getbbox()
    merge_with_neon(page, server, keep)
    both = draw_with_the_merged_file(page, server, keep, off)
    assert ImageChops.difference(both, off).getbbox() and ImageChops.difference(both, full).getbbox()
    phones_and_darkness(open_page, server, keep)


def start_ink(page: Any, keep: Keep) -> None:
    """Choose the ink pictures and the base that ship, look, and start."""
    page.locator("#train-start").wait_for(timeout=WAIT_MS)
    values = {
        "path": "samples/ink",
        "model.path": "samples/base",
        "run.name": "my-ink",
        "run.steps": str(STEPS),
        "preview.prompts": f"{PROMPT}\na photo of a red house, ink style",
    }
    for name, value in values.items():
        page.locator(f'[data-field="{name}"]').first.fill(value)
    page.locator("#train-search").fill("every")
    page.locator('[data-field="preview.every"]').fill(str(STEPS // 4))
    page.locator("#train-search").fill("")
    expect(page.locator("#train-toml-text")).to_contain_text(f"every = {STEPS // 4}", timeout=WAIT_MS)
    expect(page.locator(".thumbs img").first).to_be_visible(timeout=WAIT_MS)
    page.locator("#train-check").click()
    expect(page.locator("#train-report")).to_contain_text("Nothing to mend", timeout=ENGINE_MS)
    page.evaluate("window.scrollTo(0, 0)")
    keep(page, "train")
    page.locator("#train-start").click()
    page.wait_for_url(re.compile(r"/run\?id="), timeout=WAIT_MS)


def watch_and_reload(page: Any) -> None:
    """The curve and the samples move, also in a page that was loaded anew."""
    curve, samples = page.locator("#run-chart polyline").first, page.locator("#run-samples img")
    expect(curve).to_be_visible(timeout=ENGINE_MS)
    before = curve.get_attribute("points")
    wait_for(lambda: curve.get_attribute("points") != before, 60)
    wait_for(lambda: samples.count() >= 4, TRAIN_S)  # two prompts, before step 1 and at the first preview
    page.reload()
    expect(page.locator("#run-head")).to_contain_text("my-ink", timeout=WAIT_MS)
    wait_for(lambda: samples.count() >= 4, 60)


def restart_while_it_trains(page: Any, server: Server, run: RunFolder) -> None:
    """The run does not notice that the server was killed; the open page finds it again without being told to."""
    before = state_of(run)
    assert before.status == "running"
    server.kill()
    wait_for(lambda: state_of(run).step > before.step, 120)
    server.start()
    now = state_of(run)
    assert now.pid == before.pid and now.status == "running"
    samples = page.locator("#run-samples img")
    wait_for(lambda: samples.count() >= 6, TRAIN_S)  # a preview that was drawn after the restart
    expect(page.locator("#run-head")).to_contain_text("training")


def finish(page: Any, server: Server, run: RunFolder, keep: Keep) -> None:
    expect(page.locator("#run-head")).to_contain_text("finished", timeout=TRAIN_S * 1000)
    expect(page.locator("#run-samples img")).to_have_count(10, timeout=WAIT_MS)  # two prompts at 0, 40, …, 160
    state = state_of(run)
    assert (state.step, state.steps) == (STEPS, STEPS)
    assert [job.status for job in Queue(Workspace(server.root)).jobs()] == ["finished"]
    keep(page, "run")


def compare_strengths(page: Any, server: Server, keep: Keep) -> list[Image.Image]:
    """Open the result in Generate and draw it at strength 0, 0.5 and 1."""
    page.locator("#run-files a[href*='/generate']").last.click(timeout=WAIT_MS)
    expect(page.locator("#generate-stack output")).to_have_text("1", timeout=WAIT_MS)
    page.locator("#generate-prompt textarea").fill(f"{PROMPT} <lora:my-ink:1>")
    page.get_by_role("tab", name="Grid").click()
    page.locator("#generate-x-values textarea, #generate-x-values input").first.fill("0, 0.5, 1")
    page.locator("#generate-y-values textarea, #generate-y-values input").first.fill("1, 2, 3")
    expect(page.locator("#generate-grid-about")).to_contain_text("9 pictures", timeout=WAIT_MS)
    page.locator("#generate-grid-go").click()
    expect(page.locator("#generate-grid-download")).to_be_visible(timeout=ENGINE_MS)
    keep(page, "generate-grid")
    cells = page.locator("#generate-grid tbody tr").first.locator("td img")
    return [picture_at(page, server, cells.nth(index).get_attribute("src")) for index in range(3)]


def merge_with_neon(page: Any, server: Server, keep: Keep) -> None:
    page.goto(f"{server.url}/adapters")
    for name in ("my-ink", "neon"):
        page.locator(f'.lora:has([data-name="{name}"]) .add').first.click(timeout=WAIT_MS)
    expect(page.locator("#adapters-mix output")).to_have_count(2, timeout=WAIT_MS)
    page.locator("#adapters-preview").click()
    expect(page.locator("#adapters-slider img").first).to_be_visible(timeout=ENGINE_MS)
    keep(page, "adapters")
    page.locator("#adapters-merge-name input, #adapters-merge-name textarea").first.fill("ink-and-neon")
    page.locator("#adapters-merge-save").click()
    expect(page.locator("#adapters-said")).to_contain_text("ink-and-neon.safetensors", timeout=ENGINE_MS)
    assert (server.root / "adapters" / "ink-and-neon.safetensors").is_file()


def draw_with_the_merged_file(page: Any, server: Server, keep: Keep, like: Image.Image) -> Image.Image:
    """The picture in the size of `like`: the gallery shows it larger than a grid does."""
    page.goto(f"{server.url}/generate?adapter=adapters/ink-and-neon.safetensors")
    stack = page.locator("#generate-stack output")
    expect(stack).to_have_text(["1", "1"], timeout=WAIT_MS)  # added to the prompt that was typed
    page.locator("#generate-prompt textarea").fill(f"{PROMPT} <lora:ink-and-neon:1>")
    expect(stack).to_have_text(["1"], timeout=WAIT_MS)
    page.get_by_text("fixed", exact=True).click()
    page.locator("#generate-go").click()
    expect(page.locator(".shot")).to_have_count(2, timeout=ENGINE_MS)  # the newest first; the other is the sheet
    expect(page.locator(".drawing")).to_have_count(0, timeout=WAIT_MS)
    keep(page, "generate")
    return picture_at(page, server, page.locator(".shot img").first.get_attribute("src")).resize(like.size)


def phones_and_darkness(open_page: Pages, server: Server, keep: Keep) -> None:
    """Every page with what the afternoon left behind, on a phone and a desktop, light and dark."""
    pages = {
        "train": ("/", "#train-start"),
        "runs": ("/runs", "#runs-table tr[data-id]"),
        "run": ("/run?id=runs/my-ink", "#run-samples img"),
        "datasets": ("/dataset?id=samples/ink", "img"),
        "generate": ("/generate", ".shot img"),
        "adapters": ("/adapters", ".lora"),
    }
    for (width, height), scheme in product(((390, 844), (1280, 900)), ("light", "dark")):
        page = open_page(server.url, width=width, height=height, color_scheme=scheme)
        shown: list[Path] = []
        for name, (path, ready) in pages.items():
            page.goto(server.url + path)
            page.locator(ready).first.wait_for(timeout=WAIT_MS)
            assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{name} is wider than a screen"
            shown.append(keep(page, f"{'phone' if width < 600 else 'desktop'}-{scheme}-{name}"))
        keep.side_by_side(shown, f"{'phone' if width < 600 else 'desktop'}-{scheme}")


def state_of(run: RunFolder) -> RunState:
    state = run.read_state()
    assert state is not None
    return state


def picture_at(page: Any, server: Server, address: str) -> Image.Image:
    answer = page.request.get(f"{server.url}{address}")
    assert answer.ok
    return Image.open(io.BytesIO(answer.body())).convert("RGB")


def colour(image: Image.Image) -> float:
    """Mean saturation, 0 to 255."""
    return ImageStat.Stat(image.convert("HSV")).mean[1]

"""What the page of data sets does with captions of a model: proposed, accepted, undone; captioners confined."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from lora_diffusion.captioning.proposals import Proposal, Proposals, proposals_file
from lora_diffusion.config_captions import CaptionOrder
from lora_diffusion.errors import UserError
from lora_diffusion.jobs.queue import Job, Queue
from lora_diffusion.runs import RunFolder
from lora_diffusion.workspace import Workspace
from tests.captioners import save_tiny_blip
from webui.services.captioning import Captioning
from webui.services.datasets import Datasets
from webui.services.places import Places

SET = "data/set"
OPTIONS = {"captioner": "models/blip", "prefix": "sks", "overwrite": True, "fill": True}


@pytest.fixture
def captioning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Captioning:
    """Three pictures; 0 has no caption. The runner never comes, and the hub's cache is empty."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / SET
    folder.mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(folder / f"{number}.png")
        if number:
            (folder / f"{number}.txt").write_text(f"old {number}\n")
    workspace = Workspace(tmp_path)
    return Captioning(Datasets(Places(workspace)), Queue(workspace, start_runner=lambda _: None))


def captions(captioning: Captioning) -> dict[str, str]:
    folder = captioning.datasets.places.root / SET
    return {path.name: path.read_text() for path in sorted(folder.glob("*.txt"))}


def ended(captioning: Captioning, made: dict[str, Proposal]) -> Job:
    """A captioning of the set that made these and ended."""
    job = captioning.queue.add_captions(CaptionOrder.of(folder=SET, captioner="models/blip"))
    Proposals(made).write(proposals_file(job.run))
    captioning.queue.cancel(job.id)
    run = RunFolder(job.run)
    run.begin(len(made), len(made))
    run.end("finished")
    return job


def proposed(captioning: Captioning) -> dict[str, tuple[str | None, str]]:
    """Picture → (its caption now, the proposed one)."""
    rows = captioning.proposals(SET)["proposals"]
    assert captioning.state(SET)["pending"] == len(rows)
    return {row["name"]: (row["caption"], row["proposed"]) for row in rows}


def choice(name: str, before: str | None, text: str) -> dict[str, str | None]:
    return {"name": name, "before": before, "text": text}


def test_what_is_decided_leaves_the_list_and_what_is_undone_comes_back(captioning: Captioning) -> None:
    before = captions(captioning)
    made = {f"{n}.png": Proposal(f"new {n}", f"old {n}" if n else None) for n in range(3)}
    ended(captioning, made | {"gone.png": Proposal("new", None)})
    assert proposed(captioning) == {"0.png": (None, "new 0"), "1.png": ("old 1", "new 1"), "2.png": ("old 2", "new 2")}

    captioning.accept(SET, [choice("0.png", None, "new 0"), choice("1.png", "old 1", "mine, better")])
    captioning.reject(SET, ["2.png"])
    assert captions(captioning) == {"0.txt": "new 0\n", "1.txt": "mine, better\n", "2.txt": "old 2\n"}
    assert proposed(captioning) == {}
    captioning.reject(SET, ["2.png"], back=True)
    assert proposed(captioning) == {"2.png": ("old 2", "new 2")}
    undone = captioning.datasets.undo(SET)

    assert (undone["what"], undone["number"]) == ("caption", 2)
    assert captions(captioning) == before
    assert proposed(captioning).keys() == made.keys()


def test_a_caption_that_was_changed_since_it_was_shown_is_left_alone(captioning: Captioning) -> None:
    ended(captioning, {"1.png": Proposal("new 1", "old 1"), "2.png": Proposal("new 2", "old 2")})
    proposed(captioning)
    (captioning.datasets.places.root / SET / "1.txt").write_text("by hand\n")
    answer = captioning.accept(SET, [choice("1.png", "old 1", "new 1"), choice("2.png", "old 2", "new 2")])

    assert answer["left"] == ["1.png"]
    assert {row["name"]: row["caption"] for row in answer["rows"]} == {"1.png": "by hand", "2.png": "new 2"}
    assert captions(captioning) == {"1.txt": "by hand\n", "2.txt": "new 2\n"}
    assert proposed(captioning) == {"1.png": ("by hand", "new 1")}, "and is asked again beside what it is now"


def test_what_the_captioning_wrote_can_be_undone_once_and_only_where_it_still_is(captioning: Captioning) -> None:
    folder = captioning.datasets.places.root / SET
    (folder / "0.txt").write_text("new 0\n")
    (folder / "1.txt").write_text("by hand since\n")
    written = {"0.png": Proposal("new 0", None, is_written=True), "1.png": Proposal("new 1", "old 1", is_written=True)}
    ended(captioning, written)

    assert proposed(captioning) == {}
    assert [captioning.take_in(SET)["number"] for _ in range(2)] == [1, 0]
    captioning.datasets.undo(SET)
    assert captions(captioning) == {"1.txt": "by hand since\n", "2.txt": "old 2\n"}
    captioning.datasets.undo(SET, again=True)
    assert captions(captioning)["0.txt"] == "new 0\n"


def test_of_two_captionings_the_newer_one_is_shown(captioning: Captioning) -> None:
    ended(captioning, {"1.png": Proposal("first", "old 1"), "2.png": Proposal("first", "old 2")})
    ended(captioning, {"2.png": Proposal("second", "old 2")})
    assert proposed(captioning) == {"1.png": ("old 1", "first"), "2.png": ("old 2", "second")}
    captioning.reject(SET, ["2.png"])

    assert proposed(captioning) == {"1.png": ("old 1", "first")}


def test_one_captioning_of_a_set_at_a_time_is_queued_with_what_the_page_says(captioning: Captioning) -> None:
    save_tiny_blip(captioning.datasets.places.workspace.models / "blip")
    assert captioning.state(SET)["captioners"] == [{"id": "models/blip", "name": "blip"}]
    job = captioning.start(SET, OPTIONS)["job"]
    order = captioning.queue.captions_order(captioning.queue.job(job["id"])).caption

    assert (job["status"], job["isActive"], job["position"]) == ("queued", True, 1)
    assert (order.folder.as_posix(), order.captioner, order.prefix) == (SET, "models/blip", "sks")
    assert (order.overwrite, order.write) == (True, "missing")
    with pytest.raises(UserError, match="already"):
        captioning.start(SET, OPTIONS)
    assert captioning.stop(SET)["job"]["isActive"] is False
    assert (
        captioning.start(SET, OPTIONS | {"captioner": "owner/name", "fill": False})["job"]["captioner"] == "owner/name"
    )


@pytest.mark.parametrize("captioner", ["", "models/nothing", "../out", "/etc", "data/link", "data/set", "a\0b", "~/x"])
def test_a_captioner_elsewhere_or_that_is_none_is_refused(
    captioning: Captioning, captioner: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = save_tiny_blip(tmp_path_factory.mktemp("outside") / "blip")
    (captioning.datasets.places.root / "data" / "link").symlink_to(outside)
    (captioning.datasets.places.root / "models").mkdir()

    with pytest.raises(UserError):
        captioning.start(SET, OPTIONS | {"captioner": captioner})
    assert captioning.queue.jobs() == []


def test_nothing_is_proposed_for_other_sets_or_written_to_unknown_pictures(captioning: Captioning) -> None:
    other = captioning.datasets.places.root / "data" / "other"
    other.mkdir()
    Image.new("RGB", (16, 16)).save(other / "1.png")
    ended(captioning, {"1.png": Proposal("new 1", "old 1")})

    assert captioning.state("data/other") == {"captioners": [], "job": None, "pending": 0}
    with pytest.raises(UserError, match="no picture"):
        captioning.accept(SET, [choice("../other/1.png", None, "x")])
    assert list(other.iterdir()) == [other / "1.png"]

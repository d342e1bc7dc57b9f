"""Who works in several tabs, or with others on one server, finds in each what was ordered there."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.grey_engine import VALUES, GreyEngine, clicked, make_grey_site
from tests.queues import wait_for
from webui.pages.adapters.mix import Mixing
from webui.pages.generate.ordering import Orders
from webui.pages.generate.results import Shown
from webui.services.file_tools import FileTools
from webui.services.site import Site
from webui.translate import Translator

SAMPLES = Path(__file__).parents[2] / "samples" / "adapters"
T = Translator("en")
MINE, OTHER = "mine", "other"
MIX = ("<lora:ink:1> <lora:neon:1>", "concat", 0, "models/b")
PICTURED = (*MIX, "a red house")


class CopyingTools(FileTools):
    """A merge is a copy of the first file: the real one loads torch."""

    def merge(
        self, weights: Mapping[Path, float], target: Path, method: str, rank: int | None, base: Path | None
    ) -> str:
        shutil.copy(next(iter(weights)), target)
        return ""


@pytest.fixture
def engine() -> GreyEngine:
    return GreyEngine()


@pytest.fixture
def site(tmp_path: Path, engine: GreyEngine) -> Site:
    (tmp_path / "adapters").mkdir()
    for name in ("ink", "neon"):
        shutil.copy(SAMPLES / f"{name}.safetensors", tmp_path / "adapters")
    site = make_grey_site(tmp_path, engine)
    site.studio.tools = CopyingTools(site.workspace)
    return site


def phases(site: Site) -> list[str]:
    """In the order of the orders."""
    return [drawing.phase for drawing in reversed(site.studio.desk.drawings())]


def test_cancel_ends_what_this_tab_ordered_and_nothing_else(site: Site, engine: GreyEngine) -> None:
    engine.gate.clear()
    orders, desk = Orders(site, T), site.studio.desk
    assert orders.cancel(MINE) == "", "there is nothing to cancel"
    orders.grid(OTHER, "models/b", "steps", "4, 8", "", "", *VALUES)
    desk.add("pictures", "models/b", desk.drawings()[0].requests[:1])  # a program
    assert "said bad" in orders.cancel(MINE)
    orders.pictures(MINE, "models/b", *VALUES)

    assert "Cancelled" in orders.cancel(MINE)

    assert phases(site)[1:] == ["waiting", "cancelled"]
    engine.gate.set()
    wait_for(lambda: not desk.unfinished())
    assert phases(site) == ["done", "done", "cancelled"]


def test_everything_can_be_cancelled_where_others_draw(site: Site, engine: GreyEngine) -> None:
    engine.gate.clear()
    orders, shown = Orders(site, T), Shown(site, T)
    orders.pictures(MINE, "models/b", *VALUES)
    offered = 'data-act="cancel"'
    assert offered not in shown.draw(MINE)[0], "the button beside Generate ends it"
    assert offered in shown.draw(OTHER)[0]
    orders.pictures(OTHER, "models/b", *VALUES)
    assert offered in shown.draw(MINE)[0]

    shown.act(clicked(act="cancel"))

    wait_for(lambda: phases(site) == ["cancelled", "cancelled"])


def test_a_tab_shows_the_mix_that_was_previewed_in_it(site: Site, engine: GreyEngine) -> None:
    engine.gate.clear()
    mixing = Mixing(site, T)
    _, mine, _ = mixing.preview(*PICTURED)
    _, others, _ = mixing.preview(*PICTURED)
    assert isinstance(mine, int) and isinstance(others, int)
    engine.gate.set()
    wait_for(lambda: phases(site) == ["done", "done"])

    for ordered in (mine, others):
        shown, slider, _ = mixing.trial(ordered, 0)
        drawing = site.studio.desk.get(ordered)
        assert shown == ordered and drawing is not None
        assert getattr(slider, "value", None) is not None
    nothing = mixing.trial(0, 0)
    assert mixing.trial(mine, mine) == nothing and all(isinstance(value, dict) for value in nothing)


def test_a_preview_file_stays_until_it_has_been_drawn(site: Site, engine: GreyEngine) -> None:
    engine.gate.clear()
    mixing, folder = Mixing(site, T), site.studio.tools.previews
    for _ in range(3):
        mixing.preview(*PICTURED)
    called = {f"{name}.safetensors" for name in site.studio.desk.adapters() - {"ink", "neon"}}

    assert len(called) == 3
    assert {path.name for path in folder.iterdir()} == called
    engine.gate.set()
    wait_for(lambda: not site.studio.desk.unfinished())
    mixing.preview(*PICTURED)
    assert len(list(folder.iterdir())) == 1

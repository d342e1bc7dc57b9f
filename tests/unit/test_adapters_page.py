"""Handlers of the page Adapters, called as Gradio calls them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from gradio import skip

from tests.grey_engine import GreyEngine, make_grey_site
from webui.pages.adapters.change import Changes
from webui.pages.adapters.library import Library
from webui.pages.adapters.opening import KEPT, TEXTS, Opening
from webui.services.adapter_edit import Description, edit
from webui.services.site import Site
from webui.translate import Translator

INK = Path(__file__).parents[2] / "samples" / "adapters" / "ink.safetensors"
ID = "adapters/one.safetensors"
T = Translator("en")


@pytest.fixture()
def site(tmp_path: Path) -> Site:
    (tmp_path / "adapters").mkdir()
    for name in ("one", "two"):
        shutil.copy(INK, tmp_path / "adapters" / f"{name}.safetensors")
    return make_grey_site(tmp_path, GreyEngine())


def opened(site: Site, **kept: object) -> dict[str, object]:
    """The fields of a page whose browser kept these."""
    values = Opening(site, T).open_page(json.dumps([kept.get(name) for name in KEPT]), None)
    return {name: value for name, value in zip(KEPT, values, strict=False) if name != "base"}


def describe(site: Site, *texts: str) -> None:
    adapter = site.studio.library.find(ID)
    assert adapter is not None
    edit(adapter, Description(*texts))


def test_typed_texts_come_back_and_untouched_ones_are_those_of_the_file_now(site: Site) -> None:
    first = opened(site, chosen=ID)
    typed = first | {"title": "Half a title", "new_name": "for others", "format": "kohya", "new_rank": 3, "energy": 0.9}
    describe(site, "New", "inky", "", "")

    again = opened(site, **typed)

    assert (again["title"], again["trigger"]) == ("Half a title", "inky")
    assert [again[name] for name in ("new_name", "format", "new_rank", "energy")] == ["for others", "kohya", 3, 0.9]
    shown = Library(site, T).chosen(ID, str(again["filled"]))
    assert [*shown[2:]] == [skip()] * 6, "looking into it leaves them"


def test_another_adapter_gets_its_own_texts_and_none_gets_none(site: Site) -> None:
    typed = opened(site, chosen=ID) | {"title": "Half a title", "new_name": "for others"}

    other = opened(site, **typed | {"chosen": "adapters/two.safetensors"})
    gone = opened(site, **typed | {"chosen": "adapters/three.safetensors"})
    _, _, title, *_, name = Library(site, T).chosen("adapters/two.safetensors", str(typed["filled"]))

    assert (other["title"], other["new_name"]) == (title, name) == ("ink", "two small")
    assert [gone[key] for key in ("chosen", *TEXTS, "filled", "new_name")] == [""] * 7


def test_what_was_saved_is_no_longer_something_typed(site: Site) -> None:
    typed = opened(site, chosen=ID) | {"title": "Whole title"}
    title, trigger, tags, about = (str(typed[name]) for name in TEXTS)
    assert "said good" in Changes(site, T).describe(ID, title, trigger, tags, about, None)
    _, _, filled = Changes(site, T).head(ID)
    describe(site, "A later title", "", "", "")

    assert opened(site, **typed | {"filled": filled})["title"] == "A later title"


@pytest.mark.parametrize("filled", [None, "", "[", "{}", "[" * 5000, "[1, 2, 3, 4, 5]", json.dumps([ID, "a"])])
def test_a_damaged_note_of_what_the_fields_held_counts_as_none(site: Site, filled: str | None) -> None:
    assert opened(site, chosen=ID, title="x", filled=filled, format=["kohya"], new_rank=1e9)["title"] == "ink"


def test_an_adapter_that_cannot_be_read_opens_without_texts(site: Site) -> None:
    (site.workspace.root / ID).write_bytes(b"no adapter")

    assert [opened(site, chosen=ID)[name] for name in ("chosen", *TEXTS)] == [ID, "", "", "", ""]

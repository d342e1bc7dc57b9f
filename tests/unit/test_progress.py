from __future__ import annotations

import pytest

from lora_diffusion.progress import Track, bar, silent


@pytest.mark.parametrize("track", [silent, bar])
@pytest.mark.parametrize("items", [[], ["a", "b"]])
def test_every_item_comes_once_and_in_order(track: Track, items: list[str]) -> None:
    assert list(track(items, "working")) == items


def test_the_bar_is_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    list(bar([1, 2], "encoding images"))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "encoding images" in captured.err


def test_silence_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    list(silent([1, 2], "encoding images"))
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""

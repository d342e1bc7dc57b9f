"""Signs of life from a thread."""

from __future__ import annotations

import threading

import pytest

from lora_diffusion.training.heartbeat import kept_alive


def test_beats_go_on_while_the_main_thread_is_busy_and_after_a_failed_one() -> None:
    beats = 0
    has_beaten_thrice = threading.Event()

    def beat() -> None:
        nonlocal beats
        beats += 1
        if beats == 1:
            raise OSError("disk full")
        if beats == 3:
            has_beaten_thrice.set()

    with kept_alive(beat, every_s=0.001):
        assert has_beaten_thrice.wait(timeout=30)
    before = beats
    assert not any(thread.name.startswith("heartbeat") for thread in threading.enumerate())
    assert beats == before


def test_beats_end_with_an_error_of_the_training() -> None:
    with pytest.raises(ValueError, match="broken"), kept_alive(lambda: None, every_s=0.001):
        raise ValueError("broken")
    assert not any(thread.name.startswith("heartbeat") for thread in threading.enumerate())

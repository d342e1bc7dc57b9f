"""What signals do to a run: the first one asks it to stop, a second Ctrl-C ends it."""

from __future__ import annotations

import signal

import pytest

from lora_diffusion.training.signals import STOP_SIGNALS, StopRequest, ends_at_once


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_the_first_signal_asks_and_a_second_ctrl_c_ends(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in STOP_SIGNALS]
    stop = StopRequest()
    with pytest.raises(KeyboardInterrupt, match="second Ctrl-C"), stop.listen():
        signal.raise_signal(number)
        assert stop.reason == number.name
        signal.raise_signal(signal.SIGTERM)  # asks again, no more
        signal.raise_signal(signal.SIGINT)
        pytest.fail("it went on")

    assert [signal.getsignal(each) for each in STOP_SIGNALS] == before


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_where_nothing_is_lost_every_signal_ends(number: signal.Signals) -> None:
    with pytest.raises(KeyboardInterrupt, match=number.name), ends_at_once():
        signal.raise_signal(number)
        pytest.fail("it went on")


def test_a_request_to_all_counts_for_each_and_not_the_other_way_round() -> None:
    wider = StopRequest()
    one, other = StopRequest(wider), StopRequest(wider)
    one.reason = "control/stop"
    assert (bool(one), bool(other), bool(wider)) == (True, False, False)
    wider.reason = "SIGTERM"
    assert (one.reason, other.reason) == ("control/stop", "SIGTERM")

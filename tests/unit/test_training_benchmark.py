"""What the benchmark makes of the runs that it measured."""

from __future__ import annotations

from benchmarks.training import Run, ratios, summary

LENGTHS = (2, 12)


def record(name: str, seconds_per_step: list[float], peak_mb: float) -> dict[str, object]:
    """A trainer that starts in 3 s; one round after the other."""
    few, many = LENGTHS
    pairs = [
        (Run(3 + few * s, 6 + few * 2 * s, peak_mb - 1, 0.0), Run(3 + many * s, 6 + many * 2 * s, peak_mb, 0.0))
        for s in seconds_per_step
    ]
    return {"trainer": name} | summary(pairs, LENGTHS)


def test_a_step_is_what_more_steps_take_longer() -> None:
    ours = record("ours, attention", [1.0, 5.0, 2.0], 500)
    assert (ours["wall_s_per_step"], ours["cpu_s_per_step"], ours["run_wall_s"], ours["peak_mb"]) == (2, 4, 27, 500)


def test_ratios_are_of_runs_of_the_same_round() -> None:
    ours, peer = record("ours, attention", [1.0, 2.0, 2.0], 500), record("diffusers", [3.0, 3.0, 4.0], 750)
    (found,) = ratios([ours, peer], LENGTHS).values()
    assert found["wall_s_per_step"] == 2  # of 3, 1.5 and 2; the medians' ratio would be 1.5
    assert found["run_wall_s"] == 51 / 27  # of 39 / 15, 39 / 27 and 51 / 27
    assert found["peak_mb"] == 1.5

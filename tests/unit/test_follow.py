"""A page that follows a run sees whole lines, each step once, and little enough to draw."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_diffusion.errors import UserError
from lora_diffusion.jobs.follow import RunFollower, smooth, thin_out
from lora_diffusion.jobs.release import release
from lora_diffusion.runs import RunFolder
from webui.services.follow import Followers


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "ink")
    folder.path.mkdir()
    return folder


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def row(step: int, segment: int = 0, **values: float) -> str:
    return json.dumps({"segment": segment, "step": step, "loss": 1.0, **values}) + "\n"


def steps_of(follower: RunFollower) -> list[int]:
    return [row["step"] for row in follower.metrics()]


# Metrics


def test_a_folder_without_a_run_has_nothing(tmp_path: Path) -> None:
    follower = RunFollower(RunFolder(tmp_path / "nothing"))

    assert follower.state is None
    assert follower.metrics() == []
    assert follower.series().values == []
    assert follower.new_log() == (False, "")
    assert follower.previews().steps == []
    assert (follower.checkpoints(), follower.adapters()) == ([], [])


def test_half_a_line_is_read_when_it_is_whole(run: RunFolder) -> None:
    follower = RunFollower(run)
    append(run.metrics, row(1) + row(2)[:20])
    assert steps_of(follower) == [1]
    append(run.metrics, row(2)[20:])
    assert steps_of(follower) == [1, 2]
    assert steps_of(follower) == [1, 2]


def test_a_line_that_a_crash_cut_short_costs_only_itself(run: RunFolder) -> None:
    append(run.metrics, row(1) + row(2)[:20] + row(2, segment=1) + "\x00\x00 not json\n[]\n" + row(3, segment=1))

    assert steps_of(RunFollower(run)) == [1, 2, 3]


def test_steps_that_a_resume_repeats_are_dropped(run: RunFolder) -> None:
    follower = RunFollower(run)
    append(run.metrics, "".join(row(step, loss=5.0) for step in range(1, 9)))
    assert steps_of(follower) == list(range(1, 9))
    append(run.metrics, "".join(row(step, segment=1, loss=4.0) for step in (6, 7)))

    assert [(row["step"], row["loss"]) for row in follower.metrics()[4:]] == [(5, 5.0), (6, 4.0), (7, 4.0)]
    append(run.metrics, row(1, segment=2))
    assert steps_of(follower) == [1]


def test_a_run_that_starts_anew_in_its_folder_is_read_from_its_beginning(run: RunFolder) -> None:
    follower = RunFollower(run)
    append(run.metrics, row(1) + row(2))
    assert steps_of(follower) == [1, 2]
    run.metrics.rename(run.path / "moved")
    assert steps_of(follower) == []
    append(run.metrics, row(1))

    assert steps_of(follower) == [1]


def test_a_series_has_few_points_and_keeps_the_extremes(run: RunFolder) -> None:
    values = [1.0] * 10_000
    values[1234], values[7777] = 9.0, -3.0
    append(run.metrics, "".join(row(step, loss=value) for step, value in enumerate(values)))
    series = RunFollower(run).series()

    assert len(series.steps) == len(series.values) == len(series.smoothed) <= 300
    assert (series.steps[0], series.steps[-1]) == (0, 9999)
    assert {1234, 7777} <= set(series.steps)
    assert (max(series.values), min(series.values)) == (9.0, -3.0)
    assert series.steps == sorted(series.steps)


def test_rows_without_a_value_and_values_that_are_not_finite_are_left_out(run: RunFolder) -> None:
    append(run.metrics, row(1) + row(2, val_loss=0.5) + row(3, val_loss=float("nan")) + row(4, val_loss=0.25))

    series = RunFollower(run).series("val_loss", smoothing=0.0)
    assert (series.steps, series.values, series.smoothed) == ([2, 4], [0.5, 0.25], [0.5, 0.25])


@pytest.mark.parametrize("count", [0, 1, 2, 3, 299, 300, 301, 302, 1000])
def test_thinning_out_never_gives_more_than_was_asked_for(count: int) -> None:
    kept = thin_out([float(i % 7) for i in range(count)], 300)

    assert len(kept) <= 300
    assert kept[:1] + kept[-1:] == ([0, count - 1] if count else [])


def test_the_running_mean_of_a_constant_is_the_constant() -> None:
    assert smooth([2.0] * 50, 0.9) == pytest.approx([2.0] * 50, rel=1e-12)
    assert smooth([0.0, 1.0], 0.5) == pytest.approx([0.0, 2 / 3])  # (0.25 · 0 + 0.5 · 1) / 0.75


# Log


def test_the_log_comes_in_whole_lines_and_each_once(run: RunFolder) -> None:
    follower = RunFollower(run)
    append(run.log, "one\ntw")
    assert follower.new_log() == (True, "one\n")
    append(run.log, "o ü\n")
    assert follower.new_log() == (False, "two ü\n")
    assert follower.new_log() == (False, "")


def test_the_log_of_a_run_that_started_anew_in_the_same_folder_stands_alone(run: RunFolder) -> None:
    follower = Followers().of(run.path)
    append(run.log, "step 1\nfinished\n")
    assert follower.read_log() == ["step 1", "finished"]
    run.path.rename(run.path.with_name("ink-previous-1"))
    run.path.mkdir()
    append(run.log, "step 1 of the second run, which has already said more than the first one\n")

    assert follower.read_log() == ["step 1 of the second run, which has already said more than the first one"]
    append(run.log, "step 2\n")
    assert follower.read_log()[1:] == ["step 2"]


def test_of_a_long_log_the_end_is_shown(run: RunFolder) -> None:
    append(run.log, "".join(f"line {number}\n" for number in range(50_000)))
    _, shown = RunFollower(run).new_log()

    assert len(shown) <= 64_000
    assert shown.startswith("line ")
    assert shown.endswith("line 49999\n")


# Pictures and files


def test_previews_are_a_matrix_of_prompts_and_steps(run: RunFolder) -> None:
    run.previews.mkdir()
    run.config.write_text('[preview]\nprompts = ["a cat", "a dog"]\n')
    names = ("000000-0", "000000-1", "000100-0", "000100-2", "now-000050-0", "now-000007-0", "notes")
    for name in names:
        (run.previews / f"{name}.png").write_bytes(b"x")
    previews = RunFollower(run).previews()

    assert previews.prompts == ["a cat", "a dog", ""]
    assert previews.steps == [0, 100]
    assert previews.pictures[1, 0] == run.preview(0, 1)
    assert set(previews.pictures) == {(0, 0), (1, 0), (0, 100), (2, 100)}
    assert [path.name for path in previews.asked] == ["now-000007-0.png", "now-000050-0.png"]


def make_adapters(run: RunFolder) -> None:
    with run.lock():
        run.begin(0, 300)
        run.beat(300, 300)
        run.end("finished")
    for step in (100, 200):
        run.adapter("ink", step).write_bytes(b"weights %d" % step)
    run.adapter("ink").write_bytes(b"final weights")


def test_a_released_step_becomes_the_result_and_the_final_one_is_kept(run: RunFolder) -> None:
    make_adapters(run)
    for step in (200, 100):
        assert release(run, step) == run.adapter("ink")
        assert run.adapter("ink").read_bytes() == b"weights %d" % step
        assert run.adapter("ink", 300).read_bytes() == b"final weights"
        listed = RunFollower(run).adapters()
        assert [(file.step, file.is_released) for file in listed] == [
            (100, step == 100),
            (200, step == 200),
            (300, False),
            (None, False),
        ]
    release(run, 300)
    assert run.adapter("ink").read_bytes() == b"final weights"


def test_a_date_at_the_end_of_a_run_s_name_is_no_step(run: RunFolder) -> None:
    make_adapters(run)
    run.config.write_text('[run]\nname = "cat-20241101"\n')
    run.adapter("cat-20241101", 200).write_bytes(b"weights of step 200")
    final = run.adapter("cat-20241101")
    final.write_bytes(b"final weights")

    listed = {file.path: file.step for file in RunFollower(run).adapters()}

    assert (listed[final], listed[run.adapter("cat-20241101", 200)]) == (None, 200)
    with pytest.raises(UserError, match=r"no adapter file of step 20241101. There are: 200"):
        release(run, 20241101)
    assert release(run, 200) == final
    assert final.read_bytes() == b"weights of step 200"


def test_a_result_that_the_run_wrote_later_is_no_release(run: RunFolder) -> None:
    make_adapters(run)
    release(run, 100)
    run.adapter("ink").write_bytes(b"weights of more steps")

    assert not any(file.is_released for file in RunFollower(run).adapters())
    run.beat(500, 500)
    run.end("finished")
    release(run, 200)
    assert run.adapter("ink", 500).read_bytes() == b"weights of more steps"


def test_a_step_without_an_adapter_and_a_run_that_goes_on_are_refused(run: RunFolder) -> None:
    make_adapters(run)
    with pytest.raises(UserError, match=r"no adapter file of step 150. There are: 100, 200"):
        release(run, 150)
    with run.lock():
        run.begin(0, 300)
        with pytest.raises(UserError, match="has not ended"):
            release(run, 100)

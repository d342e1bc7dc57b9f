"""What is due is saved before pictures are drawn: they take minutes and memory, and may end the process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora_diffusion.runs import RunFolder
from lora_diffusion.training.plan import Launch
from lora_diffusion.training.previews import Previewer
from lora_diffusion.training.trainer import Trainer
from tests.sweeps import make_config, members_of, train_together
from tests.training_runs import draw_pictures, prepare, write_config

PREVIEW = {"prompts": ["a red cat"], "steps": 1, "cfg": 1.0, "size": 32, "every": 2}
RUN: dict[str, Any] = {"steps": 4, "save_every": 2}


def make_trainer(folder: Path, base: Path, launch: Launch = "eager", **sections: dict[str, Any]) -> Trainer:
    config = folder / "run.toml"
    is_resumed = config.exists()
    if not is_resumed:
        sections = {"run": RUN, "preview": PREVIEW} | sections
        write_config(config, base, draw_pictures(folder / "pictures"), **sections)
    trainer = prepare(config, resume=is_resumed)
    trainer.plan = replace(trainer.plan, launch=launch)
    return trainer


def saved_in(run: Path) -> set[str]:
    """Adapter files, and checkpoints by their numbers."""
    return {path.name for path in (*run.glob("*.safetensors"), *run.glob("checkpoints/*"))}


def watch(monkeypatch: pytest.MonkeyPatch, drawing: str = "draw") -> list[tuple[str, int, dict[str, set[str]]]]:
    """For each drawing: whose and at which step, and what was saved by then in the run folders beside each other."""
    seen: list[tuple[str, int, dict[str, set[str]]]] = []
    draw = getattr(Previewer, drawing)

    def watched(previewer: Previewer, step: int, *arguments: Any) -> list[Path]:
        run = previewer.folder.parent
        seen.append((run.name, step, {other.name: saved_in(other) for other in run.parent.glob("run*/")}))
        return draw(previewer, step, *arguments)

    monkeypatch.setattr(Previewer, drawing, watched)
    return seen


@pytest.mark.parametrize("launch", ["eager", "quiet"])
def test_before_each_preview_its_step_is_saved(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launch: Launch
) -> None:
    seen = watch(monkeypatch)
    make_trainer(tmp_path, tiny_sd1, launch).fit()

    at_2 = {"000002", "test-000002.safetensors"}
    saved = {0: set(), 2: at_2, 4: at_2 | {"000004", "test.safetensors"}}
    assert seen == [("run", step, {"run": saved[step]}) for step in (0, 2, 4)]


@pytest.mark.parametrize("as_a_whole", [True, False])
def test_in_a_sweep_all_are_saved_before_one_draws(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_a_whole: bool
) -> None:
    seen = watch(monkeypatch)
    run = RUN | {"cuda_graph": as_a_whole}
    members = members_of(make_config(tmp_path, tiny_sd1, run=run, preview=PREVIEW), "run.seed=1,2")
    train_together(members, tmp_path / "sweep")

    assert [(run, step) for run, step, _ in seen] == [
        (f"run-seed{seed}", step) for step in (0, 2, 4) for seed in (1, 2)
    ]
    for _, step, saved in seen:
        for seed in (1, 2):
            name = f"test-seed{seed}"
            expected = {0: set(), 2: {"000002", f"{name}-000002.safetensors"}, 4: {"000004", f"{name}.safetensors"}}
            assert expected[step] <= saved[f"run-seed{seed}"]


def test_pictures_asked_for_in_the_last_step_are_drawn_when_all_is_saved(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watch(monkeypatch, "draw_asked")
    trainer = make_trainer(tmp_path, tiny_sd1, run={"steps": 1}, schedule={"warmup_steps": 0})
    trainer.run.ask("sample_now", {"prompts": ["a blue cat"]})
    trainer.fit()

    assert seen == [("run", 1, {"run": {"000001", "test.safetensors"}})]
    assert (trainer.run.previews / "now-000001-0.png").exists()


@pytest.mark.parametrize("error", [MemoryError(), KeyError("unforeseen")])
def test_whatever_fails_in_a_preview_the_training_goes_on(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def failing(*_: object) -> None:
        raise error

    monkeypatch.setattr(Previewer, "draw", failing)
    trainer = make_trainer(tmp_path, tiny_sd1)
    trainer.fit()

    assert trainer.step == 4 and trainer.run.adapter("test").exists()
    told = [record.message for record in caplog.records if "could not be drawn" in record.message]
    assert [message.partition(":")[0] for message in told] == ["step 0", "step 2", "step 4"]
    assert all("MemoryError" in message or "unforeseen" in message for message in told)


def test_the_last_previews_of_a_run_that_was_killed_while_it_drew_them_come_with_a_resume(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = Previewer.draw

    def killed(previewer: Previewer, step: int, *arguments: Any) -> list[Path]:
        if step == 4:
            raise KeyboardInterrupt
        return draw(previewer, step, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Previewer, "draw", killed)
        with pytest.raises(KeyboardInterrupt):
            make_trainer(tmp_path, tiny_sd1).fit()
    run = RunFolder(tmp_path / "run")
    assert run.adapter("test").exists() and not run.preview(4, 0).exists()

    resumed = make_trainer(tmp_path, tiny_sd1)
    resumed.fit()
    assert resumed.step == 4 and run.preview(4, 0).exists()

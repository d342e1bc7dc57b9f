"""A full disk costs what cannot be written, and no step."""

from __future__ import annotations

import errno
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from lora_diffusion.config import TrainConfig
from lora_diffusion.errors import RunError
from lora_diffusion.runs import RunFolder
from lora_diffusion.training import checkpoint
from lora_diffusion.training.batches import Batch, BatchSource
from lora_diffusion.training.export import Exporter
from lora_diffusion.training.plan import Launch
from lora_diffusion.training.tracking import MetricsFile, read_metrics
from lora_diffusion.training.trainer import Trainer
from lora_diffusion.training_run import run_training
from tests.sweeps import make_config, members_of, train_together, weights_of
from tests.training_runs import distance, draw_pictures, prepare, tensor_hash, write_config


def test_training_goes_on_while_state_and_metrics_cannot_be_written(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="lora_diffusion")
    pictures = draw_pictures(tmp_path / "pictures")

    def train(name: str) -> Path:
        config = write_config(tmp_path / f"{name}.toml", tiny_sd1, pictures, run={"output": str(tmp_path / name)})
        adapter = run_training(TrainConfig.load(config), resume=False)
        assert adapter is not None
        return adapter

    whole = train("whole")
    trainers: list[Trainer] = []
    begin, beat, write = Trainer.begin, RunFolder.beat, MetricsFile.write

    def begun(trainer: Trainer) -> None:
        trainers.append(trainer)
        begin(trainer)

    def on_full_disk(call):
        def called(*arguments: object) -> None:
            if trainers and trainers[0].step in (2, 3, 4):
                raise OSError(errno.ENOSPC, "No space left on device")
            call(*arguments)

        return called

    monkeypatch.setattr("lora_diffusion.training.trainer._HEARTBEAT_EVERY_S", 0.0)
    monkeypatch.setattr(Trainer, "begin", begun)
    monkeypatch.setattr(RunFolder, "beat", on_full_disk(beat))
    monkeypatch.setattr(MetricsFile, "write", on_full_disk(write))
    adapter = train("full")

    assert tensor_hash(adapter) == tensor_hash(whole)
    run = RunFolder(tmp_path / "full")
    assert (run.read_state().status, run.read_state().step) == ("finished", 6)
    assert [line["step"] for line in read_metrics(run.metrics)] == [1, 5, 6]
    assert caplog.text.count("No space left on device") == 1


def test_in_a_sweep_one_full_disk_is_told_and_the_other_members_go_on(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = RunFolder.end

    def on_full_disk(run: RunFolder, *arguments: object) -> None:
        if run.path.name == "run-seed1":
            raise OSError(errno.ENOSPC, "No space left on device")
        end(run, *arguments)

    monkeypatch.setattr(RunFolder, "end", on_full_disk)
    members = members_of(make_config(tmp_path, tiny_sd1, run={"steps": 3}), "run.seed=1,2")
    with pytest.raises(RunError, match=r"(?s)1 of 2 runs.*test-seed1: The disk is full .*--resume"):
        train_together(members, tmp_path / "sweep")

    first, second = (RunFolder(member.config.run.output) for member in members)
    assert first.adapter("test-seed1").exists()
    assert second.read_state().status == "finished"


def fill_disk_at(monkeypatch: pytest.MonkeyPatch, step: int, of: RunFolder | None = None) -> None:
    """The files of this step's checkpoint cannot be written: of all runs, or of one."""
    write = checkpoint._write_fsynced

    def on_full_disk(path: Path, data: bytes) -> None:
        if f"{step:06d}" in path.parent.name and (of is None or of.checkpoints == path.parent.parent):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    monkeypatch.setattr(checkpoint, "_write_fsynced", on_full_disk)


def saved_in(run: RunFolder) -> list[str]:
    names = [path.name for path in (*run.path.glob("*.safetensors"), *run.checkpoints.glob("*"))]
    return sorted(names)


@pytest.mark.parametrize(("save_every", "ask"), [(2, False), (0, True)])
def test_a_save_that_fails_on_the_way_is_told_and_the_training_goes_on(
    tiny_sd1: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    save_every: int,
    ask: bool,
) -> None:
    failing = 1 if ask else 2
    fill_disk_at(monkeypatch, failing)
    trainer = prepare(
        write_config(
            tmp_path / "run.toml",
            tiny_sd1,
            draw_pictures(tmp_path / "pictures"),
            run={"save_every": save_every, "keep_checkpoints": 5},
        )
    )
    if ask:
        trainer.run.control.mkdir()
        trainer.run.ask("save_now")
    trainer.fit()

    told = [record.message for record in caplog.records if "No space left" in record.message]
    assert len(told) == 1 and told[0].startswith(f"step {failing}: not all could be saved")
    later = ["000006"] if ask else ["000004", "000006", "test-000004.safetensors"]
    assert saved_in(trainer.run) == [*later, "test.safetensors"]


def train(config: Path, *, resume: bool = False) -> Path:
    adapter = run_training(TrainConfig.load(config), resume=resume)
    assert adapter is not None
    return adapter


def test_at_the_end_the_adapter_is_written_where_the_checkpoint_does_not_fit_and_a_resume_ends_the_run(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = draw_pictures(tmp_path / "pictures")

    def configured(name: str) -> Path:
        run = {"save_every": 4, "output": str(tmp_path / name)}
        return write_config(tmp_path / f"{name}.toml", tiny_sd1, pictures, run=run)

    whole, config, run = train(configured("whole")), configured("full"), RunFolder(tmp_path / "full")
    with monkeypatch.context() as patch:
        fill_disk_at(patch, 6)
        with pytest.raises(RunError, match=r"No space left.*--resume.* step 6 .*full/test\.safetensors"):
            train(config)
    assert tensor_hash(run.adapter("test")) == tensor_hash(whole)
    state = run.read_state()
    assert state is not None and (state.status, state.step) == ("failed", 6)
    assert state.error is not None and "test.safetensors" in state.error.message
    assert saved_in(run) == ["000004", "test-000004.safetensors", "test.safetensors"]

    assert tensor_hash(train(config, resume=True)) == tensor_hash(whole)
    state = run.read_state()
    assert state is not None and (state.status, state.step) == ("finished", 6)
    assert saved_in(run) == ["000004", "000006", "test-000004.safetensors", "test.safetensors"]


def test_without_an_earlier_checkpoint_no_resume_is_promised_and_a_new_start_keeps_the_adapter(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path / "run.toml", tiny_sd1, draw_pictures(tmp_path / "pictures"))
    with monkeypatch.context() as patch:
        fill_disk_at(patch, 6)
        with pytest.raises(RunError, match=r"No space left.*Free some space") as told:
            train(config)
    assert "--resume" not in str(told.value) and "Earlier" not in str(told.value)
    kept = tensor_hash(tmp_path / "run" / "test.safetensors")

    train(config)
    assert tensor_hash(tmp_path / "run-previous-1" / "test.safetensors") == kept


def test_a_stopped_run_leaves_its_adapter_where_the_checkpoint_does_not_fit(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_disk_at(monkeypatch, 1)
    trainer = prepare(write_config(tmp_path / "run.toml", tiny_sd1, draw_pictures(tmp_path / "pictures")))
    trainer.run.control.mkdir()
    trainer.run.ask("stop")
    with pytest.raises(RunError, match=r"No space left.*test-000001\.safetensors"):
        trainer.fit()
    assert saved_in(trainer.run) == ["test-000001.safetensors"]


def test_at_the_end_the_checkpoint_is_written_where_the_adapter_cannot_be(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_full_disk(exporter: Exporter, path: Path, step: int) -> None:
        raise RunError(f"{path}: the adapter cannot be written (No space left on device).")

    config = write_config(tmp_path / "run.toml", tiny_sd1, draw_pictures(tmp_path / "pictures"))
    with monkeypatch.context() as patch:
        patch.setattr(Exporter, "write", on_full_disk)
        with pytest.raises(RunError, match=r"test\.safetensors: the adapter cannot be written"):
            train(config)
    assert saved_in(RunFolder(tmp_path / "run")) == ["000006"]

    assert train(config, resume=True).exists()


@pytest.mark.parametrize("as_a_whole", [True, False])
def test_in_a_sweep_the_adapter_is_written_where_the_checkpoint_does_not_fit_and_the_others_go_on(
    tiny_sd1: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    as_a_whole: bool,
) -> None:
    run = {"steps": 3, "save_every": 2, "cuda_graph": as_a_whole}
    members = members_of(make_config(tmp_path, tiny_sd1, run=run), "run.seed=1,2")
    runs = [RunFolder(member.config.run.output) for member in members]
    with monkeypatch.context() as patch:
        fill_disk_at(patch, 3, of=runs[0])
        with pytest.raises(RunError, match=r"(?s)1 of 2 runs.*test-seed1: .*No space left.*test-seed1\.safetensors"):
            train_together(members, tmp_path / "sweep")
    assert [run.read_state().status for run in runs] == ["failed", "finished"]
    assert saved_in(runs[0]) == ["000002", "test-seed1-000002.safetensors", "test-seed1.safetensors"]
    assert caplog.text.count("No space left") == 1
    before = weights_of(members[0])

    train_together(members, tmp_path / "sweep", resume=True)
    assert [run.read_state().status for run in runs] == ["finished", "finished"]
    assert saved_in(runs[0]) == ["000002", "000003", "test-seed1-000002.safetensors", "test-seed1.safetensors"]
    # Alone, the last step adds the same numbers in another order.
    assert distance(weights_of(members[0]), before) < 1e-4


def poison(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """From the third step on a run of this seed trains on latents that are no numbers."""
    get = BatchSource.__getitem__

    def get_poisoned(source: BatchSource, index: int) -> Batch:
        batch = get(source, index)
        is_good = source.seed != seed or index < 2
        return batch if is_good else replace(batch, latents=batch.latents * float("nan"))

    monkeypatch.setattr(BatchSource, "__getitem__", get_poisoned)


NAN_ON_FULL_DISK = (
    r"The loss became nan at step 3 .*Lower \[optimizer\] lr.*"
    r"The weights of step 2 cannot be saved: .*checkpoints/000002.*No space left"
)


@pytest.mark.parametrize("launch", ["eager", "quiet"])
def test_a_loss_that_is_not_finite_is_told_before_that_the_steps_before_it_cannot_be_saved(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launch: Launch
) -> None:
    fill_disk_at(monkeypatch, 2)
    poison(monkeypatch, 3)
    trainer = prepare(write_config(tmp_path / "run.toml", tiny_sd1, draw_pictures(tmp_path / "pictures")))
    trainer.plan = replace(trainer.plan, launch=launch)
    with pytest.raises(RunError, match=NAN_ON_FULL_DISK) as told:
        trainer.fit()
    assert "are in" not in str(told.value)


@pytest.mark.parametrize("as_a_whole", [True, False])
def test_in_a_sweep_both_are_told_too_and_once(
    tiny_sd1: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    as_a_whole: bool,
) -> None:
    members = members_of(make_config(tmp_path, tiny_sd1, run={"steps": 3, "cuda_graph": as_a_whole}), "run.seed=1,2")
    fill_disk_at(monkeypatch, 2)
    poison(monkeypatch, 1)
    with pytest.raises(RunError, match=r"(?s)1 of 2 runs.*test-seed1: " + NAN_ON_FULL_DISK):
        train_together(members, tmp_path / "sweep")
    assert caplog.text.count("No space left") == 1


def test_a_weight_too_large_for_the_file_on_the_way_costs_that_file_only(
    tiny_sd1: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = {"save_every": 2, "keep_checkpoints": 5, "save_precision": "fp16"}
    pictures = draw_pictures(tmp_path / "pictures")
    trainer = prepare(write_config(tmp_path / "run.toml", tiny_sd1, pictures, run=run))
    save_if_due, weight = trainer.save_if_due, trainer.parameters[0].data.view(-1)

    def with_large_weight() -> None:
        kept = float(weight[0])
        if trainer.step == 2:
            weight[0] = 1e5
        save_if_due()
        weight[0] = kept

    trainer.save_if_due = with_large_weight
    trainer.fit()

    assert "step 2: not all could be saved" in caplog.text and "not finite as" in caplog.text
    adapters = ["test-000004.safetensors", "test.safetensors"]
    assert saved_in(trainer.run) == ["000002", "000004", "000006", *adapters]


def test_in_a_sweep_a_save_that_fails_on_the_way_ends_no_member(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_disk_at(monkeypatch, 2)
    members = members_of(make_config(tmp_path, tiny_sd1, run={"steps": 3, "save_every": 2}), "run.seed=1,2")
    train_together(members, tmp_path / "sweep")
    for member in members:
        assert saved_in(RunFolder(member.config.run.output)) == ["000003", f"{member.name}.safetensors"]

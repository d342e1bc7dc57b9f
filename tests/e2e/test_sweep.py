"""Adapters trained together are those that were trained alone; one that stops or fails costs the others nothing."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from lora_diffusion.config_sweep import Member
from lora_diffusion.errors import RunError, UserError
from lora_diffusion.jobs.device_lock import device_lock, holder_of
from lora_diffusion.jobs.follow import RunFollower
from lora_diffusion.models import on_cpu, winograd
from lora_diffusion.progress import Track
from lora_diffusion.runs import RunFolder
from lora_diffusion.training.joint import JointTrainer
from lora_diffusion.training.trainer import Trainer
from tests.queues import wait_for
from tests.sweeps import changed, make_config, members_of, train_together, weights_of
from tests.training_runs import distance, draw_pictures, prepare, tensor_hash

pytestmark = pytest.mark.usefixtures("repeatable_arithmetic")


def alone(member: Member, folder: Path) -> dict[str, Tensor]:
    """The weights of the member's own config.toml, as the sweep left it, trained by itself."""
    config = member.config.run.output / "config.toml"
    output = folder / f"{member.name}-alone"
    prepare(config, f"run.output={json.dumps(str(output))}").fit()
    return weights_of(member, output)


def assert_each_as_alone(members: Sequence[Member], tmp_path: Path) -> None:
    for member in members:
        assert distance(weights_of(member), alone(member, tmp_path)) < 1e-4


def test_members_of_other_rates_and_ranks_learn_what_they_learn_alone(tiny_sd1: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path, tiny_sd1)
    members = members_of(config, "adapter.rank=2,4", "optimizer.lr=1e-3,3e-4")
    train_together(members, tmp_path / "sweep")

    names = ["test-rank2-lr1e-3", "test-rank2-lr3e-4", "test-rank4-lr1e-3", "test-rank4-lr3e-4"]
    assert [member.name for member in members] == names
    assert_each_as_alone(members[1:3], tmp_path)
    first, last = weights_of(members[0]), weights_of(members[3])
    up = next(name for name in first if name.endswith("lora_up.weight"))
    assert first[up].shape != last[up].shape


def test_convolutions_transformed_for_the_pictures_of_all_members_change_nothing(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = members_of(make_config(tmp_path, tiny_sd1), "adapter.rank=2,4")
    seen: list[tuple[int, int]] = []

    def transform(unet: nn.Module, num_pixels: int, track: Track) -> int:
        seen.append((num_pixels, winograd.transform_convolutions(unet, num_pixels, track)))
        return seen[-1][1]

    monkeypatch.setattr(on_cpu, "transform_convolutions", transform)
    with monkeypatch.context() as patch:
        patch.setattr(winograd, "MIN_CHANNELS", 8)
        patch.setattr(winograd, "MIN_PIXELS", 1)
        train_together(members, tmp_path / "sweep")
    assert_each_as_alone(members, tmp_path)  # on a base so small that nothing is transformed

    (together, num_transformed), *rest = seen
    assert num_transformed > 0
    assert rest == [(together, 0), *[(together // len(members), 0)] * 2]


def test_members_of_all_kinds_and_settings_learn_what_they_learn_alone(tiny_sd1: Path, tmp_path: Path) -> None:
    """Kinds, seeds, pictures, lengths, batch shapes, accumulation, losses, dropout and captions differ at once."""
    config = make_config(tmp_path, tiny_sd1, model={"gradient_checkpointing": True})
    others = draw_pictures(tmp_path / "others", 5)
    lora, dora, loha, lokr = members_of(config, "adapter.kind=lora,dora,loha,lokr")
    lora = changed(lora, "adapter.dropout=0.3", "adapter.module_dropout=0.3", "run.seed=5")
    dora = changed(dora, "run.gradient_accumulation=3", "run.batch_size=1", "run.steps=3")
    other = f"dataset.0.path={json.dumps(str(others))}"
    loha = changed(loha, other, 'adapter.targets="full"', 'loss.kind="huber"', "dataset.0.resolution=64")
    lokr = changed(
        lokr, "run.batch_size=3", "optimizer.max_grad_norm=0", "adapter.max_norm=0.01", "loss.min_snr_gamma=0"
    )
    members = [lora, dora, loha, lokr]
    train_together(members, tmp_path / "sweep")

    assert_each_as_alone(members, tmp_path)


def test_members_with_a_text_encoder_of_their_own(tiny_sd1: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path, tiny_sd1, optimizer={"text_encoder_steps": 3})
    members = members_of(config, "adapter.text_encoder=true,false", "adapter.rank=2,3")
    members = [members[0], members[1], members[2]]
    train_together(members, tmp_path / "sweep")

    assert any(name.startswith("lora_te") for name in weights_of(members[0]))
    assert not any(name.startswith("lora_te") for name in weights_of(members[2]))
    assert_each_as_alone(members, tmp_path)


def test_members_on_a_quantised_base(tiny_sd1: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path, tiny_sd1, model={"quantise": "int8"}, run={"steps": 3})
    members = members_of(config, "run.seed=1,2")
    train_together(members, tmp_path / "sweep")

    assert_each_as_alone(members, tmp_path)


def stop_at(monkeypatch: pytest.MonkeyPatch, steps: dict[str, int]) -> None:
    """Ask members to stop through their control files as soon as they are at a step."""
    do_what_is_due = Trainer.do_what_is_due

    def asked(trainer: Trainer) -> None:
        if trainer.step == steps.get(trainer.name):
            trainer.run.ask("stop")
        do_what_is_due(trainer)

    monkeypatch.setattr(Trainer, "do_what_is_due", asked)


def test_a_member_that_is_stopped_leaves_and_the_sweep_is_resumed_to_the_same_end(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path, tiny_sd1)
    members = members_of(config, "run.seed=1,2,3")
    with monkeypatch.context() as patch:
        stop_at(patch, {"test-seed2": 2})
        train_together(members, tmp_path / "sweep")

    states = [RunFolder(member.config.run.output).read_state() for member in members]
    assert [(state.status, state.step) for state in states] == [("finished", 5), ("stopped", 2), ("finished", 5)]
    hashes = [tensor_hash(member.config.run.output / f"{member.name}.safetensors") for member in members[::2]]
    train_together(members, tmp_path / "sweep", resume=True)

    assert RunFolder(members[1].config.run.output).read_state().status == "finished"
    assert [tensor_hash(m.config.run.output / f"{m.name}.safetensors") for m in members[::2]] == hashes
    assert_each_as_alone(members, tmp_path)


def test_a_resumed_sweep_ends_bit_for_bit_as_one_that_was_not_interrupted(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path, tiny_sd1)
    whole = members_of(config, "adapter.rank=2,4", overrides=[f"run.output={tmp_path / 'whole'}"])
    train_together(whole, tmp_path / "sweep-1")
    parts = members_of(config, "adapter.rank=2,4", overrides=[f"run.output={tmp_path / 'parts'}"])
    with monkeypatch.context() as patch:
        stop_at(patch, {member.name: 3 for member in parts})
        train_together(parts, tmp_path / "sweep-2")
    assert [RunFolder(member.config.run.output).read_state().step for member in parts] == [3, 3]
    RunFolder(parts[1].config.run.output).state_file.unlink()  # as one does who reads that it is damaged
    train_together(parts, tmp_path / "sweep-2", resume=True)
    assert not list(tmp_path.glob("*-previous-*")), "nothing started anew"

    for one, other in zip(whole, parts, strict=True):
        file = f"{one.name}.safetensors"
        assert tensor_hash(one.config.run.output / file) == tensor_hash(other.config.run.output / file)


def test_a_loss_that_is_not_finite_ends_its_member_only(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path, tiny_sd1, run={"cuda_graph": False})  # launched as a whole: test_quiet_sweep
    members = members_of(config, "run.seed=1,2,3")
    drawn = Trainer.next_micro_batches

    def poisoned(trainer: Trainer):
        batches = drawn(trainer)
        if trainer.name == "test-seed2" and trainer.step == 2:
            batches[0].latents.fill_(float("nan"))
        return batches

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "next_micro_batches", poisoned)
        with pytest.raises(RunError, match=r"(?s)1 of 3 runs .*test-seed2: The loss became nan at step 3"):
            train_together(members, tmp_path / "sweep")

    failed = RunFolder(members[1].config.run.output)
    assert failed.read_state().status == "failed"
    assert "loss became nan at step 3" in failed.read_state().error.message
    assert "loss became nan at step 3" in failed.log.read_text(encoding="utf-8")
    assert failed.has_checkpoint
    assert "loss became nan" not in RunFolder(members[0].config.run.output).log.read_text(encoding="utf-8")
    assert_each_as_alone(members[::2], tmp_path)


def test_each_member_is_a_run_like_any_other_and_the_sweep_compares_them(
    tiny_sd1: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="lora_diffusion")
    preview = {"prompts": ["a red cat", "a blue cat"], "steps": 1, "cfg": 1.0}
    run, schedule = {"steps": 2, "save_every": 1}, {"warmup_steps": 0}
    config = make_config(tmp_path, tiny_sd1, preview=preview, run=run, schedule=schedule)
    others = draw_pictures(tmp_path / "others", 4)
    members = members_of(config, f"dataset.0.path={tmp_path / 'pictures'},{others}")
    train_together(members, tmp_path / "sweep")

    assert [member.label for member in members] == ["pictures", "others"]
    for member in members:
        run = RunFolder(member.config.run.output)
        assert run.path == tmp_path / f"run-{member.label}"
        follower = RunFollower(run)
        assert follower.state is not None and follower.state.status == "finished"
        assert [row["step"] for row in follower.metrics()] == [1, 2]
        assert len(list(run.previews.glob("*.png"))) == 4
        assert run.adapter(member.name, 1).exists() and run.adapter(member.name).exists()
        assert {"contact-sheet.png", "loss.png", "README.md", "dataset.json"} <= {p.name for p in run.path.iterdir()}
        log = run.log.read_text(encoding="utf-8")
        assert "step 2/2" in log
        assert f"{member.name}.safetensors" in log
        assert not any(f"{other.name}.safetensors" in log for other in members if other is not member)
    pictures = [RunFolder(member.config.run.output).preview(2, 0).read_bytes() for member in members]
    assert pictures[0] != pictures[1], "each member draws with its own adapter"
    sheet = Image.open(tmp_path / "sweep" / "contact-sheet.png")
    assert sheet.width > 2 * 192 and sheet.height > 2 * 192  # two columns, two rows of pictures enlarged to 192 px
    assert (tmp_path / "sweep" / "loss.png").stat().st_size > 10_000


def test_an_input_error_of_one_member_is_told_with_its_name_before_anything_is_trained(
    tiny_sd1: Path, tmp_path: Path
) -> None:
    config = make_config(tmp_path, tiny_sd1)
    members = members_of(config, f"dataset.0.path={tmp_path / 'pictures'},{tmp_path / 'nothing'}")
    with pytest.raises(UserError, match=r"test-nothing: .*nothing"):
        train_together(members, tmp_path / "sweep")

    assert list(tmp_path.glob("run-*/log.txt")) and not list(tmp_path.glob("run-*/*.safetensors"))
    assert RunFolder(members[0].config.run.output).read_state().status == "failed"


def test_a_folder_that_is_in_use_stops_the_sweep_before_any_folder_is_touched(tiny_sd1: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path, tiny_sd1)
    members = members_of(config, "run.seed=1,2")
    folder = members[1].config.run.output
    folder.mkdir()
    (folder / "holiday.jpg").touch()
    with pytest.raises(UserError, match=r"test-seed2: .*holiday\.jpg"):
        train_together(members, tmp_path / "sweep")

    assert not RunFolder(members[0].config.run.output).state_file.exists()


@pytest.mark.parametrize(("as_a_whole", "module"), [(True, "quiet_step"), (False, "joint")])
def test_running_out_of_memory_is_told_to_every_member_and_with_what_to_do(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_a_whole: bool, module: str
) -> None:
    config = make_config(tmp_path, tiny_sd1, run={"cuda_graph": as_a_whole})
    members = members_of(config, "run.seed=1,2")

    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(f"lora_diffusion.training.{module}.joint_losses", fail)
    with pytest.raises(RunError, match=r"gradient_checkpointing = true.* fewer runs into the sweep"):
        train_together(members, tmp_path / "sweep")

    for member in members:
        state = RunFolder(member.config.run.output).read_state()
        assert state.status == "failed" and "Out of memory" in state.error.message
        assert "RunError: Out of memory" in RunFolder(member.config.run.output).log.read_text(encoding="utf-8")


def test_several_processes_are_refused(tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = members_of(make_config(tmp_path, tiny_sd1), "run.seed=1,2")
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda _: 2))
    with pytest.raises(UserError, match="one process, and several were started"):
        train_together(members, tmp_path / "sweep")
    assert not members[0].config.run.output.exists()


def test_finished_members_are_left_alone_by_a_resume_and_trained_on_if_they_are_made_longer(
    tiny_sd1: Path, tmp_path: Path
) -> None:
    config = make_config(tmp_path, tiny_sd1, run={"steps": 3}, schedule={"name": "constant"})
    members = members_of(config, "run.seed=1,2")
    train_together(members, tmp_path / "sweep")
    files = [member.config.run.output / f"{member.name}.safetensors" for member in members]
    before = [(path.stat().st_mtime_ns, tensor_hash(path)) for path in files]
    train_together(members, tmp_path / "sweep", resume=True)
    assert [(path.stat().st_mtime_ns, tensor_hash(path)) for path in files] == before

    longer = members_of(config, "run.seed=1,2", overrides=["run.steps=5"])
    train_together(longer, tmp_path / "sweep", resume=True)
    assert [RunFolder(member.config.run.output).read_state().step for member in longer] == [5, 5]
    assert tensor_hash(files[0]) != before[0][1]


def test_finished_members_are_trained_on_if_they_get_more_epochs(tiny_sd1: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path, tiny_sd1, schedule={"name": "constant"})
    train_together(members_of(config, "run.seed=1,2", overrides=["run.epochs=1"]), tmp_path / "sweep")
    longer = members_of(config, "run.seed=1,2", overrides=["run.epochs=2"])
    before = [RunFolder(member.config.run.output).read_state().step for member in longer]
    train_together(longer, tmp_path / "sweep", resume=True)
    assert [RunFolder(member.config.run.output).read_state().step for member in longer] == [2 * n for n in before]


def test_a_resume_of_what_never_began_is_refused(tiny_sd1: Path, tmp_path: Path) -> None:
    members = members_of(make_config(tmp_path, tiny_sd1), "run.seed=1,2")
    with pytest.raises(UserError, match="no run of this sweep has a checkpoint"):
        train_together(members, tmp_path / "sweep", resume=True)


@contextmanager
def waiting_sweep(members: Sequence[Member], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, a sweep in a thread waits for the device, which another has; afterwards it has ended."""
    monkeypatch.setenv("LORA_DIFFUSION_DEVICE_LOCK", str(tmp_path / "{device}.lock"))
    thread = threading.Thread(target=train_together, args=(members, tmp_path / "sweep"))
    try:
        with device_lock(tmp_path / "cpu.lock", "a test"):
            thread.start()
            for member in members:
                log = RunFolder(member.config.run.output).log
                wait_for(
                    lambda log=log: log.exists() and "waiting for the device (used by a test" in log.read_text(), 60
                )
            yield
    finally:
        thread.join()


def test_a_sweep_holds_the_device_and_a_member_that_is_stopped_while_it_waits_for_it_is_not_trained(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="lora_diffusion")
    members = members_of(make_config(tmp_path, tiny_sd1, run={"steps": 3}), "run.seed=1,2,3")
    runs = [RunFolder(member.config.run.output) for member in members]
    holders: list[str] = []
    train_step = JointTrainer.train_step

    def watched(trainer: JointTrainer) -> None:
        holders.append(holder_of(tmp_path / "cpu.lock"))
        train_step(trainer)

    monkeypatch.setattr(JointTrainer, "train_step", watched)
    with waiting_sweep(members, tmp_path, monkeypatch):
        runs[0].ask("stop")
        wait_for(lambda: runs[0].read_state().status == "stopped")
        assert holders == []

    assert [(run.read_state().status, run.read_state().step) for run in runs] == [
        ("stopped", 0),
        ("finished", 3),
        ("finished", 3),
    ]
    assert holders == [f"a sweep of 3 runs, the first test-seed1, process {os.getpid()}"] * 3
    assert holder_of(tmp_path / "cpu.lock") == "another process", "it has signed off"


def test_a_sweep_whose_members_are_all_stopped_while_it_waits_for_the_device_trains_nothing(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="lora_diffusion")
    members = members_of(make_config(tmp_path, tiny_sd1), "run.seed=1,2")
    runs = [RunFolder(member.config.run.output) for member in members]
    with waiting_sweep(members, tmp_path, monkeypatch):
        for run in runs:
            run.ask("stop")
            wait_for(lambda run=run: run.read_state().status == "stopped")

    assert all("nothing was trained" in run.log.read_text(encoding="utf-8") for run in runs)
    assert not list(tmp_path.glob("run-*/*.safetensors"))


def test_a_signal_while_a_sweep_is_loaded_stops_all_members_and_is_no_fault(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="lora_diffusion")
    monkeypatch.setattr("lora_diffusion.sweep_run._build", lambda *_: signal.raise_signal(signal.SIGTERM))
    members = members_of(make_config(tmp_path, tiny_sd1), "run.seed=1,2")
    train_together(members, tmp_path / "sweep")

    for member in members:
        run = RunFolder(member.config.run.output)
        assert (run.read_state().status, run.read_state().error) == ("stopped", None)
        assert "nothing was trained" in run.log.read_text(encoding="utf-8")


def test_a_signal_stops_all_members_after_their_step(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_step = JointTrainer.train_step

    def signalled(trainer: JointTrainer) -> None:
        signal.raise_signal(signal.SIGTERM)
        train_step(trainer)

    monkeypatch.setattr(JointTrainer, "train_step", signalled)
    members = members_of(make_config(tmp_path, tiny_sd1, schedule={"warmup_steps": 0}), "run.seed=1,2")
    train_together(members, tmp_path / "sweep")

    for member in members:
        run = RunFolder(member.config.run.output)
        assert (run.read_state().status, run.read_state().step) == ("stopped", 1)
        assert run.has_checkpoint

"""Checkpoints are whole or not there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from lora_diffusion.training import checkpoint as module
from lora_diffusion.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    checkpoint_folders,
    newest_checkpoint,
    read_checkpoint,
    save_checkpoint,
)


def _checkpoint(step: int) -> Checkpoint:
    parameter = nn.Parameter(torch.linspace(-1, 1, 6).reshape(2, 3))
    optimizer = torch.optim.AdamW([parameter], lr=1e-3)
    parameter.sum().backward()
    optimizer.step()
    return Checkpoint(
        step, {"a.lora_up.weight": parameter.detach()}, optimizer.state_dict(), {"seed": 3, "list": [1, 2]}
    )


def test_checkpoint_reads_back_equal(tmp_path: Path) -> None:
    saved = _checkpoint(7)
    read = read_checkpoint(save_checkpoint(tmp_path, saved, keep=2))
    assert read.step == 7
    assert read.facts == saved.facts
    assert torch.equal(read.adapter["a.lora_up.weight"], saved.adapter["a.lora_up.weight"])
    fresh = torch.optim.AdamW([nn.Parameter(torch.zeros(2, 3))], lr=1.0)
    fresh.load_state_dict(read.optimizer)
    assert fresh.state_dict()["param_groups"][0]["lr"] == 1e-3
    for name, value in saved.optimizer["state"][0].items():
        assert torch.equal(fresh.state_dict()["state"][0][name], value)


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save_checkpoint(tmp_path, _checkpoint(step), keep=2)
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["000020", "000030"]
    assert sorted(os.listdir(tmp_path)) == ["000020", "000030"]


@pytest.mark.parametrize("file", [module.ADAPTER, module.OPTIMIZER, module.STATE, module.MANIFEST])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damaged_newest_checkpoint_is_passed_over_and_named(tmp_path: Path, file: str, damage: str) -> None:
    save_checkpoint(tmp_path, _checkpoint(10), keep=2)
    path = save_checkpoint(tmp_path, _checkpoint(20), keep=2) / file
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 0x10
        path.write_bytes(data)
    elif damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        path.unlink()
    found, passed_over = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 10
    assert len(passed_over) == 1
    assert "000020" in passed_over[0]


class _Crash(BaseException):
    """Ends a write like a lost process: nothing that follows it runs."""


def test_crash_at_any_file_operation_leaves_a_whole_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every write, fsync and rename of a save is made the last thing that happens, one after the other."""
    operations = [(module, "_write_fsynced"), (module, "sync_folder"), (Path, "rename"), (shutil, "rmtree")]
    originals = {(owner, name): getattr(owner, name) for owner, name in operations}
    for crash_at in range(1, 100):
        folder = tmp_path / str(crash_at)
        for step in (10, 20):
            save_checkpoint(folder, _checkpoint(step), keep=2)
        countdown = iter(range(crash_at - 1, -1, -1))

        def counted(original, *arguments, _countdown=countdown, **options):
            if next(_countdown, None) == 0:
                raise _Crash
            return original(*arguments, **options)

        with monkeypatch.context() as patch:
            for (owner, name), original in originals.items():
                patch.setattr(owner, name, lambda *a, _original=original, **o: counted(_original, *a, **o))
            try:
                save_checkpoint(folder, _checkpoint(30), keep=2)
                crashed = False
            except _Crash:
                crashed = True
        found, passed_over = newest_checkpoint(folder)
        assert found is not None
        assert found.step in (20, 30)
        assert passed_over == []
        save_checkpoint(folder, _checkpoint(40), keep=2)  # and the next save clears up
        assert not list(folder.glob(".tmp-*"))
        if not crashed:
            assert crash_at > 8  # four files, two folders and a rename at least were counted
            return
    raise AssertionError("the save never came to its end")


def test_full_disk_is_told_and_the_old_checkpoint_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, _checkpoint(10), keep=2)

    def no_space(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_write_fsynced", no_space)
    with pytest.raises(CheckpointError, match="No space left"):
        save_checkpoint(tmp_path, _checkpoint(20), keep=2)
    found, _ = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 10
    assert sorted(os.listdir(tmp_path)) == ["000010"]


def test_empty_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "absent") == (None, [])

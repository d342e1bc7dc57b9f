"""Values that settings of sd-scripts and kohya_ss may hold and that nobody can train with: told, never a crash."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_diffusion.config import TrainConfig
from lora_diffusion.config_errors import ConfigError
from lora_diffusion.kohya.gui import NETWORK_ARGUMENTS
from lora_diffusion.kohya.write import Imported, import_settings
from tests.kohya_settings import GUI

HUGE = 10**400
"""An integer that no float holds."""


def imported_prompts(folder: Path, name: str, content: str) -> Imported:
    (folder / name).write_text(content, encoding="utf-8")
    settings = {"pretrained_model_name_or_path": "base", "train_data_dir": "pictures", "sample_every_n_steps": 5}
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    (folder / "theirs.toml").write_text("\n".join([*lines, f"sample_prompts = '{folder / name}'"]), encoding="utf-8")
    return import_settings(folder / "theirs.toml")


@pytest.mark.parametrize("seed", ["x", "1.5", "-1", "9" * 5000])
def test_a_seed_that_is_none_is_left_out_with_a_note(seed: str, tmp_path: Path) -> None:
    imported = imported_prompts(tmp_path, "p.txt", f"a cat --d {seed}\na tree --d 7")
    preview = TrainConfig.parse(imported.text).preview
    assert (preview.prompts, preview.seed) == (("a cat", "a tree"), 7)
    notes = [text for text in imported.ledger.differences if f"`--d {seed[:50]}" in text]
    assert len(notes) == 1
    assert len(notes[0]) < 150


@pytest.mark.parametrize("flag", ["w", "h", "s", "l"])
def test_a_number_of_thousands_of_digits_is_not_used(flag: str, tmp_path: Path) -> None:
    imported = imported_prompts(tmp_path, "p.txt", f"a cat --{flag} {'9' * 5000}")
    preview = TrainConfig.parse(imported.text).preview
    assert (preview.size, preview.steps, preview.cfg) == ((512, 512), 30, 7.5)
    assert any(f"`--{flag} 999" in text and "is no number" in text for text in imported.ledger.differences)


def test_a_key_without_value_is_as_if_it_were_not_there(tmp_path: Path) -> None:
    imported = imported_prompts(tmp_path, "p.json", '[{"prompt": "a cat", "seed": null, "width": null, "scale": null}]')
    preview = TrainConfig.parse(imported.text).preview
    assert (preview.prompts, preview.size, preview.cfg) == (("a cat",), (512, 512), 7.5)
    assert not any("previews" in text for text in imported.ledger.differences)


@pytest.mark.parametrize("empty", ['{"seed": 3}', '{"prompt": null}', '{"prompt": "  ", "width": 64}'])
def test_an_entry_without_a_text_is_left_out_with_a_note(empty: str, tmp_path: Path) -> None:
    imported = imported_prompts(tmp_path, "p.json", f'[{empty}, {{"prompt": "a cat", "seed": 5, "width": 768}}]')
    preview = TrainConfig.parse(imported.text).preview
    assert (preview.prompts, preview.seed, preview.size) == (("a cat",), 5, (768, 512))
    notes = [text for text in imported.ledger.differences if "previews" in text]
    assert notes == ["previews: of 2 entries of `sample_prompts`, 1 without a text are left out"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.json", '[{"negative_prompt": "a"}]'),
        ("p.toml", "[prompt]\nwidth = 512\n[[prompt.subset]]\nseed = 1"),
        ("p.json", '{"prompt": "a cat"}'),
        ("p.json", '"a cat"'),
        ("p.json", "[" * 100_000),
    ],
    ids=["no text", "no text in TOML", "no list", "only a text", "nested"],
)
def test_a_file_of_no_prompts_has_no_equal(name: str, content: str, tmp_path: Path) -> None:
    imported = imported_prompts(tmp_path, name, content)
    assert not TrainConfig.parse(imported.text).preview.prompts
    assert "write `preview.prompts`" in imported.ledger.without_equal["sample_prompts"]


@pytest.mark.parametrize("name", ["network_args", "optimizer_args", "lr_scheduler_args"])
@pytest.mark.parametrize("value", [5, 1.5, True, {"a": 1}, [5], [None]])
def test_a_list_of_arguments_that_is_none_is_told_with_its_name(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"`{name}` holds .*; expected texts like"):
        import_gui(tmp_path, {name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("max_resolution", value) for value in ("nan", "inf", "512,1e999", HUGE, [HUGE])),
        *((name, HUGE) for name in ("network_dim", "train_batch_size", "unet_lr", "clip_skip", "seed")),
        *((name, HUGE) for name in ("min_snr_gamma", "max_data_loader_n_workers", "lr_warmup", "text_encoder_lr")),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_number_that_no_float_holds_is_told_with_its_name(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"`{name}"):
        import_gui(tmp_path, {name: value})


@pytest.mark.parametrize("name", sorted({*GUI, *NETWORK_ARGUMENTS}))
def test_no_setting_of_kohya_ss_is_too_large_to_be_told_about(name: str, tmp_path: Path) -> None:
    try:
        import_gui(tmp_path, {name: HUGE, "LoRA_type": "LyCORIS/LoKr"})
    except ConfigError as error:
        assert f"`{name}" in str(error)


def import_gui(folder: Path, changes: dict[str, Any]) -> None:
    path = folder / "theirs.json"
    path.write_text(json.dumps(GUI | {"train_data_dir": "pictures"} | changes), encoding="utf-8")
    import_settings(path)

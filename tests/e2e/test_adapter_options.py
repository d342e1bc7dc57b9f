"""What `[adapter]` and its neighbours say about adapters happens in a run, and again when the run is resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_diffusion.adapters.base import Adapter, Dropout
from lora_diffusion.adapters.kinds import ADAPTERS, adapter_from_tensors
from lora_diffusion.config import TrainConfig
from lora_diffusion.errors import UserError
from lora_diffusion.formats.adapter_file import AdapterFile
from lora_diffusion.formats.metadata import MINIMUM_KEYS
from lora_diffusion.models.load import load_model
from lora_diffusion.recipe_base import load_base
from lora_diffusion.training.trainer import Trainer
from tests.random_adapters import random_adapter
from tests.training_runs import draw_pictures, launch, prepare, tensor_hash, write_config

CPU = torch.device("cpu")
Write = Callable[..., Path]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_pictures(tmp_path_factory.mktemp("data") / "pictures", count=5)


@pytest.fixture
def write(tiny_sd1: Path, pictures: Path, tmp_path: Path) -> Write:
    """Writes the config of a run of four steps into a folder of that name."""

    def write_named(name: str = "run", **sections: Any) -> Path:
        (tmp_path / name).mkdir(exist_ok=True)
        run = {"steps": 4, "save_precision": "fp32"} | sections.pop("run", {})
        schedule = {"name": "constant", "warmup_steps": 0}
        cache = {"folder": str(tmp_path / "cache")}
        sections = {"schedule": schedule, "cache": cache} | sections
        return write_config(tmp_path / name / "run.toml", tiny_sd1, pictures, run=run, **sections)

    return write_named


def adapters_of(trainer: Trainer, part: str = "unet") -> dict[str, Adapter]:
    return dict(trainer.exporter.adapters.get(part, {}))


def live_tensors(trainer: Trainer, start: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in trainer.exporter.tensors().items() if name.startswith(start)}


def train_until(trainer: Trainer, step: int) -> None:
    """Ask for a stop as soon as `step` is done, as a signal would."""
    do_what_is_due = trainer.do_what_is_due

    def stop_when_due() -> None:
        do_what_is_due()
        if trainer.step == step:
            trainer.stop.reason = "test"

    trainer.do_what_is_due = stop_when_due
    trainer.fit()
    assert trainer.step == step


def metrics_of(trainer: Trainer) -> list[dict[str, float]]:
    return [json.loads(line) for line in trainer.run.metrics.read_text().splitlines()]


# Patterns


def test_patterns_decide_rank_alpha_and_learning_rate_layer_by_layer(write: Write) -> None:
    config = write(
        adapter={
            "rank": 4,
            "alpha": 2.0,
            "rank_pattern": {r"mid_block.*to_q$": 2, r"mid_block": 6},
            "alpha_pattern": {r"attn2\.to_k$": 5.0},
            "lr_pattern": {r"^up_blocks": 0.5, r"to_v$": 3.0},
        },
        optimizer={"lr": 1e-3},
    )
    trainer = prepare(config)
    peaks = {
        id(parameter): group["peak_lr"] for group in trainer.optimizer.param_groups for parameter in group["params"]
    }
    adapters = adapters_of(trainer)
    assert len(adapters) > 50
    for path, adapter in adapters.items():
        in_middle = path.startswith("mid_block")
        rank = 2 if in_middle and path.endswith("to_q") else 6 if in_middle else 4
        alpha = 5.0 if path.endswith("attn2.to_k") else 2.0 * rank / 4
        factor = 0.5 if path.startswith("up_blocks") else 3.0 if path.endswith("to_v") else 1.0
        assert (adapter.rank, adapter.alpha) == (rank, alpha)
        assert {peaks[id(parameter)] for parameter in adapter.trained()} == {1e-3 * factor}
    assert trainer.optimizer.param_groups[0]["peak_lr"] == 1e-3, "the one that is logged"
    before = {path: adapter.delta() for path, adapter in adapters.items()}
    file = AdapterFile.read(trainer.fit())
    # In the middle a picture is one latent, which attends to itself whatever queries and keys are.
    learning = [path for path in adapters if not (path.startswith("mid_block") and "attn1" in path)]
    assert all(not torch.equal(adapters[path].delta(), before[path]) for path in learning)
    assert {geometry.rank for geometry in file.geometries.values()} == {2, 4, 6}


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern", "lr_pattern"])
def test_a_pattern_that_finds_nothing_is_an_error(write: Write, name: str) -> None:
    with pytest.raises(UserError, match=rf"\[adapter\] {name}: 'midblock' is found in none of the \d+ layers"):
        prepare(write(adapter={name: {"to_q": 1, "midblock": 2}}))


def test_learning_rate_0_leaves_a_layer_without_adapter(write: Write) -> None:
    trainer = prepare(write(adapter={"lr_pattern": {"^mid_block": 0.0}}))
    assert not any(path.startswith("mid_block") for path in adapters_of(trainer))
    middle = trainer.loss.model.parts["unet"].module.get_submodule("mid_block")
    assert not any(isinstance(module, Adapter) for module in middle.modules())
    assert len(AdapterFile.read(trainer.fit()).modules) == len(adapters_of(trainer)) > 50


def test_a_run_that_trains_nothing_is_an_error(write: Write) -> None:
    everywhere = {"lr_pattern": {"_blocks?[.]": 0.0}}
    with pytest.raises(UserError, match="lr_pattern: every layer has learning rate 0"):
        prepare(write(adapter=everywhere))
    both = {"text_encoder": True, **everywhere}
    with pytest.raises(UserError, match=r"text_encoder_steps: .*nothing would be trained after that step"):
        prepare(write(adapter=both, optimizer={"text_encoder_steps": 2}))
    trainer = prepare(write(adapter=both))
    assert all(name.startswith("lora_te_") for name in AdapterFile.read(trainer.fit()).modules)


def test_rslora_acts_and_is_written_with_alpha_over_the_root_of_the_rank(write: Write) -> None:
    settings = {"rank": 4, "alpha": 3.0, "rslora": True, "rank_pattern": {"mid_block": 9}}
    trainer = prepare(write(adapter=settings))
    for path, adapter in adapters_of(trainer).items():
        rank = 9 if path.startswith("mid_block") else 4
        # alpha follows the rank, 3 / 4 of it
        assert adapter.scale == pytest.approx(0.75 * rank / rank**0.5)
    file = AdapterFile.read(trainer.fit())
    attachment = file.attach(trainer.loss.model.parts)
    assert len(attachment.matches) == len(adapters_of(trainer))
    for match in attachment.matches:
        ours = adapters_of(trainer)[match.path].delta()
        theirs = adapter_from_tensors(match.layer, match.tensors).delta()
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-8)


def test_plain_rslora_has_the_alpha_that_other_programs_divide_by_the_rank(write: Write) -> None:
    trainer = prepare(write(adapter={"rank": 8, "alpha": 3.0, "rslora": True}))
    file = AdapterFile.read(trainer.fit())
    alpha = torch.tensor(3.0 * 8**0.5).item()
    assert {parts["alpha"].item() for parts in file.modules.values()} == {alpha}
    assert float(file.metadata["ss_network_alpha"]) == pytest.approx(alpha)


def test_a_layer_too_small_for_the_start_is_named(write: Write) -> None:
    with pytest.raises(UserError, match=r"unet\.\S+: rank is 20, but a layer of 8 x .*adapter\.rank_pattern"):
        prepare(write(adapter={"rank": 20, "init": "pissa"}))
    settings = {"rank": 20, "init": "pissa", "rank_pattern": {r"blocks\.[03]\.|mid_block|blocks\.\d": 4}}
    assert {adapter.rank for adapter in adapters_of(prepare(write(adapter=settings))).values()} == {4}


# Text encoders


def test_learning_rate_0_of_the_text_encoder_leaves_it_alone(write: Write) -> None:
    adapter, optimizer = {"text_encoder": True}, {"lr": 1e-3, "text_encoder_lr": 0.0}
    trainer = prepare(write(adapter=adapter, optimizer=optimizer))
    assert adapters_of(trainer, "text_encoder") == {}
    trainer.fit()
    default = prepare(write("default", adapter=adapter, optimizer={"lr": 1e-3}))
    assert {group["peak_lr"] for group in default.optimizer.param_groups} == {1e-3, 5e-4}
    assert len(adapters_of(default, "text_encoder")) == 8


def test_a_second_text_encoder_that_the_model_lacks_is_an_error(write: Write) -> None:
    with pytest.raises(UserError, match=r"text_encoder_2_lr: \S+ has one text encoder only"):
        prepare(write(adapter={"text_encoder": True}, optimizer={"text_encoder_2_lr": 1e-4}))


@pytest.mark.parametrize("adapter", [{}, {"max_norm": 0.01}, {"dropout": 0.3}, {"kind": "dora"}])
def test_text_encoder_stops_at_its_last_step_while_the_unet_goes_on(write: Write, adapter: dict[str, Any]) -> None:
    sections: dict[str, Any] = {
        "run": {"steps": 6},
        "adapter": {"text_encoder": True} | adapter,
        "optimizer": {"lr": 3e-3, "text_encoder_steps": 3, "weight_decay": 0.1},
    }
    whole = prepare(write("whole", **sections))
    at: dict[int, dict[str, Tensor]] = {}
    end_step = whole.end_step

    def remember(*arguments: Any) -> None:
        end_step(*arguments)
        at[whole.step] = whole.exporter.tensors()

    whole.end_step = remember
    expected = tensor_hash(whole.fit())
    text = [name for name in at[1] if name.startswith("lora_te_")]
    unet = [name for name in at[1] if name.startswith("lora_unet_") and "lora_up" in name]
    assert len(text) >= 16 and len(unet) > 50
    assert any(not torch.equal(at[2][name], at[3][name]) for name in text)
    assert all(torch.equal(at[3][name], at[step][name]) for name in text for step in (4, 5, 6))
    for step in (4, 5, 6):
        assert any(not torch.equal(at[step - 1][name], at[step][name]) for name in unet)

    config = write("parts", **sections)
    train_until(prepare(config), 2)
    train_until(prepare(config, resume=True), 4)
    assert tensor_hash(prepare(config, resume=True).fit()) == expected


# Dropout

DROPOUTS = [
    {"dropout": 0.4},
    {"rank_dropout": 0.4},
    {"module_dropout": 0.4},
    {"dropout": 0.2, "rank_dropout": 0.2, "module_dropout": 0.2, "kind": "dora"},
    {"module_dropout": 0.4, "kind": "loha"},
    {"module_dropout": 0.4, "kind": "lokr"},
]


@pytest.mark.parametrize("settings", DROPOUTS, ids=lambda settings: " ".join(settings))
def test_dropout_is_repeated_by_a_resumed_run_and_by_gradient_checkpointing(
    write: Write, settings: dict[str, Any]
) -> None:
    run = {"gradient_accumulation": 2, "steps": 2}
    plain = prepare(write("plain", adapter={"kind": settings.get("kind", "lora")}, run=run))
    plain_hash = tensor_hash(plain.fit())
    whole = prepare(write("whole", adapter=settings, run=run))
    expected = tensor_hash(whole.fit())
    assert expected != plain_hash
    # the first step starts without effect, whatever is dropped; later ones are not the same
    assert metrics_of(whole)[0]["loss"] == metrics_of(plain)[0]["loss"]
    assert metrics_of(whole)[-1]["loss"] != metrics_of(plain)[-1]["loss"]

    checkpointed = write("checkpointed", adapter=settings, run=run, model={"gradient_checkpointing": True})
    assert tensor_hash(prepare(checkpointed).fit()) == expected
    config = write("parts", adapter=settings, run=run)
    train_until(prepare(config), 1)
    assert tensor_hash(prepare(config, resume=True).fit()) == expected


def test_nothing_is_dropped_in_validation_and_previews(write: Write) -> None:
    dropping = {"dropout": 0.5, "rank_dropout": 0.5, "module_dropout": 0.5}
    trainer = prepare(
        write(
            adapter=dropping,
            validation={"every": 4, "fraction": 0.3},
            preview={"prompts": ["a cat"], "steps": 2, "every": 0},
            optimizer={"lr": 1e-2},
        )
    )
    trainer.fit()
    assert trainer.validator is not None
    losses, drawings = [], []
    for dropout in (Dropout(0.5, 0.5, 0.5), Dropout()):
        for adapter in adapters_of(trainer).values():
            assert adapter.dropout_seed is None
            adapter.dropout = dropout
        losses.append(trainer.validator.measure(trainer.loss, CPU))
        trainer.previewer.draw(9)
        drawings.append({p.name: p.read_bytes() for p in trainer.run.previews.rglob("*.png") if "9" in p.name})
    assert losses[0] == losses[1] == metrics_of(trainer)[-1]["val_loss"]
    assert drawings[0] == drawings[1] != {}


def test_a_batch_never_loses_all_its_adapters(write: Write) -> None:
    """It would have no gradient: with one layer, every second batch."""
    config = write(
        run={"steps": 8},
        adapter={"targets": [r"mid_block.*attn2\.to_q$"], "module_dropout": 0.9, "text_encoder": True},
        optimizer={"text_encoder_steps": 4},
    )
    trainer = prepare(config)
    (adapter,) = adapters_of(trainer).values()
    seeds = []
    for step in range(100):
        with trainer.regulariser.dropout(step, 0):
            assert not adapter.is_dropped()
            seeds.append(adapter.dropout_seed)
        assert adapter.dropout_seed is None
    assert 80 < seeds.count(None) < 100, "kept in about 90 of 100 batches, by chance in the others"
    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in metrics_of_fit(trainer))


def metrics_of_fit(trainer: Trainer) -> list[dict[str, float]]:
    trainer.fit()
    lines = metrics_of(trainer)
    assert len(lines) == trainer.plan.steps
    return lines


@pytest.mark.slow
def test_two_processes_train_with_module_dropout(write: Write, tmp_path: Path) -> None:
    config = write(
        adapter={"module_dropout": 0.5, "text_encoder": True}, optimizer={"text_encoder_steps": 2}, run={"steps": 3}
    )
    process = launch(config, launcher=("--cpu", "--num_processes", "2", "--num_machines", "1"))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    file = AdapterFile.read(tmp_path / "run" / "run" / "test.safetensors")
    trained = sum(bool(parts["lora_up.weight"].any()) for parts in file.modules.values())
    # 1 of 64 adapters is dropped in all three steps of both processes
    assert trained > 0.8 * len(file.modules)


# Limits


@pytest.mark.parametrize("kind", ADAPTERS)
def test_no_change_is_larger_than_the_limit(write: Write, kind: str) -> None:
    sections: dict[str, Any] = {"optimizer": {"lr": 1e-2}, "run": {"steps": 5}}
    free = prepare(write("free", adapter={"kind": kind}, **sections))
    free.fit()
    assert all("norms_limited" not in line for line in metrics_of(free))
    limit = 0.5 * max(adapter.delta_norm().item() for adapter in adapters_of(free).values())
    trainer = prepare(write("limited", adapter={"kind": kind, "max_norm": limit}, **sections))
    trainer.fit()
    norms = [adapter.delta_norm().item() for adapter in adapters_of(trainer).values()]
    assert len(norms) > 50
    assert max(norms) <= limit
    limited = [line["norms_limited"] for line in metrics_of(trainer)]
    assert all(0 <= count <= len(norms) for count in limited)
    assert limited[-1] >= sum(norm > 0.999 * limit for norm in norms) > 0


# Starting from a file


@pytest.mark.parametrize(
    "settings",
    [
        *({"kind": kind} for kind in ADAPTERS),
        {"alpha": 0.1},
        {"rslora": True, "rank": 5, "alpha": 3.0},
        {"rank_pattern": {"mid_block": 3, "fc1|to_k": 2}, "text_encoder": True},
        {"alpha_pattern": {"to_q": 7.0, "k_proj": 0.3}, "text_encoder": True, "rslora": True},
    ],
    ids=str,
)
def test_a_run_that_starts_from_its_own_file_goes_on_exactly_from_there(write: Write, settings: dict[str, Any]) -> None:
    first = prepare(write("first", adapter=settings, optimizer={"lr": 1e-2}))
    path = first.fit()
    second = prepare(write("second", adapter=settings | {"start_from": str(path)}, run={"steps": 2}))
    assert second.step == 0
    for part in ("unet", "text_encoder"):
        before, after = adapters_of(first, part), adapters_of(second, part)
        assert before.keys() == after.keys()
        for name, adapter in before.items():
            # alphas of a pattern pass through the factors: one float32 rounding
            torch.testing.assert_close(after[name].delta(), adapter.delta(), rtol=1e-5, atol=1e-8)
    expected = tensor_hash(second.fit())

    # A resume takes the checkpoint's weights: the file may be gone.
    config = write("parts", adapter=settings | {"start_from": str(path)}, run={"steps": 2})
    train_until(prepare(config), 1)
    path.unlink()
    assert tensor_hash(prepare(config, resume=True).fit()) == expected


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"rank": 3}, r"holds a lora of rank 4 and alpha 4 .*asks for a lora of rank 3 and alpha 3"),
        ({"alpha": 2.0}, r"rank 4 and alpha 4 .*asks for a lora of rank 4 and alpha 2"),
        ({"kind": "dora"}, r"holds a lora .*asks for a dora"),
        ({"kind": "loha"}, r"holds a lora .*asks for a loha"),
        ({"targets": ["mid_block.*to_q$"]}, r"also changes \d+ layers that this config does not train, such as unet\."),
    ],
    ids=str,
)
def test_a_file_of_another_shape_is_no_start(write: Write, settings: dict[str, Any], told: str) -> None:
    path = prepare(write("first", adapter={"rank": 4})).fit()
    adapter = {"rank": 4, "alpha": float(settings.get("rank", 4)), "start_from": str(path)}
    with pytest.raises(UserError, match=told) as caught:
        prepare(write("second", adapter=adapter | settings))
    assert str(path) in str(caught.value)


def test_layers_that_the_file_lacks_start_afresh(write: Write) -> None:
    path = prepare(write("first", adapter={"targets": ["mid_block.*to_v$"]}, optimizer={"lr": 1e-2})).fit()
    trainer = prepare(write("second", adapter={"start_from": str(path)}))
    changed = {name for name, adapter in adapters_of(trainer).items() if adapter.delta().any()}
    assert changed == {name for name in adapters_of(trainer) if name.startswith("mid_block") and name.endswith("to_v")}
    assert len(changed) == 2


# Merging into the base


def test_training_sees_the_base_with_merged_adapters(write: Write, tiny_sd1: Path, tmp_path: Path) -> None:
    base = load_model(tiny_sd1)
    files = {}
    for seed, (name, strength) in enumerate({"a": 0.7, "b": -0.4}.items()):
        path = tmp_path / f"{name}.safetensors"
        random_adapter(base, seed=seed, parts=("unet", "text_encoder"), targets="full").write(path, dtype=torch.float32)
        files[path] = strength
    merge = [f"{path}:{strength}" for path, strength in files.items()]
    config = write(model={"merge": merge})

    expected = {part: component.module.state_dict() for part, component in base.parts.items()}
    for path, strength in files.items():
        for match in AdapterFile.read(path).attach(base.parts).matches:
            weight = expected[match.part][f"{match.path}.weight"]
            up, down = match.tensors["lora_up.weight"], match.tensors["lora_down.weight"]
            change = (up.flatten(1).double() @ down.flatten(1).double()).reshape(weight.shape)
            weight += (strength * match.tensors["alpha"] / up.shape[1] * change).float()
    merged = load_base(TrainConfig.load(config), torch.float32, CPU)
    for part, weights in expected.items():
        own = merged.parts[part].module.state_dict()
        assert own.keys() == weights.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(own[name], weight, rtol=0, atol=1e-6)  # float32 sums of weights of size 1

    trainer = prepare(config)
    plain = prepare(write("plain"))
    assert trainer.text is not None and plain.text is not None
    with torch.no_grad():
        hidden = merged.encode_text(["a red cat"]).hidden[0]
    torch.testing.assert_close(trainer.text.get("a red cat")["hidden"], hidden, rtol=1e-5, atol=1e-5)
    unmerged = plain.text.get("a red cat")["hidden"]
    assert (unmerged - hidden).abs().max() > 0.1, "captions are not taken from another base's cache"
    comment = AdapterFile.read(trainer.fit()).metadata["ss_training_comment"]
    assert comment == "for a base with a.safetensors:0.7, b.safetensors:-0.4 merged in"
    assert not any(isinstance(module, Adapter) for module in merged.modules())


def test_a_resume_wants_the_same_content_in_the_merged_files(write: Write, tiny_sd1: Path, tmp_path: Path) -> None:
    model, path = load_model(tiny_sd1), tmp_path / "a.safetensors"
    random_adapter(model, seed=1).write(path)
    content = path.read_bytes()
    config = write(model={"merge": [str(path)]})
    train_until(prepare(config), 2)
    random_adapter(model, seed=2).write(path)
    with pytest.raises(UserError, match=r"model\.merge: the content of an adapter file .* changed"):
        prepare(config, resume=True)
    path.write_bytes(content)
    assert prepare(config, resume=True).step == 2


def test_a_merged_file_with_modules_that_the_base_lacks_is_refused(
    write: Write, tiny_sd1: Path, tmp_path: Path
) -> None:
    file = random_adapter(load_model(tiny_sd1), seed=1)
    parts = next(iter(file.modules.values()))
    AdapterFile({**file.modules, "lora_unet_down_blocks_9_attentions_0_proj_in": parts}).write(tmp_path / "a")
    with pytest.raises(UserError, match=r"1 of its \d+ modules do not exist in this base .*down_blocks_9"):
        prepare(write(model={"merge": [str(tmp_path / "a")]}))


# Files


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def test_peft_format_is_what_the_option_says(write: Write) -> None:
    trainer = prepare(write(run={"save_format": "peft"}, adapter={"text_encoder": True, "alpha": 2.0}))
    path = trainer.fit()
    assert all(key.startswith(("unet.", "text_encoder.")) for key in load_file(path))
    config = json.loads(metadata_of(path)["lora_adapter_metadata"])
    assert (config["unet.r"], config["unet.lora_alpha"], config["text_encoder.lora_alpha"]) == (4, 2.0, 2.0)
    file = AdapterFile.read(path)
    assert file.format == "peft"
    for match in file.attach(trainer.loss.model.parts).matches:
        ours = adapters_of(trainer, match.part)[match.path].delta()
        torch.testing.assert_close(adapter_from_tensors(match.layer, match.tensors).delta(), ours)


def test_minimal_metadata_tells_nothing_about_the_data_or_the_settings(write: Write, pictures: Path) -> None:
    hashes = {"sshs_model_hash", "sshs_legacy_hash"}
    metadata = metadata_of(prepare(write(run={"metadata": "minimal"})).fit())
    assert len(MINIMUM_KEYS) == 6
    assert metadata.keys() == {*MINIMUM_KEYS, "format"} | hashes
    full = metadata_of(prepare(write("full")).fit())
    assert full.keys() > metadata.keys() | {"ss_dataset_dirs", "ss_learning_rate", "modelspec.title"}
    assert pictures.name in full["ss_dataset_dirs"]
    assert not any(str(pictures.parent) in text for text in full.values())
    peft = metadata_of(prepare(write("peft", run={"metadata": "minimal", "save_format": "peft"})).fit())
    assert peft.keys() == {"ss_v2", "ss_base_model_version", "lora_adapter_metadata", "format"} | hashes


def test_format_and_metadata_of_the_file_may_change_on_resume(write: Write) -> None:
    train_until(prepare(write()), 2)
    trainer = prepare(write(run={"save_format": "peft", "metadata": "minimal"}), resume=True)
    assert trainer.step == 2
    assert AdapterFile.read(trainer.fit()).format == "peft"


# Every kind

KINDS = [
    {"kind": "lora"},
    {"kind": "lora", "init": "gaussian"},
    {"kind": "lora", "init": "pissa"},
    {"kind": "lora", "init": "olora"},
    {"kind": "dora"},
    {"kind": "dora", "init": "pissa"},
    {"kind": "loha"},
    {"kind": "lokr"},
    {"kind": "lokr", "lokr_factor": 2, "rank": 1},
]


@pytest.mark.parametrize("settings", KINDS, ids=lambda settings: " ".join(map(str, settings.values())))
def test_every_kind_learns_and_resumes_bit_for_bit(write: Write, settings: dict[str, Any]) -> None:
    sections: dict[str, Any] = {
        "run": {"steps": 10, "batch_size": 4},
        "adapter": {"alpha": 4.0} | settings,
        "optimizer": {"lr": 3e-3},
        "validation": {"every": 10, "fraction": 0.3},
    }
    if settings.get("init") in ("pissa", "olora"):
        sections["adapter"] |= {"rank_pattern": {".": 2}}  # the tiny base's layers are small
    whole = prepare(write("whole", **sections))
    assert whole.validator is not None
    before = whole.validator.measure(whole.loss, CPU)
    path = whole.fit()
    assert whole.validator.measure(whole.loss, CPU) < before
    assert AdapterFile.read(path).kinds.keys() == {settings["kind"]}

    config = write("parts", **sections)
    train_until(prepare(config), 4)
    assert tensor_hash(prepare(config, resume=True).fit()) == tensor_hash(path)


@pytest.mark.parametrize("settings", KINDS, ids=lambda settings: " ".join(map(str, settings.values())))
def test_the_file_of_a_run_on_the_untouched_base_is_the_trained_model(
    write: Write, tiny_sd1: Path, settings: dict[str, Any]
) -> None:
    rank = {"rank_pattern": {".": 2}} if settings.get("init") in ("pissa", "olora") else {}
    trainer = prepare(write(adapter={"targets": "full"} | settings | rank, optimizer={"lr": 3e-3}))
    file = AdapterFile.read(trainer.fit())
    fresh = load_model(tiny_sd1)
    latents, time = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(0)), torch.tensor([300, 700])
    text = fresh.encode_text(["a red cat", ""])
    with torch.no_grad():
        untouched = fresh.predict(latents, time, text)
        expected = trainer.loss.model.predict(latents, time, text)
        for match in file.attach(fresh.parts).matches:
            assert isinstance(match.layer, nn.Linear | nn.Conv2d)
            match.layer.weight += adapter_from_tensors(match.layer, match.tensors).delta()
        found = fresh.predict(latents, time, text)
    assert (expected - untouched).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_weight_decay_leaves_magnitudes_alone(write: Write) -> None:
    trainer = prepare(write(adapter={"kind": "dora"}, optimizer={"weight_decay": 0.3}))
    decays = {
        id(parameter): group["weight_decay"]
        for group in trainer.optimizer.param_groups
        for parameter in group["params"]
    }
    for adapter in adapters_of(trainer).values():
        for name, parameter in adapter.named_parameters():
            if parameter.requires_grad:
                assert decays[id(parameter)] == (0.0 if name == "dora_scale" else 0.3)


def test_a_checkpoint_of_another_rank_pattern_is_refused(write: Write) -> None:
    train_until(prepare(write()), 2)
    with pytest.raises(UserError, match=r"adapter\.rank_pattern"):
        prepare(write(adapter={"rank_pattern": {"to_q": 2}}), resume=True)

"""Files of every kind and spelling: what is written is what was in memory, and others' files mean what they meant."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_diffusion.adapters.base import Adapter
from lora_diffusion.adapters.inject import inject, merge, select_layers
from lora_diffusion.adapters.kinds import ADAPTERS, adapter_from_tensors
from lora_diffusion.adapters.lora import LoRA
from lora_diffusion.formats.adapter_file import AdapterFile, AdapterFileError
from lora_diffusion.formats.names import peft_name, split_kohya_name
from lora_diffusion.ldm_names import unet_to_ldm
from lora_diffusion.models.base import DiffusionModel
from lora_diffusion.models.load import load_model
from lora_diffusion.streams import stream
from tests.tiny import make_tiny_sd1

PARTS = ("unet", "text_encoder")
NUM_MODULES = 277 + 12  # of the tiny base, which has one shortcut less than SD 1.5
Live = dict[str, dict[str, Adapter]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_sd1(tmp_path_factory.mktemp("base"), layers_per_block=2)


@pytest.fixture(scope="module")
def model(folder: Path) -> DiffusionModel:
    return load_model(folder)


def live(model: DiffusionModel, kind: str, *, targets: str = "full", mixed: bool = False, **options: Any) -> Live:
    """Random adapters for all layers, which stay as they are. mixed: ranks and alphas differ from layer to layer."""
    adapters: Live = {}
    for part in PARTS:
        adapters[part] = {}
        for index, (path, layer) in enumerate(select_layers(model.parts[part].module, targets).items()):
            rank, alpha = (1 + index % 3, 1.0 + index % 5) if mixed else (2, 3.0)
            adapter = ADAPTERS[kind](layer, rank, alpha, generator=stream(0, path), **options)
            with torch.no_grad():
                for parameter in adapter.trained():
                    noise = torch.randn(parameter.shape, generator=stream(1, path, *parameter.shape))
                    parameter.add_(0.1 * noise)
            adapters[part][path] = adapter
    return adapters


def deltas(file: AdapterFile, model: DiffusionModel) -> dict[str, Tensor]:
    """What the file adds to each weight, by part and path."""
    attachment = file.attach(model.parts)
    assert attachment.unread == ()
    found = {f"{m.part}.{m.path}": adapter_from_tensors(m.layer, m.tensors).delta() for m in attachment.matches}
    return {name: delta.detach() for name, delta in found.items()}


def live_deltas(adapters: Live) -> dict[str, Tensor]:
    return {f"{part}.{path}": a.delta().detach() for part, group in adapters.items() for path, a in group.items()}


def assert_same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert first
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-6, rtol=1e-5)  # float32 products


def same_modules(first: AdapterFile, second: AdapterFile) -> bool:
    return first.modules.keys() == second.modules.keys() and all(
        parts.keys() == second.modules[name].keys()
        and all(torch.equal(parts[p], second.modules[name][p]) for p in parts)
        for name, parts in first.modules.items()
    )


@pytest.mark.parametrize("kind", ADAPTERS)
def test_every_kind_reads_back_bit_for_bit(model: DiffusionModel, tmp_path: Path, kind: str) -> None:
    adapters = live(model, kind)
    file = AdapterFile.collect(model.parts, adapters, family="sd1")
    path = tmp_path / "a.safetensors"
    file.write(path, dtype=torch.float32)
    again = AdapterFile.read(path)
    assert same_modules(again, file)
    assert again.kinds == {kind: NUM_MODULES}
    assert (again.format, again.unread, again.notes) == ("kohya", (), ())
    exact = live_deltas(adapters)
    assert all(torch.equal(delta, exact[name]) for name, delta in deltas(again, model).items())
    assert len(exact) == NUM_MODULES
    assert any(layer.base.weight.ndim == 4 for layer in adapters["unet"].values())
    again.write(tmp_path / "b.safetensors", dtype=torch.float32)
    assert load_file(path).keys() == load_file(tmp_path / "b.safetensors").keys()


@pytest.mark.parametrize(
    ("kind", "module", "args"),
    [
        ("lora", "networks.lora", {}),
        ("dora", "lycoris.kohya", {"algo": "locon", "dora_wd": "True", "wd_on_output": "False"}),
        ("loha", "lycoris.kohya", {"algo": "loha"}),
        ("lokr", "lycoris.kohya", {"algo": "lokr"}),
    ],
)
def test_metadata_names_the_module_that_reads_the_kind(
    model: DiffusionModel, tmp_path: Path, kind: str, module: str, args: dict[str, str]
) -> None:
    file = AdapterFile.collect(model.parts, live(model, kind, targets="attention"), family="sd1")
    file.write(tmp_path / "a.safetensors")
    metadata = AdapterFile.read(tmp_path / "a.safetensors").metadata
    assert metadata["ss_network_module"] == module
    assert json.loads(metadata["ss_network_args"]) == args
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("2", "3.0")
    assert (metadata["ss_v2"], metadata["ss_base_model_version"]) == ("False", "sd_v1")


def test_adapters_are_written_in_half_precision_but_for_numbers_that_scale_a_whole_layer(
    model: DiffusionModel, tmp_path: Path
) -> None:
    AdapterFile.collect(model.parts, live(model, "dora")).write(tmp_path / "a.safetensors")
    dtypes: dict[str, set[torch.dtype]] = {}
    for key, tensor in load_file(tmp_path / "a.safetensors").items():
        dtypes.setdefault(key.partition(".")[2], set()).add(tensor.dtype)
    assert dtypes == {
        "lora_down.weight": {torch.float16},
        "lora_up.weight": {torch.float16},
        "alpha": {torch.float32},
        "dora_scale": {torch.float32},
    }


def test_one_file_may_hold_several_kinds(model: DiffusionModel, tmp_path: Path) -> None:
    by_kind = {kind: live(model, kind, targets="attention-mlp") for kind in ADAPTERS}
    names = list(ADAPTERS)
    adapters = {
        part: {path: by_kind[names[i % 4]][part][path] for i, path in enumerate(by_kind["lora"][part])}
        for part in PARTS
    }
    AdapterFile.collect(model.parts, adapters).write(tmp_path / "a.safetensors", dtype=torch.float32)
    again = AdapterFile.read(tmp_path / "a.safetensors")
    assert again.kinds == {kind: 51 for kind in ADAPTERS}
    assert_same(deltas(again, model), live_deltas(adapters))


# Mixed ranks and alphas


@pytest.mark.parametrize("format", ["kohya", "peft"])
def test_mixed_ranks_and_alphas_read_back_as_the_same_change(
    model: DiffusionModel, tmp_path: Path, format: Any
) -> None:
    adapters = live(model, "lora", mixed=True)
    file = AdapterFile.collect(model.parts, adapters)
    file.write(tmp_path / "a.safetensors", format=format, dtype=torch.float32)
    again = AdapterFile.read(tmp_path / "a.safetensors")
    assert again.format == format
    assert {geometry.rank for geometry in again.geometries.values()} == {1, 2, 3}
    assert_same(deltas(again, model), live_deltas(adapters))


@pytest.mark.parametrize("format", ["kohya", "peft"])
def test_mixed_alphas_of_a_file_are_written_as_they_are(model: DiffusionModel, tmp_path: Path, format: Any) -> None:
    modules = {
        model.parts[part].file_name(path): adapter.tensors()
        for part, group in live(model, "lora", mixed=True).items()
        for path, adapter in group.items()
    }
    file = AdapterFile(modules)
    assert len({parts["alpha"].item() for parts in modules.values()}) == 5
    file.write(tmp_path / "a.safetensors", format=format, dtype=torch.float32)
    assert same_modules(AdapterFile.read(tmp_path / "a.safetensors"), file)


def test_trained_adapters_get_one_alpha_for_each_component(model: DiffusionModel) -> None:
    """Of differing ones diffusers takes the most frequent for text encoders and attention layers."""
    adapters = live(model, "lora", mixed=True)
    for part, prefix in (("unet", "lora_unet_"), ("text_encoder", "lora_te_")):
        assert len({adapter.alpha for adapter in adapters[part].values()}) == 5
        file = AdapterFile.collect(model.parts, adapters)
        assert len({parts["alpha"].item() for name, parts in file.modules.items() if name.startswith(prefix)}) == 1
        assert_same(deltas(file, model), live_deltas(adapters))


@pytest.mark.parametrize("format", ["kohya", "peft"])
def test_diffusers_fuses_the_same_weights_as_merging_here(folder: Path, tmp_path: Path, format: Any) -> None:
    model = load_model(folder)
    adapters = live(model, "lora", mixed=True)
    AdapterFile.collect(model.parts, adapters).write(tmp_path / "a.safetensors", format=format, dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in model.unet.state_dict().items()}
    for part in PARTS:
        module = model.parts[part].module
        layers = {path: adapter.base for path, adapter in adapters[part].items()}
        merge(module, inject(module, layers, lambda path, _, part=part: adapters[part][path]))

    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.load_lora_weights(tmp_path, weight_name="a.safetensors")
    pipeline.fuse_lora(components=list(PARTS))
    pipeline.unload_lora_weights()
    for part in PARTS:
        ours, theirs = model.parts[part].module.state_dict(), getattr(pipeline, part).state_dict()
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(
                ours[name], theirs[name], atol=1e-6, rtol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )
    assert sum(not torch.equal(before[name], tensor) for name, tensor in model.unet.state_dict().items()) == 277


def test_peft_files_refuse_what_peft_cannot_hold(model: DiffusionModel, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for kind in ("loha", "lokr"):
        file = AdapterFile.collect(model.parts, live(model, kind, targets="attention"))
        with pytest.raises(AdapterFileError, match=f"PEFT files hold LoRA only, not {kind}"):
            file.write(path, format="peft")
    file = AdapterFile.collect(model.parts, live(model, "dora", targets="attention"))
    with pytest.raises(AdapterFileError, match=r"magnitudes per input.*Keep the kohya format"):
        file.write(path, format="peft")
    assert not path.exists()


# Files of other programs


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank_pattern": {"attn1.to_q": 2}, "alpha_pattern": {"attn1.to_v": 5}},
        {"use_rslora": True},
        {"use_dora": True},
    ],
    ids=["plain", "patterns", "rsLoRA", "DoRA"],
)
@pytest.mark.parametrize("part", PARTS)
def test_a_folder_that_peft_saved_is_read_with_its_alpha(
    folder: Path, model: DiffusionModel, tmp_path: Path, part: str, options: dict[str, Any]
) -> None:
    """`adapter_model.safetensors` has no alpha; `adapter_config.json` beside it does. Its keys name no component."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    targets = ["to_q", "to_v", "conv1"] if part == "unet" else ["q_proj", "fc1"]
    if part == "text_encoder" and "rank_pattern" in options:
        options = {"rank_pattern": {"mlp.fc1": 2}}
    config = peft.LoraConfig(r=4, lora_alpha=3, target_modules=targets, init_lora_weights=False, **options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = peft.get_peft_model(getattr(pipeline, part), config)
    theirs.save_pretrained(tmp_path)
    file = AdapterFile.read(tmp_path / "adapter_model.safetensors")
    assert file.kinds.keys() == {"dora" if "use_dora" in options else "lora"}
    found = deltas(file, model)
    before = {n: p.detach().clone() for n, p in model.parts[part].module.named_parameters()}
    merged = theirs.merge_and_unload()
    expected = {
        f"{part}.{name.removesuffix('.weight')}": weight.detach() - before[name]
        for name, weight in merged.named_parameters()
        if not torch.equal(weight, before[name])
    }
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=2e-6, rtol=1e-4)  # of weights of size 1


def test_a_folder_of_peft_without_its_config_is_refused(model: DiffusionModel, tmp_path: Path) -> None:
    path = "base_model.model.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"{path}.lora_A.weight": torch.ones(2, 16), f"{path}.lora_B.weight": torch.ones(16, 2)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterFileError, match=r"its strength is in adapter_config\.json, which is not beside it"):
        AdapterFile.read(tmp_path / "adapter_model.safetensors")


def test_a_unets_own_lora_file_is_read(folder: Path, model: DiffusionModel, tmp_path: Path) -> None:
    """`unet.save_lora_adapter` of diffusers names no component either, and its metadata neither."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, lora_alpha=3, target_modules=["to_q", "conv2"], init_lora_weights=False)
        pipeline.unet.add_adapter(config, "a")
    pipeline.unet.save_lora_adapter(tmp_path, adapter_name="a")
    file = AdapterFile.read(tmp_path / "pytorch_lora_weights.safetensors")
    expected = {
        f"unet.{path}": layer.get_delta_weight("a").detach()
        for path, layer in pipeline.unet.named_modules()
        if hasattr(layer, "get_delta_weight")
    }
    assert len(expected) == 54
    assert_same(deltas(file, model), expected)


@pytest.mark.parametrize("has_processor", [True, False])
def test_the_form_of_diffusers_before_peft_is_read(model: DiffusionModel, tmp_path: Path, has_processor: bool) -> None:
    adapters = live(model, "lora", targets="attention")
    clip = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
    tensors = {}
    for name, parts in AdapterFile.collect(model.parts, adapters).modules.items():
        stem, _, layer = peft_name(name).removesuffix(".0").rpartition(".")
        if has_processor:
            stem += ".processor" if name.startswith("lora_unet") else ""
        for part, direction in (("lora_down.weight", "down"), ("lora_up.weight", "up")):
            # alpha / rank was in the weights; scale 1.5 here
            factor = parts[part] * (1.5 if direction == "up" else 1.0)
            tensors[f"{stem}.{clip.get(layer, layer)}_lora.{direction}.weight"] = factor.contiguous()
    save_file(tensors, tmp_path / "a.safetensors")
    file = AdapterFile.read(tmp_path / "a.safetensors")
    assert (file.format, file.unread) == ("peft", ())
    assert_same(deltas(file, model), live_deltas(adapters))


def test_the_numbered_files_of_2022_are_read(model: DiffusionModel, tmp_path: Path) -> None:
    """Their program numbered the Linears below every attention and GEGLU, in the module order of diffusers 0.9."""
    unet, tensors, expected = model.parts["unet"].module, {}, {}

    def add(component: str, root: str, path: str, layer: nn.Module) -> None:
        number = sum(key.startswith(f"{component}:") for key in tensors) // 2
        down = torch.randn((3, layer.in_features), generator=stream(0, root + path)) / 10
        up = torch.randn((layer.out_features, 3), generator=stream(1, root + path)) / 10
        tensors[f"{component}:{number}:down"], tensors[f"{component}:{number}:up"] = down, up
        expected[f"{component}.{root}{path}"] = up @ down

    for side in ("down_blocks", "up_blocks", "mid_block"):
        for path, block in unet.get_submodule(side).named_modules():
            if type(block).__name__ != "BasicTransformerBlock":
                continue
            for child in ("attn1", "ff", "attn2"):
                for name, layer in block.get_submodule(child).named_modules():
                    if isinstance(layer, nn.Linear) and f"{child}.{name}" != "ff.net.2":  # a plain Linear, no GEGLU
                        add("unet", f"{side}.{path}.{child}.", name, layer)
    # of the tiny text encoder's two layers
    for path, layer in model.parts["text_encoder"].module.named_modules():
        if path.endswith(("k_proj", "v_proj", "q_proj", "out_proj")):
            add("text_encoder", "", path, layer)
    assert len(expected) == 144 + 8

    save_file(tensors, tmp_path / "a.safetensors")
    file = AdapterFile.read(tmp_path / "a.safetensors")
    assert (file.format, file.unread) == ("positional", ())
    assert_same(deltas(file, model), expected)


def test_a_number_that_sd_1_does_not_have_is_refused(tmp_path: Path) -> None:
    tensors = {"unet:144:down": torch.ones(1, 4), "unet:144:up": torch.ones(4, 1)}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match="unet:144"):
        AdapterFile.read(tmp_path / "a.safetensors")


def test_an_sd_1_file_in_ldm_spelling_is_read(model: DiffusionModel, tmp_path: Path) -> None:
    file = AdapterFile.collect(model.parts, live(model, "lora"))
    tensors = {}
    for name, parts in file.modules.items():
        prefix, path = split_kohya_name(name)
        if prefix == "lora_unet":
            name = f"lora_unet_{unet_to_ldm(path, plain_up_blocks=[0])}".replace(".", "_")
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    assert "lora_unet_output_blocks_2_1_conv.alpha" in tensors
    save_file(tensors, tmp_path / "a.safetensors")
    assert same_modules(AdapterFile.read(tmp_path / "a.safetensors"), file)


def test_a_first_and_only_text_encoder_may_be_numbered(model: DiffusionModel, tmp_path: Path) -> None:
    file = AdapterFile.collect(model.parts, live(model, "loha", targets="attention"))
    renamed = {name.replace("lora_te_", "lora_te1_"): parts for name, parts in file.modules.items()}
    AdapterFile(renamed).write(tmp_path / "a.safetensors", dtype=torch.float32)
    again = AdapterFile.read(tmp_path / "a.safetensors")
    assert sum(name.startswith("lora_te1_") for name in again.modules) == 8
    assert_same(deltas(again, model), deltas(file, model))


# SDXL


def sdxl_modules() -> dict[str, dict[str, Tensor]]:
    """A module of every kind of place in the published SDXL list."""
    names = (Path(__file__).parents[1] / "reference" / "sdxl_kohya_keys.txt").read_text(encoding="utf-8").split()
    assert len(names) == 1052
    generator = torch.Generator().manual_seed(0)
    return {
        name: {
            "lora_down.weight": torch.randn((2, 2048 if name.endswith("attn2_to_k") else 8), generator=generator),
            "lora_up.weight": torch.randn((8, 2), generator=generator),
            "alpha": torch.tensor(1.0),
        }
        for name in names
    }


def save_modules(modules: Mapping[str, Mapping[str, Tensor]], path: Path, **metadata: str) -> AdapterFile:
    tensors = {f"{name}.{part}": tensor for name, parts in modules.items() for part, tensor in parts.items()}
    save_file(tensors, path, metadata)
    return AdapterFile.read(path)


def test_both_spellings_of_an_sdxl_file_are_the_same_adapter(tmp_path: Path) -> None:
    theirs = save_modules(sdxl_modules(), tmp_path / "ldm.safetensors")
    assert theirs.family == "sdxl"
    assert all("input_blocks" not in name for name in theirs.modules)
    ours = save_modules(theirs.modules, tmp_path / "diffusers.safetensors")
    assert ours.family == "sdxl"
    assert same_modules(ours, theirs)
    ours.write(tmp_path / "again.safetensors", dtype=torch.float32)
    assert load_file(tmp_path / "again.safetensors").keys() == load_file(tmp_path / "ldm.safetensors").keys()


def test_an_sdxl_peft_file_has_both_text_encoders(tmp_path: Path) -> None:
    file = save_modules(sdxl_modules(), tmp_path / "ldm.safetensors")
    file.write(tmp_path / "peft.safetensors", format="peft", dtype=torch.float32)
    again = AdapterFile.read(tmp_path / "peft.safetensors")
    assert (again.format, again.family) == ("peft", "sdxl")
    assert same_modules(again, file)


def test_a_module_in_both_spellings_is_refused(tmp_path: Path) -> None:
    modules = sdxl_modules()
    name = "lora_unet_input_blocks_4_1_proj_in"
    twice = modules | {"lora_unet_down_blocks_1_attentions_0_proj_in": {p: t.clone() for p, t in modules[name].items()}}
    with pytest.raises(AdapterFileError, match=r"proj_in\.\S+ and lora_unet_\S+ name the same tensor"):
        save_modules(twice, tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("metadata", "told"),
    [
        ({"ss_base_model_version": "sd_v1"}, "SD 1.x"),
        ({"ss_base_model_version": "sd_v2_v"}, "SD 2.x"),
        ({"modelspec.architecture": "stable-diffusion-v1/lora"}, "SD 1.x"),
    ],
)
def test_metadata_of_another_family_than_the_tensors_is_refused(
    tmp_path: Path, metadata: dict[str, str], told: str
) -> None:
    with pytest.raises(AdapterFileError, match=f"made for SDXL .*its metadata says {told}"):
        save_modules(sdxl_modules(), tmp_path / "a.safetensors", **metadata)


@pytest.mark.parametrize(("width", "family"), [(768, "sd1"), (1024, "sd2"), (2048, "sdxl"), (32, "")])
def test_the_family_is_told_by_the_width_of_the_text_conditioning(tmp_path: Path, width: int, family: str) -> None:
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    parts = {"lora_down.weight": torch.ones(2, width), "lora_up.weight": torch.ones(8, 2)}
    assert save_modules({name: parts}, tmp_path / "a.safetensors").family == family


# LyCORIS


def test_tucker_and_factored_lycoris_modules_are_kept_as_they_are(tmp_path: Path) -> None:
    """Read, written and read again: the same tensors under the same names."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "lora_unet_mid_block_resnets_0_conv1": {
            "hada_w1_a": (2, 16), "hada_w1_b": (2, 16), "hada_w2_a": (2, 16), "hada_w2_b": (2, 16),
            "hada_t1": (2, 2, 3, 3), "hada_t2": (2, 2, 3, 3),
        },
        "lora_unet_mid_block_resnets_0_conv2": {
            "lokr_w1_a": (4, 2), "lokr_w1_b": (2, 4), "lokr_t2": (2, 2, 3, 3), "lokr_w2_a": (2, 4), "lokr_w2_b": (2, 4),
        },
        "lora_unet_mid_block_resnets_1_conv1": {
            "lora_down.weight": (2, 16, 1, 1), "lora_mid.weight": (2, 2, 3, 3), "lora_up.weight": (16, 2, 1, 1),
            "dora_scale": (16, 1, 1, 1),
        },
    }  # fmt: skip
    modules = {
        name: {part: torch.randn(shape, generator=generator) for part, shape in parts.items()}
        | {"alpha": torch.tensor(1.0)}
        for name, parts in shapes.items()
    }
    file = save_modules(modules, tmp_path / "a.safetensors")
    assert file.kinds == {"loha": 1, "lokr": 1, "dora": 1}
    file.write(tmp_path / "b.safetensors", dtype=torch.float32)
    again = AdapterFile.read(tmp_path / "b.safetensors")
    assert same_modules(again, file)
    assert json.loads(again.metadata["ss_network_args"])["wd_on_output"] == "True"


def test_a_lora_with_a_tucker_core_is_written_for_peft_without_it(model: DiffusionModel, tmp_path: Path) -> None:
    layer = model.parts["unet"].module.get_submodule("mid_block.resnets.0.conv1")
    generator = torch.Generator().manual_seed(0)
    parts = {
        "lora_down.weight": torch.randn((2, 16, 1, 1), generator=generator),
        "lora_mid.weight": torch.randn((2, 2, 3, 3), generator=generator),
        "lora_up.weight": torch.randn((16, 2, 1, 1), generator=generator),
        "alpha": torch.tensor(1.0),
    }
    file = AdapterFile({"lora_unet_mid_block_resnets_0_conv1": parts})
    file.write(tmp_path / "a.safetensors", format="peft", dtype=torch.float32)
    found = deltas(AdapterFile.read(tmp_path / "a.safetensors"), model)
    assert_same(found, {"unet.mid_block.resnets.0.conv1": LoRA.from_tensors(layer, parts).delta().detach()})

"""Each rule about other programs: the file it is about, the same file without that property, and the verdict."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora_diffusion.container import read_header
from lora_diffusion.formats.adapter_file import AdapterFile
from lora_diffusion.formats.layout import layout_of
from lora_diffusion.tools.inspect import facts_of
from lora_diffusion.tools.readers import READERS, RULES, FileFacts, Reading, spelling_of_blocks, what_readers_do
from tests.adapter_parts import (
    CONV,
    LDM_K,
    LDM_Q,
    PROJ_IN,
    TE,
    TE1,
    K,
    Parts,
    Q,
    loha,
    lora,
    randn,
    saved,
    sdxl_modules,
    tucker,
)

Modules = dict[str, Parts]
COMFYUI, FORGE, SDNEXT, DIFFUSERS, SD_SCRIPTS = READERS
SD1 = {"ss_base_model_version": "sd_v1"}
SDXL = {"ss_base_model_version": "sdxl_base_v1-0"}


def facts(tmp_path: Path, modules: Modules, metadata: dict[str, str] | None = None, **extra: torch.Tensor) -> FileFacts:
    path = saved(tmp_path / "a.safetensors", modules, metadata, extra=extra)
    return facts_of(AdapterFile.read(path), layout_of(path, read_header(path)))


def verdicts(found: FileFacts) -> dict[str, str]:
    """Those that are not "as trained"."""
    return {name: str(reading.verdict) for name, reading in what_readers_do(found).items() if reading.reasons}


def plain(alpha: float = 4.0, **others: Parts) -> Modules:
    return {Q: lora(alpha=alpha), K: lora(inputs=768, alpha=alpha), TE: lora(16, 8, alpha=alpha), **others}


def without_alpha(parts: Parts) -> Parts:
    return {part: tensor for part, tensor in parts.items() if part != "alpha"}


def peft(modules: Modules) -> Modules:
    """Keys of a PEFT file: "unet.….lora_A.weight"."""
    names = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
    return {name: {names[part]: parts[part] for part in names} for name, parts in modules.items()}


ATTENTION = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
MLP = "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.2"
TEXT = "text_encoder.text_model.encoder.layers.0.mlp.fc1"


@pytest.mark.parametrize(
    "modules", [plain(), sdxl_modules(ldm=True), sdxl_modules(ldm=False)], ids=["SD1", "LDM", "XL"]
)
def test_a_plain_file_is_read_as_trained_by_all(tmp_path: Path, modules: Modules) -> None:
    even = {name: parts | {"alpha": torch.tensor(4.0)} for name, parts in modules.items()}

    assert what_readers_do(facts(tmp_path, even)) == dict.fromkeys(READERS, Reading("as trained", ()))  # pyright: ignore


def test_diffusers_misreads_attention_layers_with_different_alphas(tmp_path: Path) -> None:
    assert verdicts(facts(tmp_path, plain() | {K: lora(inputs=768, alpha=1.0)})) == {DIFFUSERS: "differently"}


def test_diffusers_reads_different_alphas_outside_attention(tmp_path: Path) -> None:
    assert verdicts(facts(tmp_path, plain() | {CONV: lora(kernel=(3, 3), alpha=1.0)})) == {}


def test_diffusers_misreads_a_text_encoder_with_different_alphas(tmp_path: Path) -> None:
    other = TE.replace("fc1", "fc2")

    assert verdicts(facts(tmp_path, plain() | {other: lora(alpha=1.0)})) == {DIFFUSERS: "differently"}
    assert verdicts(facts(tmp_path, plain() | {Q: lora(alpha=1.0), K: lora(inputs=768, alpha=1.0)})) == {}


def test_diffusers_misreads_modules_without_alpha_among_others(tmp_path: Path) -> None:
    lacking = plain(alpha=1.0) | {PROJ_IN: without_alpha(lora(kernel=(1, 1)))}
    assert verdicts(facts(tmp_path, lacking)) == {DIFFUSERS: "differently"}

    assert verdicts(facts(tmp_path, {name: without_alpha(parts) for name, parts in plain().items()})) == {}


def test_sd_scripts_takes_an_alpha_of_zero_for_none(tmp_path: Path) -> None:
    assert verdicts(facts(tmp_path, plain(alpha=0.0))) == {SD_SCRIPTS: "differently"}


def test_loha_is_refused_by_diffusers_and_unknown_to_sd_scripts(tmp_path: Path) -> None:
    assert verdicts(facts(tmp_path, {Q: loha()})) == {DIFFUSERS: "refuses it", SD_SCRIPTS: "not at all"}
    assert verdicts(facts(tmp_path, plain(**{PROJ_IN: loha()}))) == {DIFFUSERS: "refuses it", SD_SCRIPTS: "in part"}


def test_tucker_cores_are_refused_or_left_out(tmp_path: Path) -> None:
    found = verdicts(facts(tmp_path, {CONV: tucker()}))

    assert found == {DIFFUSERS: "refuses it", SD_SCRIPTS: "differently"}


def test_matrices_for_convolutions_are_refused_where_the_model_has_convolutions(tmp_path: Path) -> None:
    refused = {DIFFUSERS: "refuses it", SD_SCRIPTS: "refuses it"}

    assert verdicts(facts(tmp_path, plain(**{PROJ_IN: lora(12, 12, alpha=4.0)}))) == refused
    assert verdicts(facts(tmp_path, {PROJ_IN: lora(alpha=4.0)}, SDXL)) == {}  # linear there


def test_dora_per_input_is_left_out_by_diffusers_and_sd_scripts(tmp_path: Path) -> None:
    found = facts(tmp_path, {Q: lora() | {"dora_scale": randn(1, 8)}})

    assert verdicts(found) == {DIFFUSERS: "differently", SD_SCRIPTS: "differently"}


def test_dora_per_output_is_computed_with_another_norm(tmp_path: Path) -> None:
    found = verdicts(facts(tmp_path, {Q: lora() | {"dora_scale": randn(12, 1)}}))

    assert found == dict.fromkeys((COMFYUI, FORGE, DIFFUSERS, SD_SCRIPTS), "differently")


def test_ldm_block_names_are_for_sdxl_only_in_diffusers_and_sd_scripts(tmp_path: Path) -> None:
    found = facts(tmp_path, {LDM_Q: lora(), LDM_K: lora(inputs=768)})

    assert verdicts(found) == {DIFFUSERS: "differently", SD_SCRIPTS: "not at all"}
    assert spelling_of_blocks(found) == "LDM"


def test_two_spellings_in_one_file_lose_modules(tmp_path: Path) -> None:
    found = facts(tmp_path, {LDM_Q: lora(), PROJ_IN: lora()}, SDXL)

    assert verdicts(found) == {DIFFUSERS: "in part", SD_SCRIPTS: "in part"}
    assert "drops the 1 modules" in what_readers_do(found)[DIFFUSERS].reasons[0]
    assert spelling_of_blocks(found) == "LDM and diffusers"


@pytest.mark.parametrize(("name", "metadata"), [(TE, SDXL), (TE1, SD1)])
def test_the_other_familys_name_of_the_text_encoder_is_not_found_by_two(
    tmp_path: Path, name: str, metadata: dict[str, str]
) -> None:
    found = verdicts(facts(tmp_path, {Q: lora(), name: lora()}, metadata))

    assert found == {SDNEXT: "in part", SD_SCRIPTS: "in part"}
    assert verdicts(facts(tmp_path, {Q: lora(), name: lora()})) == {}  # the family is not known


@pytest.mark.parametrize(("layers", "forge"), [(4, "in part"), (5, "refuses it")])
def test_a_text_encoder_without_text_model_is_not_found(tmp_path: Path, layers: int, forge: str) -> None:
    names = [f"lora_te_encoder_layers_{i}_mlp_fc1" for i in range(layers)]  # Forge stops at more than 12 tensors
    found = verdicts(facts(tmp_path, {Q: lora(), **{name: lora() for name in names}}))

    assert found == {COMFYUI: "in part", SD_SCRIPTS: "in part", FORGE: forge}


def test_sd_scripts_leaves_out_the_outer_layers(tmp_path: Path) -> None:
    found = facts(tmp_path, plain(lora_unet_conv_in=lora(kernel=(3, 3), alpha=4.0)))

    assert verdicts(found) == {SD_SCRIPTS: "in part"}


def test_sd_scripts_leaves_out_text_projections(tmp_path: Path) -> None:
    found = facts(tmp_path, sdxl_modules(ldm=True) | {"lora_te2_text_projection": lora(8, 8)}, SDXL)

    assert verdicts(found)[SD_SCRIPTS] == "in part"
    assert "(1 of 6 modules)" in what_readers_do(found)[SD_SCRIPTS].reasons[0]


@pytest.mark.parametrize(("count", "forge"), [(1, {}), (13, {FORGE: "refuses it"})])
def test_tensors_of_no_module_make_diffusers_refuse(tmp_path: Path, count: int, forge: dict[str, str]) -> None:
    extra = {f"step{i}": torch.zeros(1) for i in range(count)}

    assert verdicts(facts(tmp_path, plain(), **extra)) == {DIFFUSERS: "refuses it"} | forge


def test_names_of_lycoris_itself_are_not_read_everywhere(tmp_path: Path) -> None:
    found = verdicts(facts(tmp_path, {Q.replace("lora_unet", "lycoris"): loha()}))

    assert found[DIFFUSERS] == "refuses it"
    assert found[SD_SCRIPTS] == "not at all"
    assert found[COMFYUI] == found[FORGE] == found[SDNEXT] == "not known"


def test_peft_files_are_for_diffusers(tmp_path: Path) -> None:
    elsewhere = {SDNEXT: "not at all", SD_SCRIPTS: "not at all"}

    attention = verdicts(facts(tmp_path, peft({ATTENTION: lora(), MLP: lora()})))
    assert attention == elsewhere | {COMFYUI: "in part", FORGE: "in part"}
    assert verdicts(facts(tmp_path, peft({MLP: lora(), TEXT: lora()}))) == elsewhere
    assert verdicts(facts(tmp_path, peft({TEXT.replace("text_model.", ""): lora()})))[COMFYUI] == "not at all"


def test_forge_refuses_peft_files_of_many_attention_layers(tmp_path: Path) -> None:
    layers = [ATTENTION.replace("to_q", layer) for layer in ("to_q", "to_k", "to_v", "to_out.0")]
    layers += [layer.replace("attn1", "attn2") for layer in layers]

    assert verdicts(facts(tmp_path, peft({layer: lora() for layer in layers})))[FORGE] == "refuses it"


def test_the_strength_in_peft_metadata_is_for_diffusers(tmp_path: Path) -> None:
    config = '{"unet.r": 4, "unet.lora_alpha": 2}'
    found = verdicts(facts(tmp_path, peft({MLP: lora()}), {"lora_adapter_metadata": config}))

    assert found[COMFYUI] == found[FORGE] == "differently"
    assert DIFFUSERS not in found


def test_alpha_tensors_beside_peft_names_are_for_comfyui_and_forge(tmp_path: Path) -> None:
    modules = peft({MLP: lora()})
    modules[MLP]["alpha"] = torch.tensor(2.0)
    found = verdicts(facts(tmp_path, modules))

    assert found == {SDNEXT: "not at all", SD_SCRIPTS: "not at all", DIFFUSERS: "refuses it"}


def test_old_diffusers_names_of_attention_are_read_with_their_processor(tmp_path: Path) -> None:
    base = ATTENTION.replace(".to_q", ".processor.to_q_lora")
    parts = {"down.weight": randn(4, 8), "up.weight": randn(12, 4)}

    assert verdicts(facts(tmp_path, {base: parts})) == {SDNEXT: "not at all", SD_SCRIPTS: "not at all"}


def test_the_names_of_peft_alone_are_not_known(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 4}')
    found = verdicts(facts(tmp_path, peft({f"base_model.model.{MLP}": lora()})))

    assert found[DIFFUSERS] == found[COMFYUI] == found[FORGE] == "not known"


def test_numbered_files_are_read_by_none(tmp_path: Path) -> None:
    found = facts(tmp_path, {}, **{"unet:0:down": randn(4, 8), "unet:0:up": randn(12, 4)})

    assert verdicts(found) == dict.fromkeys(READERS, "not at all")


def test_the_worst_verdict_counts_and_all_reasons_are_told(tmp_path: Path) -> None:
    reading = what_readers_do(facts(tmp_path, {CONV: tucker() | {"dora_scale": randn(12, 1, 1, 1)}}))[DIFFUSERS]

    assert reading.verdict == "refuses it"
    assert len(reading.reasons) == 2


def test_every_rule_is_asked() -> None:
    assert len(RULES) == len(set(RULES)) == 20

"""Reads a model from one .safetensors checkpoint in the layout of the original Stable Diffusion code."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import nn

from lora_diffusion.container import Header, scaling_problem
from lora_diffusion.diffusion.schedule import Prediction
from lora_diffusion.ldm_names import TEXT_ENCODER_PREFIXES, UNET_PREFIX, VAE_PREFIX, Place, place_in_single_file
from lora_diffusion.models.builtin_configs import PADDING, builtin_configs
from lora_diffusion.models.components import PARTS, Components, Dtypes, empty_module, read_json
from lora_diffusion.models.errors import ModelError
from lora_diffusion.models.libraries import CLIPTokenizer
from lora_diffusion.models.schedules import OTHER_NOISE, TYPES, ScheduleEvidence, evidence_of_scheduler
from lora_diffusion.models.tokenizers import find_tokenizer, read_tokenizer
from lora_diffusion.models.weights import Stored, TensorFile, fill, misfits
from lora_diffusion.progress import Track, silent

logger = logging.getLogger(__name__)

V_MARKER, ZERO_SNR_MARKER = "v_pred", "ztsnr"
"""Names of empty tensors in SDXL checkpoints that say what the model was trained for."""

_OTHER_NOISE_MARKERS = ("edm_vpred.sigma_max", "edm_mean", "edm_std")
"""Names of tensors in CosXL's files, and in those of Playground v2.5."""

SD2_PROBE = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
SD2_V_SPREAD = 0.09  # the standard deviation above which ComfyUI takes a model for the 768-v one

_PREDICTIONS: dict[str, Prediction] = {
    **{"v": "v", "v_prediction": "v", "v-prediction": "v", "vpred": "v"},
    **{"epsilon": "epsilon", "eps": "epsilon"},
}
_UNUSED = re.compile(
    rf"model_ema\.|denoiser\.|loss\.|first_stage_model\.loss\.|({V_MARKER}|{ZERO_SNR_MARKER})$"
    r"|(betas|alphas_cumprod\w*|sqrt_\w+|log_one_minus_\w+|posterior_\w+|logvar|lvlb_weights)$"
    r"|.*(position_ids|logit_scale|text_projection(\.weight)?)$"
)
"""Copies, constants and parts of CLIP that a model may have and we do not need."""


def checkpoint_schedule(path: Path, family: str, configs: Path | None) -> tuple[dict[str, Any], ScheduleEvidence]:
    """The scheduler config to use, and what the file and `configs` say about the noise schedule."""
    own = _config_file(configs, "scheduler")
    config = builtin_configs(family, "epsilon")["scheduler"] if own is None else read_json(own)
    evidence = _evidence_of_header(TensorFile(path), family)
    return config, evidence if own is None else evidence.completed_by(evidence_of_scheduler(config))


def read_checkpoint(
    path: Path,
    family: str,
    prediction_type: str,
    dtypes: Dtypes,
    configs: Path | None = None,
    track: Track = silent,
) -> Components:
    """The parts of a single-file checkpoint, streamed tensor by tensor; the UNet's weights are still to come.

    configs: a diffusers folder whose configs and tokenizer are used, as far as it has them; the rest is the family's
    own. Raises ModelError when a part or a tensor is missing; warns of tensors that nothing reads.
    """
    file = TensorFile(path)
    builtin = builtin_configs(family, prediction_type)
    modules: dict[str, nn.Module] = {}
    places: dict[str, dict[str, Stored]] = {}
    for part in PARTS[family]:
        _check_part(file, family, part)
        own = _config_file(configs, part)
        config = builtin[part] if own is None else read_json(own)
        modules[part] = nn.Module.to(empty_module(part, config), dtypes.of(part))
        places[part] = _places(file, family, part, modules[part])
    _check(file, family, modules, places)
    tokenizer = find_tokenizer(path, configs)
    fills = {part: partial(fill, module, places[part], dtypes.of(part), track) for part, module in modules.items()}
    fill_unet = fills.pop("unet")
    for fill_part in fills.values():
        fill_part()
    tokenizers = {
        part.replace("text_encoder", "tokenizer"): _fitting_tokenizer(tokenizer, PADDING[family, part], module)
        for part, module in modules.items()
        if part.startswith("text_encoder")
    }
    return Components(modules, tokenizers, fill_unet)


def _fitting_tokenizer(folder: Path, padding: str, text_encoder: nn.Module) -> CLIPTokenizer:
    tokenizer = read_tokenizer(folder, padding)
    num_known = cast(Any, text_encoder).config.vocab_size
    if len(tokenizer) > num_known:
        raise ModelError(
            f"{folder}: has {len(tokenizer)} tokens, but the checkpoint's text encoder knows {num_known}. Give it the "
            "tokenizer that it was trained with."
        )
    return tokenizer


def _config_file(configs: Path | None, part: str) -> Path | None:
    """The config of `part` in the folder `configs`, if it has one."""
    if configs is None:
        return None
    path = configs / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    return path if path.exists() else None


def _evidence_of_header(file: TensorFile, family: str) -> ScheduleEvidence:
    tensors, metadata = file.header.tensors, file.header.metadata
    if others := [name for name in _OTHER_NOISE_MARKERS if name in tensors]:
        raise ModelError(f"{file.path}: holds the tensor {others[0]}: {OTHER_NOISE}")
    prediction, fact = None, ""
    if V_MARKER in tensors:
        prediction, fact = "v", f"the file has the marker {V_MARKER!r}"
    elif named := metadata.get("modelspec.prediction_type"):
        if named not in _PREDICTIONS:
            raise ModelError(
                f"{file.path}: its metadata says modelspec.prediction_type {named[:100]}; this version trains "
                f"{' and '.join(TYPES)}. Give a base that was made with one of them; if the metadata is wrong, correct "
                "it there."
            )
        prediction, fact = _PREDICTIONS[named], f"the file's metadata says modelspec.prediction_type {named}"
    elif "v2-768-v" in (named := metadata.get("modelspec.architecture", "")):
        prediction, fact = "v", f"the file's metadata says modelspec.architecture {named}"
    has_zero_snr = ZERO_SNR_MARKER in tensors
    return ScheduleEvidence(
        prediction,
        fact,
        True if has_zero_snr else None,
        f"the file has the marker {ZERO_SNR_MARKER!r}",
        guess="v" if prediction is None and family == "sd2" and _looks_like_sd2_v(file) else "epsilon",
    )


def _looks_like_sd2_v(file: TensorFile) -> bool:
    """A guess from a weight whose values differ between the two published versions; fine-tuning hardly moves it."""
    if SD2_PROBE not in file.header.tensors:
        return False
    with file:
        return float(file.read(SD2_PROBE).float().std(correction=0)) > SD2_V_SPREAD


def _check_part(file: TensorFile, family: str, part: str) -> None:
    prefix = {"unet": UNET_PREFIX, "vae": VAE_PREFIX}.get(part) or TEXT_ENCODER_PREFIXES[family, part]
    names = file.header.tensors
    if not any(name.startswith(prefix) for name in names):
        what = "VAE" if part == "vae" else part.replace("_", " ")
        raise ModelError(
            f"{file.path}: this checkpoint holds no {what} (no tensor is named {prefix}…). Get the full version of the "
            "model, or its diffusers folder."
        )
    if problem := scaling_problem(file.header):
        raise ModelError(f"{file.path}: {problem}")


def _places(file: TensorFile, family: str, part: str, module: nn.Module) -> dict[str, Stored]:
    """Where the tensors of `module` are in the file, those that it has."""
    config = cast(Any, module).config
    options: dict[str, Any] = {}
    if part == "unet":
        plain = [i for i, kind in enumerate(config["up_block_types"]) if "Attn" not in kind]
        options = {"layers_per_block": config["layers_per_block"], "plain_up_blocks": plain}
    elif part == "vae":
        options = {"vae_levels": len(config["block_out_channels"])}
    found: dict[str, Stored] = {}
    for name in module.state_dict():
        place = _existing(file.header, place_in_single_file(family, part, name, **options))
        if place is not None:
            found[name] = Stored(file, place)
    return found


def _existing(header: Header, place: Place) -> Place | None:
    """`place`, or how a file names it that lacks CLIP's `text_model.` level, or None if it has neither."""
    for key in (place.key, place.key.replace(".transformer.text_model.", ".transformer.")):
        if key in header.tensors:
            return Place(key, place.third, place.is_transposed)
    return None


def _check(
    file: TensorFile, family: str, modules: Mapping[str, nn.Module], places: Mapping[str, Mapping[str, Stored]]
) -> None:
    """Everything that is needed is there and fits, or ModelError; what is there and not needed is told."""
    problems: list[str] = []
    num_expected = 0
    for part, module in modules.items():
        expected = module.state_dict()
        num_expected += len(expected)
        problems += [f"{part}: {problem}" for problem in misfits(expected, places[part])]
    if problems:
        raise ModelError(
            f"{file.path}: does not fit the configs of {family}, {len(problems)} of {num_expected} tensors: "
            f"{'; '.join(problems[:5])}. The file is damaged, or the model differs from the published one: then set "
            "model.configs to a diffusers folder with its configs."
        )
    used = {stored.place.key for part in places.values() for stored in part.values()}
    dummy = _dummy_layer(family, modules)
    unread = [name for name in file.header.tensors if name not in used and not _UNUSED.match(name)]
    unread = [name for name in unread if dummy is None or not name.startswith(dummy)]
    if unread:
        logger.warning("%s: %d tensors are not used (the first: %s)", file.path, len(unread), ", ".join(unread[:5]))


def _dummy_layer(family: str, modules: Mapping[str, nn.Module]) -> str | None:
    """SD 2.x files carry OpenCLIP's last layer, which the model does not use."""
    if family != "sd2":
        return None
    num_layers = cast(Any, modules["text_encoder"]).config.num_hidden_layers
    return f"{TEXT_ENCODER_PREFIXES['sd2', 'text_encoder']}transformer.resblocks.{num_layers}."

"""The settings that kohya_ss saves from its page "LoRA", as those that it hands to sd-scripts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lora_diffusion.kohya.keys import Row

KINDS = {
    "Standard": ("networks.lora", ""),
    "Kohya LoCon": ("networks.lora", ""),
    "LoRA-FA": ("networks.lora_fa", ""),
    "Kohya DyLoRA": ("networks.dylora", ""),
    "LyCORIS/LoCon": ("lycoris.kohya", "locon"),
    "LyCORIS/LoHa": ("lycoris.kohya", "loha"),
    "LyCORIS/LoKr": ("lycoris.kohya", "lokr"),
    "LyCORIS/DyLoRA": ("lycoris.kohya", "dylora"),
    "LyCORIS/iA3": ("lycoris.kohya", "ia3"),
    "LyCORIS/Diag-OFT": ("lycoris.kohya", "diag-oft"),
    "LyCORIS/BOFT": ("lycoris.kohya", "boft"),
    "LyCORIS/GLoRA": ("lycoris.kohya", "glora"),
    "LyCORIS/Native Fine-Tuning": ("lycoris.kohya", "full"),
}
"""`LoRA_type` → network_module and the algorithm of LyCORIS."""

OTHER_NAMES = {
    "optimizer": "optimizer_type",
    "max_resolution": "resolution",
    "weights": "network_weights",
    "lora_network_weights": "network_weights",
    "sdxl_no_half_vae": "no_half_vae",
    "sdxl_cache_text_encoder_outputs": "cache_text_encoder_outputs",
    "constrain": "network_args.constraint",
    "LyCORIS_preset": "network_args.preset",
    "num_workers": "max_data_loader_n_workers",
}
"""What kohya_ss calls settings of sd-scripts."""

NETWORK_ARGUMENTS = (
    *("conv_dim", "conv_alpha", "rank_dropout", "module_dropout"),
    *("down_lr_weight", "mid_lr_weight", "up_lr_weight", "block_lr_zero_threshold"),
    *("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas"),
    *("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio"),
    *("factor", "unit", "block_size", "rescaled", "decompose_both", "train_norm", "train_on_input", "use_cp"),
    *("use_tucker", "use_scalar", "dora_wd", "bypass_mode", "rank_dropout_scale"),
)
"""Settings of kohya_ss that stand in `network_args`."""

OF_BLOCKS = tuple(
    name for name in NETWORK_ARGUMENTS if ("block_" in name and name != "block_size") or "lr_weight" in name
)
OF_LYCORIS = NETWORK_ARGUMENTS[NETWORK_ARGUMENTS.index("factor") :]
OF_CONVOLUTIONS = ("conv_dim", "conv_alpha", "conv_block_dims", "conv_block_alphas")


def _row(theirs: str, note: str) -> Row:
    return Row(tuple(theirs.split()), (), note)


WITHOUT_EFFECT = (
    _row("model_list save_as_bool LoRA_type_visible", "belongs to the page of kohya_ss"),
    _row(
        "num_processes num_machines multi_gpu gpu_ids main_process_port num_cpu_threads_per_process dynamo_mode "
        "dynamo_use_fullgraph dynamo_use_dynamic extra_accelerate_launch_args",
        "how the process is started: options of `accelerate launch`",
    ),
    _row("use_wandb", "there is no tracker to set up"),
    _row(
        "stop_text_encoder_training stop_text_encoder_training_pct",
        "kohya_ss does not hand it to LoRA trainings; here it is `optimizer.text_encoder_steps`",
    ),
    _row("no_token_padding", "captions are always padded"),
    _row("lowvram", "what is kept in memory is `model.quantise` and `model.gradient_checkpointing`"),
    _row("mem_eff_save", "the adapter file is small"),
    _row(
        "flux1_checkbox flux1_cache_text_encoder_outputs flux1_cache_text_encoder_outputs_to_disk flux1_clip_l "
        "flux1_t5xxl flux_fused_backward_pass apply_t5_attn_mask ae clip_l clip_g t5xxl t5xxl_lr "
        "t5xxl_max_token_length t5xxl_device t5xxl_dtype discrete_flow_shift guidance_scale model_prediction_type "
        "timestep_sampling "
        "sigmoid_scale split_mode split_qkv train_blocks train_t5xxl train_double_block_indices "
        "train_single_block_indices enable_all_linear img_attn_dim img_mlp_dim img_mod_dim txt_attn_dim txt_mlp_dim "
        "txt_mod_dim single_dim single_mod_dim in_dims single_blocks_to_swap double_blocks_to_swap "
        "blockwise_fused_optimizers skip_cache_check_flux sd3_checkbox sd3_cache_text_encoder_outputs "
        "sd3_cache_text_encoder_outputs_to_disk sd3_clip_l sd3_clip_g sd3_clip_l_dropout_rate sd3_clip_g_dropout_rate "
        "sd3_enable_scaled_pos_embed sd3_fused_backward_pass sd3_t5_dropout_rate sd3_t5xxl sd3_text_encoder_batch_size "
        "pos_emb_random_crop_rate save_clip save_t5xxl lumina_checkbox "
        "ggpo_beta ggpo_sigma use_gemma sample_batch_size system_prompt cfg_trunc renorm_cfg",
        "for models other than Stable Diffusion 1.x, 2.x and SDXL",
    ),
)
"""Settings that kohya_ss has besides those of sd-scripts and that change nothing here."""

GUI_ROWS = (
    Row(
        ("optimizer", "max_resolution", "lora_network_weights"),
        (),
        "as `optimizer_type`, `resolution`, `network_weights`",
    ),
    Row(("LoRA_type", "LyCORIS_preset"), ("adapter.kind", "adapter.targets"), "as `network_module` and its arguments"),
    Row(("epoch",), ("run.epochs",), "unless `max_train_steps` or `max_train_epochs` is given"),
    Row(
        ("lr_warmup",),
        ("schedule.warmup_steps",),
        "a percentage; of a run in epochs only where the pictures can be counted",
    ),
    Row(("unet_lr", "text_encoder_lr"), ("optimizer.lr", "adapter.text_encoder"), "0 is: do not train this part"),
    Row(("sdxl",), ("model.family",)),
    Row(("noise_offset_type",), ("loss.noise_offset",), "`Multires` noise has no equal"),
    Row(("seed",), ("run.seed",), "0 is a random one there, 42 here"),
)
"""Settings of which name or meaning differs between kohya_ss and sd-scripts."""


@dataclass
class Translated:
    """What kohya_ss hands on, each with the name it has there; what it keeps back, and why ("": it is off)."""

    settings: dict[str, tuple[object, str]] = field(default_factory=dict[str, tuple[object, str]])
    without_effect: dict[str, str] = field(default_factory=dict[str, str])


def as_scripts(gui: Mapping[str, object]) -> Translated:
    """What a training started by kohya_ss with these settings would be told."""
    result = Translated()
    rest = dict(gui)
    without_effect = {name: row.note for row in WITHOUT_EFFECT for name in row.theirs}
    for take in (_take_kind, _take_length, _take_rates, _take_noise):
        take(rest, result)
    for name, value in rest.items():
        if name in without_effect:
            result.without_effect[name] = "" if is_nothing(value) else without_effect[name]
            continue
        known = f"network_args.{name}" if name in NETWORK_ARGUMENTS else OTHER_NAMES.get(name, name)
        if known not in result.settings or not is_nothing(value):
            result.settings[known] = (value, name)
    told = {origin for _, origin in result.settings.values()} | result.without_effect.keys()
    result.without_effect |= {name: "" for name in gui if name not in told}
    return result


def is_nothing(value: object) -> bool:
    """Whether a field is empty, off or 0, as kohya_ss saves that: also as text."""
    return value is None or value is False or str(value).strip().lower() in ("", "0", "0.0", "none", "false", "[]")


def _take_kind(rest: dict[str, object], result: Translated) -> None:
    name = rest.pop("LoRA_type", "Standard")
    module, algorithm = KINDS.get(str(name), (str(name), ""))
    result.settings["network_module"] = (module, "LoRA_type")
    if algorithm:
        result.settings["network_args.algo"] = (algorithm, "LoRA_type")
    unread = OF_LYCORIS if not algorithm else OF_BLOCKS
    if not algorithm:
        unread = (*unread, "LyCORIS_preset", "constrain")
    if name == "Standard":
        unread = (*unread, *OF_CONVOLUTIONS)
    for key in unread:
        if key in rest:
            reason = "" if is_nothing(rest[key]) else f'kohya_ss does not use it with `LoRA_type` "{name}"'
            result.without_effect[key] = reason
            del rest[key]


def _take_length(rest: dict[str, object], result: Translated) -> None:
    """Steps and epochs, and the warm-up, of which sd-scripts gets a share where kohya_ss has a percentage."""
    epochs = rest.pop("epoch", None)
    if is_nothing(rest.get("max_train_epochs")) and is_nothing(rest.get("max_train_steps")):
        rest.pop("max_train_epochs", None)
        rest.pop("max_train_steps", None)
        result.settings["max_train_epochs"] = (1 if is_nothing(epochs) else epochs, "epoch")
    elif epochs is not None:
        result.without_effect["epoch"] = "`max_train_steps` or `max_train_epochs` is given"
    percentage = rest.pop("lr_warmup", None)
    if percentage is None:
        return
    if is_nothing(rest.get("lr_warmup_steps")):
        rest.pop("lr_warmup_steps", None)
        result.settings["lr_warmup_steps"] = (_share(percentage), "lr_warmup")
    else:
        result.without_effect["lr_warmup"] = "`lr_warmup_steps` is given"


def _share(percentage: object) -> object:
    """A percentage as sd-scripts takes it; what is no number stays for the one who checks it."""
    try:
        return float(str(percentage)) / 100 if not is_nothing(percentage) else 0
    except ValueError:
        return percentage


def _take_rates(rest: dict[str, object], result: Translated) -> None:
    """With a rate of the UNet or the text encoder, kohya_ss trains the parts that have one, and no other."""
    unet, text = rest.get("unet_lr"), rest.get("text_encoder_lr")
    if is_nothing(unet) and is_nothing(text):
        rest.pop("unet_lr", None)
        rest.pop("text_encoder_lr", None)
        return
    if "learning_rate" in rest:
        result.without_effect["learning_rate"] = "`unet_lr` or `text_encoder_lr` is given"
        del rest["learning_rate"]
    if is_nothing(text):
        rest.pop("text_encoder_lr", None)
        result.settings["network_train_unet_only"] = (True, "text_encoder_lr")
    elif is_nothing(unet):
        rest.pop("unet_lr", None)
        result.settings["network_train_text_encoder_only"] = (True, "unet_lr")


def _take_noise(rest: dict[str, object], result: Translated) -> None:
    """Kohya_ss uses one of two kinds of noise, and no seed where it is 0."""
    kind = rest.pop("noise_offset_type", None)
    if kind is not None:
        result.without_effect["noise_offset_type"] = "says which kind of noise is used: that one is read"
    is_pyramid = kind == "Multires"
    unused = ("noise_offset", "adaptive_noise_scale", "noise_offset_random_strength")
    for name in unused if is_pyramid else ("multires_noise_iterations", "multires_noise_discount"):
        if name in rest:
            reason = "kohya_ss does not use it with this `noise_offset_type`"
            result.without_effect[name] = "" if is_nothing(rest.pop(name)) else reason
    if "seed" in rest and is_nothing(rest["seed"]):
        del rest["seed"]
        result.without_effect["seed"] = ""

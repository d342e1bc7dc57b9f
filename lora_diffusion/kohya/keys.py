"""What becomes of each setting of sd-scripts and kohya_ss: the table behind `import`, and that of the docs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """Settings that share an answer. theirs: names in sd-scripts. ours: keys here. note: what differs, or why not."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...] = ()
    note: str = ""


def _row(theirs: str, ours: str = "", note: str = "") -> Row:
    return Row(tuple(theirs.split()), tuple(ours.split()), note)


NETWORK, OPTIMIZER, SCHEDULER = "network_args.", "optimizer_args.", "lr_scheduler_args."
"""What is in front of the names inside these lists: `network_args.conv_dim`."""

TRANSLATED = (
    _row("pretrained_model_name_or_path", "model.path", "no `.ckpt`"),
    _row("v2 sdxl", "model.family", "`sdxl` is a setting of kohya_ss"),
    _row(
        "v_parameterization zero_terminal_snr",
        "model.prediction model.zero_terminal_snr",
        "if not given, read from the base's files, also from the markers of SDXL checkpoints; a value that contradicts "
        "them is refused",
    ),
    _row("clip_skip max_token_length", "model.clip_skip model.max_tokens"),
    _row("gradient_checkpointing", "model.gradient_checkpointing"),
    _row("fp8_base fp8_base_unet", "model.quantise", "`int8` for fp8; of the UNet's linear layers"),
    _row("base_weights base_weights_multiplier", "model.merge", "file and strength in one text: `a.safetensors:0.8`"),
    _row("train_data_dir image_dir", "dataset.path", "several folders: several `[[dataset]]` tables"),
    _row("resolution", "dataset.resolution", "one number or `[width, height]`"),
    _row("num_repeats dataset_repeats", "dataset.repeats"),
    _row(
        "enable_bucket min_bucket_reso max_bucket_reso bucket_reso_steps",
        "dataset.buckets dataset.bucket_min dataset.bucket_max dataset.bucket_step",
    ),
    _row("shuffle_caption keep_tokens", "dataset.shuffle_tags dataset.keep_tokens"),
    _row("caption_dropout_rate caption_tag_dropout_rate", "dataset.caption_dropout dataset.tag_dropout"),
    _row(
        "caption_prefix caption_suffix",
        "dataset.caption_prefix dataset.caption_suffix",
        "as they are; sd-scripts adds a space between",
    ),
    _row("class_tokens", "dataset.default_caption"),
    _row("flip_aug", "dataset.flip"),
    _row("train_batch_size batch_size gradient_accumulation_steps", "run.batch_size run.gradient_accumulation"),
    _row("max_train_steps max_train_epochs", "run.steps run.epochs", "one of them; sd-scripts prefers epochs"),
    _row("network_dim network_alpha", "adapter.rank adapter.alpha"),
    _row(
        "network_module network_args.algo network_args.dora_wd",
        "adapter.kind",
        "`networks.lora`, and of LyCORIS `lora`, `locon`, `loha`, `lokr`, DoRA",
    ),
    _row(
        "network_args.preset network_args.conv_dim network_args.conv_alpha",
        "adapter.targets adapter.rank_pattern adapter.alpha_pattern",
        '`networks.lora` alone is `adapter.targets = "attention-mlp"`, with `conv_dim` and in LyCORIS '
        '`adapter.targets = "full"`',
    ),
    _row(
        "network_args.block_dims network_args.block_alphas network_args.conv_block_dims network_args.conv_block_alphas",
        "adapter.rank_pattern adapter.alpha_pattern adapter.lr_pattern",
        "by the module paths of the blocks; a rank of 0 is `lr_pattern` 0",
    ),
    _row(
        "network_args.down_lr_weight network_args.mid_lr_weight network_args.up_lr_weight "
        "network_args.block_lr_zero_threshold",
        "adapter.lr_pattern",
        "by the module paths of the blocks",
    ),
    _row("network_args.factor", "adapter.lokr_factor"),
    _row("network_args.rs_lora", "adapter.rslora"),
    _row(
        "network_dropout network_args.rank_dropout network_args.module_dropout",
        "adapter.dropout adapter.rank_dropout adapter.module_dropout",
    ),
    _row("network_weights", "adapter.start_from", "of the same kind and rank"),
    _row("scale_weight_norms", "adapter.max_norm"),
    _row("network_train_unet_only cache_text_encoder_outputs", "adapter.text_encoder", "the other way round"),
    _row(
        "learning_rate unet_lr",
        "optimizer.lr optimizer.text_encoder_lr",
        "`learning_rate` is also that of the text encoder in sd-scripts; here that has half of `lr`",
    ),
    _row(
        "text_encoder_lr",
        "optimizer.text_encoder_lr",
        "the first of a list is for all text encoders, as in networks.lora",
    ),
    _row("optimizer_type use_8bit_adam", "optimizer.name", "`adamw` or `adamw8bit`"),
    _row(
        "optimizer_args.weight_decay optimizer_args.betas optimizer_args.eps",
        "optimizer.weight_decay optimizer.betas optimizer.eps",
    ),
    _row("max_grad_norm", "optimizer.max_grad_norm"),
    _row(
        "lr_scheduler lr_warmup_steps lr_scheduler_min_lr_ratio",
        "schedule.name schedule.warmup_steps schedule.min_lr_ratio",
        "`constant`, `linear`, `cosine`",
    ),
    _row("loss_type", "loss.kind", "`mse` is their `l2`; `huber` with c = 0.1 at all timesteps"),
    _row("min_snr_gamma noise_offset", "loss.min_snr_gamma loss.noise_offset"),
    _row("min_timestep max_timestep", "loss.timestep_min loss.timestep_max", "the upper one is not included"),
    _row("mixed_precision save_precision", "run.precision run.save_precision", "`no` is `fp32`"),
    _row("no_metadata", "run.metadata"),
    _row("save_every_n_steps save_every_n_epochs", "run.save_every", "in steps"),
    _row("output_dir output_name", "run.output run.name"),
    _row("seed", "run.seed", "42 if not given, never random"),
    _row("max_data_loader_n_workers", "run.loader_workers"),
    _row(
        "sample_prompts sample_every_n_steps sample_every_n_epochs sample_sampler",
        "preview.prompts preview.every preview.sampler",
        "their `euler_a` is `euler-a`, their `dpmsolver++` is `dpm++2m`",
    ),
    _row(
        "sample_prompts.n sample_prompts.w sample_prompts.h sample_prompts.d sample_prompts.s sample_prompts.l",
        "preview.negative preview.size preview.seed preview.steps preview.cfg",
        "the same for all prompts, seeds count up",
    ),
    _row(
        "validation_split validate_every_n_steps validate_every_n_epochs",
        "validation.fraction validation.every",
    ),
)
"""Settings with an equal here."""

WITHOUT_EFFECT = (
    _row(
        "sdpa xformers mem_eff_attn", note='`model.attention = "auto"` takes the fastest; they differ by rounding only'
    ),
    _row("torch_compile dynamo_backend", note="changes the speed only; here it is `model.compile`"),
    _row(
        "cache_latents cache_latents_to_disk vae_batch_size skip_cache_check cache_info",
        note="latents are always cached, in `cache.folder`",
    ),
    _row("cache_text_encoder_outputs_to_disk text_encoder_batch_size", note="captions are cached by themselves"),
    _row("no_half_vae", note="what overflows in half precision is computed in float32 by itself"),
    _row("lowram highvram disable_mmap_load_safetensors", note="how the base is loaded decides itself"),
    _row("persistent_data_loader_workers", note="workers always stay"),
    _row("save_state save_state_on_train_end", note="the state is always saved; `run.keep_checkpoints` says how many"),
    _row("sample_at_first", note="previews before the first step are always drawn"),
    _row("save_model_as use_safetensors", note="files are always safetensors"),
    _row("log_with logging_dir log_prefix log_tracker_name", note="`metrics.jsonl` and `loss.png` are always written"),
    _row("log_tracker_config log_config wandb_run_name wandb_api_key", note="there is no tracker to set up"),
    _row("console_log_level console_log_file console_log_simple", note="`log.txt` in the run folder is the log"),
    _row("config_file output_config", note="names a config of sd-scripts itself"),
    _row("tokenizer_cache_dir", note="tokenizers come with the base or with this program"),
    _row("debug_dataset dataset_class", note="for looking into sd-scripts; here there is `lora-diffusion check`"),
    _row("ddp_timeout ddp_gradient_as_bucket_view ddp_static_graph", note="for several GPUs, which need no settings"),
    _row("deepspeed zero_stage", note="the adapter is small: its optimiser fits on every GPU"),
    _row(
        "offload_optimizer_device offload_optimizer_nvme_path offload_param_device offload_param_nvme_path "
        "zero3_init_flag zero3_save_16bit_model fp16_master_weights_and_gradients",
        note="settings of DeepSpeed",
    ),
    _row(
        "weighting_scheme logit_mean logit_std mode_scale blocks_to_swap cpu_offload_checkpointing "
        "sample_prompts.g sample_prompts.ctr sample_prompts.rcfg sample_prompts.fs",
        note="for models other than Stable Diffusion 1.x, 2.x and SDXL",
    ),
    _row("network_args.bypass_mode network_args.disable_conv_cp", note="changes how it is computed, not what"),
    _row("huggingface_token", note="nothing is uploaded"),
    _row("prior_loss_weight", note="weighs regularisation pictures"),
    _row("validation_seed", note="decides which pictures are kept out; here `run.seed` does"),
    _row("lr_scheduler_power lr_scheduler_num_cycles lr_scheduler_timescale lr_decay_steps", note="of other schedules"),
    _row("dim_from_weights", note="the rank of `adapter.start_from` is checked, and has to be that of `adapter.rank`"),
    _row("network_args.unit network_args.train_on_input", note="of DyLoRA and (IA)³"),
    _row("huber_scale", note="of other losses"),
    _row("fused_backward_pass", note="saves memory where whole models are trained"),
    _row("epoch", note="sd-scripts does not read it; kohya_ss writes it for itself"),
)
"""Settings that change nothing of what is learned here."""

WITHOUT_EQUAL = (
    _row(
        "reg_data_dir is_reg",
        note="there are no regularisation pictures: leave them out, or train on them as a data set",
    ),
    _row("in_json metadata_file", note="write captions into `.txt` files or `metadata.jsonl` beside the pictures"),
    _row("conditioning_data_dir masked_loss alpha_mask", note="there are no masks: cut the pictures to what matters"),
    _row("color_aug face_crop_aug_range random_crop", note="pictures are not varied in colour or crop"),
    _row("caption_extension caption_extention", note="captions are read from `.txt` and `.caption`: rename the files"),
    _row("caption_separator keep_tokens_separator secondary_separator", note="tags are separated by commas"),
    _row("enable_wildcard", note="write the captions out, as copies of a picture"),
    _row("caption_dropout_every_n_epochs", note="use `dataset.caption_dropout`"),
    _row("token_warmup_min token_warmup_step", note="all tags are trained from the start"),
    _row("bucket_no_upscale", note="small pictures are enlarged to their bucket; `check` names them"),
    _row("resize_interpolation", note="pictures are resized with Lanczos"),
    _row("custom_attributes network_multiplier", note="data sets differ in `dataset.repeats` only"),
    _row("vae", note="the base's own VAE is used: put the other one into the base's folder"),
    _row("weighted_captions", note="`(word:1.3)` is plain text in captions: take the brackets out"),
    _row("network_train_text_encoder_only", note="the UNet is always trained as well"),
    _row(
        "network_args.loraplus_lr_ratio network_args.loraplus_unet_lr_ratio "
        "network_args.loraplus_text_encoder_lr_ratio",
        note="both matrices learn at the same rate (no LoRA+)",
    ),
    _row(
        "network_args.use_tucker network_args.use_cp network_args.use_conv_cp network_args.use_scalar "
        "network_args.decompose_both network_args.train_norm network_args.full_matrix network_args.rescaled "
        "network_args.constraint network_args.constrain network_args.block_size network_args.rank_dropout_scale "
        "network_args.unbalanced_factorization network_args.wd_on_output",
        note="a variant of LyCORIS that is not here; the plain kind is trained",
    ),
    _row("use_lion_optimizer", note="AdamW is used"),
    _row("lr_scheduler_type", note="choose a `schedule.name`"),
    _row("full_fp16 full_bf16", note="the adapter is always trained in fp32"),
    _row(
        "scale_v_pred_loss_like_noise_pred v_pred_like_loss debiased_estimation_loss",
        note="the one weighting of timesteps is `loss.min_snr_gamma`",
    ),
    _row("multires_noise_iterations multires_noise_discount", note="use `loss.noise_offset`"),
    _row("noise_offset_random_strength adaptive_noise_scale", note="`loss.noise_offset` has one strength"),
    _row("ip_noise_gamma ip_noise_gamma_random_strength", note="the noise that is added is the noise to predict"),
    _row("huber_schedule huber_c", note='`loss.kind = "huber"` has c = 0.1 at all timesteps'),
    _row(
        "save_n_epoch_ratio save_last_n_epochs save_last_n_steps",
        note="every adapter file is kept: delete those that you do not want",
    ),
    _row(
        "save_last_n_epochs_state save_last_n_steps_state", note="set `run.keep_checkpoints`, a number of checkpoints"
    ),
    _row("resume", note="states of sd-scripts are not read: `--resume` goes on from checkpoints of `run.output`"),
    _row("initial_epoch initial_step skip_until_initial_step", note="`--resume` goes on where a run stopped"),
    _row("max_validation_steps", note="all pictures kept out are measured: set `validation.fraction`"),
    _row("training_comment", note="write it into the model card, `README.md` in the run folder"),
    _row(
        "metadata_title metadata_author metadata_description metadata_license metadata_tags metadata_usage_hint "
        "metadata_thumbnail metadata_merged_from metadata_trigger_phrase metadata_preprocessor "
        "metadata_is_negative_embedding",
        note="write it into the model card, `README.md` in the run folder",
    ),
    _row(
        "huggingface_repo_id huggingface_repo_type huggingface_path_in_repo "
        "huggingface_repo_visibility save_state_to_huggingface resume_from_huggingface async_upload",
        note="nothing is uploaded: do it with `hf upload`",
    ),
    _row("sample_prompts.cn", note="previews have no ControlNet"),
)
"""Settings that would change the training and cannot be translated, with what to do."""

OFF_VALUES: dict[str, tuple[object, ...]] = {
    "caption_separator": (",",),
    "caption_extension": (".txt", ".caption", "txt", "caption"),
    "caption_extention": (".txt", ".caption"),
    "network_multiplier": (1.0,),
    "prior_loss_weight": (1.0,),
    "lr_scheduler_power": (1.0,),
    "lr_scheduler_num_cycles": (1.0,),
    "huber_c": (0.1,),
    "huber_scale": (1.0,),
    "token_warmup_min": (1.0,),
    "dynamo_backend": ("no",),
    "network_args.constraint": (-1.0,),
    "network_args.factor": (-1.0,),
}
"""Values besides false, 0 and "" with which a setting does nothing."""

NEEDS = {
    "base_weights_multiplier": "base_weights",
    "multires_noise_discount": "multires_noise_iterations",
    "noise_offset_random_strength": "noise_offset",
    "adaptive_noise_scale": "noise_offset",
    "ip_noise_gamma_random_strength": "ip_noise_gamma",
    "token_warmup_min": "token_warmup_step",
    "network_args.block_lr_zero_threshold": "network_args.down_lr_weight",
    "sample_sampler": "sample_prompts",
    "sample_every_n_steps": "sample_prompts",
    "sample_every_n_epochs": "sample_prompts",
    "validate_every_n_steps": "validation_split",
    "validate_every_n_epochs": "validation_split",
    "max_validation_steps": "validation_split",
    "lr_scheduler_min_lr_ratio": "lr_scheduler",
    "keep_tokens_separator": "shuffle_caption",
    "huggingface_repo_type": "huggingface_repo_id",
    "huggingface_repo_visibility": "huggingface_repo_id",
}
"""Settings that do nothing unless the second one is on."""


def by_name(rows: Iterable[Row]) -> dict[str, Row]:
    """Every setting that the rows name, with its row."""
    return {name: row for row in rows for name in row.theirs}


def spoken(name: str) -> str:
    """A name as people write it: `network_args conv_dim`, `--n` of a prompt."""
    if name.startswith("sample_prompts."):
        return f"--{name.partition('.')[2]}"
    return name.replace(".", " ", 1) if name.startswith((NETWORK, OPTIMIZER, SCHEDULER)) else name


def as_table(rows: Iterable[Row], program: str = "sd-scripts") -> str:
    """The rows as a table of the docs."""
    lines = [f"| {program} | Here |", "| --- | --- |"]
    for row in rows:
        theirs, ours = (", ".join(f"`{name}`" for name in names) for names in (map(spoken, row.theirs), row.ours))
        lines.append(f"| {theirs} | {': '.join(filter(None, (ours, row.note)))} |")
    return "\n".join(lines) + "\n"

"""Settings in the style of other programs, to be read as ours."""

from __future__ import annotations

OPTIONS = """
adaptive_noise_scale alpha_mask async_upload base_weights base_weights_multiplier bucket_no_upscale
bucket_reso_steps cache_info cache_latents cache_latents_to_disk cache_text_encoder_outputs
cache_text_encoder_outputs_to_disk caption_dropout_every_n_epochs caption_dropout_rate caption_extension
caption_extention caption_prefix caption_separator caption_suffix caption_tag_dropout_rate clip_skip
color_aug conditioning_data_dir config_file console_log_file console_log_level console_log_simple
cpu_offload_checkpointing dataset_class dataset_config dataset_repeats ddp_gradient_as_bucket_view
ddp_static_graph ddp_timeout debiased_estimation_loss debug_dataset deepspeed dim_from_weights
disable_mmap_load_safetensors dynamo_backend enable_bucket enable_wildcard face_crop_aug_range flip_aug
fp16_master_weights_and_gradients fp8_base fp8_base_unet full_bf16 full_fp16 fused_backward_pass
gradient_accumulation_steps gradient_checkpointing highvram huber_c huber_scale huber_schedule
huggingface_path_in_repo huggingface_repo_id huggingface_repo_type huggingface_repo_visibility huggingface_token
in_json initial_epoch initial_step ip_noise_gamma ip_noise_gamma_random_strength keep_tokens
keep_tokens_separator learning_rate log_config log_prefix log_tracker_config log_tracker_name log_with
logging_dir loss_type lowram lr_decay_steps lr_scheduler lr_scheduler_args lr_scheduler_min_lr_ratio
lr_scheduler_num_cycles lr_scheduler_power lr_scheduler_timescale lr_scheduler_type lr_warmup_steps masked_loss
max_bucket_reso max_data_loader_n_workers max_grad_norm max_timestep max_token_length max_train_epochs
max_train_steps max_validation_steps mem_eff_attn metadata_author metadata_description
metadata_is_negative_embedding metadata_license metadata_merged_from metadata_preprocessor metadata_tags
metadata_thumbnail metadata_title metadata_trigger_phrase metadata_usage_hint min_bucket_reso min_snr_gamma
min_timestep mixed_precision multires_noise_discount multires_noise_iterations network_alpha network_args
network_dim network_dropout network_module network_train_text_encoder_only network_train_unet_only
network_weights no_half_vae no_metadata noise_offset noise_offset_random_strength offload_optimizer_device
offload_optimizer_nvme_path offload_param_device offload_param_nvme_path optimizer_args optimizer_type
output_config output_dir output_name persistent_data_loader_workers pretrained_model_name_or_path
prior_loss_weight random_crop reg_data_dir resize_interpolation resolution resume resume_from_huggingface
sample_at_first sample_every_n_epochs sample_every_n_steps sample_prompts sample_sampler save_every_n_epochs
save_every_n_steps save_last_n_epochs save_last_n_epochs_state save_last_n_steps save_last_n_steps_state
save_model_as save_n_epoch_ratio save_precision save_state save_state_on_train_end save_state_to_huggingface
scale_v_pred_loss_like_noise_pred scale_weight_norms sdpa secondary_separator seed shuffle_caption
skip_cache_check skip_until_initial_step text_encoder_lr token_warmup_min token_warmup_step tokenizer_cache_dir
torch_compile train_batch_size train_data_dir training_comment unet_lr use_8bit_adam use_lion_optimizer
use_safetensors v2 v_parameterization v_pred_like_loss vae vae_batch_size validate_every_n_epochs
validate_every_n_steps validation_seed validation_split wandb_api_key wandb_run_name weighted_captions xformers
zero3_init_flag zero3_save_16bit_model zero_stage zero_terminal_snr
""".split()  # noqa: SIM905
"""All options of train_network.py and sdxl_train_network.py of sd-scripts 0.10.1."""

GUI: dict[str, object] = {
    "adaptive_noise_scale": 0,
    "additional_parameters": "",
    "ae": "",
    "apply_t5_attn_mask": False,
    "async_upload": False,
    "block_alphas": "",
    "block_dims": "",
    "block_lr_zero_threshold": "",
    "blocks_to_swap": 0,
    "bucket_no_upscale": True,
    "bucket_reso_steps": 64,
    "bypass_mode": False,
    "cache_latents": True,
    "cache_latents_to_disk": False,
    "caption_dropout_every_n_epochs": 0,
    "caption_dropout_rate": 0.05,
    "caption_extension": ".txt",
    "clip_skip": "2",
    "color_aug": False,
    "constrain": 0,
    "conv_alpha": 1,
    "conv_block_alphas": "",
    "conv_block_dims": "",
    "conv_dim": 1,
    "dataset_config": "",
    "debiased_estimation_loss": False,
    "decompose_both": False,
    "dim_from_weights": False,
    "discrete_flow_shift": 3,
    "dora_wd": False,
    "down_lr_weight": "",
    "dynamo_backend": "no",
    "dynamo_mode": "default",
    "enable_bucket": True,
    "epoch": 10,
    "extra_accelerate_launch_args": "",
    "factor": -1,
    "flip_aug": False,
    "fp8_base": False,
    "full_bf16": False,
    "full_fp16": False,
    "gpu_ids": "",
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": True,
    "guidance_scale": 3.5,
    "huber_c": 0.1,
    "huber_schedule": "snr",
    "huggingface_token": "",
    "ip_noise_gamma": 0,
    "keep_tokens": "0",
    "learning_rate": 0.0001,
    "log_config": False,
    "log_with": "",
    "logging_dir": "",
    "LoRA_type": "Standard",
    "loraplus_lr_ratio": 0,
    "loss_type": "l2",
    "lr_scheduler": "cosine",
    "lr_scheduler_args": "",
    "lr_scheduler_num_cycles": "",
    "lr_scheduler_power": "",
    "lr_scheduler_type": "",
    "lr_warmup": 10,
    "lr_warmup_steps": 0,
    "LyCORIS_preset": "full",
    "main_process_port": 0,
    "masked_loss": False,
    "max_bucket_reso": 2048,
    "max_data_loader_n_workers": "0",
    "max_grad_norm": 1,
    "max_resolution": "512,512",
    "max_timestep": 1000,
    "max_token_length": "75",
    "max_train_epochs": "",
    "max_train_steps": "",
    "mem_eff_attn": False,
    "metadata_author": "",
    "mid_lr_weight": "",
    "min_bucket_reso": 256,
    "min_snr_gamma": 0,
    "min_timestep": 0,
    "mixed_precision": "fp16",
    "model_list": "custom",
    "module_dropout": 0,
    "multi_gpu": False,
    "multires_noise_discount": 0.3,
    "multires_noise_iterations": 6,
    "network_alpha": 8,
    "network_dim": "8",
    "network_dropout": 0,
    "network_weights": "",
    "noise_offset": 0.05,
    "noise_offset_type": "Original",
    "num_cpu_threads_per_process": 2,
    "num_machines": 1,
    "num_processes": 1,
    "optimizer": "AdamW8bit",
    "optimizer_args": "",
    "output_dir": "out",
    "output_name": "my style",
    "persistent_data_loader_workers": False,
    "pretrained_model_name_or_path": "runwayml/stable-diffusion-v1-5",
    "prior_loss_weight": 1,
    "random_crop": False,
    "rank_dropout": 0,
    "rank_dropout_scale": False,
    "reg_data_dir": "",
    "rescaled": False,
    "resume": "",
    "sample_every_n_epochs": 0,
    "sample_every_n_steps": 25,
    "sample_prompts": "",
    "sample_sampler": "euler_a",
    "save_every_n_epochs": 1,
    "save_every_n_steps": 0,
    "save_last_n_epochs": 0,
    "save_last_n_steps": 0,
    "save_model_as": "safetensors",
    "save_precision": "fp16",
    "save_state": False,
    "scale_weight_norms": 0,
    "sdxl": False,
    "sdxl_no_half_vae": True,
    "seed": "",
    "shuffle_caption": False,
    "skip_cache_check": False,
    "stop_text_encoder_training_pct": 0,
    "t5xxl_lr": 0,
    "text_encoder_lr": 0.0001,
    "train_batch_size": 1,
    "train_data_dir": "",
    "train_norm": False,
    "train_on_input": True,
    "unet_lr": "1e-4",
    "unit": 1,
    "up_lr_weight": "",
    "use_cp": False,
    "use_scalar": False,
    "use_tucker": False,
    "use_wandb": False,
    "v2": False,
    "v_parameterization": False,
    "v_pred_like_loss": 0,
    "vae": "",
    "vae_batch_size": 0,
    "wandb_api_key": "",
    "weighted_captions": False,
    "xformers": "xformers",
}
"""What kohya_ss saves for a LoRA of Stable Diffusion 1.5, most of it as it is when nothing is changed."""

"""Settings of sd-scripts → a config of ours that trains what they would: what differs by default is written out."""

from __future__ import annotations

from lora_diffusion.kohya.dataset import scopes, translate_datasets
from lora_diffusion.kohya.keys import OPTIMIZER
from lora_diffusion.kohya.ledger import Ledger
from lora_diffusion.kohya.length import Length
from lora_diffusion.kohya.network import translate_network
from lora_diffusion.kohya.prompts import translate_previews
from lora_diffusion.kohya.read import Source

OPTIMIZERS = {
    "adamw": "adamw",
    "adamw8bit": "adamw8bit",
    "pagedadamw": "adamw",
    "pagedadamw8bit": "adamw8bit",
    "pagedadamw32bit": "adamw",
}
SCHEDULES = {
    "constant": "constant",
    "constant_with_warmup": "constant",
    "linear": "linear",
    "cosine": "cosine",
    "cosine_with_min_lr": "cosine",
}
NEAREST_SCHEDULES = {"cosine_with_restarts": "cosine", "polynomial": "linear", "warmup_stable_decay": "linear"}
PRECISIONS = {"no": "fp32", "fp16": "fp16", "bf16": "bf16", "float": "fp32", "fp32": "fp32"}
DEFAULT_RATE = 2e-6
OWN_RATE = 1e-4  # where theirs is none of AdamW


def translate(source: Source) -> Ledger:
    """The whole config, and what became of each setting. What is wrong with the values is in `problems`."""
    ledger = Ledger(source)
    length = Length.of(ledger)
    length.translate()
    _translate_run(ledger)
    _translate_model(ledger)
    translate_network(ledger)
    translate_datasets(ledger)
    _translate_rates(ledger)
    _translate_optimizer(ledger)
    _translate_schedule(ledger, length)
    _translate_loss(ledger)
    translate_previews(ledger, length)
    _translate_validation(ledger, length)
    ledger.close()
    return ledger


def _translate_run(ledger: Ledger) -> None:
    name = ledger.text("output_name")
    ledger.put("run.name", name or "last", "output_name", note="" if name else "last if not given")
    if folder := ledger.text("output_dir"):
        ledger.put("run.output", folder, "output_dir")
    seed = ledger.whole("seed")
    if seed is None:
        ledger.differ("seed: not given, so a random one in sd-scripts; 42 here")
    else:
        ledger.put("run.seed", seed, "seed")
    for setting, key in (("mixed_precision", "precision"), ("save_precision", "save_precision")):
        given = ledger.text(setting).lower()
        if given and given not in PRECISIONS:
            ledger.refuse(setting, f"`run.{key}` is fp32, fp16 or bf16; fp32 is used")
        note = "" if given else "fp32 if not given"
        ledger.put(f"run.{key}", PRECISIONS.get(given, "fp32"), setting, note=note)
    if ledger.switch("no_metadata"):
        ledger.put("run.metadata", "minimal", "no_metadata")
    if (workers := ledger.whole("max_data_loader_n_workers")) is not None:
        ledger.put("run.loader_workers", workers, "max_data_loader_n_workers")


def _translate_model(ledger: Ledger) -> None:
    if base := ledger.text("pretrained_model_name_or_path"):
        ledger.put("model.path", base, "pretrained_model_name_or_path")
    for setting, family in (("v2", "sd2"), ("sdxl", "sdxl")):
        if ledger.switch(setting):
            ledger.put("model.family", family, setting)
    if ledger.switch("v_parameterization"):
        ledger.put("model.prediction", "v", "v_parameterization")
    if ledger.switch("zero_terminal_snr"):
        ledger.put("model.zero_terminal_snr", True, "zero_terminal_snr")
    for setting, key in (("clip_skip", "clip_skip"), ("max_token_length", "max_tokens")):
        if number := ledger.whole(setting):
            ledger.put(f"model.{key}", number, setting)
    if ledger.switch("gradient_checkpointing"):
        ledger.put("model.gradient_checkpointing", True, "gradient_checkpointing")
    for setting in ("fp8_base", "fp8_base_unet"):
        if ledger.switch(setting):
            ledger.put("model.quantise", "int8", setting, note="as small, and nearer to the base")
    if ledger.is_on("base_weights"):
        value = ledger.value("base_weights")
        files: list[object] = [*value] if isinstance(value, list) else [value]
        strengths = ledger.numbers("base_weights_multiplier")
        merged = [f"{file}:{strengths[i]:g}" if i < len(strengths) else str(file) for i, file in enumerate(files)]
        ledger.put("model.merge", merged, "base_weights", "base_weights_multiplier")


def _translate_rates(ledger: Ledger) -> None:
    """Learning rates, and whether the text encoders are trained."""
    shared = ledger.number("learning_rate")
    unet = ledger.number("unet_lr")
    texts = ledger.numbers("text_encoder_lr")
    text = texts[0] if texts else DEFAULT_RATE if shared is None else shared
    without = [name for name in ("network_train_unet_only", "cache_text_encoder_outputs") if ledger.switch(name)]
    if texts and not any(texts):
        without.append("text_encoder_lr")
    is_trained = not without and text > 0
    note = "" if without else "trained unless told otherwise" if is_trained else "its learning rate is 0"
    ledger.put("adapter.text_encoder", is_trained, *without, note=note)
    if not is_trained:
        ledger.ignore("text_encoder_lr", "the text encoder is not trained")
    optimizer = _optimizer(ledger)
    if optimizer not in OPTIMIZERS:
        for name in ("learning_rate", "unet_lr", "text_encoder_lr"):
            if ledger.is_on(name):
                ledger.refuse(name, f"a rate of {optimizer}, which is of another size: `optimizer.lr` is {OWN_RATE:g}")
        ledger.put("optimizer.lr", OWN_RATE, note=f"of AdamW: rates of {optimizer} are of another size")
        return
    name = "learning_rate" if unet is None else "unet_lr"
    rate = unet if unet is not None else shared
    note = "2e-6 if not given" if rate is None else ""
    if rate == 0:
        ledger.refuse(name, "the UNet is always trained: give it a rate")
    else:
        ledger.put("optimizer.lr", DEFAULT_RATE if rate is None else rate, name, note=note)
    if is_trained:
        origin = "text_encoder_lr" if texts else "learning_rate"
        ledger.put("optimizer.text_encoder_lr", text, origin, note="" if texts else "that of the UNet if not given")
        if len(set(texts)) > 1:
            ledger.differ(f"text_encoder_lr: the first rate is for all text encoders, as in networks.lora ({text:g})")


def _optimizer(ledger: Ledger) -> str:
    """The name in lower case, without the package it is in."""
    if ledger.switch("use_8bit_adam"):
        return "adamw8bit"
    return (ledger.text("optimizer_type") or "AdamW").lower().rpartition(".")[2]


def _translate_optimizer(ledger: Ledger) -> None:
    optimizer = _optimizer(ledger)
    name = "use_8bit_adam" if ledger.switch("use_8bit_adam") else "optimizer_type"
    arguments = [setting for setting in ledger.source.settings if setting.startswith(OPTIMIZER)]
    if optimizer not in OPTIMIZERS:
        ledger.refuse(name, "`adamw` is used, or choose `adamw8bit`")
        ledger.put("optimizer.name", "adamw", note=f"in place of {optimizer}")
        for setting in arguments:
            ledger.ignore(setting, f"is for {optimizer}")
    else:
        ledger.put(
            "optimizer.name", OPTIMIZERS[optimizer], name, note="" if ledger.is_on(name) else "AdamW if not given"
        )
        for setting in arguments:
            _translate_argument(ledger, setting)
    norm = ledger.number("max_grad_norm")
    if norm is not None:
        ledger.put("optimizer.max_grad_norm", norm, "max_grad_norm")


def _translate_argument(ledger: Ledger, setting: str) -> None:
    key = setting.removeprefix(OPTIMIZER)
    if key == "betas":
        ledger.put("optimizer.betas", ledger.numbers(setting), setting)
    elif key in ("weight_decay", "eps"):
        ledger.put(f"optimizer.{key}", ledger.number(setting), setting)
    else:
        ledger.refuse(setting, "the optimiser has `weight_decay`, `betas` and `eps` here")


def _translate_schedule(ledger: Ledger, length: Length) -> None:
    given = ledger.text("lr_scheduler").lower()
    cycles, power = ledger.number("lr_scheduler_num_cycles") or 1, ledger.number("lr_scheduler_power") or 1
    name = SCHEDULES.get(given or "constant")
    if (given == "cosine_with_restarts" and cycles == 1) or (given == "polynomial" and power == 1):
        name = NEAREST_SCHEDULES[given]
    note = "" if given else "constant if not given"
    if name is None:
        name = NEAREST_SCHEDULES.get(given, "constant")
        settings = "".join(
            f" with `{ledger.origin(setting)}` {value:g}"
            for setting, value in (("lr_scheduler_num_cycles", cycles), ("lr_scheduler_power", power))
            if value != 1
        )
        ledger.refuse("lr_scheduler", f"there is none like it{settings}: `schedule.name` is {name}")
    ledger.put("schedule.name", name, "lr_scheduler", note=note)
    if given == "cosine_with_min_lr" and (ratio := ledger.number("lr_scheduler_min_lr_ratio")):
        ledger.put("schedule.min_lr_ratio", ratio, "lr_scheduler_min_lr_ratio")
    else:
        ledger.ignore("lr_scheduler_min_lr_ratio", "is for cosine_with_min_lr")
    for setting in ledger.source.settings:
        if setting.startswith("lr_scheduler_args."):
            ledger.refuse(setting, "schedules take no further settings here")
    if given in ("", "constant"):
        ledger.ignore("lr_warmup_steps", "a constant schedule has no warm-up in sd-scripts")
        return
    _translate_warmup(ledger, length)


def _translate_warmup(ledger: Ledger, length: Length) -> None:
    warmup = ledger.number("lr_warmup_steps")
    if not warmup:
        return
    if warmup >= 1:
        ledger.put("schedule.warmup_steps", int(warmup), "lr_warmup_steps")
        return
    steps = length.share(warmup)
    if steps is None:
        ledger.refuse(
            "lr_warmup_steps",
            f"{warmup:.0%} of a run whose pictures could not be counted: set `schedule.warmup_steps` to that share of "
            "the steps that `check` tells",
        )
    else:
        ledger.put("schedule.warmup_steps", steps, "lr_warmup_steps", note=f"{warmup:.0%} of the run")


def _translate_loss(ledger: Ledger) -> None:
    kind = ledger.text("loss_type").lower() or "l2"
    if kind in ("l2", "mse"):
        ledger.put("loss.kind", "mse", "loss_type", note="" if ledger.is_on("loss_type") else "l2 if not given")
    elif kind == "huber":
        ledger.put("loss.kind", "huber", "loss_type")
        if ledger.text("huber_schedule") != "constant":
            ledger.differ("huber loss: sd-scripts lets c fall with the timestep; here it is 0.1 at all of them")
    else:
        ledger.refuse("loss_type", "there are `mse` and `huber`; `huber` is used")
        ledger.put("loss.kind", "huber", "loss_type")
    if kind != "huber":
        for setting in ("huber_c", "huber_schedule", "huber_scale"):
            ledger.ignore(setting, "is for the huber loss")
    gamma = ledger.number("min_snr_gamma")
    ledger.put("loss.min_snr_gamma", gamma or 0.0, "min_snr_gamma", note="off if not given" if gamma is None else "")
    if offset := ledger.number("noise_offset"):
        ledger.put("loss.noise_offset", offset, "noise_offset")
    for setting, key in (("min_timestep", "timestep_min"), ("max_timestep", "timestep_max")):
        if (step := ledger.whole(setting)) is not None:
            ledger.put(f"loss.{key}", step, setting)


def _translate_validation(ledger: Ledger, length: Length) -> None:
    name = scopes(ledger)[0].name("validation_split")
    fraction = ledger.number(name)
    if not fraction:
        return
    every = length.interval("validate_every_n_steps", "validate_every_n_epochs")
    if every.steps == 0:
        every = length.each_epoch(name)
    if every.steps is not None:
        ledger.put("validation.fraction", fraction, name)
        ledger.put("validation.every", every.steps, *every.names, note=every.note)

"""Which noise schedule a base was trained with: what its files say, what the settings say, and that they agree."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lora_diffusion.diffusion.schedule import NoiseSchedule, Prediction, make_betas
from lora_diffusion.models.builtin_configs import SCHEDULER
from lora_diffusion.models.errors import ModelError

TYPES: dict[str, Prediction] = {"epsilon": "epsilon", "v_prediction": "v"}
"""`prediction_type` in diffusers' files → our name."""

OTHER_NOISE = (
    "it learnt on another noise process (EDM or flow matching), and an adapter would be trained towards the wrong "
    f"target. This version trains {' and '.join(TYPES)}: give a base that was made with one of them."
)
"""What is said of a base that predicts neither noise nor velocity, after the place that shows it."""

_OTHER_SCHEDULERS = re.compile(r"\w*(EDM|FlowMatch)\w*")  # names of diffusers' classes

_DIFFUSERS_TYPES = {ours: theirs for theirs, ours in TYPES.items()}


@dataclass(frozen=True)
class ScheduleEvidence:
    """What a base's files say of its noise schedule; None where they say nothing.

    *_fact: the place and the words, for messages. guess: what to assume when neither files nor settings say.
    """

    prediction: Prediction | None = None
    prediction_fact: str = ""
    zero_terminal_snr: bool | None = None
    zero_terminal_snr_fact: str = ""
    guess: Prediction = "epsilon"

    def completed_by(self, other: ScheduleEvidence) -> ScheduleEvidence:
        """This evidence, and that of `other` where there is none here."""
        first = self if self.prediction is not None else other
        second = self if self.zero_terminal_snr is not None else other
        return ScheduleEvidence(
            first.prediction,
            first.prediction_fact,
            second.zero_terminal_snr,
            second.zero_terminal_snr_fact,
            self.guess,
        )


def evidence_of_scheduler(config: Mapping[str, Any]) -> ScheduleEvidence:
    """What a scheduler_config.json says; many leave `prediction_type` and `rescale_betas_zero_snr` out.

    Raises ModelError for what this version does not train.
    """
    check_scheduler_class(config.get("_class_name"), "scheduler_config.json")
    if config.get("use_flow_sigmas"):
        raise ModelError(
            f"scheduler_config.json has use_flow_sigmas = true: {OTHER_NOISE} If the file is wrong, correct it there."
        )
    named, rescaled = config.get("prediction_type"), config.get("rescale_betas_zero_snr")
    if named is not None and named not in tuple(TYPES):
        raise ModelError(
            f"scheduler_config.json has prediction_type {named!r}; this version trains {' and '.join(TYPES)}. "
            "If the file is wrong, correct it there."
        )
    return ScheduleEvidence(
        prediction=None if named is None else TYPES[named],
        prediction_fact=f"scheduler_config.json says {named}",
        zero_terminal_snr=None if rescaled is None else bool(rescaled),
        zero_terminal_snr_fact=f"scheduler_config.json says rescale_betas_zero_snr = {str(rescaled).lower()}",
    )


def check_scheduler_class(named: object, file: str) -> None:
    """Raises ModelError if the scheduler that `file` names is of a noise process that this version does not train.

    named: the class's name, or library and class as in model_index.json.
    """
    if other := _OTHER_SCHEDULERS.search(str(named)):
        raise ModelError(
            f"{file} names the scheduler {other[0]}: {OTHER_NOISE} If the file is wrong, correct it there."
        )


def resolve_scheduler(
    config: Mapping[str, Any],
    evidence: ScheduleEvidence,
    *,
    prediction: Literal["auto"] | Prediction = "auto",
    zero_terminal_snr: Literal["auto"] | bool = "auto",
) -> dict[str, Any]:
    """A diffusers scheduler config with `prediction_type` and `rescale_betas_zero_snr` as they will be used.

    Where `config` says nothing, Stable Diffusion's values, so that training and drawing agree.
    Raises ModelError when a setting contradicts the evidence.
    """
    if prediction == "auto":
        prediction = evidence.prediction or evidence.guess
    elif evidence.prediction not in (None, prediction):
        raise ModelError(
            f"model.prediction is {prediction!r}, but {evidence.prediction_fact}: the adapter would be trained towards "
            "the wrong target. Use 'auto'; if that file is wrong, correct it there."
        )
    if zero_terminal_snr == "auto":
        zero_terminal_snr = bool(evidence.zero_terminal_snr)
    elif evidence.zero_terminal_snr not in (None, zero_terminal_snr):
        raise ModelError(
            f"model.zero_terminal_snr is {str(zero_terminal_snr).lower()}, but {evidence.zero_terminal_snr_fact}: the "
            "noise would not be what the base was trained with. Use 'auto'; if that file is wrong, correct it there."
        )
    resolved = SCHEDULER | {name: value for name, value in config.items() if not name.startswith("_")}
    resolved["prediction_type"] = _DIFFUSERS_TYPES[prediction]
    resolved["rescale_betas_zero_snr"] = zero_terminal_snr
    return resolved


def schedule_of(config: Mapping[str, Any]) -> NoiseSchedule:
    """The training schedule that a resolved scheduler config describes."""
    if config.get("trained_betas") is not None:
        betas = torch.tensor(config["trained_betas"], dtype=torch.float32)
    else:
        betas = make_betas(
            config["beta_schedule"],
            config["beta_start"],
            config["beta_end"],
            config["num_train_timesteps"],
        )
    return NoiseSchedule.from_betas(betas, TYPES[config["prediction_type"]], config["rescale_betas_zero_snr"])

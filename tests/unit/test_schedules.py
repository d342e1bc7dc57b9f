"""What a base was trained to predict: its files decide, and a setting that says otherwise is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_diffusion.models.errors import ModelError
from lora_diffusion.models.load import load_model
from lora_diffusion.models.schedules import ScheduleEvidence, evidence_of_scheduler, resolve_scheduler, schedule_of
from tests.tiny import make_tiny_sd2


@pytest.mark.parametrize(
    ("stored", "setting", "message"),
    [
        (
            {"prediction": "v"},
            {"prediction": "epsilon"},
            r"model.prediction is 'epsilon', but scheduler_config.json says v_prediction: .* correct it there",
        ),
        (
            {"prediction": "epsilon"},
            {"prediction": "v"},
            r"model.prediction is 'v', but scheduler_config.json says epsilon",
        ),
        (
            {"zero_terminal_snr": True},
            {"zero_terminal_snr": False},
            r"model.zero_terminal_snr is false, but scheduler_config.json says rescale_betas_zero_snr = true",
        ),
    ],
)
def test_a_setting_against_the_folders_scheduler_is_refused(
    tmp_path: Path, stored: dict[str, Any], setting: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(make_tiny_sd2(tmp_path, **stored), **setting)


def test_settings_decide_where_the_files_say_nothing(tmp_path: Path) -> None:
    folder = make_tiny_sd2(tmp_path, prediction=None)
    assert load_model(folder).schedule.prediction == "epsilon"
    model = load_model(folder, prediction="v", zero_terminal_snr=True)
    assert model.schedule.prediction == "v"
    assert float(model.schedule.alphas_cumprod[-1]) == 0


@pytest.mark.parametrize("scheduler", ["EDMDPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_a_scheduler_of_another_noise_process_is_refused(tmp_path: Path, scheduler: str) -> None:
    folder = make_tiny_sd2(tmp_path, prediction=None)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": scheduler}))
    with pytest.raises(ModelError, match=rf"names the scheduler {scheduler}: .*This version trains epsilon and v_pred"):
        load_model(folder, prediction="v")


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (
            {"use_flow_sigmas": True},
            r"has use_flow_sigmas = true: it learnt on another noise process .* correct it there",
        ),
        ({"prediction_type": "flow_prediction"}, r"has prediction_type 'flow_prediction'; .* correct it there"),
        ({"prediction_type": "sample"}, r"has prediction_type 'sample'; this version trains epsilon and v_prediction"),
        ({"prediction_type": ["epsilon"]}, r"has prediction_type \['epsilon'\]; this version trains epsilon"),
    ],
)
def test_a_scheduler_file_that_asks_for_what_is_not_trained_is_refused(
    tmp_path: Path, stored: dict[str, Any], message: str
) -> None:
    folder = make_tiny_sd2(tmp_path, prediction=None)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | stored))
    for prediction in ("auto", "epsilon", "v"):
        with pytest.raises(ModelError, match=f"scheduler_config.json {message}"):
            load_model(folder, prediction=prediction)


def test_a_scheduler_of_another_noise_process_is_refused_where_only_the_index_names_it(tmp_path: Path) -> None:
    folder = make_tiny_sd2(tmp_path, prediction=None)
    index = folder / "model_index.json"
    named = {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}
    index.write_text(json.dumps(json.loads(index.read_text()) | named))
    with pytest.raises(ModelError, match=r"model_index.json names the scheduler FlowMatchEulerDiscreteScheduler: "):
        load_model(folder)


def test_evidence_is_completed_where_it_is_silent() -> None:
    marker = ScheduleEvidence("v", "a marker")
    both = marker.completed_by(evidence_of_scheduler({"prediction_type": "epsilon", "rescale_betas_zero_snr": True}))
    assert (both.prediction, both.prediction_fact, both.zero_terminal_snr) == ("v", "a marker", True)
    assert evidence_of_scheduler({}).completed_by(marker).prediction == "v"


def test_a_guess_gives_way_to_a_setting() -> None:
    guess = ScheduleEvidence(guess="v")
    assert schedule_of(resolve_scheduler({}, guess)).prediction == "v"
    assert schedule_of(resolve_scheduler({}, guess, prediction="epsilon")).prediction == "epsilon"

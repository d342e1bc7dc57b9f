from __future__ import annotations

import pytest
import torch

from lora_diffusion.diffusion.loss import HUBER_C, LOSS_WEIGHTS, LOSSES, per_sample_loss
from lora_diffusion.diffusion.schedule import NoiseSchedule, make_betas
from lora_diffusion.streams import stream

SNR = NoiseSchedule.from_betas(make_betas("scaled_linear"), "epsilon").snr(torch.arange(1000))


def draw(name: str) -> torch.Tensor:
    return torch.randn((3, 4, 8, 8), generator=stream(0, name))


def test_both_dicts_are_filled() -> None:
    assert {"mse", "huber"} <= LOSSES.keys()
    assert {"none", "min-snr"} <= LOSS_WEIGHTS.keys()


def test_mse_is_torchs_mean_squared_error_of_each_sample() -> None:
    prediction, target = draw("p"), draw("t")
    expected = [torch.nn.functional.mse_loss(p, t) for p, t in zip(prediction, target, strict=True)]
    torch.testing.assert_close(per_sample_loss(prediction, target, "mse"), torch.stack(expected))


@pytest.mark.parametrize("kind", LOSSES)
def test_a_loss_is_zero_where_prediction_and_target_agree_and_has_a_gradient_elsewhere(kind: str) -> None:
    target = draw("t")
    assert not per_sample_loss(target, target, kind).any()
    prediction = draw("p").requires_grad_()
    per_sample_loss(prediction, target, kind).sum().backward()
    assert torch.equal(prediction.grad.sign(), (prediction - target).sign())


@pytest.mark.parametrize("kind", LOSSES)
def test_half_precision_is_summed_in_float32(kind: str) -> None:
    prediction, target = draw("p").half(), draw("t").half()
    loss = per_sample_loss(prediction, target, kind)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, per_sample_loss(prediction.float(), target.float(), kind))


def test_huber_is_quadratic_for_small_and_linear_for_large_errors() -> None:
    error = torch.tensor([[1e-3], [1000.0]])
    loss = per_sample_loss(error, torch.zeros(2, 1), "huber")
    assert loss[0] == pytest.approx(1e-6, rel=0.02)  # float32 cancels half the digits of so small an error
    assert loss[1] == pytest.approx(2 * HUBER_C * 1000, rel=1e-3)


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3, 4\), target \(3, 1\)"):
        per_sample_loss(torch.zeros(3, 4), torch.zeros(3, 1))


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("name", LOSS_WEIGHTS)
def test_weights_are_finite_and_not_negative_also_at_zero_snr(name: str, prediction: str) -> None:
    weights = LOSS_WEIGHTS[name](torch.cat([SNR, torch.zeros(1)]), prediction, 5.0)  # type: ignore[arg-type]
    assert weights.shape == (1001,)
    assert weights.dtype == torch.float32
    assert weights.isfinite().all() and (weights >= 0).all()
    assert (weights[:1000] > 0).all()


def test_none_leaves_the_loss_alone() -> None:
    assert (LOSS_WEIGHTS["none"](SNR, "v", 5.0) == 1).all()


def test_min_snr_for_epsilon_is_one_from_the_timestep_where_snr_falls_below_gamma() -> None:
    weights = LOSS_WEIGHTS["min-snr"](SNR, "epsilon", 5.0)
    assert (weights[147:] == 1).all() and (weights[:147] < 1).all()
    assert weights[0] == pytest.approx(5 / 1175.5, rel=1e-3)
    assert weights[100] == pytest.approx(5 / 8.45, rel=1e-3)


def test_min_snr_for_v_is_the_epsilon_weight_times_snr_over_snr_plus_one() -> None:
    epsilon = LOSS_WEIGHTS["min-snr"](SNR, "epsilon", 5.0)
    torch.testing.assert_close(LOSS_WEIGHTS["min-snr"](SNR, "v", 5.0), epsilon * SNR / (SNR + 1))


def test_min_snr_loses_its_effect_with_a_large_gamma() -> None:
    assert (LOSS_WEIGHTS["min-snr"](SNR, "epsilon", 1e4) == 1).all()

"""Which schedulers of diffusers take the place of a model's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compress.plugins.diffusion.scheduler import UNTRAINED, Choice, best_untrained, check_steps, fitting_scheduler
from compress.utils.errors import InputError

diffusers = pytest.importorskip("diffusers")


TRAINED = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def own(**fields: Any) -> Any:
    return diffusers.DDPMScheduler(**{**TRAINED, "clip_sample": False, **fields})


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("choice", UNTRAINED, ids=str)
@pytest.mark.parametrize("steps", [50, 4])
def test_what_is_tried_fits_and_keeps_the_noise_and_what_the_network_predicts(
    kind: str, choice: Choice, steps: int
) -> None:
    base = own(prediction_type=kind)
    fitted = fitting_scheduler(base, choice, steps)
    assert type(fitted).__name__ == choice.scheduler and fitted.config.prediction_type == kind
    torch.testing.assert_close(fitted.alphas_cumprod, base.alphas_cumprod)
    assert fitted.config.timestep_spacing == choice.fields["timestep_spacing"]


@pytest.mark.parametrize(
    ("base", "choice", "steps", "words"),
    [
        ({}, Choice("DDIMSchedular"), 10, "no scheduler 'DDIMSchedular'"),
        ({}, Choice("LCMScheduler"), 4, "LCMScheduler does not fit"),
        ({}, Choice("FlowMatchEulerDiscreteScheduler"), 4, "does not fit"),
        ({"prediction_type": "sample"}, Choice("PNDMScheduler"), 10, "does not fit"),
        ({}, Choice("PNDMScheduler", {"timestep_spacing": "karras"}), 10, "karras"),
        ({}, Choice("DDIMScheduler", {"use_karras_sigmas": True}), 10, "has no use_karras_sigmas"),
        ({}, Choice("DDIMScheduler"), 1001, "1001|1000"),
        ({"rescale_betas_zero_snr": True}, Choice("PNDMScheduler"), 10, "noise levels"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(
    base: dict[str, Any], choice: Choice, steps: int, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        fitting_scheduler(own(**base), choice, steps)


def test_a_consistent_model_keeps_its_scheduler() -> None:
    lcm = diffusers.LCMScheduler(**TRAINED, original_inference_steps=50)
    check_steps(lcm, 4)
    with pytest.raises(InputError, match="DDIMScheduler does not fit"):
        fitting_scheduler(lcm, Choice("DDIMScheduler"), 4)
    with pytest.raises(InputError, match="smaller"):
        check_steps(lcm, 51)


def test_the_best_is_that_of_the_least_measure_and_misfits_are_told() -> None:
    choices = (Choice("DDIMScheduler"), Choice("LCMScheduler"), Choice("UniPCMultistepScheduler"))
    measures = {"DDIMScheduler": 2.0, "UniPCMultistepScheduler": 1.0}
    best, tried = best_untrained(own(), 4, lambda trial: measures[type(trial).__name__], choices)
    assert type(best).__name__ == "UniPCMultistepScheduler"
    assert [trial.error for trial in tried] == [1.0, 2.0, None] and "LCMScheduler does not fit" in tried[2].reason


def test_schedulers_that_call_twice_a_step_are_no_choice_for_so_many_calls() -> None:
    _, tried = best_untrained(own(), 4, lambda one: 0.0, (Choice("DDIMScheduler"), Choice("HeunDiscreteScheduler")))
    assert "more than once" in tried[1].reason

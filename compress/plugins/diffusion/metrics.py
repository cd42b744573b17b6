"""Rows of the metrics table for models that generate images."""

from __future__ import annotations

from compress.results.metrics import Metric, milliseconds, share, speedup

_COMPONENTS = {
    "text_encoder": "Text encoder",
    "denoiser_step": "Step of the denoiser",
    "decoder": "Decoder of pictures",
    "scheduler": "Scheduler and guidance",
}
METRICS = (
    Metric("psnr_to_baseline", "PSNR to the baseline's image", better="higher", unit="dB", relative=True),
    Metric("ssim_to_baseline", "SSIM to the baseline's image", better="higher", relative=True),
    Metric(
        "perceptual_distance_to_baseline",
        "Distance to the baseline's image in the classifier's features",
        better="lower",
        relative=True,
    ),
    Metric("sampling_steps", "Steps of a picture", "count", "lower", aggregation="exact"),
    share("prompt_accuracy", "Prompt accuracy", aggregation="mean", margin="1 points", gate_margin="1 points"),
    Metric(
        "frechet_distance",
        "Fr\u00e9chet distance",
        better="lower",
        quality=True,
        aggregation="all examples",
        margin="5%",
        gate_margin="5%",
    ),
    Metric("picture_contrast", "Spread of a picture's levels", unit="levels", aggregation="mean"),
    milliseconds("first_picture_ms", "First picture", measured_by="images"),
    *(milliseconds(f"{component}_ms", title, measured_by="images") for component, title in _COMPONENTS.items()),
    *(
        speedup(f"speedup_{component}", f"Speed-up of the {title.lower()}", measured_by="images")
        for component, title in _COMPONENTS.items()
    ),
)

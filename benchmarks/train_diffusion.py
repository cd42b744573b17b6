"""Train a small latent diffusion model that generates images of clothes from captions, and a classifier to evaluate it.

    python benchmarks/train_diffusion.py artifacts/fashion-diffusion

`model/` is a StableDiffusionPipeline of diffusers: MiniLM as text encoder, and a variational autoencoder and a UNet
that are trained on the train split of `sample:fashion-captions`, which has ten classes and eight caption templates.
`judge/` is an image classifier of transformers, trained on the same rows and on no generated image. Images are
Fashion-MNIST's 28 x 28 gray pixels, padded to 32 x 32.

The number of steps that fit into `--minutes` is estimated by timing a few, and stored in `training/plan.json`. The same
command resumes after a kill; the same plan, seed and number of threads give the same model.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusion_lessons import (
    SCALE,
    SCHEDULE,
    SIZE,
    TOKENS,
    CaptionedImages,
    Text,
    as_floats,
    autoencoder_loss,
    build_autoencoder,
    build_judge,
    build_unet,
    denoising_loss,
    judge_loss,
)
from restartable import Training, load_or_make_plan, remove_checkpoint, seconds_per_step
from restartable import train as train_module

from compress.formats.quiet_output import quiet_libraries
from compress.plugins.diffusion.image_metrics import frechet_distance, psnr
from compress.plugins.diffusion.pipeline_model import SAMPLING, Sampling, import_diffusers
from compress.report.progress import ConsoleProgress
from compress.utils.errors import CompressError, InputError
from compress.utils.progress import Progress

GUIDANCE, SAMPLING_STEPS = 2.0, 25
_SHARES = {"judge": 0.12, "autoencoder": 0.23, "unet": 0.65}
_MARGIN = 0.9
"""Share of the remaining time that is planned for steps, as a margin for other processes."""
PLAN, RECORD = "plan.json", "training.json"
GENERATED, BATCH = 500, 256


def main(
    output: Annotated[Path, typer.Argument(help="Folder for model and classifier: a new one, or one to resume.")],
    minutes: Annotated[float, typer.Option(min=0.2, help="Total time on this machine.")] = 38.0,
    seed: Annotated[int, typer.Option(min=0, help="Random seed.")] = 0,
) -> None:
    """Train model and classifier and write them as safetensors."""
    quiet_libraries()
    import_diffusers()
    progress = ConsoleProgress()
    try:
        train(output, minutes, seed, progress)
    except CompressError as error:
        progress.note(str(error))
        raise typer.Exit(error.exit_code) from None


def train(output: Path, minutes: float, seed: int, progress: Progress) -> None:
    """Train everything and write the folders. Raises `InputError` if ``output`` holds other files."""
    work, start = output / "training", time.monotonic()
    _check_new(output, work / PLAN)
    images, text = CaptionedImages.read(progress), Text()
    torch.manual_seed(seed)
    judge, autoencoder, unet = build_judge(images.classes), build_autoencoder(), build_unet()
    latents = torch.zeros(len(images.train), 2, 4, SIZE // SCALE, SIZE // SCALE)
    trainings = (
        Training("judge", judge, judge_loss(judge, images), 2e-3),
        Training("autoencoder", autoencoder, autoencoder_loss(autoencoder, images), 1e-3),
        Training(
            "unet", unet, denoising_loss(unet, images, latents, text.states(images.captions)), 8e-4, averaged=True
        ),
    )

    def plan() -> dict[str, int]:
        rows = int(min(len(images.train), 5_000 * minutes))
        generated = int(min(GENERATED, len(images.held_out) // 2, 20 * minutes))
        other_seconds = estimate_other_seconds(autoencoder, unet, rows, generated)
        remaining = _MARGIN * (60 * minutes - (time.monotonic() - start) - other_seconds)
        steps = {
            training.name: max(round(_SHARES[training.name] * remaining / seconds_per_step(training, seed)), 4)
            for training in trainings
        }
        return {**steps, "rows": rows, "drawn": generated}

    steps = load_or_make_plan(work / PLAN, plan)
    images.shorten(steps["rows"])
    progress.note(f"planned: {steps}")
    train_module(trainings[0], steps["judge"], seed, work, progress)
    write_judge(judge, output / "judge")
    train_module(trainings[1], steps["autoencoder"], seed + 1, work, progress)
    latents[: steps["rows"]] = scaled_latents(autoencoder, images.train, progress)
    train_module(trainings[2], steps["unet"], seed + 2, work, progress)
    write_pipeline(autoencoder, unet, text, output / "model")
    metrics = evaluate(output, images, steps["drawn"], seed, progress)
    record = {"seed": seed, "threads": torch.get_num_threads(), "plan": steps, **metrics}
    (output / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for training in trainings:
        remove_checkpoint(training, work)
    progress.note(f"done after {(time.monotonic() - start) / 60:.1f} minutes: {metrics}")


def _check_new(output: Path, plan: Path) -> None:
    if (output / RECORD).is_file():
        raise InputError(f"The model in {str(output)!r} is trained.", expected="a new folder, or one to resume")
    if output.exists() and any(output.iterdir()) and not plan.is_file():
        raise InputError(f"The folder {str(output)!r} is not empty.", expected="a new folder, or one to resume")


@torch.no_grad()
def estimate_other_seconds(autoencoder: Any, unet: Any, images: int, generated: int) -> float:
    """Estimate the seconds for encoding all images and generating those for the evaluation."""
    side = SIZE // SCALE
    start = time.monotonic()
    autoencoder.encode(torch.zeros(BATCH, 1, SIZE, SIZE))
    encoded = time.monotonic()
    unet(torch.zeros(BATCH, 4, side, side), 0, torch.zeros(BATCH, TOKENS, unet.config.cross_attention_dim))
    called = time.monotonic()
    return ((encoded - start) * images + (called - encoded) * 2 * SAMPLING_STEPS * generated) / BATCH


@torch.no_grad()
def scaled_latents(autoencoder: Any, pixels: torch.Tensor, progress: Progress) -> torch.Tensor:
    """Return mean and deviation of every image's latents, [n, 2, 4, 8, 8], scaled to a standard deviation of 1.

    Sets the autoencoder's `scaling_factor` accordingly (Rombach et al. 2022, appendix G).
    """
    batches = []
    for start in progress.track(range(0, len(pixels), BATCH), "encoding", -(-len(pixels) // BATCH)):
        posterior = autoencoder.encode(as_floats(pixels[start : start + BATCH])).latent_dist
        batches.append(torch.stack([posterior.mean, posterior.std], dim=1))
    latents = torch.cat(batches)
    total = latents[:, 0].var() + latents[:, 1].square().mean()
    autoencoder.register_to_config(scaling_factor=float(1 / total.sqrt()))
    return latents * autoencoder.config.scaling_factor


def write_judge(judge: Any, folder: Path) -> None:
    """Write the classifier with the configuration of its image processor."""
    judge.to(memory_format=torch.contiguous_format).save_pretrained(folder)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": SIZE, "width": SIZE},
        "do_resize": False,
        "image_mean": [0.5],
        "image_std": [0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")


def write_pipeline(autoencoder: Any, unet: Any, text: Text, folder: Path) -> None:
    """Write a folder for diffusers' StableDiffusionPipeline, with a model card."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline(
        vae=autoencoder.to(memory_format=torch.contiguous_format),
        text_encoder=text.encoder,
        tokenizer=text.tokenizer,
        unet=unet.to(memory_format=torch.contiguous_format),
        scheduler=DDIMScheduler(**SCHEDULE, set_alpha_to_one=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    # transformers 4 reads vocab.txt, but transformers 5 only writes tokenizer.json.
    text.tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))
    (folder / SAMPLING).write_bytes(Sampling(guidance=GUIDANCE).as_json())
    (folder / "README.md").write_text(_CARD, encoding="utf-8")


_CARD = """\
---
license: apache-2.0
---
A small latent diffusion model of Fashion-MNIST's images (MIT), trained by compress' `benchmarks/train_diffusion.py`.
Its text encoder is all-MiniLM-L6-v2 (Apache-2.0), unchanged. It generates gray images of ten kinds of clothes, 32 x 32,
from captions such as "a photo of a coat"; other captions are out of distribution.
"""


@torch.no_grad()
def evaluate(output: Path, images: CaptionedImages, count: int, seed: int, progress: Progress) -> dict[str, float]:
    """Return metrics of images generated from ``count`` held-out captions, of the autoencoder and of the classifier."""
    from diffusers import StableDiffusionPipeline
    from transformers import RegNetForImageClassification

    pipeline = StableDiffusionPipeline.from_pretrained(output / "model")
    pipeline.set_progress_bar_config(disable=True)
    judge = RegNetForImageClassification.from_pretrained(output / "judge").eval()
    prompts, kinds = images.held_out_texts[:count], images.held_out_kinds[:count]
    generator, generated = torch.Generator().manual_seed(seed), []
    for start in progress.track(range(0, count, BATCH), "generating", -(-count // BATCH)):
        levels = pipeline(
            prompts[start : start + BATCH], num_inference_steps=SAMPLING_STEPS, guidance_scale=GUIDANCE,
            height=SIZE, width=SIZE, generator=generator, output_type="np",
        ).images  # fmt: skip
        generated.append(torch.from_numpy(levels.astype(np.float32)).permute(0, 3, 1, 2) * 2 - 1)
    real = as_floats(images.held_out)
    decoded = torch.cat([pipeline.vae(pixels).sample for pixels in real[:count].split(BATCH)]).clamp(-1, 1)
    generated_features, logits = features(judge, torch.cat(generated))
    real_features, real_logits = features(judge, real)
    return {
        "judge_accuracy": float((real_logits.argmax(1) == images.held_out_kinds.numpy()).mean()),
        "autoencoder_psnr_db": float(
            psnr(*((batch / 2 + 0.5).numpy() for batch in (decoded, real[:count])), 1.0).mean()
        ),
        "class_seen": float((logits.argmax(1) == kinds.numpy()).mean()),
        "frechet_distance": frechet_distance(generated_features, real_features),
        "frechet_distance_of_real_pictures": frechet_distance(real_features[:count], real_features[count:]),
    }


def features(judge: Any, pixels: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the inputs of the classifier's last layer [n, 128], and its logits [n, classes]."""
    pooled = torch.cat([judge.regnet(part).pooler_output.flatten(1) for part in pixels.split(BATCH)])
    return pooled.numpy(), judge.classifier[-1](pooled).numpy()


if __name__ == "__main__":
    typer.run(main)

"""Train a small latent diffusion model that draws clothes from captions, and a classifier that judges its pictures.

    python benchmarks/train_diffusion.py artifacts/fashion-diffusion

`model/` is a pipeline in diffusers' layout, which its StableDiffusionPipeline opens: MiniLM as it is for the text, and
a variational autoencoder and a UNet trained here on the train split of `sample:fashion-captions`, which names ten
kinds of clothes in eight sentences. `judge/` is an image classifier in transformers' layout, trained on the same rows
and on no picture that the pipeline drew. Both are small: they know Fashion-MNIST's 28 x 28 gray pixels in a frame of
32 x 32, and nothing else.

The steps that fit into `--minutes` are found by timing a few, and kept in `training/plan.json`. The same command goes
on where it was killed; the same plan, seed and number of threads give the same model.
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
    Pictures,
    Text,
    as_floats,
    autoencoder_loss,
    build_autoencoder,
    build_judge,
    build_unet,
    denoising_loss,
    judge_loss,
)
from restartable import Lesson, forget, kept_plan, learn, seconds_a_step

from compress.cli.output import ConsoleProgress
from compress.formats.quiet_output import quiet_libraries
from compress.plugins.diffusion.image_metrics import frechet_distance, psnr
from compress.plugins.diffusion.pipeline_model import SAMPLING, Sampling, import_diffusers
from compress.utils.errors import CompressError, InputError
from compress.utils.progress import Progress

GUIDANCE, SAMPLING_STEPS = 2.0, 25
_SHARES = {"judge": 0.12, "autoencoder": 0.23, "unet": 0.65}
_SPARE = 0.9
"""The share of the time left that steps are planned for: nobody knows what else a machine will do."""
PLAN, RECORD = "plan.json", "training.json"
DRAWN, BATCH = 500, 256


def main(
    output: Annotated[Path, typer.Argument(help="a folder for the model and the judge: a new one, or one begun")],
    minutes: Annotated[float, typer.Option(min=0.2, help="for everything, on this machine")] = 38.0,
    seed: Annotated[int, typer.Option(min=0, help="of the weights and everything that is drawn")] = 0,
) -> None:
    """Train both and write them in safetensors."""
    quiet_libraries()
    import_diffusers()
    progress = ConsoleProgress()
    try:
        train(output, minutes, seed, progress)
    except CompressError as error:
        progress.note(str(error))
        raise typer.Exit(error.exit_code) from None


def train(output: Path, minutes: float, seed: int, progress: Progress) -> None:
    """Everything from captions to folders. Raises `InputError` for a folder that holds something else already."""
    work, began = output / "training", time.monotonic()
    _check_new(output, work / PLAN)
    pictures, text = Pictures.read(progress), Text()
    torch.manual_seed(seed)
    judge, autoencoder, unet = build_judge(pictures.classes), build_autoencoder(), build_unet()
    latents = torch.zeros(len(pictures.train), 2, 4, SIZE // SCALE, SIZE // SCALE)
    lessons = (
        Lesson("judge", judge, judge_loss(judge, pictures), 2e-3),
        Lesson("autoencoder", autoencoder, autoencoder_loss(autoencoder, pictures), 1e-3),
        Lesson(
            "unet", unet, denoising_loss(unet, pictures, latents, text.states(pictures.captions)), 8e-4, averaged=True
        ),
    )

    def plan() -> dict[str, int]:
        rows = int(min(len(pictures.train), 5_000 * minutes))
        drawn = int(min(DRAWN, len(pictures.held_out) // 2, 20 * minutes))
        beside = beside_seconds(autoencoder, unet, rows, drawn)
        left = _SPARE * (60 * minutes - (time.monotonic() - began) - beside)
        shares = {lesson.name: _SHARES[lesson.name] * left / seconds_a_step(lesson, seed) for lesson in lessons}
        steps = {name: max(round(count), 4) for name, count in shares.items()}
        return {**steps, "rows": rows, "drawn": drawn}

    steps = kept_plan(work / PLAN, plan)
    pictures.shorten(steps["rows"])
    progress.note(f"planned: {steps}")
    learn(lessons[0], steps["judge"], seed, work, progress)
    write_judge(judge, output / "judge")
    learn(lessons[1], steps["autoencoder"], seed + 1, work, progress)
    latents[: steps["rows"]] = scaled_latents(autoencoder, pictures.train, progress)
    learn(lessons[2], steps["unet"], seed + 2, work, progress)
    write_pipeline(autoencoder, unet, text, output / "model")
    judgement = judged(output, pictures, steps["drawn"], seed, progress)
    record = {"seed": seed, "threads": torch.get_num_threads(), "plan": steps, **judgement}
    (output / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for lesson in lessons:
        forget(lesson, work)
    progress.note(f"done after {(time.monotonic() - began) / 60:.1f} minutes: {judgement}")


def _check_new(output: Path, plan: Path) -> None:
    if (output / RECORD).is_file():
        raise InputError(f"The model in {str(output)!r} is trained.", expected="a new folder, or one that this began")
    if output.exists() and any(output.iterdir()) and not plan.is_file():
        raise InputError(f"The folder {str(output)!r} is not empty.", expected="a new folder, or one that this began")


@torch.no_grad()
def beside_seconds(autoencoder: Any, unet: Any, pictures: int, drawn: int) -> float:
    """About how long it takes to encode every picture, and to draw those that are judged."""
    side = SIZE // SCALE
    began = time.monotonic()
    autoencoder.encode(torch.zeros(BATCH, 1, SIZE, SIZE))
    encoded = time.monotonic()
    unet(torch.zeros(BATCH, 4, side, side), 0, torch.zeros(BATCH, TOKENS, unet.config.cross_attention_dim))
    called = time.monotonic()
    return ((encoded - began) * pictures + (called - encoded) * 2 * SAMPLING_STEPS * drawn) / BATCH


@torch.no_grad()
def scaled_latents(autoencoder: Any, pixels: torch.Tensor, progress: Progress) -> torch.Tensor:
    """Mean and spread of every picture's latents, [n, 2, 4, 8, 8], scaled so that their standard deviation is 1.

    The autoencoder's `scaling_factor` is set accordingly (Rombach et al. 2022, appendix G).
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
    """The classifier with what its pictures are prepared by."""
    judge.to(memory_format=torch.contiguous_format).save_pretrained(folder)
    prepared = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": SIZE, "width": SIZE},
        "do_resize": False,
        "image_mean": [0.5],
        "image_std": [0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(prepared, indent=2) + "\n", encoding="utf-8")


def write_pipeline(autoencoder: Any, unet: Any, text: Text, folder: Path) -> None:
    """The folder that diffusers' StableDiffusionPipeline opens, with a card that says what is in it."""
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
    # vocab.txt, which transformers 4 reads; 5 writes tokenizer.json alone.
    text.tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))
    (folder / SAMPLING).write_bytes(Sampling(guidance=GUIDANCE).as_json())
    (folder / "README.md").write_text(_CARD, encoding="utf-8")


_CARD = """\
---
license: apache-2.0
---
A small latent diffusion model of Fashion-MNIST's pictures (MIT), trained by compress' `benchmarks/train_diffusion.py`.
Its text encoder is all-MiniLM-L6-v2 (Apache-2.0), unchanged. It draws ten kinds of clothes, 32 x 32, gray, from
captions such as "a photo of a coat"; it knows no other words.
"""


@torch.no_grad()
def judged(output: Path, made: Pictures, count: int, seed: int, progress: Progress) -> dict[str, float]:
    """What the files as they were written give on ``count`` held-out captions, and how near the autoencoder comes."""
    from diffusers import StableDiffusionPipeline
    from transformers import RegNetForImageClassification

    pipeline = StableDiffusionPipeline.from_pretrained(output / "model")
    pipeline.set_progress_bar_config(disable=True)
    judge = RegNetForImageClassification.from_pretrained(output / "judge").eval()
    prompts, kinds = made.held_out_texts[:count], made.held_out_kinds[:count]
    generator, drawn = torch.Generator().manual_seed(seed), []
    for start in progress.track(range(0, count, BATCH), "drawing", -(-count // BATCH)):
        levels = pipeline(
            prompts[start : start + BATCH], num_inference_steps=SAMPLING_STEPS, guidance_scale=GUIDANCE,
            height=SIZE, width=SIZE, generator=generator, output_type="np",
        ).images  # fmt: skip
        drawn.append(torch.from_numpy(levels.astype(np.float32)).permute(0, 3, 1, 2) * 2 - 1)
    real = as_floats(made.held_out)
    again = torch.cat([pipeline.vae(pixels).sample for pixels in real[:count].split(BATCH)]).clamp(-1, 1)
    seen, answers = features(judge, torch.cat(drawn))
    known, right = features(judge, real)
    return {
        "judge_accuracy": float((right.argmax(1) == made.held_out_kinds.numpy()).mean()),
        "autoencoder_psnr_db": float(
            psnr(*((images / 2 + 0.5).numpy() for images in (again, real[:count])), 1.0).mean()
        ),
        "class_seen": float((answers.argmax(1) == kinds.numpy()).mean()),
        "frechet_distance": frechet_distance(seen, known),
        "frechet_distance_of_real_pictures": frechet_distance(known[:count], known[count:]),
    }


def features(judge: Any, pixels: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """What the classifier's last layer is given [n, 128], and its logits [n, classes]."""
    pooled = torch.cat([judge.regnet(part).pooler_output.flatten(1) for part in pixels.split(BATCH)])
    return pooled.numpy(), judge.classifier[-1](pooled).numpy()


if __name__ == "__main__":
    typer.run(main)

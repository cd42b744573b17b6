"""Image generation in an app: prompts to images by the tables of the manifest, without diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.formats.runtime import Batch
from compress.models.pipeline_folder import image_generation_hook
from compress.plugins.apps.app_type import Answers, Numbers, Rounding, round_to_float32
from compress.plugins.apps.manifest import MODEL_FOLDER, TensorRecord
from compress.plugins.apps.postprocess import Draw
from compress.plugins.apps.preprocess import TokenizePrompt
from compress.plugins.apps.text import FOREIGN, TextCase, Texts
from compress.utils.errors import ModelError

if TYPE_CHECKING:
    from compress.models.model import Processor


IDS, SEED, HIDDEN = "input_ids", "seed", "last_hidden_state"


class ImagePromptCase(TextCase):
    """Prompt, its token ids, and the seed of the noise."""

    seed: int


class ImagePrompts(Texts):
    """Image prompts, which are padded to ``max_length``. The built-in ones are few because generation is slow."""

    plural, web = "prompts", "prompt"
    case = ImagePromptCase
    meanings = {IDS: "token ids, one prompt a row"}
    tokenizer_file = "tokenizer/tokenizer.json"
    built_in = ("a photo of a bag", "a coat")
    rule: TokenizePrompt

    @classmethod
    def find_rule(cls, folder: Path, processor: Processor, max_length: int) -> TokenizePrompt:
        """Return the rule of the pipeline's tokenizer. Raises `ModelError` if it pads on the left or not at all."""
        tokenizer = processor.tokenizer
        if getattr(tokenizer, "padding_side", "right") != "right" or tokenizer.pad_token_id is None:
            raise ModelError(
                "The tokenizer cannot be described to an app: it pads at the beginning, or not at all.",
                where=str(folder / MODEL_FOLDER / "tokenizer"),
            )
        rule = super().find_rule(folder, tokenizer, processor.length)
        return TokenizePrompt.model_validate({**rule.model_dump(exclude={"kind"}), "pad_id": tokenizer.pad_token_id})

    def make_cases(self, samples: Sequence[str], processor: Processor) -> Sequence[ImagePromptCase]:
        """Verify the rule on all prompts, and return a case for each sample or built-in prompt."""
        texts = samples or self.built_in
        # Other scripts and long texts verify the rule, but generating images for them would take long.
        probes = [*texts, *FOREIGN]
        for text, expected in zip(probes, processor.ids(probes).tolist(), strict=True):
            if self.ids(text) != expected:
                raise ModelError(
                    f"The tokenizer cannot be described to an app: of {text[:60]!r} it makes other ids than its rule.",
                    expected="special tokens before and after a text's own, as tokenizer.json alone gives them",
                )
        return [
            ImagePromptCase(text=text, input_ids=tuple(self.ids(text)), seed=seed) for seed, text in enumerate(texts)
        ]

    def ids(self, text: str) -> list[int]:
        """Return the ids of a prompt, padded to ``max_length``."""
        ids = super().ids(text)
        return [*ids, *[self.rule.pad_id] * (self.rule.max_length - len(ids))]

    def feed(self, case: ImagePromptCase) -> Batch:  # type: ignore[override]
        """Return the ids [1, tokens] and the seed [1] of a case."""
        return {IDS: np.array([self.ids(case.text)], np.int64), SEED: np.array([case.seed])}

    @classmethod
    def shown(cls, cases: Sequence[TextCase]) -> list[str]:
        """Return all prompts."""
        return [case.text for case in cases]


def portable_noise(seed: int, count: int) -> np.ndarray:
    """Return standard normal numbers [count] that are equal on every platform: see `Draw`."""
    with np.errstate(over="ignore"):
        # The generator is mulberry32, which JavaScript computes with the same 32-bit integers. Box-Muller follows.
        state = np.uint32(seed) + np.arange(1, count + count % 2 + 1, dtype=np.uint32) * np.uint32(0x6D2B79F5)
        mixed = (state ^ (state >> np.uint32(15))) * (state | np.uint32(1))
        mixed ^= mixed + (mixed ^ (mixed >> np.uint32(7))) * (mixed | np.uint32(61))
    uniform = (mixed ^ (mixed >> np.uint32(14))) / 2.0**32
    radius, angle = np.sqrt(-2 * np.log(uniform[::2] + 2.0**-33)), 2 * np.pi * uniform[1::2]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1)[:count]


def initial_noise(step: Draw, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the initial noise [1, channels, height, width] and the noise of each step, [steps, 1, channels, ...]."""
    shape = (1, step.channels, step.height, step.width)
    drawn = portable_noise(seed, (1 + len(step.timesteps)) * int(np.prod(shape))).reshape(-1, *shape)
    return drawn[0].astype(np.float32), drawn[1:]


class ImageLevels(Answers):
    """Images of prompts, of which the self-test stores at most 1024 pixel levels at regular intervals."""

    plural, field, web = "pictures", "picture", "draw"
    meanings = {HIDDEN: "what the text encoder makes of each token", "pooler_output": "of the whole prompt; not used"}
    required = frozenset({HIDDEN})
    # Shares of all levels. Integers that are rounded another way at one step are found again in all that follow.
    rounding = (Rounding(0.01), Rounding(0.1))

    def find_postprocessing(self, model: Path, outputs: Sequence[TensorRecord]) -> Draw:
        """Return the step with the numbers of the model's scheduler. Raises `ModelError` if no table can hold them."""
        from compress.formats.onnx.model import find_graphs

        # The graphs are the text encoder, the denoiser and the image decoder, in this order.
        _, denoiser, decoder = (f"{MODEL_FOLDER}/{graph.relative_to(model).as_posix()}" for graph in find_graphs(model))
        sampling: dict[str, Any] = image_generation_hook("app_sampling")(model)
        condition = sampling["condition"]
        # Seven figures are the precision of float32.
        for name in ("outputs", "added"):
            sampling[name] = tuple(round_to_float32(np.array(row)) for row in sampling[name])
        for name in ("timesteps", "scales", "noise"):
            sampling[name] = round_to_float32(np.array(sampling[name]))
        sampling["condition"] = () if condition is None else round_to_float32(condition)
        return Draw(output=HIDDEN, denoiser=denoiser, decoder=decoder, **sampling)

    def predict(self, session: Any, step: Draw, feed: Batch) -> Numbers:
        """Return levels of the image that the session of a plug-in generates in the way of an app."""
        sampler = session.sampler
        noise, added = initial_noise(step, int(feed[SEED][0]))
        # Classifier-free guidance: one batch holds the prompt and the empty prompt.
        guided = step.guidance > 1
        ids = [feed[IDS], np.array([step.empty_ids])] if guided else [feed[IDS]]
        text = {"encoder_hidden_states": np.concatenate([sampler.encode({IDS: row})[HIDDEN] for row in ids])}
        if step.condition:
            text["timestep_cond"] = np.array([step.condition] * len(ids), np.float32)

        def denoise(latents: np.ndarray, time: float) -> np.ndarray:
            sample, timestep = np.repeat(latents, len(ids), axis=0), np.array(time, np.float32)
            output: np.ndarray = sampler.denoise({"sample": sample, "timestep": timestep, **text})["out_sample"]
            guided_output: np.ndarray = output[1:] + step.guidance * (output[:1] - output[1:]) if guided else output
            return guided_output

        columns = ("initial", "timesteps", "scales", "noise", "outputs", "added")
        table = {name: getattr(step, name) for name in columns}
        image = sampler.decode_latents(image_generation_hook("sample_by_table")(table, denoise, noise, added))
        levels = image.reshape(-1)
        return round_to_float32(levels[:: -(-len(levels) // 1024)])

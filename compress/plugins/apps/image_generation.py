"""Image generation in an app: prompts to images by the tables of the manifest, without diffusers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.formats.runtime import Batch
from compress.models.pipeline_folder import image_generation_hook
from compress.plugins.apps.app_type import Answers, Inputs, Numbers, Rounding, round_to_float32
from compress.plugins.apps.manifest import MODEL_FOLDER, TensorRecord
from compress.plugins.apps.postprocess import Draw
from compress.plugins.apps.preprocess import TokenizePrompt
from compress.plugins.apps.text import FOREIGN, TextCase, TextRule, find_tokenize, more_for_page
from compress.utils.errors import ModelError

if TYPE_CHECKING:
    from compress.models.model import Processor


IDS, SEED, HIDDEN = "input_ids", "seed", "last_hidden_state"
SAMPLE, TIMESTEP, TEXT, CONDITION, DENOISED = (
    "sample",
    "timestep",
    "encoder_hidden_states",
    "timestep_cond",
    "out_sample",
)
"""Names of the components' inputs and outputs in optimum's files."""
_TABLE = ("initial", "timesteps", "scales", "noise", "outputs", "added")
"""Columns of a scheduler's table."""
_PROMPTS = ("a photo of a bag", "a coat")
"""Built-in prompts. They are few because image generation is slow."""
_MOST = 1024
"""Number of pixel levels in the self-test. Larger images are sampled at regular intervals."""
_STEP = np.uint32(0x6D2B79F5)


class ImagePromptCase(TextCase):
    """Prompt, its token ids, and the seed of the noise."""

    seed: int


class ImagePromptRule(TextRule):
    """Tokenization of image prompts by the rule of a manifest, with padding to ``max_length``."""

    def ids(self, text: str) -> list[int]:
        """Return the ids of a prompt, padded to ``max_length``."""
        ids = super().ids(text)
        return [*ids, *[self.rule.pad_id] * (self.rule.max_length - len(ids))]

    def feed(self, case: ImagePromptCase) -> Batch:  # type: ignore[override]
        """Return the ids [1, tokens] and the seed [1] of a case."""
        return {IDS: np.array([self.ids(case.text)], np.int64), SEED: np.array([case.seed])}


def _find_rule(folder: Path, processor: Processor, max_length: int) -> TokenizePrompt:
    """Return the rule of the pipeline's tokenizer. Raises `ModelError` if it pads on the left or not at all."""
    tokenizer = processor.tokenizer
    if getattr(tokenizer, "padding_side", "right") != "right" or tokenizer.pad_token_id is None:
        raise ModelError(
            "The tokenizer cannot be described to an app: it pads at the beginning, or not at all.",
            where=str(folder / MODEL_FOLDER / "tokenizer"),
        )
    rule = find_tokenize(folder, f"{MODEL_FOLDER}/tokenizer/tokenizer.json", tokenizer, processor.length)
    return TokenizePrompt.model_validate({**rule.model_dump(exclude={"kind"}), "pad_id": tokenizer.pad_token_id})


def _make_cases(
    folder: Path, rule: TokenizePrompt, samples: Sequence[str], processor: Processor
) -> Sequence[ImagePromptCase]:
    """Verify the rule on all prompts, and return a case for each sample or built-in prompt."""
    preparation, texts = ImagePromptRule(folder, rule), samples or _PROMPTS
    # Other scripts and long texts verify the rule, but generating images for them would take long.
    probes = [*texts, *FOREIGN]
    for text, expected in zip(probes, processor.ids(probes).tolist(), strict=True):
        if preparation.ids(text) != expected:
            raise ModelError(
                f"The tokenizer cannot be described to an app: of {text[:60]!r} it makes other ids than its rule.",
                expected="special tokens before and after a text's own, as tokenizer.json alone gives them",
            )
    return [
        ImagePromptCase(text=text, input_ids=tuple(preparation.ids(text)), seed=at) for at, text in enumerate(texts)
    ]


def portable_noise(seed: int, count: int) -> np.ndarray:
    """Return standard normal numbers [count] that are equal on every platform: see `Draw`."""
    with np.errstate(over="ignore"):
        # The generator is mulberry32, which JavaScript computes with the same 32-bit integers. Box-Muller follows.
        state = np.uint32(seed) + np.arange(1, count + count % 2 + 1, dtype=np.uint32) * _STEP
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


def _find_sampling(model: Path, outputs: Sequence[TensorRecord]) -> Draw:
    """Return the step with the numbers of the model's scheduler. Raises `ModelError` if no table can hold them."""
    from compress.formats.onnx.model import find_graphs

    # The graphs are the text encoder, the denoiser and the image decoder, in this order.
    _, denoiser, decoder = (f"{MODEL_FOLDER}/{graph.relative_to(model).as_posix()}" for graph in find_graphs(model))
    sampling: dict[str, Any] = image_generation_hook("app_sampling")(model)
    condition = sampling.pop("condition")
    # Seven figures are the precision of float32.
    rows = {name: tuple(round_to_float32(np.array(row)) for row in sampling.pop(name)) for name in ("outputs", "added")}
    columns = {name: round_to_float32(np.array(sampling.pop(name))) for name in ("timesteps", "scales", "noise")}
    return Draw(
        output=HIDDEN,
        denoiser=denoiser,
        decoder=decoder,
        condition=() if condition is None else round_to_float32(condition),
        **sampling,
        **columns,
        **rows,
    )


def _generate_image(session: Any, step: Draw, feed: Batch, known: Numbers) -> Numbers:
    """Return levels of the image that the session of a plug-in generates in the way of an app."""
    sampler = session.sampler
    noise, added = initial_noise(step, int(feed[SEED][0]))
    # Classifier-free guidance: one batch holds the prompt and the empty prompt.
    guided = step.guidance > 1
    ids = [feed[IDS], np.array([step.empty_ids])] if guided else [feed[IDS]]
    text = np.concatenate([sampler.encode({IDS: row})[HIDDEN] for row in ids])
    condition = {CONDITION: np.array([step.condition] * len(ids), np.float32)} if step.condition else {}

    def denoise(latents: np.ndarray, time: float) -> np.ndarray:
        inputs: Mapping[str, np.ndarray] = {
            SAMPLE: np.repeat(latents, len(ids), axis=0), TIMESTEP: np.array(time, np.float32), TEXT: text, **condition
        }  # fmt: skip
        output: np.ndarray = sampler.denoise(inputs)[DENOISED]
        guided_output: np.ndarray = output[1:] + step.guidance * (output[:1] - output[1:]) if guided else output
        return guided_output

    sample_by_table = image_generation_hook("sample_by_table")
    table = {name: getattr(step, name) for name in _TABLE}
    image = sampler.decode_latents(sample_by_table(table, denoise, noise, added))
    return round_to_float32(tested(image.reshape(-1)))


def tested(levels: np.ndarray) -> np.ndarray:
    """Return every n-th of all levels [height x width x channels], so that at most 1024 remain."""
    return levels[:: -(-len(levels) // _MOST)]


IMAGE_PROMPTS = Inputs(
    plural="prompts",
    folder="prompt",
    case=ImagePromptCase,
    meanings={IDS: "token ids, one prompt a row"},
    required=frozenset({IDS}),
    tokenizes=True,
    find_rule=_find_rule,
    open=ImagePromptRule,
    make_cases=_make_cases,
    shown=lambda cases: [case.text for case in cases],
    more_for_page=more_for_page,
)
GENERATED_IMAGES = Answers(
    plural="pictures",
    field="picture",
    folder="draw",
    meanings={HIDDEN: "what the text encoder makes of each token", "pooler_output": "of the whole prompt; not used"},
    required=frozenset({HIDDEN}),
    # Shares of all levels. Integers that are rounded another way at one step are found again in all that follow.
    rounding=(Rounding(0.01), Rounding(0.1)),
    find_postprocessing=_find_sampling,
    predict=_generate_image,
)

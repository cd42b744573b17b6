"""Image generation in an app: prompts to images by the tables of the manifest, without diffusers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compress.formats.runtime import Batch
from compress.models.pipeline_folder import image_generation_hook
from compress.plugins.apps.app_type import Answers, Inputs, Numbers, Rounding, seven_figures
from compress.plugins.apps.manifest import MODEL_FOLDER, TensorRecord
from compress.plugins.apps.postprocess import Draw
from compress.plugins.apps.preprocess import TokenizePrompt
from compress.plugins.apps.text import FOREIGN, TextCase, find_tokenize, more_for_page, open_tokenizer, other_ids
from compress.utils.errors import ModelError

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
"""Few, since drawing takes a while."""
_MOST = 1024
"""Levels of a picture that the self-test has; of a larger one every so many."""
_STEP = np.uint32(0x6D2B79F5)


class DrawnCase(TextCase):
    """One prompt, its ids, and the seed of the noise."""

    seed: int


class PromptRule:
    """The rule of a manifest over the tokenizer beside it."""

    def __init__(self, folder: Path, rule: TokenizePrompt) -> None:
        self.rule = rule
        self.tokenizer = open_tokenizer(folder / rule.tokenizer)

    def ids(self, text: str) -> list[int]:
        """The ids of one prompt, ``max_length`` of them."""
        rule = self.rule
        own = self.tokenizer.encode(text, add_special_tokens=False).ids
        room = rule.max_length - len(rule.prefix_ids) - len(rule.suffix_ids)
        ids = [*rule.prefix_ids, *own[:room], *rule.suffix_ids]
        return [*ids, *[rule.pad_id] * (rule.max_length - len(ids))]

    def feed(self, case: DrawnCase) -> Batch:
        """Ids [1, tokens] and the seed [1]."""
        return {IDS: np.array([self.ids(case.text)], np.int64), SEED: np.array([case.seed])}

    def difference(self, case: DrawnCase) -> tuple[str, str] | None:
        """See `Preparation`."""
        return other_ids(self.ids(case.text), case)


def _find_rule(folder: Path, processor: Any, max_length: int) -> TokenizePrompt:
    tokenizer = processor.tokenizer
    if getattr(tokenizer, "padding_side", "right") != "right" or tokenizer.pad_token_id is None:
        raise ModelError(
            "The tokenizer cannot be described to an app: it pads at the beginning, or not at all.",
            where=str(folder / MODEL_FOLDER / "tokenizer"),
        )
    found = find_tokenize(folder, f"{MODEL_FOLDER}/tokenizer/tokenizer.json", tokenizer, processor.length)
    return TokenizePrompt.model_validate({**found.model_dump(exclude={"kind"}), "pad_id": tokenizer.pad_token_id})


def _make_cases(folder: Path, rule: TokenizePrompt, samples: Sequence[str], processor: Any) -> Sequence[DrawnCase]:
    way, texts = PromptRule(folder, rule), samples or _PROMPTS
    tried = [*texts, *FOREIGN]
    for text, wanted in zip(tried, processor.ids(tried).tolist(), strict=True):
        if way.ids(text) != wanted:
            raise ModelError(
                f"The tokenizer cannot be described to an app: of {text[:60]!r} it makes other ids than its rule.",
                expected="special tokens before and after a text's own, as tokenizer.json alone gives them",
            )
    return [DrawnCase(text=text, input_ids=tuple(way.ids(text)), seed=at) for at, text in enumerate(texts)]


def portable_noise(seed: int, count: int) -> np.ndarray:
    """Standard normal numbers [count], the same on every platform: see `Draw`."""
    with np.errstate(over="ignore"):
        state = np.uint32(seed) + np.arange(1, count + count % 2 + 1, dtype=np.uint32) * _STEP
        mixed = (state ^ (state >> np.uint32(15))) * (state | np.uint32(1))
        mixed ^= mixed + (mixed ^ (mixed >> np.uint32(7))) * (mixed | np.uint32(61))
    uniform = (mixed ^ (mixed >> np.uint32(14))) / 2.0**32
    radius, angle = np.sqrt(-2 * np.log(uniform[::2] + 2.0**-33)), 2 * np.pi * uniform[1::2]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1)[:count]


def noise_of(end: Draw, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """z [1, channels, height, width], and that of each step, [steps, 1, channels, height, width]."""
    shape = (1, end.channels, end.height, end.width)
    drawn = portable_noise(seed, (1 + len(end.timesteps)) * int(np.prod(shape))).reshape(-1, *shape)
    return drawn[0].astype(np.float32), drawn[1:]


def _find_end(model: Path, outputs: Sequence[TensorRecord]) -> Draw:
    """Return the step with the numbers of the model's scheduler. Raises `ModelError` if no table can hold them."""
    from compress.formats.onnx.model import find_graphs

    _, denoiser, decoder = (f"{MODEL_FOLDER}/{graph.relative_to(model).as_posix()}" for graph in find_graphs(model))
    sampling: dict[str, Any] = image_generation_hook("app_sampling")(model)
    condition = sampling.pop("condition")
    # Seven figures are the precision of float32.
    rows = {name: tuple(seven_figures(np.array(row)) for row in sampling.pop(name)) for name in ("outputs", "added")}
    columns = {name: seven_figures(np.array(sampling.pop(name))) for name in ("timesteps", "scales", "noise")}
    return Draw(
        output=HIDDEN,
        denoiser=denoiser,
        decoder=decoder,
        condition=() if condition is None else seven_figures(condition),
        **sampling,
        **columns,
        **rows,
    )


def _ask(session: Any, end: Draw, feed: Batch, known: Numbers) -> Numbers:
    """Return levels of the image that the session of a plug-in generates in the way of an app."""
    sampler = session.sampler
    noise, added = noise_of(end, int(feed[SEED][0]))
    guided = end.guidance > 1
    ids = [feed[IDS], np.array([end.empty_ids])] if guided else [feed[IDS]]
    text = np.concatenate([sampler.encode({IDS: row})[HIDDEN] for row in ids])
    condition = {CONDITION: np.array([end.condition] * len(ids), np.float32)} if end.condition else {}

    def denoise(latents: np.ndarray, time: float) -> np.ndarray:
        inputs: Mapping[str, np.ndarray] = {
            SAMPLE: np.repeat(latents, len(ids), axis=0), TIMESTEP: np.array(time, np.float32), TEXT: text, **condition
        }  # fmt: skip
        output: np.ndarray = sampler.denoise(inputs)[DENOISED]
        guided_output: np.ndarray = output[1:] + end.guidance * (output[:1] - output[1:]) if guided else output
        return guided_output

    sample_by_table = image_generation_hook("sample_by_table")
    table = {name: getattr(end, name) for name in _TABLE}
    image = sampler.decoded(sample_by_table(table, denoise, noise, added))
    return seven_figures(tested(image.reshape(-1)))


def tested(levels: np.ndarray) -> np.ndarray:
    """What the self-test has of all levels [height x width x channels]: every so many, from the first on."""
    return levels[:: -(-len(levels) // _MOST)]


DRAWN_PROMPTS = Inputs(
    plural="prompts",
    folder="prompt",
    case=DrawnCase,
    meanings={IDS: "token ids, one prompt a row"},
    required=frozenset({IDS}),
    tokenizes=True,
    find_rule=_find_rule,
    open=PromptRule,
    make_cases=_make_cases,
    shown=lambda cases: [case.text for case in cases],
    more_for_page=more_for_page,
)
DRAWN_PICTURES = Answers(
    plural="pictures",
    field="picture",
    folder="draw",
    meanings={HIDDEN: "what the text encoder makes of each token", "pooler_output": "of the whole prompt; not used"},
    required=frozenset({HIDDEN}),
    # Shares of all levels. Integers that are rounded another way at one step are found again in all that follow.
    rounding=(Rounding(0.01), Rounding(0.1)),
    find_end=_find_end,
    ask=_ask,
)

"""Inputs and answers of text generation: a message and its reply, token by token.

Runtimes round differently. If two tokens are nearly equally likely, one machine may choose the other token, and the
texts differ from there on. The self-test therefore follows the expected reply: it feeds each expected token and
compares the token's logit, and the logit's distance from the largest one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from compress.evaluation.generate import end_tokens
from compress.formats.generation.decoder import PAST, PRESENT, Decoder, likeliest
from compress.formats.runtime import Batch, Session
from compress.models.json_file import read_json
from compress.plugins.apps.app_type import (
    Answers,
    Inputs,
    Numbers,
    Reply,
    Rounding,
    format_numbers,
    largest_difference,
    round_to_float32,
    span,
)
from compress.plugins.apps.manifest import MODEL_FOLDER, TensorRecord
from compress.plugins.apps.postprocess import Generate
from compress.plugins.apps.preprocess import Prompt
from compress.plugins.apps.text import _IDS, TEXTS, TextCase, id_difference, open_tokenizer, short_texts
from compress.plugins.apps.tokenizer_fallbacks import to_page_tokenizer
from compress.tasks.task import LOGITS
from compress.utils.errors import InputError, ModelError

if TYPE_CHECKING:
    from compress.models.model import Processor


_NEW_TOKENS = 256
"""Longest reply in tokens if the model's config states none."""
_TESTED = 16
_WHERE = "the bundle's model"


class ReplyComparison(NamedTuple):
    """Comparison with an expected reply.

    Attributes:
        ids: Most likely token at each position.
        logits: Distance of the expected token's logit from the mean of all.
        behind: Distance of the expected token's logit from the largest one.
    """

    ids: tuple[int, ...]
    logits: Numbers
    behind: Numbers


def _find_generation(model: Path, outputs: Sequence[TensorRecord]) -> Generate:
    """Return the step for greedy decoding by config.json and generation_config.json. Sampling settings are ignored."""
    file = model / "generation_config.json"
    generation_config = read_json(file) if file.is_file() else {}
    longest = longest_text(model)
    presents = [entry.name for entry in outputs if entry.name.startswith(PRESENT)]
    return Generate(
        output=LOGITS,
        cache={PAST + name.removeprefix(PRESENT): name for name in presents},
        end_ids=tuple(sorted(end_tokens(model))),
        max_new_tokens=min(generation_config.get("max_new_tokens") or _NEW_TOKENS, longest),
        max_length=longest,
    )


def _predict_reply(session: Session, step: Generate, feed: Batch, known: Reply | None) -> Reply | ReplyComparison:
    """Return the beginning of the reply to a prompt, or the comparison with a ``known`` reply."""
    decoder, prompt = Decoder(session, _WHERE), [int(token) for token in feed["input_ids"][0]]
    # Without an expected reply the self-test is being made.
    if known is None:
        length = min(_TESTED, step.max_new_tokens, step.max_length - len(prompt))
        reply = list(_greedy_tokens(decoder, prompt, step.end_ids, length))
        return Reply(ids=tuple(token for token, _ in reply), logits=_round_all([logit for _, logit in reply]))
    ids, logits_above_mean, behind = zip(*_follow_reply(decoder, prompt, known.ids), strict=True)
    return ReplyComparison(ids, _round_all(logits_above_mean), _round_all(behind))


def _logit_span(measured: Sequence[Reply]) -> float:
    """Return the difference of the largest and smallest logit of all generated tokens."""
    return span([tuple(logit for reply in measured for logit in reply.logits)])


def _reply_difference(measured: ReplyComparison, known: Reply) -> float:
    """Return the largest difference of an expected token's logit, or its distance from the largest logit."""
    return max(largest_difference(measured.logits, known.logits), *measured.behind)


def _format_reply(answer: Reply | ReplyComparison) -> str:
    return f"of the tokens {list(answer.ids)} with logits {format_numbers(answer.logits)}"


REPLIES = Answers(
    plural="replies",
    field="reply",
    folder="reply",
    meanings={
        LOGITS: "one score for each token of the vocabulary, at each place",
        **{f"{PAST}N.{part}": f"{part}s of earlier tokens, in layer N" for part in ("key", "value")},
        **{f"{PRESENT}N.{part}": f"{part}s of all tokens, in layer N" for part in ("key", "value")},
    },
    required=frozenset({LOGITS}),
    # With integers, WebAssembly moved logits of a model in 4 bits by 2.7% of their span.
    rounding=(Rounding(0.01), Rounding(0.1)),
    find_postprocessing=_find_generation,
    predict=_predict_reply,
    span=_logit_span,
    difference=_reply_difference,
    shown=_format_reply,
)


def longest_text(model: Path) -> int:
    """Return the number of tokens of the longest text, prompt and reply together. Raises `ModelError`."""
    limit = read_json(model / "config.json").get("max_position_embeddings")
    if not isinstance(limit, int) or limit < 2:
        raise ModelError(
            f"The model's config has max_position_embeddings {limit!r}.",
            where=str(model / "config.json"),
            expected="how many tokens a text may have, two or more",
        )
    return limit


def _greedy_tokens(
    decoder: Decoder, prompt: Sequence[int], ends: Sequence[int], most: int
) -> Iterator[tuple[int, float]]:
    """Yield the tokens of the greedy reply including the end token, each with its logit above the mean."""
    logits = decoder.read(prompt)
    for number in range(1, most + 1):
        token = likeliest(logits, _WHERE)
        yield token, _logit_above_mean(logits, token)
        if token in ends or number == most:
            return
        logits = decoder.read_on(token)


def _follow_reply(decoder: Decoder, prompt: Sequence[int], ids: Sequence[int]) -> Iterator[tuple[int, float, float]]:
    """Yield for each expected token: the most likely token, the logit above the mean, and the distance to the top."""
    for number, token in enumerate(ids):
        # The cache holds the expected tokens, also where the model prefers others.
        logits = decoder.read_on(ids[number - 1]) if number else decoder.read(prompt)
        if token >= len(logits):
            raise ModelError(f"Token {token} is expected, and the model has {len(logits)}.", where=_WHERE)
        first = likeliest(logits, _WHERE)
        yield first, _logit_above_mean(logits, token), float(logits[first]) - float(logits[token])


def _logit_above_mean(logits: np.ndarray, token: int) -> float:
    """Return a logit minus the mean of all, which a constant added to all logits does not change."""
    return float(logits[token]) - float(logits.mean(dtype=np.float64))


def _round_all(values: Sequence[float]) -> Numbers:
    return round_to_float32(np.array(values))


_PROBE = "zq8message8qz"
"""Text that occurs in no template."""
_TODAY = "strftime_now"
_MESSAGES = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "",
    "  Leave my spaces\tand\n\nlines alone: 3.14 %,  ½, <b>tags</b> & {{ braces }} \n",
    "Wie heißt die Hauptstadt von Österreich?",
    "Какая сегодня погода? 👍🏽 👩‍👩‍👧",
    "写一句关于春天的话。 猫は何を食べますか。",
    "ما هي العاصمة؟ भारत की राजधानी क्या है?",
)
"""Questions, an empty message, characters that a template must not change, other scripts and emoji."""
_SHOWN_MESSAGES, _SHORT = 3, 60


class ChatPromptRule:
    """Tokenization of chat messages by the rule of a manifest."""

    def __init__(self, folder: Path, rule: Prompt) -> None:
        self.rule = rule
        self._tokenizer = open_tokenizer(folder / rule.tokenizer)

    def ids(self, message: str) -> list[int]:
        """Return the ids of a message within the prompt template."""
        text = f"{self.rule.before}{message}{self.rule.after}"
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=self.rule.add_special_tokens).ids
        return ids

    def fits(self, ids: Sequence[int]) -> bool:
        """Return True if a prompt is neither empty nor too long."""
        return 0 < len(ids) <= self.rule.max_length

    def feed(self, case: TextCase) -> Batch:
        """Return the ids of a case, [1, tokens]."""
        return {"input_ids": np.array([self.ids(case.text)], dtype=np.int64)}

    def difference(self, case: TextCase) -> tuple[str, str] | None:
        """Return the differing ids and the expected ones, or None."""
        ids = self.ids(case.text)
        # A prompt that is too long is refused, since a cut chat template misleads the model.
        if not self.fits(ids):
            return f"{len(ids)} ids", f"1 to {self.rule.max_length}"
        return id_difference(ids, case)


def _find_chat_rule(folder: Path, processor: Processor, max_length: int) -> Prompt:
    """Return the rule of a chat template as the text before and after a message. `_make_chat_cases` verifies it.

    Raises:
        ModelError: The template depends on the date, or repeats the message.
    """
    file = f"{MODEL_FOLDER}/tokenizer.json"
    max_length = min(max_length, longest_text(folder / MODEL_FOLDER) - 1)
    template = getattr(processor, "chat_template", None)
    if not template:
        return Prompt(tokenizer=file, before="", after="", add_special_tokens=True, max_length=max_length)
    # A template with the current date has no fixed text.
    if _TODAY in str(template):
        raise _no_chat_rule("it puts today's date into a prompt")
    # Render a probe that occurs in no template, and split the prompt at the probe.
    before, *after = render_prompt(processor, _PROBE).split(_PROBE)
    if len(after) != 1:
        raise _no_chat_rule(f"a message stands in it {len(after)} times")
    return Prompt(tokenizer=file, before=before, after=after[0], add_special_tokens=False, max_length=max_length)


def _make_chat_cases(folder: Path, rule: Prompt, samples: Sequence[str], processor: Processor) -> Sequence[TextCase]:
    """Verify the rule on all messages, and return cases for the samples, or for the built-in messages that fit."""
    preparation = ChatPromptRule(folder, rule)
    for message in (*_MESSAGES, *samples):
        check_chat_rule(preparation, message, processor)
    cases = [TextCase(text=text, input_ids=tuple(preparation.ids(text))) for text in samples or _MESSAGES]
    fitting = [case for case in cases if preparation.fits(case.input_ids)]
    # Built-in messages may be too long for a small model. The user's own must fit.
    if not fitting or (samples and len(fitting) < len(cases)):
        case = next(case for case in cases if not preparation.fits(case.input_ids))
        raise InputError(
            f"A prompt has {len(case.input_ids)} tokens: that of {case.text[:60]!r}.",
            expected=f"1 to {rule.max_length} tokens, of which {len(preparation.ids('x')) - 1} belong to the template",
            hint="name shorter messages with --sample, or raise data.max_length of the recipe",
        )
    return fitting


def _chat_files_for_page(folder: Path, rule: Prompt) -> dict[str, bytes]:
    """Return a tokenizer definition for JavaScript if it reads the original differently."""
    definition = json.loads((folder / rule.tokenizer).read_text(encoding="utf-8"))
    page_definition = to_page_tokenizer(definition)
    is_equal = page_definition == definition
    return (
        {}
        if is_equal
        else {rule.tokenizer: json.dumps(page_definition, ensure_ascii=False, separators=(",", ":")).encode()}
    )


PROMPTS = Inputs(
    plural="messages",
    folder="prompt",
    case=TextCase,
    meanings={**TEXTS.meanings, "position_ids": "the place of each token"},
    required=TEXTS.required,
    tokenizes=True,
    find_rule=_find_chat_rule,
    open=ChatPromptRule,
    make_cases=_make_chat_cases,
    shown=partial(short_texts, _SHOWN_MESSAGES, _SHORT),
    more_for_page=_chat_files_for_page,
)


def render_prompt(processor: Processor, message: str) -> str:
    """Return the prompt of one message by the tokenizer's chat template. Raises `ModelError` if the template fails."""
    from jinja2.exceptions import TemplateError

    messages = [{"role": "user", "content": message}]
    try:
        return str(processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except (TemplateError, TypeError, ValueError) as error:
        raise _no_chat_rule(f"it fails for {message[:60]!r}: {error}") from error


def check_chat_rule(preparation: ChatPromptRule, message: str, processor: Processor) -> None:
    """Raise `ModelError` if transformers returns another prompt or other ids for ``message`` than the rule."""
    rule = preparation.rule
    if not rule.add_special_tokens:
        # The template writes all special tokens itself, so that the tokenizer adds none.
        text = render_prompt(processor, message)
        if text != f"{rule.before}{message}{rule.after}":
            raise _no_chat_rule(f"of {message[:60]!r} it makes {text[-200:]!r}")
        expected = list(processor(text, add_special_tokens=False)["input_ids"])
    else:
        expected = list(processor(message)["input_ids"])
    if preparation.ids(message) != expected:
        raise ModelError(
            f"The tokenizer cannot be described to an app: of {message[:60]!r} it makes {expected[:_IDS]}, its "
            f"tokenizer.json alone {preparation.ids(message)[:_IDS]}.",
            expected="ids as tokenizer.json alone gives them",
        )


def _no_chat_rule(reason: str) -> ModelError:
    return ModelError(
        f"The chat template cannot be described to an app: {reason}.",
        expected="a fixed text before a message and another behind it, the message itself unchanged",
        hint="save the tokenizer with such a chat_template, or hand over the model's folder itself",
    )

"""Inputs and answers of text generation: a message and its reply, token by token.

Runtimes round differently. If two tokens are nearly equally likely, one machine may choose the other token, and the
texts differ from there on. The self-test therefore follows the expected reply: it feeds each expected token and
compares the token's logit, and the logit's distance from the largest one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from compress.evaluation.generate import end_tokens
from compress.formats.generation.decoder import PAST, PRESENT, Decoder, likeliest
from compress.formats.runtime import Batch, Session
from compress.models.chat_template import apply_chat_template
from compress.models.json_file import read_json
from compress.plugins.apps.app_type import Answers, Numbers, Reply, Rounding, round_to_float32
from compress.plugins.apps.manifest import MODEL_FOLDER, TensorRecord
from compress.plugins.apps.postprocess import Generate
from compress.plugins.apps.preprocess import Prompt
from compress.plugins.apps.text import SHOWN_IDS, TextCase, Texts, TokenizedInputs, id_difference
from compress.plugins.apps.tokenizer_fallbacks import to_page_tokenizer
from compress.tasks.task import LOGITS
from compress.utils.errors import DataError, InputError, ModelError

if TYPE_CHECKING:
    from compress.models.model import Processor


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


class Replies(Answers):
    """Replies to prompts."""

    plural, field, web = "replies", "reply", "reply"
    meanings = {
        LOGITS: "one score for each token of the vocabulary, at each place",
        **{f"{PAST}N.{part}": f"{part}s of earlier tokens, in layer N" for part in ("key", "value")},
        **{f"{PRESENT}N.{part}": f"{part}s of all tokens, in layer N" for part in ("key", "value")},
    }
    required = frozenset({LOGITS})
    # With integers, WebAssembly moved logits of a model in 4 bits by 2.7% of their span.
    rounding = (Rounding(0.01), Rounding(0.1))

    def find_postprocessing(self, model: Path, outputs: Sequence[TensorRecord]) -> Generate:
        """Return the step for greedy decoding by config.json and generation_config.json without sampling settings."""
        file = model / "generation_config.json"
        generation_config = read_json(file) if file.is_file() else {}
        longest = longest_text(model)
        presents = [entry.name for entry in outputs if entry.name.startswith(PRESENT)]
        return Generate(
            output=LOGITS,
            cache={PAST + name.removeprefix(PRESENT): name for name in presents},
            end_ids=tuple(sorted(end_tokens(model))),
            # Without a length in the model's config a reply has 256 tokens.
            max_new_tokens=min(generation_config.get("max_new_tokens") or 256, longest),
            max_length=longest,
        )

    def predict(self, session: Session, step: Generate, feed: Batch) -> Reply:
        """Return the beginning of the reply to a prompt, up to the end token."""
        decoder, prompt = Decoder(session, _WHERE), feed["input_ids"][0].tolist()
        most = min(16, step.max_new_tokens, step.max_length - len(prompt))
        logits = decoder.read(prompt)
        reply = [likeliest(logits, _WHERE)]
        heights = [_logit_above_mean(logits, reply[0])]
        while reply[-1] not in step.end_ids and len(reply) < most:
            logits = decoder.read_on(reply[-1])
            reply.append(likeliest(logits, _WHERE))
            heights.append(_logit_above_mean(logits, reply[-1]))
        return Reply(ids=tuple(reply), logits=round_to_float32(np.array(heights)))

    def follow(self, session: Session, step: Generate, feed: Batch, expected: Reply) -> ReplyComparison:
        """Return the comparison with an expected reply, whose tokens are fed one by one.

        Args:
            session: The model.
            step: Step after the model.
            feed: Ids of the prompt.
            expected: Expected reply.

        Raises:
            ModelError: The model has fewer tokens.
        """
        decoder = Decoder(session, _WHERE)
        logits = decoder.read(feed["input_ids"][0].tolist())
        firsts, heights, behind = [], [], []
        for number, token in enumerate(expected.ids):
            # The cache holds the expected tokens, also where the model prefers others.
            logits = decoder.read_on(expected.ids[number - 1]) if number else logits
            if token >= len(logits):
                raise ModelError(f"Token {token} is expected, and the model has {len(logits)}.", where=_WHERE)
            firsts.append(likeliest(logits, _WHERE))
            heights.append(_logit_above_mean(logits, token))
            behind.append(float(logits[firsts[-1]]) - float(logits[token]))
        return ReplyComparison(tuple(firsts), round_to_float32(np.array(heights)), round_to_float32(np.array(behind)))

    def span(self, answers: Sequence[Reply]) -> float:
        """Return the difference of the largest and smallest logit of all generated tokens."""
        return super().span([reply.logits for reply in answers])

    def difference(self, answer: ReplyComparison, expected: Reply) -> float:
        """Return the largest difference of an expected token's logit, or its distance from the largest logit."""
        return max(super().difference(answer.logits, expected.logits), *answer.behind)

    def shown(self, answer: Reply | ReplyComparison) -> str:
        """Return the tokens and their logits."""
        return f"of the tokens {list(answer.ids)} with logits {super().shown(answer.logits)}"


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


def _logit_above_mean(logits: np.ndarray, token: int) -> float:
    """Return a logit minus the mean of all, which a constant added to all logits does not change."""
    return float(logits[token]) - float(logits.mean(dtype=np.float64))


_PROBE = "zq8message8qz"
"""Text that occurs in no template."""


class ChatPrompts(TokenizedInputs):
    """Chat messages in the prompt template of the model.

    The built-in ones are questions, an empty message, characters that a template must not change, other scripts and
    emoji.
    """

    plural, web = "messages", "prompt"
    case = TextCase
    meanings = {**Texts.meanings, "position_ids": "the place of each token"}
    built_in = (
        "What is the capital of France?",
        "Write one sentence about the sea.",
        "",
        "  Leave my spaces\tand\n\nlines alone: 3.14 %,  ½, <b>tags</b> & {{ braces }} \n",
        "Wie heißt die Hauptstadt von Österreich?",
        "Какая сегодня погода? 👍🏽 👩‍👩‍👧",
        "写一句关于春天的话。 猫は何を食べますか。",
        "ما هي العاصمة؟ भारत की राजधानी क्या है?",
    )
    rule: Prompt

    @classmethod
    def find_rule(cls, folder: Path, processor: Processor, max_length: int) -> Prompt:
        """Return the rule of a chat template as the text before and after a message. `make_cases` verifies it.

        Raises:
            ModelError: The template depends on the date, or repeats the message.
        """
        file = f"{MODEL_FOLDER}/tokenizer.json"
        max_length = min(max_length, longest_text(folder / MODEL_FOLDER) - 1)
        template = getattr(processor, "chat_template", None)
        if not template:
            return Prompt(tokenizer=file, before="", after="", add_special_tokens=True, max_length=max_length)
        # A template with the current date has no fixed text.
        if "strftime_now" in str(template):
            raise _no_chat_rule("it puts today's date into a prompt")
        # Render a probe that occurs in no template, and split the prompt at the probe.
        before, *after = render_prompt(processor, _PROBE).split(_PROBE)
        if len(after) != 1:
            raise _no_chat_rule(f"a message stands in it {len(after)} times")
        return Prompt(tokenizer=file, before=before, after=after[0], add_special_tokens=False, max_length=max_length)

    def make_cases(self, samples: Sequence[str], processor: Processor) -> Sequence[TextCase]:
        """Verify the rule on all messages, and return cases for the samples, or for the built-in messages that fit.

        Raises:
            InputError: A sample is too long.
            ModelError: The template or the tokenizer does something else than the rule.
        """
        for message in (*self.built_in, *samples):
            self.check(message, processor)
        cases = [TextCase(text=text, input_ids=tuple(self.ids(text))) for text in samples or self.built_in]
        fitting = [case for case in cases if self.fits(case.input_ids)]
        # Built-in messages may be too long for a small model. The user's own must fit.
        if not fitting or (samples and len(fitting) < len(cases)):
            case = next(case for case in cases if not self.fits(case.input_ids))
            own = len(self.ids("x")) - 1
            raise InputError(
                f"A prompt has {len(case.input_ids)} tokens: that of {case.text[:60]!r}.",
                expected=f"1 to {self.rule.max_length} tokens, of which {own} belong to the template",
                hint="name shorter messages with --sample, or raise data.max_length of the recipe",
            )
        return fitting

    def check(self, message: str, processor: Processor) -> None:
        """Raise `ModelError` if transformers returns another prompt or other ids for ``message`` than the rule."""
        rule = self.rule
        if not rule.add_special_tokens:
            # The template writes all special tokens itself, so that the tokenizer adds none.
            text = render_prompt(processor, message)
            if text != f"{rule.before}{message}{rule.after}":
                raise _no_chat_rule(f"of {message[:60]!r} it makes {text[-200:]!r}")
            expected = list(processor(text, add_special_tokens=False)["input_ids"])
        else:
            expected = list(processor(message)["input_ids"])
        if self.ids(message) != expected:
            raise ModelError(
                f"The tokenizer cannot be described to an app: of {message[:60]!r} it makes {expected[:SHOWN_IDS]}, "
                f"its tokenizer.json alone {self.ids(message)[:SHOWN_IDS]}.",
                expected="ids as tokenizer.json alone gives them",
            )

    def ids(self, message: str) -> list[int]:
        """Return the ids of a message within the prompt template."""
        text = f"{self.rule.before}{message}{self.rule.after}"
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=self.rule.add_special_tokens).ids
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

    @classmethod
    def shown(cls, cases: Sequence[TextCase]) -> list[str]:
        """Return the first short messages."""
        return [case.text for case in cases if 0 < len(case.text) <= 60][:3]

    def more_for_page(self) -> dict[str, bytes]:
        """Return a tokenizer definition for JavaScript if it reads the original differently."""
        definition = json.loads((self.folder / self.rule.tokenizer).read_text(encoding="utf-8"))
        page_definition = to_page_tokenizer(definition)
        if page_definition == definition:
            return {}
        content = json.dumps(page_definition, ensure_ascii=False, separators=(",", ":"))
        return {self.rule.tokenizer: content.encode()}


def render_prompt(processor: Processor, message: str) -> str:
    """Return the prompt of one message by the tokenizer's chat template. Raises `ModelError` if the template fails."""
    messages = [{"role": "user", "content": message}]
    try:
        return apply_chat_template(processor, messages, add_generation_prompt=True)
    except DataError as error:
        raise _no_chat_rule(f"it fails for {message[:60]!r}: {error.what}") from error


def _no_chat_rule(reason: str) -> ModelError:
    return ModelError(
        f"The chat template cannot be described to an app: {reason}.",
        expected="a fixed text before a message and another behind it, the message itself unchanged",
        hint="save the tokenizer with such a chat_template, or hand over the model's folder itself",
    )

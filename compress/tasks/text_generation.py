"""Text generation: prediction of each token of running text. Importing this imports no torch."""

from __future__ import annotations

import io
import keyword
import math
import tokenize
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.data.columns import Column
from compress.models.model import TorchModel
from compress.tasks.capability import EXPORTED_FROM_CHECKPOINT, GENERATES, TAKES_TEXT
from compress.tasks.classes import finite, interval_row
from compress.tasks.lazy_modules import calibration, np, pa, statistics, token_metrics, torch
from compress.tasks.loading import Origin, load_by, tokenizer_by
from compress.tasks.task import Examples, NamedArrays, Task, starter_recipe
from compress.tasks.token_sequences import (
    EXPECTED,
    SEPARATOR,
    cut,
    prefix_tokens,
    read,
    spread,
    text_or_messages,
    token_ids,
)
from compress.utils.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers.utils import ModelOutput

    from compress.models.model import Processor
    from compress.results.report import Measurement
    from compress.tasks.evaluation import Evaluation

KINDS = ("whitespace", "identifier", "keyword", "string", "number", "comment", "operator")
_BY_TYPE = {"STRING": "string", "NUMBER": "number", "COMMENT": "comment", "OP": "operator"}


def python_kinds(texts: Sequence[str]) -> np.ndarray:
    """Return the index in `KINDS` of every byte of ``texts``, joined by blank lines.

    Tokens are those of the standard library's `tokenize`. Text between tokens and indents count as white space. Raises
    `DataError` for a text that is not Python.
    """
    byte_kinds = []
    for row, text in enumerate(texts):
        try:
            byte_kinds += [_bytes(text), np.zeros(len(SEPARATOR), np.int8)]
        except (tokenize.TokenError, SyntaxError) as error:
            raise DataError(
                f"A text is not valid Python: {error}.",
                where=f"data.also, row {row + 1}",
                expected="whole files of Python",
                hint="take it out, or call the split `text` in data.also",
            ) from error
    return np.concatenate(byte_kinds[:-1])


def kinds_of_tokens(kinds: np.ndarray, spaces: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return the category of each token by its first byte that is not white space.

    ``kinds`` and ``spaces`` describe the bytes of the text; ``starts`` [n + 1] are the first bytes of the tokens, and
    the
    end.
    """
    positions = np.where(spaces, len(spaces), np.arange(len(spaces)))
    following = np.append(np.minimum.accumulate(positions[::-1])[::-1], len(spaces))
    first = following[starts[:-1]]
    within = first < np.maximum(starts[1:], starts[:-1] + 1)
    return np.where(within, np.append(kinds, 0)[first], 0)


def _bytes(text: str) -> np.ndarray:
    """Return the categories of the bytes of one text in UTF-8."""
    lines = list(io.StringIO(text, newline=""))
    begins = np.concatenate([[0], np.cumsum([len(line) for line in lines])]).astype(int)
    kinds, opened = np.zeros(len(text), np.int8), list[int]()
    for token in tokenize.generate_tokens(io.StringIO(text, newline="").readline):
        name = tokenize.tok_name[token.type]
        kind = "string" if name.startswith("FSTRING") else _BY_TYPE.get(name)
        if name == "NAME":
            kind = "keyword" if keyword.iskeyword(token.string) else "identifier"
        if kind is not None:
            first, last = (begins[line - 1] + column for line, column in (token.start, token.end))
            if name == "FSTRING_START":
                opened.append(first)
            elif name == "FSTRING_END":  # from Python 3.12 on it comes in parts
                first = opened.pop()
            kinds[first:last] = KINDS.index(kind)
    return np.repeat(kinds, [len(character.encode()) for character in text])


_IGNORED = -100
_SEED = 0
"""Seed of the bootstrap and of the sampled positions, so that equal answers give equal metrics."""
_DISTRIBUTIONS = 640
"""Positions over all sequences whose whole distribution is collected; a vocabulary of 50,000 takes 100 kB each."""
_IDS, _LOGITS = "input_ids", "logits"
_SCORED, _TOKENS, _BEGIN, _FIRST, _END = range(5)
"""Columns of the windows' labels [n, 5]: how many tokens at a window's end count, how many the baseline's tokenizer
makes of their text, and the bytes of the text at which the window begins, what counts begins, and both end."""
_LOSS, _RIGHT, _TOP, _DISTRIBUTION = "loss", "right", "top", "log_probabilities"


class TextGeneration(Task):
    """Hugging Face `text-generation`, evaluated by how well the test text is predicted token by token."""

    name = "text-generation"
    columns = (Column("text", read=text_or_messages, expected=EXPECTED),)
    capabilities = frozenset({TAKES_TEXT, GENERATES, EXPORTED_FROM_CHECKPOINT})
    architectures = ("ForCausalLM", "LMHeadModel")
    ratios = ("perplexity", "next_token_accuracy", "bits_per_byte")
    metrics = ("perplexity", "next_token_accuracy", "bits_per_byte", "agreement", "kl_divergence")
    app_steps = ("prompt", "generate")
    starter = starter_recipe(
        "my-chat-model",
        "a language model with 4-bit weights, as ONNX, calibrated and evaluated on my own texts",
        "sample:smollm2",
        {"splits": {"train": "train.jsonl", "test": "test.jsonl"}, "columns": {"text": "text"}, "max_length": 512},
        {"equalize": {}, "gptq": {"bits": 4, "group_size": 64, "embedding_bits": 4}, "onnx": {}},
        {"metric": "perplexity", "at_most": 1.35, "of": "baseline"},
        evaluation={"windows": 20},
        benchmark={"contexts": [128], "every_stage": False},
    )
    batch_size = 1

    def load(self, directory: Path, labels: Sequence[str] | None, trust_remote_code: bool) -> TorchModel:
        """Load weights in fp32 and the tokenizer. Raises `ModelError` for files that do not load."""
        expected = "a causal language model with a tokenizer, in Hugging Face layout"
        origin = Origin(self.name, directory, tokenizer_by(trust_remote_code), expected)
        return load_by("AutoModelForCausalLM", origin, trust_remote_code, float_only=False, dtype=torch.float32)

    def encode(self, rows: pa.Table, processor: Processor, labels: Sequence[str] | None, max_length: int) -> Examples:
        """Return all full sequences of ``max_length`` tokens of the running text, or none if the text is shorter.

        Args:
            rows: Rows with the task's columns; label columns are optional.
            processor: Processor of the model.
            labels: Class names of the model, or None to ignore labels.
            max_length: Number of tokens after which texts are truncated.
        """
        return _examples(cut(token_ids(rows, processor), prefix_tokens(processor), max_length))

    def eval_examples(
        self,
        rows: pa.Table,
        processor: Processor,
        labels: Sequence[str] | None,
        max_length: int,
        evaluation: Evaluation,
    ) -> Examples:
        """Return the sequences that ``evaluation`` selects. Raises `DataError` for text shorter than one sequence.

        Args:
            rows: Rows of the test split.
            processor: Processor of the model.
            labels: Class names of the model.
            max_length: Number of tokens after which texts are truncated.
            evaluation: The recipe's `evaluation` section.
        """
        reading, first, stride = read(rows, processor), prefix_tokens(processor), evaluation.stride
        ids = token_ids(rows, processor) if reading is None else reading.ids
        body = max_length - len(first)
        if stride is not None and stride > body:
            raise DataError(
                f"A stride of {stride} would leave out tokens between windows of {body}.",
                where="evaluation.stride",
                expected=f"at most {body}, the tokens of a window",
            )
        windows = cut(ids, first, max_length, stride)
        if not windows:
            raise DataError(
                f"The text has {len(ids):,} tokens of this model, too few for one window of {body}.",
                where="data.splits",
                expected="text of at least one window; perplexity is precise from about twenty windows",
                hint="give more text, or lower data.max_length",
            )
        chosen = spread(len(windows), evaluation.windows or len(windows))
        scored = None if stride in (None, body) else stride
        note = _note(len(ids), len(windows), len(chosen), body, stride or body)
        begins = np.array(chosen) * (stride or body)
        counts = None
        if reading is not None:
            # The last tokens of each sequence count.
            num_scored = scored or max_length - 1
            places = (begins, begins + body - min(num_scored, body), begins + body)
            counted = np.full(len(begins), num_scored)
            counts = np.column_stack([counted, counted, *(reading.starts[position] for position in places)])
        return _examples([windows[index] for index in chosen], scored, note, counts)

    def eval_examples_like(
        self,
        rows: pa.Table,
        processor: Processor,
        labels: Sequence[str] | None,
        max_length: int,
        evaluation: Evaluation,
        baseline: Callable[[], Any],
    ) -> Examples:
        """Return the baseline's sequences of text, tokenized by ``processor`` if it has another vocabulary.

        A token belongs to the sequence in which it begins. Raises `DataError` for a sequence without a scored token.
        """
        reference = baseline()
        if processor.get_vocab() == reference.get_vocab():
            return self.eval_examples(rows, processor, labels, max_length, evaluation)
        whole = self.eval_examples(rows, reference, labels, max_length, evaluation)
        mine, theirs, first = read(rows, processor), read(rows, reference), prefix_tokens(processor)
        if mine is None or theirs is None or whole.labels is None:
            raise DataError(
                "The text of a window of another tokenizer is unknown.",
                where="evaluation",
                expected="fast tokenizers of the baseline and of each model that has another vocabulary",
            )
        begins, firsts, ends = np.searchsorted(mine.starts[:-1], whole.labels[:, [_BEGIN, _FIRST, _END]]).T
        # Of a window that nothing opens, the first token has nothing to be told from.
        counted = ends - np.maximum(firsts, begins + (not first))
        if counted.min() < 1:
            raise DataError("A window has no token to evaluate.", where="data.max_length", hint="raise data.max_length")
        head, places = np.array(first, dtype=np.int64), zip(begins, ends, strict=True)
        windows = [np.concatenate([head, mine.ids[begin:end]]) for begin, end in places]
        note = (
            f"{whole.note}; a vocabulary of {len(processor):,} tokens encodes the same windows, the whole text as "
            f"{len(mine.ids):,}, where the baseline's {len(reference):,} yield {len(theirs.ids):,}: perplexity is per "
            "token of the baseline, times are per token of each model"
        )
        return _examples(windows, None, note, np.column_stack([counted, whole.labels[:, _TOKENS:]]))

    def members(self, rows: pa.Table, chosen: np.ndarray, examples: Examples) -> np.ndarray:
        """Return the sequences whose scored text lies in ``chosen`` rows.

        The blank line after a row belongs to the row.
        """
        if examples.labels is None:
            return np.zeros(len(examples), dtype=bool)
        sizes = [len(text.encode()) + len(SEPARATOR) for text in rows["text"].to_pylist()]
        begins = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        first = np.searchsorted(begins, examples.labels[:, _FIRST], side="right") - 1
        behind = np.searchsorted(begins, examples.labels[:, _END], side="left")
        others = np.concatenate([[0], np.cumsum(~chosen)])
        return np.asarray(others[behind] == others[first])

    def token_categories(self, rows: pa.Table, processor: Processor, examples: Examples, language: str) -> NamedArrays:
        """Return for Python code which scored tokens are identifiers, keywords and so on, [n, scored] each.

        Args:
            rows: Rows of the split.
            processor: Tokenizer of the model.
            examples: The examples made of the rows.
            language: "text" or "python".
        """
        reading = None if language == "text" else read(rows, processor)
        if reading is None or examples.labels is None:
            return {}
        spaces = np.frombuffer(reading.text.encode(), np.uint8) == ord(" ")
        categories = kinds_of_tokens(python_kinds(rows["text"].to_pylist()), spaces, reading.starts)
        counted = examples.labels[:, _SCORED]
        columns = np.full((len(examples), counted.max()), -1)
        ends = np.searchsorted(reading.starts[:-1], examples.labels[:, _END])
        for row, (end, count) in enumerate(zip(ends, counted, strict=True)):
            scored = examples.inputs[row][_IDS][-count:]
            # A window may end within a character, whose tokens all begin at one byte.
            last = next((n for n in range(end, end + 4) if np.array_equal(reading.ids[n - count : n], scored)), end)
            columns[row, :count] = categories[last - count : last]
        return {kind: columns == index for index, kind in enumerate(KINDS)}

    def loss(self, outputs: ModelOutput, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy of ``labels`` [batch, length] without the first token and those of -100."""
        logits: torch.Tensor = outputs.logits[:, :-1].float()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=_IGNORED)

    def collect(self, outputs: NamedArrays, examples: Examples, indices: Sequence[int]) -> NamedArrays:
        """Return each scored token's loss, the most likely token, and some distributions.

        From logits [batch, length, vocabulary]: `loss`, `right` and `top` are [batch, scored]; `log_probabilities` is
        [batch, positions, vocabulary] in float16, at positions sampled for each sequence. Raises `ModelError` for
        logits
        that are not finite or incomplete.
        """
        parts = [_kept(outputs[_LOGITS][row], examples, index) for row, index in enumerate(indices)]
        return {name: np.stack([part[name] for part in parts]) for name in parts[0]}

    def measure(self, collected: NamedArrays, labels: np.ndarray | None, model: str, target: str) -> list[Measurement]:
        """Return perplexity, bits per byte and next-token accuracy, with intervals over sequences.

        The raw outcomes of perplexity are the losses per token of each sequence. Tokens are counted by the baseline's
        tokenizer. Next-token accuracy is omitted for another vocabulary.

        Args:
            collected: Collected outputs of all examples.
            labels: Labels of all examples.
            model: Name of the model in the report.
            target: Name of the target in the report.
        """
        nats = np.nansum(collected[_LOSS], axis=1, dtype=np.float64)
        token_counts = np.isfinite(collected[_LOSS]).sum(axis=1)
        tokens = token_counts if labels is None else labels[:, _TOKENS]
        measurements = [perplexity_row("perplexity", nats / tokens, model, target)]
        if (token_counts == tokens).all():
            right = collected[_RIGHT].sum(axis=1, dtype=np.float64) / token_counts
            measurements.append(_row("next_token_accuracy", right, model, target, "ratio"))
        if labels is not None:
            # Bits per byte of text are comparable between vocabularies. Outcomes use the mean number of bytes.
            bits, size = np.asarray(nats) / math.log(2), labels[:, _END] - labels[:, _FIRST]
            interval: tuple[float | None, ...] = (float(bits[0] / size[0]), None, None)
            if len(bits) > 1:
                interval = statistics.ratio_interval(bits, size, _SEED)
            raw = bits / size.mean()
            measurements.append(interval_row("bits_per_byte", interval, len(raw), model, target, "bits", raw))
        return measurements

    def compare(self, collected: NamedArrays, reference: NamedArrays, model: str, target: str) -> list[Measurement]:
        """Return the agreement of the most likely tokens and the KL divergence from the baseline's distributions.

        Returns nothing for a model with another vocabulary.

        Args:
            collected: Collected outputs of the model.
            reference: Collected outputs of the baseline.
            model: Name of the model in the report.
            target: Name of the target in the report.
        """
        if any(collected[name].shape != reference[name].shape for name in (_TOP, _DISTRIBUTION)):
            return []
        same = (collected[_TOP] == reference[_TOP]).mean(axis=1, dtype=np.float64)
        pairs = zip(reference[_DISTRIBUTION], collected[_DISTRIBUTION], strict=True)
        divergences = np.array([token_metrics.divergence(baseline, student).mean() for baseline, student in pairs])
        return [
            _row("agreement", same, model, target, "ratio"),
            _row("kl_divergence", divergences, model, target, "nats"),
        ]


def _examples(
    windows: Sequence[np.ndarray], scored: int | None = None, note: str = "", counts: np.ndarray | None = None
) -> Examples:
    inputs = [{_IDS: window, "attention_mask": np.ones_like(window)} for window in windows]
    return Examples(inputs, {_IDS: 0, "attention_mask": 0}, counts, num_scored_tokens=scored, note=note)


def _note(tokens: int, windows: int, chosen: int, body: int, stride: int) -> str:
    """Return a note on which part of the text is evaluated.

    Args:
        tokens: Number of tokens of the text.
        windows: Number of full sequences.
        chosen: Number of evaluated sequences.
        body: Tokens per sequence without special tokens.
        stride: Distance between the starts of two sequences.
    """
    judged = f"{chosen} of {windows} windows" if chosen < windows else f"{windows} windows"
    shared = f", one every {stride}" if stride < body else ""
    left = tokens - (windows - 1) * stride - body
    remainder = f"; the last {left:,} do not fill a window and are skipped" if left else ""
    return f"evaluated on {judged} of {body} tokens{shared} ({tokens:,} tokens of test text{remainder})"


def _kept(logits: np.ndarray, examples: Examples, index: int) -> dict[str, np.ndarray]:
    ids = examples.inputs[index][_IDS]
    if logits.shape[:-1] != ids.shape:
        raise ModelError(
            f"The model gives logits {list(logits.shape)} for {len(ids)} tokens.",
            expected="logits of every token, [batch, length, vocabulary]",
            hint="export it again with the logits of all positions, not only the last",
        )
    counts = None if examples.labels is None else examples.labels[:, _SCORED]
    scored = examples.num_scored_tokens or len(ids) - 1 if counts is None else int(counts[index])
    followed, answers = ids[-scored:], logits[-scored - 1 : -1]
    if int(followed.max()) >= logits.shape[-1]:
        raise ModelError(
            f"The text has the token id {int(followed.max())}; the model has logits for {logits.shape[-1]}.",
            expected="the tokenizer that the model was trained with",
        )
    loss = finite(token_metrics.negative_log_likelihood(answers, followed), "logits")
    top = answers.argmax(axis=-1)
    # Windows of one text in other tokens differ in length; what is collected of them doesn't.
    fewest, more = (scored, 0) if counts is None else (int(counts.min()), int(counts.max()) - scored)
    # The positions whose distribution is collected are the same for every model.
    count = min(fewest, max(1, _DISTRIBUTIONS // len(examples)))
    places = np.sort(np.random.default_rng([_SEED, index]).choice(fewest, count, replace=False))
    return {
        _LOSS: np.pad(loss.astype(np.float32), (0, more), constant_values=np.nan),
        _RIGHT: np.pad(top == followed, (0, more)),
        _TOP: np.pad(top.astype(np.int32), (0, more), constant_values=-1),
        _DISTRIBUTION: token_metrics.log_probabilities(answers[places]).astype(np.float16),
    }


def perplexity_row(metric: str, nats: np.ndarray, model: str, target: str) -> Measurement:
    """Return exp of the mean of losses per token, in ``nats`` [n], with its interval. The outcomes are the losses.

    Args:
        metric: Name of the metric.
        nats: Loss per token of each sequence.
        model: Name of the model in the report.
        target: Name of the target in the report.
    """
    loss = _row(metric, nats, model, target, "")
    bounds = {"value": loss.value, "low": loss.low, "high": loss.high}
    return loss.model_copy(update={name: None if value is None else math.exp(value) for name, value in bounds.items()})


def _row(metric: str, samples: np.ndarray, model: str, target: str, unit: str) -> Measurement:
    """Return the mean over sequences. A single sequence has no interval."""
    value, low, high = calibration.mean_interval(samples, _SEED)
    interval = (value, low, high) if len(samples) > 1 else (value, None, None)
    return interval_row(metric, interval, len(samples), model, target, unit, samples)


TASK = TextGeneration()

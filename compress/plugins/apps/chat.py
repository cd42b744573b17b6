"""A prompt's ids -> a reply, token by token.

Kernels round otherwise, and where two tokens are nearly as likely one machine may take the other; from there on the
texts differ. So the self-test follows a reply: each token is read as it is expected, through the cache of the tokens
before it, and at each place its logit must be what it was, and the largest, both within the tolerance.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from compress.evaluation.generate import end_tokens
from compress.formats.generation.decoder import PAST, PRESENT, Decoder, likeliest
from compress.formats.runtime import Batch, Session
from compress.models.json_file import read_json
from compress.plugins.apps.app_type import Answers, Numbers, Reply, Rounding, apart, seven_figures, shown, span
from compress.plugins.apps.manifest import TensorRecord
from compress.plugins.apps.postprocess import Generate
from compress.tasks.task import LOGITS
from compress.utils.errors import ModelError

_NEW_TOKENS = 256
"""Of a reply, where the model's own config says nothing."""
_TESTED = 16
_WHERE = "the bundle's model"


class Followed(NamedTuple):
    """Comparison with an expected reply.

    Attributes:
        ids: Most likely token at each position.
        logits: Distance of the expected token's logit from the mean of all.
        behind: Distance of the expected token's logit from the largest one.
    """

    ids: tuple[int, ...]
    logits: Numbers
    behind: Numbers


def _find_end(model: Path, outputs: Sequence[TensorRecord]) -> Generate:
    """As config.json and generation_config.json say; how to draw at random is left out."""
    said = read_json(model / "generation_config.json") if (model / "generation_config.json").is_file() else {}
    longest = longest_text(model)
    presents = [entry.name for entry in outputs if entry.name.startswith(PRESENT)]
    return Generate(
        output=LOGITS,
        cache={PAST + name.removeprefix(PRESENT): name for name in presents},
        end_ids=tuple(sorted(end_tokens(model))),
        max_new_tokens=min(said.get("max_new_tokens") or _NEW_TOKENS, longest),
        max_length=longest,
    )


def _ask(session: Session, end: Generate, feed: Batch, known: Reply | None) -> Reply | Followed:
    """The beginning of the reply to one prompt; of a ``known`` one what becomes of it here."""
    decoder, prompt = Decoder(session, _WHERE), [int(token) for token in feed["input_ids"][0]]
    if known is None:
        most = min(_TESTED, end.max_new_tokens, end.max_length - len(prompt))
        said = list(_said(decoder, prompt, end.end_ids, most))
        return Reply(ids=tuple(token for token, _ in said), logits=_rounded([height for _, height in said]))
    places = [_place(logits, token) for logits, token in _followed(decoder, prompt, known.ids)]
    ids, heights, behind = zip(*places, strict=True)
    return Followed(ids, _rounded(heights), _rounded(behind))


def _span(found: Sequence[Reply]) -> float:
    """From the smallest to the largest logit of all tokens that are said."""
    return span([tuple(height for reply in found for height in reply.logits)])


def _apart(found: Followed, known: Reply) -> float:
    """The largest difference of an expected token's logit, or distance of one to the largest."""
    return max(apart(found.logits, known.logits), *found.behind)


def _shown(answer: Reply | Followed) -> str:
    return f"of the tokens {list(answer.ids)} with logits {shown(answer.logits)}"


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
    find_end=_find_end,
    ask=_ask,
    span=_span,
    apart=_apart,
    shown=_shown,
)


def longest_text(model: Path) -> int:
    """Tokens that a text of the model in that folder may have, prompt and reply. Raises `ModelError`."""
    found = read_json(model / "config.json").get("max_position_embeddings")
    if not isinstance(found, int) or found < 2:
        raise ModelError(
            f"The model's config has max_position_embeddings {found!r}.",
            where=str(model / "config.json"),
            expected="how many tokens a text may have, two or more",
        )
    return found


def _said(decoder: Decoder, prompt: Sequence[int], ends: Sequence[int], most: int) -> Iterator[tuple[int, float]]:
    """Tokens of the reply, the one that ends it too, each with its logit above the mean."""
    logits = decoder.read(prompt)
    for number in range(1, most + 1):
        token = likeliest(logits, _WHERE)
        yield token, _height(logits, token)
        if token in ends or number == most:
            return
        logits = decoder.read_on(token)


def _followed(decoder: Decoder, prompt: Sequence[int], ids: Sequence[int]) -> Iterator[tuple[np.ndarray, int]]:
    """Each of the tokens with the logits at its place."""
    for number, token in enumerate(ids):
        logits = decoder.read_on(ids[number - 1]) if number else decoder.read(prompt)
        if token >= len(logits):
            raise ModelError(f"Token {token} is expected, and the model has {len(logits)}.", where=_WHERE)
        yield logits, token


def _place(logits: np.ndarray, token: int) -> tuple[int, float, float]:
    first = likeliest(logits, _WHERE)
    return first, _height(logits, token), float(logits[first]) - float(logits[token])


def _height(logits: np.ndarray, token: int) -> float:
    return float(logits[token]) - float(logits.mean(dtype=np.float64))


def _rounded(values: Sequence[float]) -> Numbers:
    return seven_figures(np.array(values))

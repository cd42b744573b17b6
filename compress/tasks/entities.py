"""Entities in the labels of words: the schemes in which they are written, and how many of them are found."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from compress.utils.errors import DataError, MissingExtraError

OUTSIDE = "O"
_SCHEMES = {"BIO": frozenset("BI"), "IO": frozenset("I"), "BILOU": frozenset("BILU"), "BIOES": frozenset("BIES")}
"""The prefixes of each; O is in all of them."""
_AS_BIOES = {"L": "E", "U": "S"}


class Entity(NamedTuple):
    """Words ``start`` to ``end``, the last among them, are a ``kind``."""

    kind: str
    start: int
    end: int


def scheme_of(labels: Collection[str]) -> str | None:
    """The scheme in which ``labels`` mark entities; `None` for labels of single words, such as parts of speech.

    Raises `DataError` for labels of which some mark entities and others don't, or for prefixes of two schemes.
    """
    parts = {label: label.partition("-") for label in labels if label != OUTSIDE}
    marking = {label for label, (prefix, dash, _) in parts.items() if dash and prefix in "BILUES" and len(prefix) == 1}
    if not marking:
        return None
    other = sorted(parts.keys() - marking)
    if other:
        raise DataError(
            f"Of the labels {other[0]!r} marks no entity, and {sorted(marking)[0]!r} does.",
            where="data.labels",
            expected="O and labels with the prefixes of one scheme: BIO, IO, BILOU or BIOES; or none with a prefix",
        )
    used = frozenset(parts[label][0] for label in marking)
    for name, prefixes in _SCHEMES.items():
        if used <= prefixes and ("B" in used) >= ("I" in used and name == "BIO"):
            return name
    raise DataError(
        f"The labels have the prefixes {', '.join(sorted(used))}, which are of no one scheme.",
        where="data.labels",
        expected="BIO, IO, BILOU or BIOES",
    )


def check_schemes(known: Sequence[str], labels: Sequence[str]) -> None:
    """Raises `DataError` where the data's ``labels`` mark entities in another scheme than a model's ``known`` ones."""
    if all(label in known for label in labels):
        return
    theirs, own = scheme_of(known), scheme_of(labels)
    if theirs != own:
        odd = next(label for label in labels if label not in known)
        raise DataError(
            f"The data's labels are {own or 'of single words'}, as {odd!r} shows; the model's are "
            f"{theirs or 'of single words'}: {', '.join(known[:5])}.",
            where="data.labels",
            expected=f"labels among {', '.join(known)}",
            hint="write the data's labels in the model's scheme, or start from a model without a head",
        )


def entities(labels: Sequence[str]) -> set[Entity]:
    """Those of one text, as conlleval and seqeval find them: what begins with I after another kind begins anew.

    Raises `MissingExtraError` without seqeval.
    """
    try:
        from seqeval.metrics.sequence_labeling import get_entities
    except ModuleNotFoundError as error:
        raise MissingExtraError("seqeval", "metrics", "Counting entities") from error
    written = [_AS_BIOES.get(label[0], label[0]) + label[1:] if "-" in label else label for label in labels]
    return {Entity(*found) for found in get_entities(written)}

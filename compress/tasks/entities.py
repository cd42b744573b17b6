"""Named entities in word labels: labeling schemes and extraction."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from compress.utils.errors import DataError, MissingExtraError

OUTSIDE = "O"
_SCHEMES = {"BIO": frozenset("BI"), "IO": frozenset("I"), "BILOU": frozenset("BILU"), "BIOES": frozenset("BIES")}
"""Prefixes of each scheme. All of them have O."""
_AS_BIOES = {"L": "E", "U": "S"}


class Entity(NamedTuple):
    """Entity of a ``kind`` that spans the words ``start`` to ``end``, inclusive."""

    kind: str
    start: int
    end: int


def scheme_of(labels: Collection[str]) -> str | None:
    """Return the scheme in which ``labels`` mark entities, or None for labels of single words (parts of speech).

    Raises `DataError` if only some labels mark entities, or prefixes belong to two schemes.
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
    """Raise `DataError` if the data's ``labels`` have another scheme than a model's ``known`` ones."""
    if all(label in known for label in labels):
        return
    theirs, data_scheme = scheme_of(known), scheme_of(labels)
    if theirs != data_scheme:
        odd = next(label for label in labels if label not in known)
        raise DataError(
            f"The data's labels are {data_scheme or 'of single words'}, as {odd!r} shows; the model's are "
            f"{theirs or 'of single words'}: {', '.join(known[:5])}.",
            where="data.labels",
            expected=f"labels among {', '.join(known)}",
            hint="write the data's labels in the model's scheme, or start from a model without a head",
        )


def entities(labels: Sequence[str]) -> set[Entity]:
    """Return the entities of one text, by the rules of conlleval and seqeval.

    Raises `MissingExtraError` without seqeval.
    """
    try:
        from seqeval.metrics.sequence_labeling import get_entities
    except ModuleNotFoundError as error:
        raise MissingExtraError("seqeval", "metrics", "Counting entities") from error
    written = [_AS_BIOES.get(label[0], label[0]) + label[1:] if "-" in label else label for label in labels]
    return {Entity(*item) for item in get_entities(written)}

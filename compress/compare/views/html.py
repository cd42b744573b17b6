"""A comparison or a gate as one self-contained page, in the manner of the report's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from compress.compare import words
from compress.compare.change import Change, Comparison, Side
from compress.compare.gate import GateResult, Judgement
from compress.compare.views import forest
from compress.report.html import render

_FAILED, _WARNED, _PASSED = ("missed", "\u2717 failed"), ("warned", "? can't tell"), ("passed", "\u2713 passed")
_CHIPS = {"failed": _FAILED, "warned": _WARNED, "passed": _PASSED}
_COLOURS = {"worse": "missed", "can't tell": "warned", "better": "passed", "same": "none"}


class Row(NamedTuple):
    """A change under the name it is shown by, with which changes matter, and its verdict (colour, words)."""

    name: str
    change: Change
    allowed: str
    chip: tuple[str, str]


def html_comparison(comparison: Comparison) -> str:
    """Every change against its margin, slices, flips, and where the figures come from."""
    worse = any(change.verdict == "worse" for change in comparison.changes)
    verdict = "missed" if worse else "none", words.comparison_sentence(comparison)
    others = words.ordered(comparison)
    return _page("compare", "comparison", comparison, verdict, comparison.model_dump_json(), others)


def html_gate(result: GateResult) -> str:
    """Every judgement against its margin, then what no rule judges."""
    known = [judgement.change for judgement in result.judgements]
    others = [change for change in words.ordered(result.comparison) if change not in known]
    judged = [
        Row(words.judged_name(one), one.change, f"allowed {one.margin} worse", _CHIPS[one.status])
        for one in result.judgements
        if one.change
    ]
    verdict = _CHIPS[result.status][0], words.gate_sentence(result)
    lacking = [(one, _CHIPS[one.status]) for one in result.judgements if one.change is None]
    return _page("gate", "gate", result.comparison, verdict, result.to_json(), others, judged, lacking)


def _page(
    kind: str,
    title: str,
    comparison: Comparison,
    verdict: tuple[str, str],
    json: str,
    others: Sequence[Change],
    judged: Sequence[Row] = (),
    lacking: Sequence[tuple[Judgement, tuple[str, str]]] = (),
) -> str:
    slices = sorted(comparison.slices, key=lambda part: part.change.effect)
    return render(
        "compare/templates/comparison.html",
        f"{comparison.candidate.name} \u00b7 compress {title}",
        json,
        kind=kind,
        name=f"{_short(comparison.candidate)} against {_short(comparison.baseline)}",
        state=verdict[0],
        sentence=verdict[1],
        comparison=comparison,
        judged=judged,
        lacking=lacking,
        others=[_row(words.title(change), change, forest.matters(change)) for change in others],
        slices=[_row(part.name, part.change, f"{part.rows:,} rows") for part in slices],
        words=words,
        forest=forest,
    )


def _row(name: str, change: Change, allowed: str) -> Row:
    return Row(name, change, allowed, (_COLOURS[change.verdict], change.verdict))


def _short(side: Side) -> str:
    name = side.name.rstrip("/").removesuffix("/report.json").rpartition("/")[2]
    return name if side.model == "final" else f"{name} ({side.model})"

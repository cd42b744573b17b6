"""A search record of invented figures for tests of its views: two objectives, three stages, one failed trial."""

from __future__ import annotations

from typing import Any

from compress.plugins.search.record import ConstraintMargin, ParameterRecord, SearchRecord, TrialRecord

LIMIT = "accuracy at least 0.97"


def trial(number: int, words: str, status: str, size: float, low: float, **more: Any) -> TrialRecord:
    """Return a trial of 4 s with three stages, of which all trials share the first."""
    stages = (("finetune", "f", 60.0 * (number == 0), number > 0), ("distill", f"d{number % 2}", 30.0, number > 1),
              ("quantize", f"q{number}", 5.0, False))  # fmt: skip
    values = {
        "final": {"size_bytes": size, "latency_ms": size / 1e7},
        "spread": {"latency_ms": (size / 1.1e7, size / 0.9e7)},
        "rooms": (ConstraintMargin(limit=LIMIT, value=low + 0.01, low=low, high=low + 0.02),),
        "seconds": 4.0, "share": 1.0, "stages": stages, "why": "largest expected gain per time", "point": (number, 0),
    }  # fmt: skip
    return TrialRecord.model_validate({"number": number, "words": words, "status": status, **values, **more})


def record(**changes: Any) -> SearchRecord:
    """Return the record of six trials."""
    trials = (
        trial(0, "the recipe as it stands", "kept", 9e6, 0.01),
        trial(1, "prune.heads 0.25, distill.student.layers [2, 5]", "best", 4.8e6, 0.002),
        trial(
            2, "distill.student.layers [1, 2, 5]", "missed", 4e6, -0.03, final={"size_bytes": 4e6, "latency_ms": 0.3}
        ),
        trial(3, "prune.heads 0.5", "given up", 3e6, -0.1, share=1 / 9, reason="it would end -9.0% inside"),
        trial(4, "no trim_vocabulary", "front", 6e6, 0.001, final={"size_bytes": 6e6, "latency_ms": 0.4}),
        trial(5, "prune.heads 0.75", "failed", 0, 0, final={}, rooms=(), spread={}, stages=(), reason="out of memory"),
    )
    parameters = (
        ParameterRecord(name="stages.1.prune.heads", values=("0", "0.25"), effects={"size_bytes": 1.9},
                   importance={"size_bytes": 0.8}),
        ParameterRecord(name="trim_vocabulary", values=("kept", "left out"), effects={}),
    )  # fmt: skip
    values = {
        "name": "reviews", "description": "", "started": "", "moment": "", "seconds": 400, "budget_seconds": 3600,
        "minimize": ("size_bytes", "latency_ms"), "limits": ("accuracy >= 97% of baseline", "size_bytes <= 8 MB"),
        "confidence": 0.9, "rows": 1500, "knobs": parameters, "size": 96, "refused": {}, "trials": trials, "errors": {},
        "ended": "", "best": "prune.heads 0.25", "bounds": {"size_bytes": 8e6},
        "explained": {"size_bytes": "by 9 recipes", "accuracy": "too few to say: 4 recipes"},
    }  # fmt: skip
    return SearchRecord.model_validate({**values, **changes})

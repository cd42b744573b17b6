"""Advice for each kind of drift, in terms of the stages and fields of the recipe that made the model."""

from __future__ import annotations

from typing import Any

from compress.plugins.monitoring.record import DriftTest
from compress.recipe.recipe import Recipe

_LEARN = (
    "label a sample of today's rows and judge it with `compress evaluate`; if it does worse there, put them into "
    "`data.splits.train`{unlabeled} and run {stages} again"
)
_TRAINING = ("finetune", "distill", "distill_language_model", "qat", "sparsify_gradually", "lora_recovery")


def advice_of(look: DriftTest, recipe: Recipe) -> str:
    """Return what to do about a drift, in one or two sentences."""
    match look.name:
        case "unknown" | "words":
            return _widen(recipe)
        case "length" | "cut":
            return _lengthen(recipe, look.name == "cut")
        case "ranges":
            return _recalibrate(recipe)
        case "embeddings":
            return (
                "see whether searches still find what they should (`compress evaluate` on pairs of today); if not, "
                f"{_retrain(recipe)}, and embed the index anew"
            )
        case "brightness" | "contrast" | "size":
            return f"look at what takes the pictures and what decodes them; if they are meant, {_retrain(recipe)}"
        case "loudness" | "clipped" | "seconds" | "rate":
            return f"look at the microphone, its gain and its sampling rate; if they are meant, {_retrain(recipe)}"
        case _:
            return _retrain(recipe)


def _retrain(recipe: Recipe) -> str:
    """Return the advice to train again on recent rows."""
    kinds = [stage.kind for stage in recipe.stages]
    stages = " and ".join(f"`{kind}`" for kind in dict.fromkeys(kinds) if kind in _TRAINING)
    unlabeled = " (unlabeled ones into `data.unlabeled`, which `distill` reads)" if "distill" in kinds else ""
    return _LEARN.format(unlabeled=unlabeled, stages=stages or "a `finetune` stage")


def _widen(recipe: Recipe) -> str:
    """Return the advice to extend the vocabulary."""
    index, stage = _stage(recipe, "trim_vocabulary")
    if stage is None:
        return f"the tokenizer never had these words: {_retrain(recipe)}"
    fewer = f" and `min_count` to 1 (now {stage.min_count})" if stage.min_count > 1 else ""
    letters = ", `characters: all`" if stage.characters == "seen" else ""
    return (
        f"widen the table: put today's text into `data.unlabeled`, set `use_unlabeled: true`{letters}{fewer} of "
        f"`stages.{index}.trim_vocabulary`, and run the recipe again"
    )


def _lengthen(recipe: Recipe, cut: bool) -> str:
    """Return the advice to raise the maximum length."""
    _, stage = _stage(recipe, "trim_vocabulary")
    positions = " (`trim_vocabulary` has cut the positions to it)" if stage is not None and stage.trim_positions else ""
    longer = f"raise `data.max_length` (now {recipe.data.max_length}){positions} and run the recipe again"
    return longer if cut else f"if texts are longer, {longer}; times grow with length: `compress bench` on today's rows"


def _recalibrate(recipe: Recipe) -> str:
    """Return the advice to calibrate activation ranges again."""
    index, stage = _stage(recipe, "onnx_int8")
    if stage is None or getattr(stage, "method", "") != "static":
        return f"activations are beyond what the reference has: {_retrain(recipe)}"
    method = stage.calibration_method
    wider = f" or set `calibration_method: minmax` (now {method})" if method != "minmax" else ""
    return (
        f"recalibrate: put rows like today's into `data.splits.train`, of which `stages.{index}.onnx_int8` draws its "
        f"{stage.calibration_examples} `calibration_examples`, and run it again{wider}; "
        "`method: dynamic` needs no ranges"
    )


def _stage(recipe: Recipe, kind: str) -> tuple[int, Any]:
    """Return the index of the first stage of a kind, and the stage, or (0, None)."""
    return next(((index, stage) for index, stage in enumerate(recipe.stages) if stage.kind == kind), (0, None))

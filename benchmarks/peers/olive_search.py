"""Olive's joint search over post-training INT8, in the environment that `benchmarks/search.py olive` creates.

    PY peers/olive_search.py ORDER.json ANSWER.json

ORDER has `model` (an ONNX file in float), `rows` (.npz: the inputs' arrays [n, length] and `labels`), `calibration`
(.npz, without labels), `keep` (share of the float model's accuracy), `trials` and `output` (a folder). ANSWER has the
seconds, the number of quantized models, Olive's metrics of its output models, and the file of the best one.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

_SHOWN = (
    "quant_mode",
    "precision",
    "per_channel",
    "reduce_range",
    "quant_preprocess",
    "calibrate_method",
    "quant_format",
)
_TELEMETRY = {"OLIVE_DISABLE_TELEMETRY": "1", "OLIVE_TELEMETRY_DISABLED": "1", "DO_NOT_TRACK": "1"}


def main() -> None:
    """Run the search of the order and write the answer."""
    os.environ.update(_TELEMETRY)
    order = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps(_search(order)))


def _search(order: dict[str, Any]) -> dict[str, Any]:
    import numpy as np
    from olive.data.component.dataset import BaseDataset, ClassificationDataset
    from olive.data.registry import Registry
    from olive.workflows import run

    def rows_of(path: str) -> list[dict[str, Any]]:
        arrays = dict(np.load(path))
        return [dict(zip(arrays, row, strict=True)) for row in zip(*arrays.values(), strict=True)]

    @Registry.register_dataset("evaluated")  # type: ignore[untyped-decorator]
    def evaluated(**options: Any) -> Any:
        return ClassificationDataset(rows_of(order["rows"]), label_col="labels")

    @Registry.register_dataset("calibrating")  # type: ignore[untyped-decorator]
    def calibrating(**options: Any) -> Any:
        return BaseDataset(rows_of(order["calibration"]))

    @Registry.register_post_process("most_likely")  # type: ignore[untyped-decorator]
    def most_likely(output: Any, **options: Any) -> Any:
        return (output if hasattr(output, "argmax") else output["logits"]).argmax(-1)

    _patch_footprint()
    begin = time.perf_counter()
    workflow = run(_configuration(order))
    seconds = time.perf_counter() - begin
    best = workflow.get_best_candidate()
    if best is None:
        raise SystemExit("Olive found no model within the accuracy limit")
    file = Path(best.model_path)
    footprint = json.loads((Path(order["output"]) / "best" / "footprint.json").read_text())
    return {
        "seconds": seconds,
        "models": sum(entry["from_pass"] == "onnxquantization" for entry in footprint.values()),
        "best": str(file if file.is_file() else next(file.glob("*.onnx"))),
        "words": _describe(footprint, best.model_id),
        "seen": [entry.metrics_value for entry in workflow.get_output_models()],
    }


def _patch_footprint() -> None:
    """Fix Olive 0.13.0 for passes that occur in several trials.

    Its record of models sets a field by its alias, which pydantic 2 rejects, so the search ends without a model.
    """
    from olive.engine.footprint import FootprintNode

    def update(node: Any, **options: Any) -> None:
        for name, value in options.items():
            setattr(node, "model_config_data" if name == "model_config" else name, value)

    FootprintNode.update = update


def _describe(footprint: dict[str, Any], model: str | None) -> str:
    """Return the passes of a model with their searched settings; ``footprint`` is Olive's record of all models."""
    lines = []
    while model is not None:
        entry = footprint[model]
        chosen = {name: value for name, value in (entry["pass_run_config"] or {}).items() if name in _SHOWN}
        inside = ", ".join(f"{name} {value}" for name, value in chosen.items() if not isinstance(value, dict))
        if entry["from_pass"]:
            lines.append(f"{entry['from_pass']} ({inside})" if inside else entry["from_pass"])
        model = entry["parent_model_id"]
    return "; ".join(reversed(lines))


def _configuration(order: dict[str, Any]) -> dict[str, Any]:
    """Return Olive's configuration: its optimizer, then dynamic or static INT8, with default search settings."""
    keep = {"type": "percent-max-degradation", "value": 100 * (1 - order["keep"])}
    accuracy = {"name": "accuracy_score", "priority": 1, "metric_config": {"task": "multiclass", "num_classes": 2}}
    single = {"batch_size": 1}
    return {
        "input_model": {"type": "ONNXModel", "model_path": order["model"]},
        "systems": {
            "here": {
                "type": "LocalSystem",
                "accelerators": [{"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}],
            }
        },
        "data_configs": [
            {
                "name": "evaluated",
                "type": "DataContainer",
                "load_dataset_config": {"type": "evaluated"},
                "pre_process_data_config": {"type": "skip_pre_process"},
                "post_process_data_config": {"type": "most_likely"},
                "dataloader_config": {"batch_size": 50},
            },
            {
                "name": "timed",
                "type": "DataContainer",
                "load_dataset_config": {"type": "evaluated"},
                "pre_process_data_config": {"type": "skip_pre_process"},
                "dataloader_config": single,
            },
            {
                "name": "calibrating",
                "type": "DataContainer",
                "load_dataset_config": {"type": "calibrating"},
                "pre_process_data_config": {"type": "skip_pre_process"},
                "dataloader_config": single,
            },
        ],
        "evaluators": {
            "both": {
                "metrics": [
                    {
                        "name": "accuracy",
                        "type": "accuracy",
                        "data_config": "evaluated",
                        "sub_types": [{**accuracy, "goal": keep, "higher_is_better": True}],
                    },
                    {
                        "name": "latency",
                        "type": "latency",
                        "data_config": "timed",
                        "sub_types": [{"name": "avg", "priority": 2}],
                    },
                ]
            }
        },
        "passes": {
            "transformer": {"type": "OrtTransformersOptimization", "model_type": "bert", "opt_level": 0},
            "quantization": {"type": "OnnxQuantization", "data_config": "calibrating"},
        },
        "search_strategy": {
            "execution_order": "joint",
            "sampler": "tpe",
            "sampler_config": {"seed": 0},
            "max_iter": order["trials"],
        },
        "evaluator": "both",
        "host": "here",
        "target": "here",
        "cache_dir": f"{order['output']}/cache",
        "output_dir": f"{order['output']}/best",
        "log_severity_level": 2,
    }


if __name__ == "__main__":
    main()

"""Olive's joint search over post-training INT8; runs in the environment that `benchmarks/search.py olive` makes for it.

    PY peers/olive_search.py ORDER.json ANSWER.json

ORDER has `model` (an ONNX file in float), `rows` (.npz: the inputs' arrays [n, length] and `labels`), `calibration`
(.npz, without labels), `keep` (share of the float model's accuracy), `trials` and `output` (a folder). ANSWER has the
seconds, the files of the models made, each with the accuracy and latency that Olive saw, and the one it puts first.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

_TELEMETRY = {"OLIVE_DISABLE_TELEMETRY": "1", "OLIVE_TELEMETRY_DISABLED": "1", "DO_NOT_TRACK": "1"}


def main() -> None:
    """Search, answer."""
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

    @Registry.register_dataset("judged")  # type: ignore[untyped-decorator]
    def judged(**given: Any) -> Any:
        return ClassificationDataset(rows_of(order["rows"]), label_col="labels")

    @Registry.register_dataset("calibrating")  # type: ignore[untyped-decorator]
    def calibrating(**given: Any) -> Any:
        return BaseDataset(rows_of(order["calibration"]))

    @Registry.register_post_process("most_likely")  # type: ignore[untyped-decorator]
    def most_likely(output: Any, **given: Any) -> Any:
        return (output if hasattr(output, "argmax") else output["logits"]).argmax(-1)

    begin = time.perf_counter()
    run(_configuration(order))
    return {"seconds": time.perf_counter() - begin, **_found(Path(order["output"]))}


def _configuration(order: dict[str, Any]) -> dict[str, Any]:
    """What a user of Olive would write: its optimizer, then dynamic or static INT8, every default of its search."""
    keep = {"type": "percent-max-degradation", "value": 100 * (1 - order["keep"])}
    accuracy = {"name": "accuracy_score", "priority": 1, "metric_config": {"task": "multiclass", "num_classes": 2}}
    as_one = {"batch_size": 1}
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
                "name": "judged",
                "type": "DataContainer",
                "load_dataset_config": {"type": "judged"},
                "pre_process_data_config": {"type": "skip_pre_process"},
                "post_process_data_config": {"type": "most_likely"},
                "dataloader_config": {**as_one, "batch_size": 50},
            },
            {
                "name": "timed",
                "type": "DataContainer",
                "load_dataset_config": {"type": "judged"},
                "pre_process_data_config": {"type": "skip_pre_process"},
                "dataloader_config": as_one,
            },
            {
                "name": "calibrating",
                "type": "DataContainer",
                "load_dataset_config": {"type": "calibrating"},
                "pre_process_data_config": {"type": "skip_pre_process"},
                "dataloader_config": as_one,
            },
        ],
        "evaluators": {
            "both": {
                "metrics": [
                    {
                        "name": "accuracy",
                        "type": "accuracy",
                        "data_config": "judged",
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
            "quantization": [
                {"type": "OnnxDynamicQuantization"},
                {"type": "OnnxStaticQuantization", "data_config": "calibrating"},
            ],
        },
        "search_strategy": {
            "execution_order": "joint",
            "sampler": "tpe",
            "sampler_config": {"num_samples": order["trials"], "seed": 0},
            "max_iter": order["trials"],
        },
        "evaluator": "both",
        "host": "here",
        "target": "here",
        "cache_dir": f"{order['output']}/cache",
        "output_dir": f"{order['output']}/best",
        "log_severity_level": 2,
    }


def _found(output: Path) -> dict[str, Any]:
    """What the search kept."""
    return {"files": sorted(str(path) for path in output.rglob("*") if path.suffix in (".onnx", ".json"))}


if __name__ == "__main__":
    main()

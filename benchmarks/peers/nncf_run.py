"""Weight compression of a torch model with NNCF: 4 bits with AWQ and scale estimation.

    PY peers/nncf_run.py ORDER.json ANSWER.json

ORDER is as in `optimum_gptq.py`, with `windows` (a .npy file of token ids [n, length] for evaluation), `prompt` and
`tokens`. NNCF keeps embedding and output layer at 8 bits by default. Its compressed model only runs in the process that
made it, so it is evaluated and timed here: ANSWER has the `losses` of the windows and `tokens_per_second`. (NNCF's ONNX
backend does not support the fused operators of our decoders.)
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from quantizing import run_order
from transformers_decode import tokens_per_second


def run(order: dict[str, Any]) -> dict[str, Any]:
    """Compress, save, evaluate and time."""
    # Disables NNCF's telemetry.
    os.environ.setdefault("NNCF_CI", "1")
    import nncf
    import numpy as np
    import torch
    from safetensors.torch import save_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    start, output = time.perf_counter(), Path(order["output"])
    windows = torch.from_numpy(np.load(order["calibration"]))
    feeds = [{"input_ids": window[None], "attention_mask": torch.ones_like(window[None])} for window in windows]
    model = AutoModelForCausalLM.from_pretrained(order["model"], dtype=torch.float32).eval()
    model.config.use_cache = False
    compressed = nncf.compress_weights(
        model,
        mode=nncf.CompressWeightsMode.INT4_SYM,
        ratio=1.0,
        group_size=order["group_size"],
        dataset=nncf.Dataset(feeds),
        awq=True,
        scale_estimation=True,
        subset_size=len(feeds),
    )
    save_model(compressed, str(output / "model.safetensors"))
    compressed.config.save_pretrained(output)
    AutoTokenizer.from_pretrained(order["model"]).save_pretrained(output)
    seconds = time.perf_counter() - start
    compressed.config.use_cache = True
    return {
        "seconds": seconds,
        "losses": [_loss(compressed, window) for window in torch.from_numpy(np.load(order["windows"]))],
        "tokens_per_second": tokens_per_second(compressed, order["prompt"], order["tokens"]),
    }


def _loss(model: Any, window: Any) -> float:
    """Return the mean cross-entropy of all tokens except the first."""
    import torch

    with torch.no_grad():
        logits = model(window[None]).logits[0, :-1].double()
    return float(torch.nn.functional.cross_entropy(logits, window[1:]))


if __name__ == "__main__":
    run_order(run, ("nncf", "transformers", "torch"), ("torch", "transformers", "nncf"))

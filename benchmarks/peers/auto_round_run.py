"""Quantization with auto-round (sign-gradient rounding), in the environment that `benchmarks/llm_peers.py` creates.

    PY peers/auto_round_run.py ORDER.json ANSWER.json

ORDER and ANSWER are as in `optimum_gptq.py`; ORDER also has `iterations`. Only linear layers are quantized, as by
default.
"""

from __future__ import annotations

from typing import Any

from quantizing import run_order


def run(order: dict[str, Any]) -> None:
    """Quantize and write a checkpoint in AutoGPTQ's format."""
    import numpy as np
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    windows = torch.from_numpy(np.load(order["calibration"]))
    model = AutoModelForCausalLM.from_pretrained(order["model"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(order["model"])
    rounding = AutoRound(
        model,
        tokenizer,
        bits=order["bits"],
        group_size=order["group_size"],
        sym=True,
        iters=order["iterations"],
        nsamples=len(windows),
        seqlen=windows.shape[1],
        batch_size=4,
        dataset=[{"input_ids": window[None]} for window in windows],
        device_map="cpu",
    )
    rounding.quantize_and_save(output_dir=order["output"], format="auto_gptq")


if __name__ == "__main__":
    run_order(run, ("auto-round", "transformers", "torch"), ("torch", "transformers", "auto_round"))

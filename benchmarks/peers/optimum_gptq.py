"""Optimum's GPTQ with gptqmodel, in the environment that `benchmarks/llm_peers.py` creates.

    PY peers/optimum_gptq.py ORDER.json ANSWER.json

ORDER has `model`, `calibration` (a .npy file of token ids [samples, length]), `output`, `bits`, `group_size` and
`threads`. ANSWER has `seconds`, including loading the weights and writing the checkpoint, and the package versions.
"""

from __future__ import annotations

from typing import Any

from quantizing import run_order


def run(order: dict[str, Any]) -> None:
    """Quantize as in Optimum's documentation, with token ids instead of text."""
    import numpy as np
    import torch
    from optimum.gptq import GPTQQuantizer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    windows = torch.from_numpy(np.load(order["calibration"]))
    dataset = [{"input_ids": window[None], "attention_mask": torch.ones_like(window[None])} for window in windows]
    model = AutoModelForCausalLM.from_pretrained(order["model"], dtype=torch.float32)
    # Without it, packing fails after the quantization.
    model.hf_device_map = {"": "cpu"}
    quantizer = GPTQQuantizer(
        bits=order["bits"],
        group_size=order["group_size"],
        dataset=dataset,
        sym=True,
        desc_act=False,
        model_seqlen=windows.shape[1],
        block_name_to_quantize="model.layers",
    )
    quantized = quantizer.quantize_model(model)
    quantizer.dataset = None
    quantized.config.quantization_config = quantizer.to_dict()
    quantizer.save(quantized, order["output"])
    AutoTokenizer.from_pretrained(order["model"]).save_pretrained(order["output"])


if __name__ == "__main__":
    run_order(run, ("optimum", "gptqmodel", "transformers", "torch"), ("torch", "transformers", "gptqmodel"))

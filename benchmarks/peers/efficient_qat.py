"""Block-AP of EfficientQAT (Chen et al. 2024), with the authors' code, in the environment of this project.

    PY peers/efficient_qat.py ORDER.json ANSWER.json

ORDER is as in `optimum_gptq.py`, and has `authors`, a checkout of OpenGVLab/EfficientQAT, `epochs` and `learning_rate`,
that of the weights. The authors' code runs unchanged except for these adaptations: blocks get their rotary embeddings
from the model and return a tensor, as in current versions of transformers; autocast is on the CPU in bf16 instead of
fp16; and the calibration text is ours. Four of the windows are the authors' validation data. The second phase is not
run, since it needs CUDA (Triton kernels and the optimizer of bitsandbytes).

The checkpoint has dequantized weights. In ANSWER, `bytes` is the size of the folder with packed integers: `bits` for
each weight, and a zero point of `bits` and a 16-bit scale for each group.
"""

from __future__ import annotations

import logging
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from quantizing import run_order

HELD_OUT = 4


class Block(torch.nn.Module):
    """A block with the interface that the authors' code expects: it computes rotary embeddings and returns a tuple."""

    def __init__(self, layer: torch.nn.Module, rotary: torch.nn.Module) -> None:
        super().__init__()
        # In a list, so that it is no submodule.
        self.layer, self.rotary = layer, [rotary]

    def forward(self, states: torch.Tensor, attention_mask: Any = None, position_ids: Any = None, **_: Any) -> Any:
        embeddings = self.rotary[0](states, position_ids)
        outputs = self.layer(
            states, attention_mask=attention_mask, position_ids=position_ids, position_embeddings=embeddings
        )
        return (outputs,)


def import_block_ap(authors: Path) -> Any:
    """Import the authors' function without CUDA and Triton."""
    sys.path.insert(0, str(authors))
    # Replace the modules for Triton kernels and data loading, which are not used.
    for name in ("quantize.int_linear_real", "datasets"):
        module = sys.modules[name] = ModuleType(name)
        module.load_dataset = None  # type: ignore[attr-defined]
    torch.cuda.amp.autocast = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    from quantize.block_ap import block_ap  # type: ignore[import-not-found]

    return block_ap


def run(order: dict[str, Any]) -> dict[str, Any]:
    """Train block by block, and write a checkpoint of the dequantized weights."""
    import numpy as np
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from compress.utils.storage import size_bytes

    windows = torch.from_numpy(np.load(order["calibration"])).long()
    texts = [(window[None],) for window in windows]
    block_ap = import_block_ap(Path(order["authors"]))
    model = AutoModelForCausalLM.from_pretrained(order["model"], dtype=torch.float16).requires_grad_(False)
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = Block(layer, model.model.rotary_emb)
    arguments = Namespace(
        off_load_to_disk=False, real_quant=False, train_size=len(texts) - HELD_OUT, val_size=HELD_OUT,
        training_seqlen=windows.shape[1], batch_size=2, epochs=order["epochs"], wbits=order["bits"],
        group_size=order["group_size"], quant_lr=1e-4, weight_lr=order["learning_rate"], min_lr_factor=20, wd=0,
        early_stop=0,
    )  # fmt: skip
    block_ap(model, arguments, texts[HELD_OUT:], texts[:HELD_OUT], logging.getLogger("authors"))
    quantized, scales = 0, 0
    for index, block in enumerate(model.model.layers):
        model.model.layers[index] = block.layer
        for module in block.layer.modules():
            if hasattr(module, "weight_quantizer"):
                quantized, scales = quantized + module.weight.numel(), scales + module.weight_quantizer.scale.numel()
    dequantized = AutoModelForCausalLM.from_pretrained(order["model"], dtype=torch.float16)
    dequantized.load_state_dict({name: value for name, value in model.state_dict().items() if "quantizer" not in name})
    output = Path(order["output"])
    dequantized.save_pretrained(output)
    AutoTokenizer.from_pretrained(order["model"]).save_pretrained(output)
    packed = (quantized + scales) * order["bits"] // 8 + 2 * scales
    return {"bytes": size_bytes(output) - 2 * quantized + packed}


if __name__ == "__main__":
    run_order(run, ("torch", "transformers"), ("torch", "transformers.modeling_utils"))

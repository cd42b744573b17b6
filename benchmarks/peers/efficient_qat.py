"""Block-AP of EfficientQAT (Chen et al. 2024) as its authors wrote it, in the environment of this project.

    PY peers/efficient_qat.py ORDER.json ANSWER.json

ORDER as in `auto_round_run.py`, but for `authors`, a checkout of OpenGVLab/EfficientQAT, `epochs` and `learning_rate`,
that of the weights. The walk over the blocks and the training in it run as they are, but for what has moved since: a
model gives its blocks their rotary angles now and gets a tensor from them, mixed precision is that of the CPU, bf16 in
place of fp16, and text comes from here. Four of the windows are the authors' validation. The second phase is not run:
it needs CUDA (its integers are read by Triton, its optimizer is that of bitsandbytes).

The checkpoint holds what the integers stand for; in ANSWER `bytes` is what the folder takes with them packed: `bits` of
each weight, and of each group a zero point of as many and a scale of 16.
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
from quantizing import answer

HELD_OUT = 4


class Block(torch.nn.Module):
    """A block as the authors knew it: it finds its rotary angles itself and returns a tuple."""

    def __init__(self, layer: torch.nn.Module, angles: torch.nn.Module) -> None:
        super().__init__()
        self.layer, self.angles = layer, [angles]

    def forward(self, states: torch.Tensor, attention_mask: Any = None, position_ids: Any = None, **_: Any) -> Any:
        angles = self.angles[0](states, position_ids)
        outputs = self.layer(
            states, attention_mask=attention_mask, position_ids=position_ids, position_embeddings=angles
        )
        return (outputs,)


def authors_walk(authors: Path) -> Any:
    """Their function, on a machine without CUDA and Triton."""
    sys.path.insert(0, str(authors))
    # What packs integers for Triton, and what fetches text; neither is used here.
    for name in ("quantize.int_linear_real", "datasets"):
        module = sys.modules[name] = ModuleType(name)
        module.load_dataset = None  # type: ignore[attr-defined]
    torch.cuda.amp.autocast = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    from quantize.block_ap import block_ap  # type: ignore[import-not-found]

    return block_ap


def run(order: dict[str, Any]) -> dict[str, Any]:
    """Train block after block, and write what the integers stand for as a checkpoint."""
    import numpy as np
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from compress.utils.storage import size_bytes

    windows = torch.from_numpy(np.load(order["calibration"])).long()
    texts = [(window[None],) for window in windows]
    walk = authors_walk(Path(order["authors"]))
    model = AutoModelForCausalLM.from_pretrained(order["model"], dtype=torch.float16).requires_grad_(False)
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = Block(layer, model.model.rotary_emb)
    asked = Namespace(
        off_load_to_disk=False, real_quant=False, train_size=len(texts) - HELD_OUT, val_size=HELD_OUT,
        training_seqlen=windows.shape[1], batch_size=2, epochs=order["epochs"], wbits=order["bits"],
        group_size=order["group_size"], quant_lr=1e-4, weight_lr=order["learning_rate"], min_lr_factor=20, wd=0,
        early_stop=0,
    )  # fmt: skip
    walk(model, asked, texts[HELD_OUT:], texts[:HELD_OUT], logging.getLogger("authors"))
    quantized, scales = 0, 0
    for index, block in enumerate(model.model.layers):
        model.model.layers[index] = block.layer
        for module in block.layer.modules():
            if hasattr(module, "weight_quantizer"):
                quantized, scales = quantized + module.weight.numel(), scales + module.weight_quantizer.scale.numel()
    fresh = AutoModelForCausalLM.from_pretrained(order["model"], dtype=torch.float16)
    fresh.load_state_dict({name: value for name, value in model.state_dict().items() if "quantizer" not in name})
    output = Path(order["output"])
    fresh.save_pretrained(output)
    AutoTokenizer.from_pretrained(order["model"]).save_pretrained(output)
    packed = (quantized + scales) * order["bits"] // 8 + 2 * scales
    return {"bytes": size_bytes(output) - 2 * quantized + packed}


if __name__ == "__main__":
    answer(run, ("torch", "transformers"), ("torch", "transformers.modeling_utils"))

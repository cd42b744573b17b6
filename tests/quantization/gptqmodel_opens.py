"""Run by gptqmodel's own interpreter: open checkpoints as transformers or gptqmodel do, and save their logits."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def load(opener: str, folder: str) -> Any:
    """The model as that library gives it."""
    if opener == "transformers":
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
    import gptqmodel

    return gptqmodel.GPTQModel.load(folder, device="cpu").model


def main(ids_file: str, *jobs: str) -> None:
    """``jobs``: OPENER=FOLDER; the logits go beside each folder, the layers' modules to stdout."""
    ids = load_file(ids_file)["ids"]
    modules = {}
    for opener, folder in (job.split("=", 1) for job in jobs):
        model = load(opener, folder)
        with torch.no_grad():
            logits = model(input_ids=ids).logits.float()
        save_file({"logits": logits.contiguous()}, Path(folder).with_suffix(".logits"))
        modules[folder] = type(model.model.layers[0].mlp.up_proj).__module__
    sys.stdout.write("\n" + json.dumps(modules) + "\n")


main(*sys.argv[1:])

"""Script for gptqmodel's own interpreter: open checkpoints with transformers or gptqmodel and save their logits."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def load(opener: str, folder: str) -> Any:
    """Return the model as the given library loads it."""
    if opener == "transformers":
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
    import gptqmodel

    return gptqmodel.GPTQModel.load(folder, device="cpu").model


def main(ids_file: str, *jobs: str) -> None:
    """Open each OPENER=FOLDER of ``jobs``, save logits beside the folder and print layer counts by module class."""
    ids = load_file(ids_file)["ids"]
    modules = {}
    for opener, folder in (job.split("=", 1) for job in jobs):
        model = load(opener, folder)
        with torch.no_grad():
            logits = model(input_ids=ids).logits.float()
        save_file({"logits": logits.contiguous()}, Path(folder).with_suffix(".logits"))
        kernels = [type(part).__module__ for part in model.modules() if hasattr(part, "qweight")]
        modules[folder] = {name: kernels.count(name) for name in kernels}
    sys.stdout.write("\n" + json.dumps(modules) + "\n")


main(*sys.argv[1:])

"""Greedy decoding of a quantized checkpoint by transformers, with the kernels of the environment it runs in.

    PY peers/transformers_decode.py ORDER.json ANSWER.json

ORDER has `folder`, `prompt` (token ids), `tokens` and `threads`. The prompt and two steps are not timed.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

from quantizing import answer

_UNTIMED = 2


def run(order: dict[str, Any]) -> dict[str, Any]:
    """Median time of a step."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(order["folder"], device_map="cpu").eval()
    seconds = []
    with torch.no_grad():
        found = model(torch.tensor([order["prompt"]]), use_cache=True)
        for _ in range(_UNTIMED + order["tokens"]):
            token = found.logits[:, -1:].argmax(-1)
            start = time.perf_counter()
            found = model(token, past_key_values=found.past_key_values, use_cache=True)
            seconds.append(time.perf_counter() - start)
    return {"tokens_per_second": 1 / statistics.median(seconds[_UNTIMED:])}


if __name__ == "__main__":
    answer(run, ("transformers", "torch"), ("torch", "transformers"))

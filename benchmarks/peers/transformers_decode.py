"""Decode speed of a quantized checkpoint in transformers.

    PY peers/transformers_decode.py ORDER.json ANSWER.json

ORDER has `folder`, `prompt` (token ids), `tokens` and `threads`. The prompt and two steps are not timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

from quantizing import run_order

_UNTIMED = 2


def run(order: dict[str, Any]) -> dict[str, Any]:
    """Load the model and measure its decode speed."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(order["folder"], device_map="cpu").eval()
    return {"tokens_per_second": tokens_per_second(model, order["prompt"], order["tokens"])}


def tokens_per_second(model: Any, prompt: Sequence[int], tokens: int) -> float:
    """Return tokens per second, from the median time of a decoding step."""
    import torch

    seconds = []
    with torch.no_grad():
        outputs = model(torch.tensor([list(prompt)]), use_cache=True)
        for _ in range(_UNTIMED + tokens):
            token = outputs.logits[:, -1:].argmax(-1)
            start = time.perf_counter()
            outputs = model(token, past_key_values=outputs.past_key_values, use_cache=True)
            seconds.append(time.perf_counter() - start)
    return 1 / statistics.median(seconds[_UNTIMED:])


if __name__ == "__main__":
    run_order(run, ("transformers", "torch"), ("torch", "transformers"))

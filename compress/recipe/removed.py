"""Names of stages and fields that no longer exist, and what a recipe should contain instead."""

from __future__ import annotations

from typing import Final

REMOVED: Final = {
    "draft_of": "one model without a draft beside it: pairs were between 0.6 and 1.3 times as fast as the model alone; "
    "openvino-genai's `prompt_lookup` needs no draft",
    "eagle3": "a recipe without a draft head: generation with it was only 1.06 to 1.21 times as fast; openvino-genai's "
    "`prompt_lookup` needs no head",
    "rotate": "`equalize` before the quantization, which lowers its error; rotations never showed a benefit",
}
"""Maps an old stage (`rotate`), a field (`draft_of`), or a field of one stage or section (`prune.heads`) to the
"expected" part of the error for a recipe that still names it."""

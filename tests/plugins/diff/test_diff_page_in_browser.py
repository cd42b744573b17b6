"""Tests of the diff page in Chromium: layout at two widths, without script messages and requests."""

from __future__ import annotations

import pytest
from browser import Browser

from compress.plugins.diff.record import Diff, LayerChange, TensorChange, WeightsDiff
from compress.plugins.diff.views import html_diff

pytestmark = pytest.mark.browser

DRAWN = """
return {
  layers: [...document.querySelectorAll("table.stack tbody tr")].map((row) => row.textContent),
  tensors: [...document.querySelectorAll("details tbody tr th")].map((name) => name.textContent),
  overflow: document.documentElement.scrollWidth - innerWidth,
  chip: document.querySelector(".chip.big").textContent };
"""


def tensor(layer: int, kind: str, relative: float, how: str) -> TensorChange:
    fields = {"ranges": (-1.0, 1.0, -1.0, 1.0), "sparsity": (0.0, 0.0), "bits": (32, 32), "shape": (8, 8)}
    unexplained = relative if how == "changed" else 0.0
    identity = {"name": f"layers.{layer}.{kind}.weight", "layer": f"layers.{layer}", "kind": kind, "how": how}
    figures = {"relative": relative, "unexplained": unexplained, "dtypes": ("float32", "float32")}
    return TensorChange.model_validate({**identity, **figures, **fields})


@pytest.fixture(scope="module")
def page() -> str:
    """Return the page of 12 layers with 7 weights each: one changed by 50%, one by 1%, the last layer rounded."""
    kinds = [*(f"self_attn.{name}_proj" for name in "qkvo"), *(f"mlp.{name}_proj" for name in ("gate", "up", "down"))]
    by_cell = {(layer, kind): tensor(layer, kind, 0.0, "identical") for layer in range(12) for kind in kinds}
    by_cell[3, kinds[1]] = tensor(3, kinds[1], 0.5, "changed")
    by_cell[7, kinds[4]] = tensor(7, kinds[4], 0.01, "changed")
    by_cell |= {(11, kind): tensor(11, kind, 0.005, "rounded") for kind in kinds}
    worst = by_cell[3, kinds[1]]
    layer = LayerChange(name="layers.3", relative=0.5, unexplained=0.5, changed=1, tensors=7, worst=worst.name)
    # Files list tensors by name, so that layer 10 comes before layer 2.
    tensors = sorted(by_cell.values(), key=lambda entry: entry.name)
    weights = WeightsDiff(formats=("safetensors", "safetensors"), tensors=tuple(tensors), layers=(layer,))
    diff = Diff(before="a", after="b", verdict="changed", first="layers.3", summary=("weights",), weights=weights)
    return html_diff(diff)


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (400, False)])
def test_changed_layers_and_tensors_are_listed_by_size(browser: Browser, page: str, width: int, dark: bool) -> None:
    seen = browser.look(page, DRAWN, width=width, dark=dark)
    assert seen.said == [] and seen.asked == []
    assert seen.found["overflow"] <= 0 and seen.found["chip"] == "not the same"
    assert any("layers.3" in row and "50" in row for row in seen.found["layers"])
    tensors = seen.found["tensors"]
    assert len(tensors) == 9 and tensors[0] == "layers.3.self_attn.k_proj.weight"

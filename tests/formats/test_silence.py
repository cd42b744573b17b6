"""torchao beside transformers: out of the way until somebody calls it, and whole then."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")

PROGRAM = """
import json, sys
from compress.pipeline.quiet import quiet_libraries
quiet_libraries()
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel
AutoModel.from_pretrained, AutoTokenizer.from_pretrained
early = "torchao" in sys.modules
from compress.formats.silence import silence
with silence("logs"):
    from torchao.prototype.safetensors import safetensors_support
    from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers.quantizers import quantizer_torchao
model = BertModel(BertConfig(
    vocab_size=8, hidden_size=32, num_hidden_layers=1, num_attention_heads=1, intermediate_size=32
))
quantize_(model, Int8WeightOnlyConfig())
expected = safetensors_support.flatten_tensor_state_dict(model.state_dict())
found = quantizer_torchao.flatten_tensor_state_dict(model.state_dict())
print(json.dumps({
    "early": early,
    "file": getattr(safetensors_support, "__file__", None),
    "names": [sorted(expected[0]), sorted(found[0])],
    "metadata": [expected[1], found[1]],
}))
"""


def test_it_is_imported_by_nobody_but_its_callers_silently_and_still_saves_what_it_quantized() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert not told["early"], "transformers imported it"
    assert told["file"], "the stand-in hides the real module"
    assert told["names"][0] == told["names"][1]
    assert any("int_data" in name or "qdata" in name for name in told["names"][1]), "not quantized"
    assert told["metadata"][0] == told["metadata"][1]

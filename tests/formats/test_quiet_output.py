"""What others log, warn of and print is kept back; torchao is out of the way until somebody calls it."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
import warnings

import pytest

from compress.formats.quiet_output import Extent, suppress_output

PROGRAM = """
import json, sys
from compress.formats.quiet_output import quiet_libraries
quiet_libraries()
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel
AutoModel.from_pretrained, AutoTokenizer.from_pretrained
early = "torchao" in sys.modules
from compress.formats.quiet_output import suppress_output
with suppress_output("logs"):
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


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_it_is_imported_by_nobody_but_its_callers_silently_and_still_saves_what_it_quantized() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    answer = json.loads(done.stdout)
    assert not answer["early"], "transformers imported it"
    assert answer["file"], "the stand-in hides the real module"
    assert answer["names"][0] == answer["names"][1]
    assert any("int_data" in name or "qdata" in name for name in answer["names"][1]), "not quantized"
    assert answer["metadata"][0] == answer["metadata"][1]


@pytest.mark.parametrize("extent", ["logs", "prints", "process"])
def test_so_much_is_kept_back_and_told_and_everything_is_as_before(
    extent: Extent, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    level_before = logging.root.manager.disable
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with suppress_output(extent) as written:
            logging.getLogger("other").warning("logged")
            logging.getLogger("other").error("an error")
            warnings.warn("warned", stacklevel=1)
            sys.stdout.write("to stdout")
            sys.stderr.write("to stderr")
            os.write(2, b"below Python\n")
            output = written()
    assert [log_record.getMessage() for log_record in caplog.records if log_record.name == "other"] == ["an error"]
    printed, errors = capfd.readouterr()
    warnings_kept = extent != "logs"
    assert [str(warning.message) for warning in caught] == ([] if warnings_kept else ["warned"])
    assert ("to stdout" in printed, "to stderr" in errors, "to stderr" in output) == (
        not warnings_kept,
        not warnings_kept,
        warnings_kept,
    )
    assert ("below Python" in errors, "below Python" in output) == (extent != "process", extent == "process")
    assert logging.root.manager.disable == level_before
    os.write(2, b"again\n")
    assert capfd.readouterr().err == "again\n"


def test_a_failure_leaves_everything_as_before(capfd: pytest.CaptureFixture[str]) -> None:
    level_before = logging.root.manager.disable
    with pytest.raises(ValueError, match="broken"), suppress_output("process"):
        raise ValueError("broken")
    os.write(2, b"again\n")
    assert (logging.root.manager.disable, capfd.readouterr().err) == (level_before, "again\n")


OF_DRAWING = """
import sys
from compress.formats.quiet_output import quiet_libraries
quiet_libraries()
from compress.plugins.diffusion import denoiser_pruning, step_distillation, tiny_autoencoder
from compress.plugins.diffusion.sampling_settings import import_diffusers
diffusers = import_diffusers()
diffusers.AutoencoderKL, diffusers.UNet2DConditionModel, diffusers.StableDiffusionPipeline
print("torchao" in sys.modules)
"""


def test_what_trains_models_that_draw_leaves_it_out_as_well() -> None:
    done = subprocess.run([sys.executable, "-c", OF_DRAWING], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "False\n", "")

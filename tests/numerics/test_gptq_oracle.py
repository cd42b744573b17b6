"""gptqmodel's own solver on the same inputs and the same scales finds the same integers."""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path

import pytest
import torch
from foreign_environments import GPTQMODEL
from safetensors.torch import load_file, save_file

from compress.numerics import gptq
from compress.numerics.gptq import GptqSettings, output_error, quantize_gptq
from compress.numerics.integer_grid import IntegerGrid

pytestmark = pytest.mark.slow

ROWS, COLUMNS, GROUP = 64, 192, 32
# In a process of its own: importing gptqmodel changes torch's settings, and leaves files behind until its end.
THEIRS = """
import sys
import torch
from gptqmodel.quantization import QuantizeConfig
from gptqmodel.quantization.gptq import GPTQ
from safetensors.torch import load_file, save_file

folder, group = sys.argv[1], int(sys.argv[2])
given = load_file(f"{folder}/given.safetensors")
rows, columns = given["weight"].shape
for name in sys.argv[3:]:
    module = torch.nn.Linear(columns, rows, bias=False)
    module.weight.data = given["weight"].clone()
    config = QuantizeConfig(bits=4, group_size=group, sym=name[1] == "1", desc_act=name[0] == "1",
                            act_group_aware=False, static_groups=True, damp_percent=0.01)
    solver = GPTQ(module, config)
    solver.quantizer.configure(perchannel=True)
    solver.add_batch(given["inputs"], torch.empty(0))
    restored, scales, zeros = (part.float().contiguous() for part in solver.quantize()[:3])
    save_file({"restored": restored, "scales": scales, "zeros": zeros}, f"{folder}/{name}.safetensors")
"""


def weight_and_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(ROWS, COLUMNS, generator=generator)
    mixing = torch.randn(COLUMNS, COLUMNS, generator=generator) * torch.arange(1, COLUMNS + 1)[:, None] ** -0.6
    return weight, torch.randn(2048, COLUMNS, generator=generator) @ mixing


def named(act_order: bool, symmetric: bool) -> str:
    return f"{act_order:d}{symmetric:d}"


@pytest.fixture(scope="module")
def solved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What it finds each way: in one process, which takes longer to begin than to find it all."""
    folder = tmp_path_factory.mktemp("solved")
    weight, inputs = weight_and_inputs()
    save_file({"weight": weight, "inputs": inputs}, folder / "given.safetensors")
    names = [named(*item) for item in itertools.product((True, False), repeat=2)]
    command = [str(GPTQMODEL.python()), "-W", "ignore", "-c", THEIRS, str(folder), str(GROUP), *names]
    child = subprocess.run(command, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return folder


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptqmodel_finds_the_same_integers(
    act_order: bool, symmetric: bool, solved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, inputs = weight_and_inputs()
    theirs = load_file(solved / f"{named(act_order, symmetric)}.safetensors")
    grid = IntegerGrid(theirs["scales"].T.contiguous(), theirs["zeros"].T.contiguous(), 4, GROUP)
    monkeypatch.setattr(gptq, "_find_grid", lambda *_: grid)
    hessian = inputs.T @ inputs / len(inputs)
    ours = quantize_gptq(weight, hessian, GptqSettings(4, GROUP, symmetric, act_order, damping=0.01))
    # Their inverse and our factor round differently: a weight may lie on the border, and then the rest of its row,
    # which makes up for it, is another. Which rows those are depends on the processor.
    apart = (ours.quantized.dequantize() - theirs["restored"]).abs() > 0.01 * theirs["scales"].min()
    assert int(apart.any(1).sum()) <= 0.05 * len(weight)
    assert ours.error == pytest.approx(output_error(weight, theirs["restored"], hessian), rel=0.01)

"""The compared quantizers of language models: installation, commands and results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from peers.environment import Packages, UnavailableError, peer_python
from peers.language_setting import LanguageSetting
from peers.llama_cpp_library import llama_cpp_library
from safetensors.numpy import save_file

from compress.formats.gguf.export import GgufTypes, plan_gguf, write_gguf
from compress.formats.gguf.llama_cpp_library import VARIABLE
from compress.formats.onnx.decoder import export_decoder
from compress.formats.target_profile import Target
from compress.formats.targets import TARGETS
from compress.models.checkpoint import Checkpoint
from compress.models.safetensors_file import read_imatrix
from compress.stages.imatrix.stage import Imatrix
from compress.utils.storage import size_bytes

OURS = "compress, quick GPTQ"
OURS_TRAINED, OURS_TUNED = "compress, block_qat", "compress, block_qat and tune_scales"
CONTEXT, TOKENS = 128, 32
"""Tokens of context, and timed decoding steps."""
_TIMEOUT_SECONDS = 7200.0
_TAIL_LINES = 6
_STACK = ("torch==2.13.0", "transformers==5.24.0", "accelerate==1.15.0")
OPTIMUM = (
    Packages((*_STACK, "optimum==2.3.0", "numpy==2.2.6", "requests", "setuptools>=77", "wheel", "ninja", "packaging")),
    Packages(("gptqmodel==7.5.0",), ("--no-build-isolation",), (("BUILD_CUDA_EXT", "0"),)),
)
AUTO_ROUND = (Packages(("torch==2.13.0", "auto-round==0.16.1")),)


@dataclass(frozen=True)
class PeerResult:
    """Output of a quantizer.

    Attributes:
        artifact: Model file or folder.
        target: Target that runs it, or None for a checkpoint of transformers.
        seconds: Time of the quantization.
        peak_bytes: Peak memory of the quantization.
        bytes: Size of the model.
        packages: Versions of the packages.
        losses: Losses of the test windows, if the model can only be evaluated in its own process.
        tokens_per_second: Decode speed in that case.
    """

    artifact: Path
    target: Target | None
    seconds: float | None
    peak_bytes: int | None
    bytes: int
    packages: Mapping[str, str] = field(default_factory=dict)
    losses: tuple[float, ...] = ()
    tokens_per_second: float | None = None


def ours(*stages: Mapping[str, Any]) -> Callable[[LanguageSetting], PeerResult]:
    """Run our stages on the linear layers; the first one gets bits, group size and calibration windows."""

    def make(setting: LanguageSetting) -> PeerResult:
        first, *others = stages
        numbers = {"bits": setting.bits, "group_size": setting.group_size, "samples": setting.samples}
        stage_fields = [{**numbers, "sequence_length": setting.length, **first}, *others]
        more = {"data": setting.data, "samples": setting.samples, "length": setting.length, "stages": stage_fields}
        return _checkpoint_result(setting, "compress_stages.py", Path(sys.executable), **more)

    return make


def optimum(setting: LanguageSetting) -> PeerResult:
    """Run Optimum's GPTQQuantizer with gptqmodel."""
    python = peer_python("optimum-gptq", OPTIMUM, setting.progress.note)
    return _checkpoint_result(setting, "optimum_gptq.py", python)


def auto_round(iterations: int) -> Callable[[LanguageSetting], PeerResult]:
    """Run auto-round with this number of iterations per block."""

    def make(setting: LanguageSetting) -> PeerResult:
        python = peer_python("auto-round", AUTO_ROUND, setting.progress.note)
        return _checkpoint_result(setting, "auto_round_run.py", python, iterations=iterations)

    return make


def efficient_qat(epochs: int, learning_rate: float) -> Callable[[LanguageSetting], PeerResult]:
    """Run Block-AP of EfficientQAT's authors with these epochs and this learning rate of the weights."""

    def make(setting: LanguageSetting) -> PeerResult:
        if setting.authors is None:
            raise UnavailableError("it needs a checkout of OpenGVLab/EfficientQAT: --efficient-qat FOLDER")
        output = setting.folder / f"efficient-qat-{epochs}-{learning_rate}"
        more = {"authors": str(setting.authors.absolute()), "epochs": epochs, "learning_rate": learning_rate}
        order = setting.order(output, **more)
        answer = _run_script(setting, "efficient_qat.py", Path(sys.executable), order)
        return PeerResult(output, None, **{key: answer[key] for key in ("seconds", "peak_bytes", "packages", "bytes")})

    return make


def nncf(setting: LanguageSetting) -> PeerResult:
    """Run NNCF's 4-bit weight compression with AWQ and scale estimation on the torch model."""
    output = setting.folder / "nncf"
    output.mkdir(exist_ok=True)
    windows = setting.folder / "windows.npy"
    np.save(windows, np.stack([example["input_ids"] for example in setting.held_out.inputs]))
    more = {"windows": str(windows), "prompt": setting.prompt(CONTEXT), "tokens": TOKENS}
    answer = _run_script(setting, "nncf_run.py", Path(sys.executable), setting.order(output, **more))
    return PeerResult(
        output,
        None,
        **{key: answer[key] for key in ("seconds", "peak_bytes", "packages", "tokens_per_second")},
        bytes=size_bytes(output),
        losses=tuple(answer["losses"]),
    )


def onnxruntime_rtn(setting: LanguageSetting) -> PeerResult:
    """Run ONNX Runtime's MatMulNBits quantizer on the fp32 ONNX graph."""
    return _graph_result(setting, "onnxruntime_rtn.py", _float_graph(setting))


def genai_builder(setting: LanguageSetting) -> PeerResult:
    """Run onnxruntime-genai's model builder."""
    return _graph_result(setting, "genai_builder.py", None)


def llama_cpp(file_type: str, with_imatrix: bool = False) -> Callable[[LanguageSetting], PeerResult]:
    """Run llama.cpp's quantizer from its official release, optionally with our importance matrix."""

    def make(setting: LanguageSetting) -> PeerResult:
        library = llama_cpp_library()
        source = setting.folder / "f32.gguf"
        if not source.is_file():
            write_gguf(Checkpoint(setting.source), source, GgufTypes("f32"))
        file = setting.folder / f"llama-cpp-{file_type}-{with_imatrix}" / "model.gguf"
        file.parent.mkdir(exist_ok=True)
        more = {"library": str(library), "source": str(source), "file_type": file_type}
        if with_imatrix:
            more["imatrix"] = str(_imatrix(setting))
        answer = _run_quantizer(setting, "llama_cpp_quantize.py", Path(sys.executable), file, **more)
        # The build of the Python package has no AVX-512, so the official release is timed.
        os.environ[VARIABLE] = str(library)
        return PeerResult(file, TARGETS["llama-cpp"], **answer, bytes=file.stat().st_size)

    return make


IMATRIX_TYPES = ("Q2_K", "IQ3_XXS", "Q3_K_S", "IQ4_NL", "Q4_0", "Q4_K_M")
"""llama.cpp's file types that are also quantized with an importance matrix."""
TRAINING = {"kind": "block_qat", "epochs": 4, "held_out": 4}

PEERS: dict[str, Callable[[LanguageSetting], PeerResult]] = {
    OURS: ours({"kind": "gptq", "guided": False}),
    OURS_TRAINED: ours(TRAINING),
    OURS_TUNED: ours(TRAINING, {"kind": "tune_scales", "steps": 90, "batch_size": 1, "labels_weight": 0.5}),
    "EfficientQAT, Block-AP": efficient_qat(4, 2e-5),
    "EfficientQAT, Block-AP, steps ten times as large": efficient_qat(4, 2e-4),
    "Optimum + gptqmodel": optimum,
    "auto-round": auto_round(50),
    "auto-round, 200 iterations": auto_round(200),
    "NNCF": nncf,
    "ONNX Runtime RTN": onnxruntime_rtn,
    "onnxruntime-genai": genai_builder,
    "llama.cpp Q4_0": llama_cpp("Q4_0"),
    "llama.cpp Q4_K_M": llama_cpp("Q4_K_M"),
    **{f"llama.cpp {name}, imatrix": llama_cpp(name, True) for name in IMATRIX_TYPES},
}


def float_onnx(setting: LanguageSetting) -> PeerResult:
    """Export the starting model as fp32 ONNX."""
    graph = _float_graph(setting)
    return PeerResult(graph, TARGETS["cpu"], None, None, size_bytes(graph))


def decode_in_transformers(result: PeerResult, setting: LanguageSetting) -> float:
    """Return tokens per second of a GPTQ checkpoint in transformers with gptqmodel. Raises `UnavailableError`."""
    python = peer_python("optimum-gptq", OPTIMUM, setting.progress.note)
    more = {"folder": str(result.artifact), "prompt": setting.prompt(CONTEXT), "tokens": TOKENS}
    answer = _run_script(setting, "transformers_decode.py", python, setting.order(result.artifact, **more))
    return float(answer["tokens_per_second"])


def imatrix_by_tensor(checkpoint: Checkpoint, file: Path) -> None:
    """Write the importance matrix of a checkpoint under the tensor names of GGUF."""
    imatrix = read_imatrix(checkpoint.folder)
    sources = {
        tensor.name: str(tensor.source).removesuffix(".weight") for tensor in plan_gguf(checkpoint) if tensor.source
    }
    save_file({name: imatrix[source].numpy() for name, source in sources.items() if source in imatrix}, file)


def _imatrix(setting: LanguageSetting) -> Path:
    """Return the importance matrix of the calibration windows, computed once."""
    file = setting.folder / "imatrix.safetensors"
    if not file.is_file():
        stage = Imatrix(samples=setting.samples, sequence_length=setting.length)
        imatrix_by_tensor(stage.run(Checkpoint(setting.source), setting.context(setting.folder / "imatrix")), file)
    return file


def _float_graph(setting: LanguageSetting) -> Path:
    folder = setting.folder / "onnx-fp32"
    if not folder.is_dir():
        folder.mkdir()
        export_decoder(Checkpoint(setting.source)).save(folder)
    return folder


def _checkpoint_result(setting: LanguageSetting, script: str, python: Path, **more: Any) -> PeerResult:
    output = setting.folder / script.removesuffix(".py")
    answer = _run_quantizer(setting, script, python, output, **more)
    # auto-round creates a subfolder.
    (config,) = output.rglob("config.json")
    return PeerResult(config.parent, None, **answer, bytes=size_bytes(config.parent))


def _graph_result(setting: LanguageSetting, script: str, source: Path | None) -> PeerResult:
    output = setting.folder / script.removesuffix(".py")
    output.mkdir(exist_ok=True)
    more = {} if source is None else {"source": str(source)}
    answer = _run_quantizer(setting, script, Path(sys.executable), output, **more)
    return PeerResult(output, TARGETS["cpu"], **answer, bytes=size_bytes(output))


def _run_quantizer(setting: LanguageSetting, script: str, python: Path, output: Path, **more: Any) -> dict[str, Any]:
    answer = _run_script(setting, script, python, setting.order(output, **more))
    return {key: answer[key] for key in ("seconds", "peak_bytes", "packages")}


def _run_script(setting: LanguageSetting, script: str, python: Path, order: dict[str, Any]) -> dict[str, Any]:
    """Run a script and return its answer. Raises `UnavailableError` with the last lines of its output."""
    script_path = Path(__file__).parent / script
    order_file, answer_file = setting.folder / "order.json", setting.folder / "answer.json"
    order_file.write_text(json.dumps(order), encoding="utf-8")
    answer_file.unlink(missing_ok=True)
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables = {**inherited, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(setting.threads)}
    command = [str(python), str(script_path), str(order_file), str(answer_file)]
    try:
        done = subprocess.run(
            command,
            cwd=setting.folder,
            env=variables,
            capture_output=True,
            text=True,
            check=False,
            timeout=_TIMEOUT_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise UnavailableError(f"{script} did not end within {_TIMEOUT_SECONDS:.0f} s") from error
    if done.returncode != 0 or not answer_file.is_file():
        tail = "\n".join(f"{done.stdout}\n{done.stderr}".strip().splitlines()[-_TAIL_LINES:])
        raise UnavailableError(f"{script} ended with exit code {done.returncode}: {tail}")
    answer: dict[str, Any] = json.loads(answer_file.read_text(encoding="utf-8"))
    return answer

"""The quantizers that are compared: how each is installed and run, and what it leaves."""

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
"""What tokens per second are timed on: after so many tokens of text, so many more."""
_TIMEOUT_SECONDS = 7200.0
_TAIL_LINES = 6
_STACK = ("torch==2.13.0", "transformers==5.24.0", "accelerate==1.15.0")
OPTIMUM = (
    Packages((*_STACK, "optimum==2.3.0", "numpy==2.2.6", "requests", "setuptools>=77", "wheel", "ninja", "packaging")),
    Packages(("gptqmodel==7.5.0",), ("--no-build-isolation",), (("BUILD_CUDA_EXT", "0"),)),
)
AUTO_ROUND = (Packages(("torch==2.13.0", "auto-round==0.16.1")),)


@dataclass(frozen=True)
class Made:
    """What a peer left: its ``artifact``, and the ``target`` that runs it, or None for a checkpoint of transformers'.

    ``seconds`` and ``peak_bytes`` are its work's; ``losses`` and ``tokens_per_second`` are of a peer that can only be
    judged and timed in its own process.
    """

    artifact: Path
    target: Target | None
    seconds: float | None
    peak_bytes: int | None
    bytes: int
    packages: Mapping[str, str] = field(default_factory=dict)
    losses: tuple[float, ...] = ()
    tokens_per_second: float | None = None


def ours(*stages: Mapping[str, Any]) -> Callable[[LanguageSetting], Made]:
    """Stages of ours on the linear layers; the first is told of bits and windows."""

    def make(setting: LanguageSetting) -> Made:
        first, *others = stages
        numbers = {"bits": setting.bits, "group_size": setting.group_size, "samples": setting.samples}
        stage_fields = [{**numbers, "sequence_length": setting.length, **first}, *others]
        more = {"data": setting.data, "samples": setting.samples, "length": setting.length, "stages": stage_fields}
        return _checkpoint(setting, "compress_stages.py", Path(sys.executable), **more)

    return make


def optimum(setting: LanguageSetting) -> Made:
    """Optimum's GPTQQuantizer with gptqmodel."""
    python = peer_python("optimum-gptq", OPTIMUM, setting.progress.note)
    return _checkpoint(setting, "optimum_gptq.py", python)


def auto_round(iterations: int) -> Callable[[LanguageSetting], Made]:
    """auto-round with so many iterations a block."""

    def make(setting: LanguageSetting) -> Made:
        python = peer_python("auto-round", AUTO_ROUND, setting.progress.note)
        return _checkpoint(setting, "auto_round_run.py", python, iterations=iterations)

    return make


def efficient_qat(epochs: int, learning_rate: float) -> Callable[[LanguageSetting], Made]:
    """Block-AP of EfficientQAT's authors, with so many epochs and so large steps of the weights."""

    def make(setting: LanguageSetting) -> Made:
        if setting.authors is None:
            raise UnavailableError("a checkout of OpenGVLab/EfficientQAT is wanted: --efficient-qat FOLDER")
        output = setting.folder / f"efficient-qat-{epochs}-{learning_rate}"
        more = {"authors": str(setting.authors.absolute()), "epochs": epochs, "learning_rate": learning_rate}
        order = setting.order(output, **more)
        answer = _ask(setting, "efficient_qat.py", Path(sys.executable), order)
        return Made(output, None, **{key: answer[key] for key in ("seconds", "peak_bytes", "packages", "bytes")})

    return make


def nncf(setting: LanguageSetting) -> Made:
    """NNCF's 4 bits with AWQ and scale estimation, on the torch model."""
    output = setting.folder / "nncf"
    output.mkdir(exist_ok=True)
    windows = setting.folder / "windows.npy"
    np.save(windows, np.stack([example["input_ids"] for example in setting.held_out.inputs]))
    more = {"windows": str(windows), "prompt": setting.prompt(CONTEXT), "tokens": TOKENS}
    answer = _ask(setting, "nncf_run.py", Path(sys.executable), setting.order(output, **more))
    return Made(
        output,
        None,
        **{key: answer[key] for key in ("seconds", "peak_bytes", "packages", "tokens_per_second")},
        bytes=size_bytes(output),
        losses=tuple(answer["losses"]),
    )


def onnxruntime_rtn(setting: LanguageSetting) -> Made:
    """ONNX Runtime's MatMulNBits quantizer, on the fp32 ONNX graph."""
    return _graph(setting, "onnxruntime_rtn.py", _float_graph(setting))


def genai_builder(setting: LanguageSetting) -> Made:
    """onnxruntime-genai's builder."""
    return _graph(setting, "genai_builder.py", None)


def llama_cpp(file_type: str, weighed: bool = False) -> Callable[[LanguageSetting], Made]:
    """llama.cpp's own quantizer, run and timed by its own release; ``weighed`` by our importance matrix."""

    def make(setting: LanguageSetting) -> Made:
        library = llama_cpp_library()
        source = setting.folder / "f32.gguf"
        if not source.is_file():
            write_gguf(Checkpoint(setting.source), source, GgufTypes("f32"))
        file = setting.folder / f"llama-cpp-{file_type}-{weighed}" / "model.gguf"
        file.parent.mkdir(exist_ok=True)
        more = {"library": str(library), "source": str(source), "file_type": file_type}
        if weighed:
            more["imatrix"] = str(_imatrix(setting))
        answer = _child(setting, "llama_cpp_quantize.py", Path(sys.executable), file, **more)
        # The Python package's build knows no AVX-512; the peer runs as its own release does.
        os.environ[VARIABLE] = str(library)
        return Made(file, TARGETS["llama-cpp"], **answer, bytes=file.stat().st_size)

    return make


IMPORTANT = ("Q2_K", "IQ3_XXS", "Q3_K_S", "IQ4_NL", "Q4_0", "Q4_K_M")
"""llama.cpp's file types that are also made with an importance matrix."""
TRAINING = {"kind": "block_qat", "epochs": 4, "held_out": 4}

PEERS: dict[str, Callable[[LanguageSetting], Made]] = {
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
    **{f"llama.cpp {name}, imatrix": llama_cpp(name, True) for name in IMPORTANT},
}


def float_onnx(setting: LanguageSetting) -> Made:
    """The starting model as our own fp32 ONNX folder."""
    graph = _float_graph(setting)
    return Made(graph, TARGETS["cpu"], None, None, size_bytes(graph))


def decode_in_transformers(made: Made, setting: LanguageSetting) -> float:
    """Tokens per second of a checkpoint in GPTQ format, by transformers and gptqmodel. Raises `UnavailableError`."""
    python = peer_python("optimum-gptq", OPTIMUM, setting.progress.note)
    more = {"folder": str(made.artifact), "prompt": setting.prompt(CONTEXT), "tokens": TOKENS}
    answer = _ask(setting, "transformers_decode.py", python, setting.order(made.artifact, **more))
    return float(answer["tokens_per_second"])


def imatrix_by_tensor(checkpoint: Checkpoint, file: Path) -> None:
    """Write the matrix that lies beside a checkpoint by the names that GGUF has for its tensors."""
    imatrix = read_imatrix(checkpoint.folder)
    sources = {
        tensor.name: str(tensor.source).removesuffix(".weight") for tensor in plan_gguf(checkpoint) if tensor.source
    }
    save_file({name: imatrix[source].numpy() for name, source in sources.items() if source in imatrix}, file)


def _imatrix(setting: LanguageSetting) -> Path:
    """That of the calibration windows, made once; llama.cpp's own program would take about as long."""
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


def _checkpoint(setting: LanguageSetting, script: str, python: Path, **more: Any) -> Made:
    output = setting.folder / script.removesuffix(".py")
    answer = _child(setting, script, python, output, **more)
    # auto-round makes a folder of its own inside.
    (config,) = output.rglob("config.json")
    return Made(config.parent, None, **answer, bytes=size_bytes(config.parent))


def _graph(setting: LanguageSetting, script: str, source: Path | None) -> Made:
    output = setting.folder / script.removesuffix(".py")
    output.mkdir(exist_ok=True)
    more = {} if source is None else {"source": str(source)}
    answer = _child(setting, script, Path(sys.executable), output, **more)
    return Made(output, TARGETS["cpu"], **answer, bytes=size_bytes(output))


def _child(setting: LanguageSetting, script: str, python: Path, output: Path, **more: Any) -> dict[str, Any]:
    answer = _ask(setting, script, python, setting.order(output, **more))
    return {key: answer[key] for key in ("seconds", "peak_bytes", "packages")}


def _ask(setting: LanguageSetting, script: str, python: Path, order: dict[str, Any]) -> dict[str, Any]:
    """What a peer's process answers. Raises `UnavailableError` with its last words."""
    script_path = Path(__file__).parent / script
    question, reply = setting.folder / "order.json", setting.folder / "answer.json"
    question.write_text(json.dumps(order), encoding="utf-8")
    reply.unlink(missing_ok=True)
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables = {**inherited, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(setting.threads)}
    command = [str(python), str(script_path), str(question), str(reply)]
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
    if done.returncode != 0 or not reply.is_file():
        words = "\n".join(f"{done.stdout}\n{done.stderr}".strip().splitlines()[-_TAIL_LINES:])
        raise UnavailableError(f"{script} ended with exit code {done.returncode}: {words}")
    answer: dict[str, Any] = json.loads(reply.read_text(encoding="utf-8"))
    return answer

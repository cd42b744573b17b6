"""ONNX Runtime's own kernels for 64-bit ARM, on an emulated processor: what a graph answers there.

Needs `qemu-aarch64` (Debian: qemu-user) and a Python for ARM with numpy and onnxruntime, which
`benchmarks/arm64_runtime.sh` puts into the user's cache. What is slow or fast there says nothing of a real processor.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from compress.errors import StageError
from compress.formats.onnx.int8.observe import Feed

_EMULATORS = ("qemu-aarch64", "qemu-aarch64-static")
_PYTHON = "root/usr/bin/python3.13"
NEWEST, OLD = "max", "cortex-a72"
"""As qemu names them: with 8-bit matrix products and SME, and without even dot products."""
_SECONDS = 1800.0
_RUN = """
import sys
import numpy as np
import onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
options.log_severity_level = 3
if sys.argv[4] == "as it is":
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
fed = np.load(sys.argv[2])
names = [value.name for value in session.get_outputs()]
found = {}
for batch in range(int(sys.argv[5])):
    answers = session.run(names, {value.name: fed[f"{batch}:{value.name}"] for value in session.get_inputs()})
    found.update({f"{batch}:{place}": answer for place, answer in enumerate(answers)})
np.savez(sys.argv[3], **found)
"""


@dataclass(frozen=True)
class EmulatedArm:
    """An emulator and a Python for it, both there, and the processor to be."""

    emulator: str
    home: Path
    processor: str = NEWEST

    def run(self, graph: onnx.ModelProto, feeds: Sequence[Feed], optimize: bool) -> list[dict[str, np.ndarray]]:
        """All outputs of ``graph`` by name, for each of ``feeds``.

        Raises `StageError` where the process fails or takes half an hour.
        """
        with tempfile.TemporaryDirectory(prefix="compress-arm-") as folder:
            place = Path(folder)
            onnx.save(graph, place / "model.onnx")
            fed = {f"{batch}:{name}": array for batch, feed in enumerate(feeds) for name, array in feed.items()}
            np.savez(place / "fed.npz", **fed)  # type: ignore[arg-type]
            self._start(place, "optimized" if optimize else "as it is", len(feeds))
            with np.load(place / "answers.npz") as answers:
                names = [value.name for value in graph.graph.output]
                return [
                    {name: answers[f"{batch}:{number}"] for number, name in enumerate(names)}
                    for batch in range(len(feeds))
                ]

    def _start(self, place: Path, level: str, batches: int) -> None:
        files = [str(place / name) for name in ("model.onnx", "fed.npz", "answers.npz")]
        python = [self.emulator, "-cpu", self.processor, "-L", str(self.home / "root"), str(self.home / _PYTHON)]
        environment = {"PYTHONHOME": str(self.home / "root" / "usr"), "PYTHONPATH": str(self.home / "site")}
        try:
            done = subprocess.run(
                [*python, "-c", _RUN, *files, level, str(batches)],
                capture_output=True,
                text=True,
                timeout=_SECONDS,
                check=False,
                env={"PATH": os.defpath, **environment},
            )
        except subprocess.TimeoutExpired as error:
            raise StageError(f"The emulated ARM processor took more than {_SECONDS:.0f} s.") from error
        if done.returncode:
            said = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
            raise StageError(f"The emulated ARM processor failed: {said[0]}", where=self.emulator)


def find_emulated_arm() -> EmulatedArm | str:
    """What runs ARM code here, or why nothing does."""
    emulator = next((path for name in _EMULATORS if (path := shutil.which(name))), None)
    if emulator is None:
        return "there is no qemu-aarch64 on PATH (Debian: apt-get install qemu-user)"
    home = arm_home()
    if not (home / _PYTHON).is_file() or not (home / "site" / "onnxruntime").is_dir():
        return f"{home} has no Python with onnxruntime for it (`bash benchmarks/arm64_runtime.sh` fetches them)"
    return EmulatedArm(emulator, home)


def arm_home() -> Path:
    """`compress/arm64` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    home = Path(base) if Path(base).is_absolute() else Path.home() / ".cache"
    return home / "compress" / "arm64"

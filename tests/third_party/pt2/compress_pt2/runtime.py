"""Runtime that runs torch.export programs with torch."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from compress.formats.runtime import Batch, TensorType, check_inputs
from compress.formats.target_profile import Target
from compress.models.model import only_file
from compress.tasks.task import LOGITS, Examples

_PREFIX = "inputs_"


def traced(module: Any, examples: Examples) -> bytes:
    """Return the exported program of a classifier: a batch of any size and length -> logits [B, classes]."""
    import torch

    from compress.tasks.inference import tensors

    class Answering(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = module.eval()

        def forward(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
            return self.model(**inputs).logits

    sample = {name: value for name, value in tensors(examples, [0, 1]).items() if name in examples.padding}
    longest = module.config.max_position_embeddings
    axes = {0: torch.export.Dim("batch", max=4096), 1: torch.export.Dim("length", min=2, max=longest)}
    with torch.no_grad():
        program = torch.export.export(Answering(), (sample,), dynamic_shapes={"inputs": dict.fromkeys(sample, axes)})
    written = io.BytesIO()
    torch.export.save(program, written)
    return written.getvalue()


class Pt2Session:
    """Session of an opened program."""

    def __init__(self, program: Any) -> None:
        self._module = program.module()
        names = [name.removeprefix(_PREFIX) for name in program.graph_signature.user_inputs]
        (answer,) = next(node for node in program.graph.nodes if node.op == "output").args[0]
        self._types = {name: TensorType("int64", ("batch_size", "sequence_length")) for name in names}
        self._classes = int(answer.meta["val"].shape[-1])

    @property
    def inputs(self) -> tuple[str, ...]:
        """Return the names of the inputs that a batch must have."""
        return tuple(self._types)

    @property
    def input_types(self) -> Mapping[str, TensorType]:
        """Return the type and axes of each input."""
        return self._types

    @property
    def output_types(self) -> Mapping[str, TensorType]:
        """Return the type and axes of each output."""
        return {LOGITS: TensorType("float32", ("batch_size", self._classes))}

    @property
    def provider(self) -> str:
        """Return torch's name of the CPU."""
        return "cpu"

    @property
    def settings(self) -> dict[str, Any]:
        """Return torch's number of threads."""
        import torch

        return {"threads": torch.get_num_threads()}

    def predict(self, batch: Batch) -> dict[str, np.ndarray]:
        """Return the logits [B, classes]. Raises `InputError` for a missing input."""
        import torch

        check_inputs(self.inputs, batch, "the program")
        with torch.no_grad():
            answer = self._module({name: torch.from_numpy(np.ascontiguousarray(batch[name])) for name in self.inputs})
        return {LOGITS: answer.numpy()}


def open_bytes(program: bytes) -> Pt2Session:
    """Return the program from the content of its file."""
    import torch

    return Pt2Session(torch.export.load(io.BytesIO(program)))


class Pt2Runtime:
    """Runtime of the format; see `Runtime`."""

    name = "torch-export"

    def open(self, artifact: Path, target: Target, threads: int) -> Pt2Session:
        """Open an artifact. Raises `ModelError` unless it has exactly one program."""
        import torch

        torch.set_num_threads(threads)
        return open_bytes(only_file(artifact, ".pt2", "pt2").read_bytes())

    def unavailable(self, target: Target) -> str | None:
        """Return None, since torch is always installed."""
        return None

    def build(self) -> str:
        """Return torch's version."""
        import torch

        return str(torch.__version__)


RUNTIME = Pt2Runtime()

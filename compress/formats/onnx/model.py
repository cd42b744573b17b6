"""An ONNX model as a directory: its graphs, the config and the processor's files. Importing this imports no onnx."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from compress.models.model import only_file, read_companions, write_companions
from compress.models.pipeline_folder import is_pipeline
from compress.utils.errors import ModelError

if TYPE_CHECKING:
    import onnx

GRAPH_FOLDER = "onnx"
FLOAT_GRAPH = "model.onnx"
QUANTIZED_GRAPH = "model_quantized.onnx"
GraphPart = Literal["all", "encoder", "decoder", "text_encoder", "unet", "vae_decoder"]
EXTERNAL_DATA_FROM_BYTES = 1_500_000_000
ENCODER, DECODER = "encoder_model", "decoder_model_merged"
"""File name prefixes of a model in two parts: transformers.js' and optimum's names."""
VISION, EMBED_TOKENS = "vision_encoder", "embed_tokens"
"""File names of the graphs before a decoder that reads images: transformers.js' names."""
_PARTS = ((ENCODER, DECODER), (VISION, EMBED_TOKENS, DECODER))
DIFFUSION_PARTS = ("text_encoder", "unet", "vae_decoder")
"""Folders of the graphs of a diffusion model, in the order in which they run: optimum's names."""
GENAI_CONFIG = "genai_config.json"
"""File beside a decoder from which onnxruntime-genai reads the name of its graph."""
SHARED_CACHE = "past_present_share_buffer"
"""Metadata key of a decoder's graph; "1" if input and output of its cache may be one buffer (onnxruntime-genai)."""


@dataclass
class OnnxModel:
    """A graph, its file name, and the small files that belong to it (path below the folder -> content).

    ``onnx/model.onnx`` and ``onnx/model_quantized.onnx`` are the names that transformers.js, optimum and
    sentence-transformers look for. A model that runs in several parts has the others in ``others``, by file name: for
    an encoder, which is ``graph``, its decoder. Each graph of a diffusion model lies in a folder of its own,
    `unet/model.onnx`, where optimum looks for it, whatever the type of its weights.
    """

    kind: ClassVar[str] = "onnx"
    graph: onnx.ModelProto
    file_name: str
    companions: Mapping[str, bytes] = field(repr=False)
    others: Mapping[str, onnx.ModelProto] = field(default_factory=dict, repr=False)

    @property
    def graphs(self) -> Mapping[str, onnx.ModelProto]:
        """Every graph by file name, in the order in which they run."""
        return {self.file_name: self.graph, **self.others}

    def is_part(self, name: str, part: GraphPart) -> bool:
        """Return whether ``part`` selects the graph of that file; a model's only graph is selected by `all` alone."""
        if part == "all" or "/" in name:
            return part in ("all", name.partition("/")[0])
        return part in ("encoder", "decoder") and (
            name.startswith((ENCODER, VISION)) == (part == "encoder") and bool(self.others)
        )

    @property
    def is_diffusion(self) -> bool:
        """Return whether the graphs are the parts of a diffusion model."""
        return "/" in self.file_name

    def with_graphs(self, graphs: Mapping[str, onnx.ModelProto]) -> OnnxModel:
        """Return the model with other graphs, given in the order in which they run."""
        (name, first), *others = graphs.items()
        companions = dict(self.companions)
        # onnxruntime-genai opens the graph by the name in its config.
        if GENAI_CONFIG in companions:
            config = json.loads(companions[GENAI_CONFIG])
            config["model"]["decoder"]["filename"] = f"{GRAPH_FOLDER}/{name}"
            companions[GENAI_CONFIG] = json.dumps(config, ensure_ascii=False, separators=(",", ":")).encode()
        return OnnxModel(first, name, companions, dict(others))

    def save(self, directory: Path) -> None:
        """Write the graphs and the companion files. Weights of graphs above 1.5 GB go into a file FILE_data."""
        import onnx

        for name, graph in self.graphs.items():
            target = directory / name if "/" in name else directory / GRAPH_FOLDER / name
            target.parent.mkdir(exist_ok=True)
            outside = graph.ByteSize() > EXTERNAL_DATA_FROM_BYTES
            onnx.save_model(graph, target, save_as_external_data=outside, location=f"{target.name}_data")
            if outside:
                # Saving so takes the weights out of the graph in memory.
                onnx.load_external_data_for_model(graph, str(target.parent))
        write_companions(directory, self.companions)

    @classmethod
    def load(cls, directory: Path, task: object) -> OnnxModel:
        """Open a directory that `save` wrote. Raises `ModelError` for incomplete or mixed graphs."""
        files = find_graphs(directory)
        beside = tuple(path.with_name(f"{path.name}_data") for path in files)
        # External weights are loaded with their graphs and are no companion files.
        companions = read_companions(directory, (*files, *beside), below=directory / GRAPH_FOLDER)
        drawing = is_pipeline(directory)
        graphs = {(path.relative_to(directory).as_posix() if drawing else path.name): _read(path) for path in files}
        (name, first), *others = graphs.items()
        return cls(first, name, companions, dict(others))


def all_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield the graph and those of its branches and loops at any depth."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from all_graphs(inner)


def quantized_name(name: str) -> str:
    """Return the name that transformers.js opens for `dtype: "q8"`, such as `encoder_model_quantized.onnx`.

    A name that only optimum knows, `unet/model.onnx`, stays as it is, here and in the functions below.
    """
    if "/" in name:
        return name
    return re.sub(r"(_(quantized|fp16|q4|q2))*(\.onnx)?$", "_quantized.onnx", name, count=1)


def float16_name(name: str) -> str:
    """Return the name that transformers.js opens for `dtype: "fp16"`: `model.onnx` -> `model_fp16.onnx`."""
    return quantized_name(name).replace("_quantized.onnx", "_fp16.onnx")


def weight_only_name(name: str, bits: int) -> str:
    """Return the name for weights of few bits: `encoder_model.onnx` -> `encoder_model_q4.onnx`."""
    quantized = quantized_name(name)
    return quantized if bits == 8 else quantized.replace("_quantized.onnx", f"_q{bits}.onnx")


def _read(path: Path) -> onnx.ModelProto:
    """Load a graph with its weights. Raises `ModelError` if it cannot be read."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return onnx.load(path)
    except (DecodeError, onnx.checker.ValidationError, FileNotFoundError) as error:
        raise ModelError(
            f"The graph cannot be read: {' '.join(str(error).split())}",
            where=str(path),
            expected=f"a whole .onnx file, and {path.name}_data beside it where its weights lie there",
            hint="copy the folder again with all of its files, or write the model again with the stage onnx",
        ) from error


def find_graph(artifact: Path) -> Path:
    """Return the only `.onnx` file at or below ``artifact``. Raises `ModelError` unless there is exactly one."""
    return only_file(artifact, ".onnx", "onnx")


def find_graphs(artifact: Path) -> tuple[Path, ...]:
    """Return the files of a model's graphs in the order in which they run: one, two or three.

    Two are an encoder and its decoder. Three are a vision encoder, a token embedding and a decoder, or a text encoder,
    a denoiser and an image decoder.

    Raises:
        ModelError: The folder holds any other number of graphs.
    """
    if not artifact.is_dir():
        return (find_graph(artifact),)
    if is_pipeline(artifact):
        # The graphs of a diffusion model. Raises `ModelError` if one is missing.
        files = tuple(file for part in DIFFUSION_PARTS if (file := artifact / part / FLOAT_GRAPH).is_file())
        if len(files) != len(DIFFUSION_PARTS):
            raise ModelError(
                f"The folder holds {', '.join(file.relative_to(artifact).as_posix() for file in files) or 'no graph'}.",
                where=str(artifact),
                expected=", ".join(f"{part}/{FLOAT_GRAPH}" for part in DIFFUSION_PARTS),
                hint="write the model again with the stage onnx",
            )
        return files
    # A vision encoder distinguishes a vision-language model from an encoder-decoder.
    names = _PARTS[bool(_part(artifact, VISION))]
    parts = tuple(_part(artifact, part) for part in names)
    first_files = tuple(files[0] for files in parts if files)
    if not first_files:
        return (find_graph(artifact),)
    if any(len(files) != 1 for files in parts):
        raise ModelError(
            f"The folder holds {', '.join(file.name for files in parts for file in files)}.",
            where=str(artifact),
            expected=" and ".join(f"one {name}*.onnx" for name in names),
            hint="leave one file of each in the folder, or write the model again with the stage onnx",
        )
    return first_files


def graph_label(graph: Path) -> str:
    """Return a name that distinguishes a graph from the others of its model: its file, with the folder of a part."""
    return f"{graph.parent.name}/{graph.name}" if graph.parent.name in DIFFUSION_PARTS else graph.name


def _part(artifact: Path, part: str) -> list[Path]:
    """Return the files whose names start with ``part``."""
    return sorted(artifact.rglob(f"{part}*.onnx"))

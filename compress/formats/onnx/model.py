"""An ONNX model as a directory: its graphs, the config and the processor's files. Importing this imports no onnx."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from compress.models.diffusion_checks import is_pipeline
from compress.models.model import only_file, read_companions, write_companions
from compress.utils.errors import ModelError

if TYPE_CHECKING:
    import onnx

GRAPH_FOLDER = "onnx"
FLOAT_GRAPH = "model.onnx"
QUANTIZED_GRAPH = "model_quantized.onnx"
_SUFFIXES = ("_quantized", "_fp16", "_q4", "_q2")
Part = Literal["all", "encoder", "decoder", "text_encoder", "unet", "vae_decoder"]
EXTERNAL_DATA_FROM_BYTES = 1_500_000_000
ENCODER, DECODER = "encoder_model", "decoder_model_merged"
"""What the files of a model in two parts begin with: transformers.js' and optimum's names."""
VISION, EMBED_TOKENS = "vision_encoder", "embed_tokens"
"""What stands before a decoder that reads images: transformers.js' names."""
_PARTS = ((ENCODER, DECODER), (VISION, EMBED_TOKENS, DECODER))
DRAWING = ("text_encoder", "unet", "vae_decoder")
"""Folders of the graphs of a model that draws pictures, in the order in which they run: optimum's names."""
GENAI_CONFIG = "genai_config.json"
"""Beside a decoder: where onnxruntime-genai reads the name of its graph."""
SHARED_CACHE = "past_present_share_buffer"
"""Metadata "1" of a decoder's graph: input and output of its cache may be one buffer (onnxruntime-genai's term)."""


@dataclass
class OnnxModel:
    """A graph, the name of its file, and the small files that belong to it (path below the folder -> content).

    ``onnx/model.onnx`` and ``onnx/model_quantized.onnx`` are the names that transformers.js, optimum and
    sentence-transformers look for. A model that runs in several parts has the others in ``others``, by the names of
    their files: for an encoder, which is ``graph``, its decoder. Of one that draws pictures, each lies in a folder of
    its own, `unet/model.onnx`, where optimum looks for it, whatever its weights are stored in.
    """

    kind: ClassVar[str] = "onnx"
    graph: onnx.ModelProto
    file_name: str
    companions: Mapping[str, bytes] = field(repr=False)
    others: Mapping[str, onnx.ModelProto] = field(default_factory=dict, repr=False)

    @property
    def graphs(self) -> Mapping[str, onnx.ModelProto]:
        """Every graph by the name of its file, in the order in which they run."""
        return {self.file_name: self.graph, **self.others}

    def is_part(self, name: str, part: Part) -> bool:
        """Whether the graph of that file is meant: `all` is any, and the only graph of a model is no part of it."""
        if part == "all" or "/" in name:
            return part in ("all", name.partition("/")[0])
        return part in ("encoder", "decoder") and (
            name.startswith((ENCODER, VISION)) == (part == "encoder") and bool(self.others)
        )

    @property
    def draws(self) -> bool:
        """Whether it is the parts of a model that draws pictures."""
        return "/" in self.file_name

    def with_graphs(self, graphs: Mapping[str, onnx.ModelProto]) -> OnnxModel:
        """The same model with other graphs, in the order in which they run."""
        (name, first), *others = graphs.items()
        return OnnxModel(first, name, _renamed(self.companions, name), dict(others))

    def save(self, directory: Path) -> None:
        """Write the graphs (weights inside, or in FILE_data beside one above 1.5 GB) and the companion files."""
        for name, graph in self.graphs.items():
            target = directory / name if "/" in name else directory / GRAPH_FOLDER / name
            target.parent.mkdir(exist_ok=True)
            _write(graph, target)
        write_companions(directory, self.companions)

    @classmethod
    def load(cls, directory: Path, task: object) -> OnnxModel:
        """Open what `save` wrote. Raises `ModelError` when the graphs are not those of one model, or are not whole."""
        files = find_graphs(directory)
        beside = tuple(path.with_name(f"{path.name}_data") for path in files)
        companions = read_companions(directory, (*files, *beside), below=directory / GRAPH_FOLDER)
        drawing = is_pipeline(directory)
        graphs = {(path.relative_to(directory).as_posix() if drawing else path.name): _read(path) for path in files}
        (name, first), *others = graphs.items()
        return cls(first, name, companions, dict(others))


def all_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and those of its branches and loops, however deep."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from all_graphs(inner)


def quantized_name(name: str) -> str:
    """`encoder_model.onnx` -> `encoder_model_quantized.onnx`, which transformers.js opens for `dtype: "q8"`.

    A name that optimum alone knows, `unet/model.onnx`, stays as it is, here and below.
    """
    if "/" in name:
        return name
    stem = name.removesuffix(".onnx")
    for suffix in _SUFFIXES:
        stem = stem.removesuffix(suffix)
    return f"{stem}_quantized.onnx"


def float16_name(name: str) -> str:
    """`model.onnx` -> `model_fp16.onnx`, which transformers.js opens for `dtype: "fp16"`."""
    return quantized_name(name).replace("_quantized.onnx", "_fp16.onnx")


def few_bits_name(name: str, bits: int) -> str:
    """`encoder_model.onnx` -> `encoder_model_q4.onnx`; of eight bits as `quantized_name` has it."""
    whole = quantized_name(name)
    return whole if bits == 8 else whole.replace("_quantized.onnx", f"_q{bits}.onnx")


def _renamed(companions: Mapping[str, bytes], name: str) -> Mapping[str, bytes]:
    """The small files of a model whose graph has another name now."""
    if GENAI_CONFIG not in companions:
        return companions
    config = json.loads(companions[GENAI_CONFIG])
    config["model"]["decoder"]["filename"] = f"{GRAPH_FOLDER}/{name}"
    return {**companions, GENAI_CONFIG: json.dumps(config, ensure_ascii=False, separators=(",", ":")).encode()}


def _read(path: Path) -> onnx.ModelProto:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return onnx.load(path)
    except (DecodeError, onnx.checker.ValidationError, FileNotFoundError) as error:
        raise ModelError(
            f"The graph cannot be read: {' '.join(str(error).split())}",
            where=str(path),
            expected=f"a whole .onnx file, and {path.name}_data beside it where its weights lie there",
            hint="copy the folder again with all of its files, or write the model anew with the stage export",
        ) from error


def _write(graph: onnx.ModelProto, target: Path) -> None:
    import onnx

    if graph.ByteSize() <= EXTERNAL_DATA_FROM_BYTES:
        onnx.save_model(graph, target)
        return
    onnx.save_model(graph, target, save_as_external_data=True, location=f"{target.name}_data")
    # Saving so takes the weights out of the graph in memory.
    onnx.load_external_data_for_model(graph, str(target.parent))


def find_graph(artifact: Path) -> Path:
    """The only `.onnx` file at or below ``artifact``. Raises `ModelError` where there isn't exactly one."""
    return only_file(artifact, ".onnx", "export")


def find_graphs(artifact: Path) -> tuple[Path, ...]:
    """The files of a model's graphs in the order in which they run: one, an encoder and its decoder, or three.

    Three are what sees, a table of tokens and a decoder, or a text encoder, a denoiser and a decoder of pictures.

    Raises `ModelError` for any other number of them.
    """
    if not artifact.is_dir():
        return (find_graph(artifact),)
    if is_pipeline(artifact):
        return _drawing_graphs(artifact)
    names = _PARTS[bool(_part(artifact, VISION))]
    parts = tuple(_part(artifact, part) for part in names)
    found = tuple(files[0] for files in parts if files)
    if not found:
        return (find_graph(artifact),)
    if any(len(files) != 1 for files in parts):
        raise ModelError(
            f"The folder holds {', '.join(file.name for files in parts for file in files)}.",
            where=str(artifact),
            expected=" and ".join(f"one {name}*.onnx" for name in names),
            hint="leave one file of each in the folder, or write the model anew with the stage export",
        )
    return found


def shown_name(graph: Path) -> str:
    """What tells a graph from the others of its model: the name of its file, below its folder where that is a part."""
    return f"{graph.parent.name}/{graph.name}" if graph.parent.name in DRAWING else graph.name


def _drawing_graphs(artifact: Path) -> tuple[Path, ...]:
    found = tuple(file for part in DRAWING if (file := artifact / part / FLOAT_GRAPH).is_file())
    if len(found) != len(DRAWING):
        raise ModelError(
            f"The folder holds {', '.join(file.relative_to(artifact).as_posix() for file in found) or 'no graph'}.",
            where=str(artifact),
            expected=", ".join(f"{part}/{FLOAT_GRAPH}" for part in DRAWING),
            hint="write the model anew with the stage export",
        )
    return found


def _part(artifact: Path, part: str) -> list[Path]:
    return sorted(artifact.rglob(f"{part}*.onnx"))

"""Stored tensors of ONNX files with their roles, and inspection of ONNX models for integrity checks.

Exporters and optimizers leave names such as `val_12` or `onnx::MatMul_123`. The module that a tensor belongs to is
found from, in this order: the bias that is added to the weight's product, the exporter's scopes on the node, the node's
name.
"""

from __future__ import annotations

import ast
import math
import re
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
from pydantic import ValidationError

from compress.formats.graph_value import GraphValue
from compress.formats.integrity import Encode, ModelInspector, Stored, answers_of, stored_arrays
from compress.formats.onnx.graph_reader import DTYPES, GraphNode, Initializer, OnnxGraph, axes_of, read_graph
from compress.formats.onnx.model import VISION, OnnxModel, all_graphs
from compress.formats.runtime import open_model
from compress.models.model import write_companions
from compress.models.pipeline_folder import image_generation_hook
from compress.models.processor import processor_of
from compress.models.stored_tensor import Role, StoredTensor, stored
from compress.utils.errors import ModelError

if TYPE_CHECKING:
    import onnx

_GENERATED = re.compile(r"^(onnx::.*|_?val?_\d+|_v_\d+|\d+|packed_\w+_\d+|t_?\d+|arg\d+_\d+)$")
_QUANTIZED_NAME = re.compile(r"(_Transposed)?(_quantized|_[Qq](Int|UInt)?\d+\w*)$")
COMPANION_NAME = re.compile(r"^(?P<weight>.+?)(_DQ)?_(scales?|zero_points?|zp|g_idx|bzp|absmax|Q\d_plane[1-9])$")
_FEW_BITS = re.compile(r"_Q(?P<bits>[2-8])(?P<plane>_plane0)?$")
"""Names of packed integers in `compress.formats.onnx.decoder`; odd bits are stored in planes of 4, 2 and 1 bits."""
_CARRIES_ON = (
    *("Add", "Mul", "Cast", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"),
    *("BiasGelu", "FastGelu", "QuickGelu", "DequantizeLinear", "SkipLayerNormalization"),
)
_COMPANIONS: dict[str, dict[int, tuple[int, ...]]] = {
    **{name: {0: (1, 2)} for name in ("DequantizeLinear", "QuantizeLinear")},
    **{"MatMulNBits": {1: (2, 3, 4)}, "GatherBlockQuantized": {0: (2, 3)}, "DynamicQuantizeMatMul": {1: (2, 3)}},
    **{name: {1: (3,)} for name in ("MatMulInteger", "ConvInteger")},
    **{name: {3: (4, 5)} for name in ("QLinearMatMul", "QLinearConv", "QGemm")},
    **{"MatMulIntegerToFloat": {1: (3, 5)}, "QAttention": {1: (4, 7)}},
}
"""Operator -> its weight's input -> the inputs with that weight's scale, zero point and order."""
_BIAS_INPUT = {"SkipLayerNormalization": 4}
_MAX_HOPS = 6
_CONSTANTS = "constants."
"""Beginning of the names of constants in exported decoders."""
_INTEGERS = ("int8", "uint8", "int4", "uint4", "int2", "uint2")

_RECORDINGS = 3


@dataclass(frozen=True)
class InitializerRole:
    """Module name, role and number of parameters of one initializer."""

    name: str
    role: Role
    parameters: int
    dtype: str
    packed: bool = False


def describe_initializers(graph: OnnxGraph) -> list[InitializerRole]:
    """Return the role of each initializer, in their order."""
    return _Names(graph).all()


class _Names:
    """Names and roles of a graph's initializers, derived from the nodes that read them."""

    def __init__(self, graph: OnnxGraph) -> None:
        self.stored = {item.name: item for item in graph.initializers}
        self.order = graph.initializers
        self.users: dict[str, list[tuple[GraphNode, int]]] = defaultdict(list)
        for node in graph.nodes:
            for index, name in enumerate(node.inputs):
                self.users[name].append((node, index))
        self.makers = {name: node for node in graph.nodes for name in node.outputs}
        self.taken: set[str] = set()

    def all(self) -> list[InitializerRole]:
        """Return the role of each initializer, in their order."""
        weight_of = self.companions()
        names = {item.name: self.weight_name(item) for item in self.order if item.name not in weight_of}
        return [self.meaning(item, weight_of, names) for item in self.order]

    def meaning(self, item: Initializer, weight_of: dict[str, str], names: dict[str, str]) -> InitializerRole:
        """Return the role of one initializer, given the weights of companions and the names of weights."""
        if item.name in weight_of:
            weight = names.get(weight_of[item.name])
            suffix = COMPANION_NAME.match(item.name)
            companion = item.name[suffix.end("weight") + 1 :] if suffix else item.name
            base = "" if "." in item.name else "quantization."
            name = f"{weight}_{companion}" if weight else base + item.name
            return InitializerRole(name, "quantization", 0, item.dtype)
        count = math.prod(item.shape)
        if self.is_constant(item, count):
            name = item.name if "." in item.name else _CONSTANTS + item.name
            return InitializerRole(name, "constant", 0, item.dtype)
        parameters, dtype = self.unpacked(item, count)
        return InitializerRole(names[item.name], "weight", parameters, dtype, packed=dtype != item.dtype)

    def companions(self) -> dict[str, str]:
        """Return for each scale, zero point or order the weight that it belongs to, or "" for one of an activation."""
        weight_of: dict[str, str] = {}
        for users in self.users.values():
            for node, _ in users:
                for at, others in _COMPANIONS.get(node.op_type, {}).items():
                    weight = node.inputs[at] if at < len(node.inputs) else ""
                    for companion in (node.inputs[i] for i in others if i < len(node.inputs)):
                        if companion in self.stored and (weight in self.stored or companion not in weight_of):
                            weight_of[companion] = weight if weight in self.stored else ""
        # Quantizers also mark companions by name only.
        for name in self.stored:
            match = COMPANION_NAME.match(name)
            if match and not weight_of.get(name):
                # The suffixes with which packed integers of a weight may be stored.
                suffixes = ("_quantized", "", "_Q4", "_Q8", "_Q2", *(f"_Q{bits}_plane0" for bits in (3, 5, 6, 7)))
                candidates = (match["weight"] + suffix for suffix in suffixes)
                base = next((candidate for candidate in candidates if candidate in self.stored), None)
                weight_of |= {name: base} if base is not None else {}
        return weight_of

    def is_constant(self, item: Initializer, count: int) -> bool:
        """Return whether an initializer is a constant of the graph, such as a shape, rather than a weight."""
        if item.name.startswith(_CONSTANTS):
            return True
        if "float" in item.dtype or "complex" in item.dtype:
            return count <= 1 and "." not in item.name
        # Integers are weights only if an operator for quantized weights reads them or their name says so.
        named = item.dtype in _INTEGERS and _QUANTIZED_NAME.search(item.name)
        return not named and not (item.dtype in (*_INTEGERS, "int32") and self.quantized_use(item))

    def quantized_use(self, item: Initializer) -> bool:
        """Return whether an operator for quantized weights reads the initializer as a weight or as a bias."""
        return any(
            index in _COMPANIONS[node.op_type] or (node.op_type, index) in (("QLinearConv", 8), ("QGemm", 6))
            for node, index in self.users[item.name]
            if node.op_type in _COMPANIONS
        )

    def unpacked(self, item: Initializer, count: int) -> tuple[int, str]:
        """Return the number of weights in a tensor and their type; contrib operators pack several into a byte."""
        for node, index in self.users[item.name]:
            numbers = node.integers
            bits = numbers.get("bits", 4) or 4
            if node.op_type == "MatMulNBits" and index == 1 and {"K", "N"} <= numbers.keys():
                return numbers["K"] * numbers["N"], f"int{bits}"
            if node.op_type == "GatherBlockQuantized" and index == 0 and item.dtype == "uint8":
                return count * 8 // bits, f"uint{bits}"
        # Planes of odd bits are recognized by name, because plain operators read them.
        packed = _FEW_BITS.search(item.name)
        if packed and item.dtype == "uint8":
            bits = int(packed["bits"])
            # The lowest plane has the largest power of two of these bits.
            return count * 8 // (1 << bits.bit_length() - 1 if packed["plane"] else bits), f"uint{bits}"
        return count, item.dtype

    def weight_name(self, item: Initializer) -> str:
        """Return the name of a weight in the model, from its own name or its module's."""
        name = _QUANTIZED_NAME.sub("", item.name)
        # A dotted name is the module's own.
        if "." in name and not name.startswith("onnx::"):
            return name
        module = self.module_by_bias(item) or self.module_by_scope(item)
        if module and math.prod(item.shape) > 1:
            full = f"{module}.weight"
            # Two weights of one module must not get the same name.
            full = full if full not in self.taken and full not in self.stored else f"{module}.{name}"
            self.taken.add(full)
            return full
        return f"unnamed.{name}" if _GENERATED.match(name) else name

    def module_by_bias(self, item: Initializer) -> str:
        """Return the module whose bias is added to the weight's product."""
        for node, _ in self.users[item.name]:
            biases = self.biases_after(node)
            # Exporters store equal biases once, such as those of zeros, under the name of one of their modules.
            if any(len(self.users[bias]) > len(self.users[item.name]) for bias in biases):
                continue
            size = sum(math.prod(self.stored[bias].shape) for bias in biases)
            # The bias belongs to this weight only if it has as many elements as the product has columns.
            if biases and size in (*item.shape, node.integers.get("N")):
                # The common name of several modules: `[a.query, a.key]` -> `a.query+key`.
                first, *others = (bias.removesuffix(".bias") for bias in biases)
                parent, leaves = first.rpartition(".")[0], [name.rpartition(".") for name in others]
                siblings = [leaf for other_parent, _, leaf in leaves if other_parent == parent]
                return "+".join([first, *siblings]) if len(siblings) == len(others) else first
        return ""

    def biases_after(self, node: GraphNode) -> list[str]:
        """Return the nearest biases downstream of a node, through operators that only move or scale values."""
        nearest: dict[str, None] = {}
        front = {id(node): node}
        for hop in range(_MAX_HOPS):
            following: dict[int, GraphNode] = {}
            for current in front.values():
                biases = self.biases_of(current)
                nearest.update(dict.fromkeys(biases))
                if not biases and (hop == 0 or current.op_type in _CARRIES_ON):
                    following |= {id(user): user for out in current.outputs for user, _ in self.users[out]}
            front = following
        return list(nearest)

    def biases_of(self, node: GraphNode) -> list[str]:
        """Return the biases that a node reads."""
        if node.op_type.endswith("LayerNormalization") and node.op_type not in _BIAS_INPUT:
            return []
        only = _BIAS_INPUT.get(node.op_type)
        return [
            name
            for index, name in enumerate(node.inputs)
            if name.endswith(".bias") and name in self.stored and only in (None, index)
        ]

    def module_by_scope(self, item: Initializer) -> str:
        """Return the module that the exporter recorded for the nodes that read the tensor."""
        for node, _ in self.users[item.name]:
            scopes = _scopes(node)
            if scopes:
                return scopes
            if "/" in node.name.strip("/"):
                return node.name.strip("/").rpartition("/")[0].replace("/", ".")
        return ""


def _scopes(node: GraphNode) -> str:
    """Return the module that the exporter recorded for a node; the last scope is the node's own name."""
    try:
        scopes = ast.literal_eval(node.metadata.get("pkg.torch.onnx.name_scopes", "[]"))
    except (ValueError, SyntaxError):
        return ""
    return str(scopes[-2]) if isinstance(scopes, list) and len(scopes) > 1 else ""


_NUMBERS = {name: number for number, name in DTYPES.items()}
_BITS = {"bool": 8} | {
    name: int(digits[0])
    for name in DTYPES.values()
    if (digits := re.search(r"\d+", name)) and not name.startswith("float6")  # whose packing differs by version
}


def read_tensors(file: Path, root: Path) -> list[StoredTensor]:
    """Return every initializer, its external data checked. Raises `ModelError`."""
    graph = read_graph(file)
    return annotate_tensors(graph, [_stored(item, file) for item in graph.initializers])


def read_signature(file: Path) -> dict[str, list[GraphValue]]:
    """Return the ``inputs`` and ``outputs`` of a graph. Raises `ModelError`.

    Inputs that only name an initializer, as before version 4 of the format, are left out.
    """
    import onnx
    from google.protobuf.message import DecodeError

    graph = read_graph(file)
    stored_names = {item.name for item in graph.initializers}
    values: dict[str, list[GraphValue]] = {}
    try:
        for kind, items in (("inputs", graph.inputs), ("outputs", graph.outputs)):
            read = [_graph_value(onnx.ValueInfoProto.FromString(item)) for item in items]
            values[kind] = [value for value in read if value.name not in stored_names]
    # protobuf returns strings that are not UTF-8 as bytes, which pydantic and `re` refuse.
    except (DecodeError, TypeError, ValidationError) as error:
        raise ModelError(f"{file.name} holds {kind} that cannot be read.", where=str(file)) from error
    return values


def _graph_value(value: onnx.ValueInfoProto) -> GraphValue:
    tensor = value.type.tensor_type
    if not value.type.HasField("tensor_type"):
        return GraphValue(name=value.name, dtype=value.type.WhichOneof("value") or "unknown", shape=None)
    return GraphValue(
        name=value.name,
        dtype=DTYPES.get(tensor.elem_type, "unknown"),
        shape=axes_of(value) if tensor.HasField("shape") else None,
    )


def annotate_tensors(graph: OnnxGraph, tensors: Sequence[StoredTensor]) -> list[StoredTensor]:
    """Return the tensors of a graph's initializers, in their order, with the name and role that the graph implies."""
    return [
        tensor.model_copy(update={**vars(meaning), "origin": tensor.name})
        for tensor, meaning in zip(tensors, describe_initializers(graph), strict=True)
    ]


def _stored(item: Initializer, file: Path) -> StoredTensor:
    """Return the location and description of one initializer."""
    if not item.external:
        span = item.start, item.stop - item.start
        return stored(item.name, item.dtype, item.shape, file, span, bytes=item.bytes, decode=_parsed)
    path, start, size = _external(item, file)
    decode = partial(_as_typed, _NUMBERS.get(item.dtype, 0), item.shape)
    return stored(item.name, item.dtype, item.shape, path, (start, size), decode=decode, tied_to=f"{path}:{start}")


def _parsed(data: np.ndarray) -> np.ndarray:
    """Decode a whole TensorProto. Raises `ValueError` for a broken one."""
    from google.protobuf.message import DecodeError
    from onnx import TensorProto, numpy_helper

    try:
        array: np.ndarray = numpy_helper.to_array(TensorProto.FromString(data.tobytes()))
    except DecodeError as error:
        raise ValueError(str(error)) from error
    return array


def _as_typed(number: int, shape: tuple[int, ...], data: np.ndarray) -> np.ndarray:
    """Decode raw bytes of an ONNX data type."""
    from onnx import TensorProto, numpy_helper

    array: np.ndarray = numpy_helper.to_array(TensorProto(data_type=number, dims=shape, raw_data=data.tobytes()))
    return array


def _external(item: Initializer, file: Path) -> tuple[Path, int, int]:
    """Return file, offset and length of external data. Raises `ModelError` if they are invalid."""
    location = item.external.get("location", "")
    pure = PurePosixPath(location)
    path = file.parent / location.replace("\0", "?")
    # External data must not lie outside the model folder, through links neither.
    inside = path.resolve().is_relative_to(file.parent.resolve())
    if not location or pure.is_absolute() or ".." in pure.parts or not inside:
        raise ModelError(
            f"The tensor {item.name!r} names {location!r} as its file, which lies outside the model folder.",
            where=str(file),
            expected="external data beside the ONNX file",
            hint="Save the model again with its data beside it.",
        )
    if not path.is_file():
        raise ModelError(
            f"The file {location!r} with the weights is missing.",
            where=str(file),
            expected=f"{location} beside it",
            hint="Copy the data file along with the ONNX file.",
        )
    # The path with offset and length. Raises `ModelError` if they exceed the file.
    size = path.stat().st_size
    try:
        offset = int(item.external.get("offset") or 0)
        length = int(item.external.get("length") or size - offset)
    except ValueError as error:
        raise ModelError(
            f"The place of {item.name!r} in its file is {item.external!r}.", where=str(path), expected="numbers"
        ) from error
    # A span beyond the end of the file means that the file was truncated.
    if offset < 0 or length < 0 or offset + length > size:
        raise ModelError(
            f"The external data is truncated: {item.name!r} ends at byte {offset + length} of {size}.",
            where=str(path),
            hint="Fetch, copy or export the model again.",
        )
    bits = _BITS.get(item.dtype)
    needed = length if bits is None else -(-math.prod(item.shape) * bits // 8)
    if not item.external.get("length"):
        length = min(length, needed)
    if length != needed:
        raise ModelError(
            f"The tensor {item.name!r} has {length} bytes of external data, too many or too few for its shape.",
            where=str(path),
            expected=f"those of {item.dtype} values of the shape {list(item.shape)}",
            hint="Fetch, copy or export the model again.",
        )
    return path, offset, length


def stored_tensors_of(model: OnnxModel) -> Stored:
    """Return every stored tensor of every graph, branches included, by the name of its module's weight."""
    from onnx import numpy_helper

    graphs = (graph for whole in model.graphs.values() for graph in all_graphs(whole.graph))
    tensors = (tensor for graph in graphs for tensor in graph.initializer)
    return stored_arrays(((tensor.name, numpy_helper.to_array(tensor)) for tensor in tensors), _CONSTANTS)


def probe_logits(model: OnnxModel, encode: Encode) -> np.ndarray:
    """Return the answers of ONNX Runtime.

    For a model of several graphs they are logits [examples, vocabulary] of the first token of a few outputs.
    """
    if model.is_diffusion:
        images: np.ndarray = image_generation_hook("open_onnx")(model).probe(encode(processor_of(model)))
        return images
    if not model.others:
        return answers_of(open_model(model), encode(processor_of(model)))
    from compress.formats.generation import image_text, speech_recognition
    from compress.formats.onnx.decoder import open_image_reader, teacher_forced_logits
    from compress.models.processor import load_processor

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_companions(folder, model.companions)
        processor = load_processor(folder)
        examples = encode(processor)
        if next(iter(model.graphs)).startswith(VISION):
            graphs = open_image_reader(model, image_text.read_rules(folder).image)
            batches = (examples.batch([index]) for index in range(min(len(examples), _RECORDINGS)))
            return np.concatenate(
                [graphs.begin(batch[image_text.IDS], batch[image_text.PIXELS])[:, -1] for batch in batches]
            )
        prompt = np.array(speech_recognition.read_rules(folder).prompt, dtype=np.int64)
    inputs: list[dict[str, np.ndarray]]
    if hasattr(processor, "feature_extractor"):
        frames = processor.feature_extractor.nb_max_frames
        inputs = [{"input_features": example["input_features"][:, :frames]} for example in examples.inputs]
    else:
        inputs = [{name: example[name] for name in ("input_ids", "attention_mask")} for example in examples.inputs]
        prompt = prompt[:1]
    return np.stack([teacher_forced_logits(model, example, prompt)[-1] for example in inputs[:_RECORDINGS]])


INSPECTOR = ModelInspector(stored_tensors_of, probe_logits)

"""Test whether `compress diff` detects planted changes of a model and names the right layer first.

    python benchmarks/diff.py [ROW...] [--write]

A row is the name of a planted change, `planted` (all of these, the default), `formats` (an encoder and a decoder
compared with their own exports; some minutes) or `memory` (two checkpoints of 3 billion parameters, 0.8 GB on disk).
`--write` updates these rows in `benchmarks/results/diff.json` and leaves the others unchanged.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ml_dtypes import bfloat16
from safetensors.numpy import load_file, save_file

from compress.models.checkpoint import Checkpoint, write_shards
from compress.models.gptq_layout import pack_layer
from compress.numerics.gptq import GptqSettings, round_to_nearest
from compress.numerics.integer_grid import QuantizedWeight
from compress.plugins.diff.models import DiffRequest, Side, compare_models
from compress.plugins.diff.record import Diff
from compress.utils.progress import SilentProgress

RESULT = Path(__file__).parent / "results" / "diff.json"
LAYERS, HIDDEN, HEADS, INTERMEDIATE, VOCABULARY = 4, 128, 8, 256, 512
HEAD_SIZE = HIDDEN // HEADS
WEIGHTS = "model.safetensors"
Tensors = dict[str, np.ndarray]
Change = Callable[[Path], None]


def model(folder: Path, seed: int = 0) -> Path:
    """Save a decoder with random weights and a tokenizer in ``folder``, and return the folder."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, tie_word_embeddings=True, rms_norm_eps=1e-6,
    )  # fmt: skip
    network = LlamaForCausalLM(config).float()
    for name, parameter in network.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.1)
    network.save_pretrained(folder)
    words = {f"w{index}": index for index in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocab=words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    return folder


def quantize(source: Path, folder: Path, bits: Mapping[str, int], scale: Mapping[str, float]) -> None:
    """Save a model rounded to 8 bits, where ``bits`` and ``scale`` change the bits and scales of some layers."""
    checkpoint = Checkpoint(source)
    tensors: list[tuple[str, torch.Tensor]] = []
    for name in checkpoint.files:
        module, weight = name.removesuffix(".weight"), checkpoint.stored(name)
        if not module.endswith("_proj"):
            tensors.append((name, weight.half()))
            continue
        module_bits = bits.get(module, 8)
        grid = round_to_nearest(weight.float(), GptqSettings(module_bits, 64, scale_search=False))
        scaled = QuantizedWeight(
            grid.integers, (grid.scales * scale.get(module, 1.0)).half().float(), grid.zero_points, module_bits, 64
        )
        tensors += [(f"{module}.{part}", value) for part, value in pack_layer(scaled, stored_less_one=True).items()]
    folder.mkdir()
    write_shards(folder, tensors)
    dynamic = {f"+:{module}$": {"bits": module_bits, "group_size": 64} for module, module_bits in bits.items()}
    settings = {"quant_method": "gptq", "bits": 8, "group_size": 64, "sym": True, "checkpoint_format": "gptq"}
    config = {**checkpoint.config, "quantization_config": {**settings, **({"dynamic": dynamic} if dynamic else {})}}
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def weight_name(number: int, part: str) -> str:
    """Return the name of a weight."""
    return f"model.layers.{number}.{part}.weight"


def on_tensors(change: Callable[[Tensors], None]) -> Change:
    """Return a function that applies ``change`` to the tensors of a model folder."""

    def apply(folder: Path) -> None:
        tensors = {name: array.copy() for name, array in load_file(folder / WEIGHTS).items()}
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return apply


def retrain(folder: Path) -> None:
    """Train only the third layer for 20 steps on random tokens."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(3)
    network = LlamaForCausalLM.from_pretrained(folder).float()
    parameters = list(network.model.layers[2].parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    for _ in range(20):
        ids = torch.randint(0, VOCABULARY, (4, 16))
        network(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        network.zero_grad()
    network.save_pretrained(folder)


def swap_heads(tensors: Tensors) -> None:
    """Swap heads 2 and 5 of the second layer: rows of q, k and v, columns of o."""
    order = np.arange(HIDDEN)
    heads = order.reshape(HEADS, HEAD_SIZE)
    heads[[2, 5]] = heads[[5, 2]]
    for part in ("q_proj", "k_proj", "v_proj"):
        name = weight_name(1, f"self_attn.{part}")
        tensors[name] = np.ascontiguousarray(tensors[name][order])
    name = weight_name(1, "self_attn.o_proj")
    tensors[name] = np.ascontiguousarray(tensors[name][:, order])


def zero_rows(tensors: Tensors) -> None:
    """Set the embeddings of three tokens to zero."""
    tensors["model.embed_tokens.weight"][[7, 100, 333]] = 0


def add_lora(tensors: Tensors) -> None:
    """Add products of rank 4 with a tenth of the norm of the weights."""
    generator = np.random.default_rng(4)
    for part in ("q_proj", "v_proj"):
        name = weight_name(3, f"self_attn.{part}")
        product = generator.standard_normal((HIDDEN, 4)) @ generator.standard_normal((4, HIDDEN))
        weight = tensors[name]
        tensors[name] = (weight + 0.1 * product * np.linalg.norm(weight) / np.linalg.norm(product)).astype(np.float32)


def prune(tensors: Tensors) -> None:
    """Set the two smallest of every four weights of a feed-forward network to zero."""
    for part in ("gate_proj", "up_proj", "down_proj"):
        weight = tensors[weight_name(0, f"mlp.{part}")]
        groups = weight.reshape(len(weight), -1, 4)
        np.put_along_axis(groups, np.argsort(np.abs(groups), axis=-1)[..., :2], 0, axis=-1)


def change_tokenizer(folder: Path) -> None:
    """Swap the ids of two tokens."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    words = content["model"]["vocab"]
    words["w11"], words["w12"] = words["w12"], words["w11"]
    path.write_text(json.dumps(content))


def change_epsilon(folder: Path) -> None:
    """Change the epsilon of the norms in the config."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rms_norm_eps": 1e-5}))


@dataclass(frozen=True)
class PlantedChange:
    """A change of a model, the expected start of the diff's first line, and ``words`` expected among its causes."""

    change: Change | None
    first: str
    words: str = ""
    quantized: tuple[Mapping[str, int], Mapping[str, float]] | None = None
    seed: int | None = None


_GATE, _DOWN = "model.layers.1.mlp.gate_proj", "model.layers.3.mlp.down_proj"
PLANTED: dict[str, PlantedChange] = {
    "one layer retrained": PlantedChange(retrain, "layers.2"),
    "scales off by 2%": PlantedChange(None, "layers.1", "1.02", quantized=({}, {_GATE: 1.02})),
    "a pair of heads swapped": PlantedChange(on_tensors(swap_heads), "layers.1", f"blocks of {HEAD_SIZE} rows 2 and 5"),
    "three rows of the table zeroed": PlantedChange(on_tensors(zero_rows), "embed_tokens", "rows 7, 100, 333"),
    "another tokenizer": PlantedChange(change_tokenizer, "tokenizer.json"),
    "another seed": PlantedChange(None, "recipe: seed 0", seed=1),
    "a norm's epsilon": PlantedChange(change_epsilon, "config.json: rms_norm_eps"),
    "a merged LoRA": PlantedChange(on_tensors(add_lora), "layers.3", "rank 4"),
    "a layer pruned by 2:4": PlantedChange(on_tensors(prune), "layers.0", "2:4"),
    "bits of one layer lowered": PlantedChange(None, "layers.3", "4 bits", quantized=({_DOWN: 4}, {})),
}


def plant(name: str, folder: Path) -> Diff:
    """Create both models in ``folder``, and compare them."""
    planted = PLANTED[name]
    runs = folder / "before", folder / "after"
    for index, run in enumerate(runs):
        run.mkdir(parents=True)
        seed = planted.seed if index and planted.seed is not None else 0
        source = model(run / "model", seed)
        (run / "recipe.yaml").write_text(_recipe(seed))
        if planted.quantized is not None:
            source.rename(run / "float")
            bits, scale = planted.quantized if index else ({}, {})
            quantize(run / "float", source, bits, scale)
        elif index and planted.change is not None:
            planted.change(source)
    sides = [Side(run.name, run / "model", run) for run in runs]
    return compare_models(sides[0], sides[1], DiffRequest("weights"), SilentProgress())


def _recipe(seed: int) -> str:
    fields: dict[str, Any] = {"name": "planted", "task": "text-generation", "model": "model", "seed": seed}
    splits = {name: f"{name}.csv" for name in ("train", "test")}
    return json.dumps({**fields, "data": {"splits": splits}, "stages": ["onnx"]})


def is_located(name: str, diff: Diff) -> bool:
    """Return whether a diff names the changed layer first, states the cause, and lists no other layer."""
    planted = PLANTED[name]
    causes = " ".join(cause for layer in diff.weights.layers for cause in layer.causes) if diff.weights else ""
    layers = {layer.name for layer in diff.weights.layers} if diff.weights else set()
    only = planted.seed is not None or layers <= {planted.first}
    # Tied embeddings are the head as well, which is not listed as a separate layer.
    return diff.first.startswith(planted.first) and planted.words in causes and only


def planted_rows(names: list[str]) -> Iterator[list[str]]:
    """Yield the change, whether it is located, and the first line of the diff."""
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            diff = plant(name, Path(folder))
        yield [name, "found" if is_located(name, diff) else "NOT FOUND", diff.first]


FORMATS = ("onnx", "onnx_int8", "ort", "openvino", "litert", "executorch", "coreml")


def format_rows() -> Iterator[list[str]]:
    """Compare an encoder and a decoder of the tests with their exports in every installed format."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
    import stage_contract
    import tiny

    from compress.models.checkpoint import QuantizedCheckpoint
    from compress.models.model import TorchModel
    from compress.stages.base import Context
    from compress.utils.errors import CompressError

    def export(model: Any, context: Context, folder: Path, kind: str) -> Any:
        artifact = stage_contract.stage_of(kind, {}).run(model, context)
        folder.mkdir()
        artifact.save(folder)
        return artifact

    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        encoder, context = (
            tiny.encoder(num_hidden_layers=1),
            tiny.context(tiny.dataset(64, 16), scratch=root / "scratch"),
        )
        (root / "encoder").mkdir()
        encoder.save(root / "encoder")
        graph: Any = None
        for kind in FORMATS:
            folder = root / f"encoder {kind}"
            try:
                artifact = export(graph if kind in ("onnx_int8", "ort") else encoder, context, folder, kind)
            except (CompressError, ImportError) as error:
                yield [f"encoder, {kind}", "not available", str(error).splitlines()[0]]
                continue
            graph = artifact if kind == "onnx" else graph
            yield _compare_export(f"encoder, {kind}", root / "encoder", folder)
        texts = stage_contract.language_context(root / "texts")
        decoder = stage_contract.save_mergeable_llama(root / "decoder")
        packed = stage_contract.quantize_tiny_llama(decoder, root / "decoder gptq")
        for file in (root / "decoder").glob("tokenizer*"):
            shutil.copy(file, packed.folder)
        yield _compare_export("decoder, GPTQ", root / "decoder", packed.folder)
        sources = {"": decoder, " of GPTQ": QuantizedCheckpoint(packed.folder)}
        for name, source in sources.items():
            for kind in ("onnx", "gguf"):
                exportable = TorchModel.load(decoder.folder, texts.task) if kind == "onnx" and not name else source
                export(exportable, texts, root / f"decoder {kind}{name}", kind)
                yield _compare_export(f"decoder, {kind}{name}", root / "decoder", root / f"decoder {kind}{name}")


def _compare_export(name: str, source: Path, exported: Path) -> list[str]:
    sides = Side("a", source), Side("b", exported)
    diff = compare_models(*sides, DiffRequest("weights"), SilentProgress())
    weights = diff.weights
    assert weights is not None
    largest = max((tensor.relative for tensor in weights.tensors), default=0.0)
    rounding = max((tensor.times_rounding or 0.0 for tensor in weights.having("rounded")), default=0.0)
    verdict = "same" if weights.verdict != "changed" else "NOT THE SAME"
    counts = f"{len(weights.having('identical'))} identical, {len(weights.having('rounded'))} rounded"
    return [name, verdict, f"{counts}, {largest:.2%} at most, {rounding:.2f} times what the bits explain"]


def memory_row(layers: int = 28, hidden: int = 3072, inner: int = 8192, vocabulary: int = 128_256) -> list[str]:
    """Compare two bfloat16 checkpoints of the shape of a 3B decoder, which differ in the embeddings and one layer.

    The files are sparse: only one block in sixteen has values and takes disk space, but all of it is read.
    """
    products = {
        **{f"self_attn.{name}_proj": (hidden, hidden) for name in "qo"},
        **{f"self_attn.{name}_proj": (hidden // 3, hidden) for name in "kv"},
        **{f"mlp.{name}_proj": (inner, hidden) for name in ("gate", "up")},
        "mlp.down_proj": (hidden, inner),
    }
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    shapes |= {weight_name(number, part): shape for number in range(layers) for part, shape in products.items()}
    changed = ("model.embed_tokens.weight", weight_name(layers // 2, "mlp.down_proj"))
    total = sum(rows * columns for rows, columns in shapes.values())
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch) / name for name in ("before", "after")]
        for index, folder in enumerate(folders):
            _write_sparse_checkpoint(folder, shapes, changed if index else ())
        code = f"import sys; from compress.cli import main; sys.argv[1:] = ['diff', *{list(map(str, folders))!r}, "
        code += "'--depth', 'weights', '--json']; main()"
        began = time.monotonic()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        seconds = time.monotonic() - began
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    first = json.loads(done.stdout)["first"]
    return [f"{total / 1e9:.2f} B weights", f"{peak / 1e9:.2f} GB", f"{seconds:.0f} s; {first}"]


def _write_sparse_checkpoint(folder: Path, shapes: Mapping[str, tuple[int, int]], changed: tuple[str, ...]) -> None:
    """Write each tensor into a sparse safetensors file."""
    folder.mkdir()
    block = np.random.default_rng(0).standard_normal(1 << 15).astype(bfloat16)
    files = {}
    for index, (name, shape) in enumerate(shapes.items()):
        size = 2 * shape[0] * shape[1]
        header = json.dumps({name: {"dtype": "BF16", "shape": shape, "data_offsets": [0, size]}}).encode()
        header += b" " * (-len(header) % 8)
        files[name] = f"model-{index + 1:05d}-of-{len(shapes):05d}.safetensors"
        values = (block.astype(np.float32) * (1.05 if name in changed else 1)).astype(bfloat16).tobytes()
        with (folder / files[name]).open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            start = file.tell()
            for offset in range(0, size - len(values), 16 * len(values)):
                file.seek(start + offset)
                file.write(values)
            file.truncate(start + size)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))


_HEADERS = {
    "planted": ("Planted changes", ["planted change", "located", "first line of the output"]),
    "formats": ("A model compared with its own export", ["format", "verdict", "tensors"]),
    "memory": ("Two checkpoints of 3 billion parameters", ["size", "peak memory", "time, first line of the output"]),
}


def main() -> None:
    """Print the requested rows, and store them with `--write`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"{', '.join((*_HEADERS, *PLANTED))}")
    parser.add_argument("--write", action="store_true", help=f"write the rows into {RESULT.name}")
    options = parser.parse_args()
    requested = options.rows or ["planted"]
    names = list(PLANTED) if "planted" in requested else [name for name in PLANTED if name in requested]
    tables: dict[str, list[list[str]]] = {}
    rows = {"planted": lambda: planted_rows(names), "formats": format_rows, "memory": lambda: [memory_row()]}
    for kind, compute in rows.items():
        if kind in requested or (kind == "planted" and names):
            tables[kind] = []
            for row in compute():
                sys.stdout.write("  ".join(row) + "\n")
                sys.stdout.flush()
                tables[kind].append(row)
    if options.write:
        _write(tables)


def _write(tables: Mapping[str, list[list[str]]]) -> None:
    previous_tables = json.loads(RESULT.read_text())["tables"] if RESULT.is_file() else []
    known = {table["title"]: table for table in previous_tables}
    for kind, rows in tables.items():
        title, columns = _HEADERS[kind]
        rows_by_name = {row[0]: row for row in known.get(title, {}).get("rows", [])} | {row[0]: row for row in rows}
        known[title] = {"title": title, "columns": columns, "rows": list(rows_by_name.values())}
    content = {
        "title": "Model diff",
        "order": 12,
        "command": "python benchmarks/diff.py planted formats memory --write",
        "machine": "2 virtual cores of an Intel Xeon with AVX512-VNNI",
        "measured": datetime.now(UTC).date().isoformat(),
        "text": "`compress diff` was tried on planted changes of a decoder with random weights, on tiny models "
        "compared with their own exports, and on a pair of 3B checkpoints.",
        "tables": [known[title] for title, _ in _HEADERS.values() if title in known],
    }
    RESULT.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()

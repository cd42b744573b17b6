"""Whether `compress diff` finds what was done to a model, and names the right layer first.

    python benchmarks/diff.py [ROW...] [--write]

Rows are the names of planted changes, `formats` (an encoder and a decoder beside themselves in every other format,
some minutes), `memory` (two checkpoints of the shape of 3B weights, 0.8 GB on the disk), or
`planted`, all of the first kind, which is meant where nothing is named. `--write` puts the figures into
`benchmarks/results/diff.json`; rows that weren't asked for stay as they are there.
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
LAYERS, HIDDEN, HEADS, INNER, WORDS = 4, 128, 8, 256, 512
HEAD = HIDDEN // HEADS
WEIGHTS = "model.safetensors"
Tensors = dict[str, np.ndarray]
Change = Callable[[Path], None]


def model(folder: Path, seed: int = 0) -> Path:
    """A decoder of drawn weights, with a tokenizer and the recipe that it may come from."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, tie_word_embeddings=True, rms_norm_eps=1e-6,
    )  # fmt: skip
    network = LlamaForCausalLM(config).float()
    for name, parameter in network.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.1)
    network.save_pretrained(folder)
    words = {f"w{index}": index for index in range(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocab=words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    return folder


def quantized(source: Path, folder: Path, bits: Mapping[str, int], scale: Mapping[str, float]) -> None:
    """The same rounded to 8 bits; ``bits`` of some layers and factors of their ``scale`` are others."""
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


def layer(number: int, part: str) -> str:
    """The name of a weight."""
    return f"model.layers.{number}.{part}.weight"


def changed(change: Callable[[Tensors], None]) -> Change:
    """A change of the tensors of a folder."""

    def apply(folder: Path) -> None:
        tensors = {name: array.copy() for name, array in load_file(folder / WEIGHTS).items()}
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return apply


def retrain(folder: Path) -> None:
    """Twenty steps of the third layer alone, on drawn text."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(3)
    network = LlamaForCausalLM.from_pretrained(folder).float()
    learned = list(network.model.layers[2].parameters())
    optimizer = torch.optim.AdamW(learned, lr=1e-3)
    for _ in range(20):
        ids = torch.randint(0, WORDS, (4, 16))
        network(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        network.zero_grad()
    network.save_pretrained(folder)


def swap_heads(tensors: Tensors) -> None:
    """Heads 2 and 5 of the second layer: rows of its first three products, columns of the last."""
    order = np.arange(HIDDEN)
    order[2 * HEAD : 3 * HEAD], order[5 * HEAD : 6 * HEAD] = (
        order[5 * HEAD : 6 * HEAD].copy(),
        order[2 * HEAD : 3 * HEAD].copy(),
    )
    for part in ("q_proj", "k_proj", "v_proj"):
        name = layer(1, f"self_attn.{part}")
        tensors[name] = np.ascontiguousarray(tensors[name][order])
    name = layer(1, "self_attn.o_proj")
    tensors[name] = np.ascontiguousarray(tensors[name][:, order])


def zero_rows(tensors: Tensors) -> None:
    """Three tokens of the table."""
    tensors["model.embed_tokens.weight"][[7, 100, 333]] = 0


def add_lora(tensors: Tensors) -> None:
    """A product of rank 4, as large as a tenth of the weights that it is added to."""
    generator = np.random.default_rng(4)
    for part in ("q_proj", "v_proj"):
        name = layer(3, f"self_attn.{part}")
        product = generator.standard_normal((HIDDEN, 4)) @ generator.standard_normal((4, HIDDEN))
        weight = tensors[name]
        tensors[name] = (weight + 0.1 * product * np.linalg.norm(weight) / np.linalg.norm(product)).astype(np.float32)


def prune(tensors: Tensors) -> None:
    """The two smallest of every four inputs of a layer's feed-forward."""
    for part in ("gate_proj", "up_proj", "down_proj"):
        weight = tensors[layer(0, f"mlp.{part}")]
        fours = weight.reshape(len(weight), -1, 4)
        np.put_along_axis(fours, np.argsort(np.abs(fours), axis=-1)[..., :2], 0, axis=-1)


def other_tokenizer(folder: Path) -> None:
    """Two tokens have changed their ids."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    words = content["model"]["vocab"]
    words["w11"], words["w12"] = words["w12"], words["w11"]
    path.write_text(json.dumps(content))


def other_epsilon(folder: Path) -> None:
    """That of the norms."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rms_norm_eps": 1e-5}))


@dataclass(frozen=True)
class Planted:
    """What is done to a model, and what a diff has to say: ``first`` of all, and ``words`` that stand in its causes."""

    change: Change | None
    first: str
    words: str = ""
    quantized: tuple[Mapping[str, int], Mapping[str, float]] | None = None
    seed: int | None = None


_GATE, _DOWN = "model.layers.1.mlp.gate_proj", "model.layers.3.mlp.down_proj"
PLANTED: dict[str, Planted] = {
    "one layer retrained": Planted(retrain, "layers.2"),
    "scales off by 2%": Planted(None, "layers.1", "1.02", quantized=({}, {_GATE: 1.02})),
    "a pair of heads swapped": Planted(changed(swap_heads), "layers.1", f"blocks of {HEAD} rows 2 and 5"),
    "three rows of the table zeroed": Planted(changed(zero_rows), "embed_tokens", "rows 7, 100, 333"),
    "another tokenizer": Planted(other_tokenizer, "tokenizer.json"),
    "another seed": Planted(None, "recipe: seed 0", seed=1),
    "a norm's epsilon": Planted(other_epsilon, "config.json: rms_norm_eps"),
    "a merged LoRA": Planted(changed(add_lora), "layers.3", "rank 4"),
    "a layer pruned by 2:4": Planted(changed(prune), "layers.0", "2:4"),
    "bits of one layer lowered": Planted(None, "layers.3", "4 bits", quantized=({_DOWN: 4}, {})),
}


def plant(name: str, folder: Path) -> Diff:
    """Make both models below ``folder``, and compare them."""
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
            quantized(run / "float", source, bits, scale)
        elif index and planted.change is not None:
            planted.change(source)
    sides = [Side(run.name, run / "model", run) for run in runs]
    return compare_models(sides[0], sides[1], DiffRequest("weights"), SilentProgress())


def _recipe(seed: int) -> str:
    fields: dict[str, Any] = {"name": "planted", "task": "text-generation", "model": "model", "seed": seed}
    splits = {name: f"{name}.csv" for name in ("train", "test")}
    return json.dumps({**fields, "data": {"splits": splits}, "stages": ["onnx"]})


def found(name: str, diff: Diff) -> bool:
    """Whether a diff names the place first, and what was done there, and no other layer."""
    planted = PLANTED[name]
    causes = " ".join(cause for layer in diff.weights.layers for cause in layer.causes) if diff.weights else ""
    layers = {layer.name for layer in diff.weights.layers} if diff.weights else set()
    only = planted.seed is not None or layers <= {planted.first}
    # A merged table is the head too, and no layer of its own.
    return diff.first.startswith(planted.first) and planted.words in causes and only


def planted_rows(names: list[str]) -> Iterator[list[str]]:
    """Change, whether it is found, what is said first."""
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            diff = plant(name, Path(folder))
        yield [name, "found" if found(name, diff) else "NOT FOUND", diff.first]


FORMATS = ("onnx", "onnx_int8", "ort", "openvino", "litert", "executorch", "coreml")


def format_rows() -> Iterator[list[str]]:
    """An encoder and a decoder of the tests beside themselves in every format that is to be had here."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
    import stage_contract
    import tiny

    from compress.models.checkpoint import QuantizedCheckpoint
    from compress.models.model import TorchModel
    from compress.stages.base import Context
    from compress.utils.errors import CompressError

    def written(model: Any, context: Context, folder: Path, kind: str) -> Any:
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
                artifact = written(graph if kind in ("onnx_int8", "ort") else encoder, context, folder, kind)
            except (CompressError, ImportError) as error:
                yield [f"encoder, {kind}", "not to be had", str(error).splitlines()[0]]
                continue
            graph = artifact if kind == "onnx" else graph
            yield _same(f"encoder, {kind}", root / "encoder", folder)
        texts = stage_contract.language_context(root / "texts")
        decoder = stage_contract.save_mergeable_llama(root / "decoder")
        packed = stage_contract.quantize_tiny_llama(decoder, root / "decoder gptq")
        for file in (root / "decoder").glob("tokenizer*"):
            shutil.copy(file, packed.folder)
        yield _same("decoder, GPTQ", root / "decoder", packed.folder)
        sources = {"": decoder, " of GPTQ": QuantizedCheckpoint(packed.folder)}
        for name, source in sources.items():
            for kind in ("onnx", "gguf"):
                given = TorchModel.load(decoder.folder, texts.task) if kind == "onnx" and not name else source
                written(given, texts, root / f"decoder {kind}{name}", kind)
                yield _same(f"decoder, {kind}{name}", root / "decoder", root / f"decoder {kind}{name}")


def _same(name: str, before: Path, after: Path) -> list[str]:
    sides = Side("a", before), Side("b", after)
    diff = compare_models(*sides, DiffRequest("weights"), SilentProgress())
    weights = diff.weights
    assert weights is not None
    most = max((tensor.relative for tensor in weights.tensors), default=0.0)
    times = max((tensor.times_rounding or 0.0 for tensor in weights.having("rounded")), default=0.0)
    verdict = "same" if weights.verdict != "changed" else "NOT THE SAME"
    counts = f"{len(weights.having('identical'))} identical, {len(weights.having('rounded'))} rounded"
    return [name, verdict, f"{counts}, {most:.2%} at most, {times:.2f} times what the bits explain"]


def memory_row(layers: int = 28, hidden: int = 3072, inner: int = 8192, words: int = 128_256) -> list[str]:
    """Two checkpoints of the shape of a 3B decoder in bfloat16; the table and one layer of the second are others.

    One stretch in sixteen of each file has numbers, so that the disk holds a sixteenth; all of it is read.
    """
    products = {
        **{f"self_attn.{name}_proj": (hidden, hidden) for name in "qo"},
        **{f"self_attn.{name}_proj": (hidden // 3, hidden) for name in "kv"},
        **{f"mlp.{name}_proj": (inner, hidden) for name in ("gate", "up")},
        "mlp.down_proj": (hidden, inner),
    }
    shapes = {"model.embed_tokens.weight": (words, hidden)}
    shapes |= {layer(number, part): shape for number in range(layers) for part, shape in products.items()}
    changed = ("model.embed_tokens.weight", layer(layers // 2, "mlp.down_proj"))
    total = sum(rows * columns for rows, columns in shapes.values())
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch) / name for name in ("before", "after")]
        for index, folder in enumerate(folders):
            _drawn_checkpoint(folder, shapes, changed if index else ())
        code = f"import sys; from compress.cli import main; sys.argv[1:] = ['diff', *{list(map(str, folders))!r}, "
        code += "'--depth', 'weights', '--json']; main()"
        began = time.monotonic()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        seconds = time.monotonic() - began
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    first = json.loads(done.stdout)["first"]
    return [f"{total / 1e9:.2f} B weights", f"{peak / 1e9:.2f} GB", f"{seconds:.0f} s; {first}"]


def _drawn_checkpoint(folder: Path, shapes: Mapping[str, tuple[int, int]], changed: tuple[str, ...]) -> None:
    """A file for each tensor, as safetensors lays it out."""
    folder.mkdir()
    stretch = np.random.default_rng(0).standard_normal(1 << 15).astype(bfloat16)
    where = {}
    for index, (name, shape) in enumerate(shapes.items()):
        size = 2 * shape[0] * shape[1]
        about = json.dumps({name: {"dtype": "BF16", "shape": shape, "data_offsets": [0, size]}}).encode()
        about += b" " * (-len(about) % 8)
        where[name] = f"model-{index + 1:05d}-of-{len(shapes):05d}.safetensors"
        values = (stretch.astype(np.float32) * (1.05 if name in changed else 1)).astype(bfloat16).tobytes()
        with (folder / where[name]).open("wb") as file:
            file.write(len(about).to_bytes(8, "little") + about)
            start = file.tell()
            for offset in range(0, size - len(values), 16 * len(values)):
                file.seek(start + offset)
                file.write(values)
            file.truncate(start + size)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))


_HEADS = {
    "planted": ("Planted changes", ["what was done", "", "said first"]),
    "formats": ("A model beside itself in another format", ["format", "verdict", "by how much"]),
    "memory": ("Two checkpoints of 3B weights", ["size", "peak memory", "time, said first"]),
}


def main() -> None:
    """Print the rows that were asked for; with `--write` keep them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"{', '.join((*_HEADS, *PLANTED))}")
    parser.add_argument("--write", action="store_true", help=f"keep the figures in {RESULT.name}")
    options = parser.parse_args()
    asked = options.rows or ["planted"]
    names = list(PLANTED) if "planted" in asked else [name for name in PLANTED if name in asked]
    tables: dict[str, list[list[str]]] = {}
    rows = {"planted": lambda: planted_rows(names), "formats": format_rows, "memory": lambda: [memory_row()]}
    for kind, make in rows.items():
        if kind in asked or (kind == "planted" and names):
            tables[kind] = []
            for row in make():
                sys.stdout.write("  ".join(row) + "\n")
                sys.stdout.flush()
                tables[kind].append(row)
    if options.write:
        _write(tables)


def _write(tables: Mapping[str, list[list[str]]]) -> None:
    previous_tables = json.loads(RESULT.read_text())["tables"] if RESULT.is_file() else []
    known = {table["title"]: table for table in previous_tables}
    for kind, rows in tables.items():
        title, heads = _HEADS[kind]
        rows_by_name = {row[0]: row for row in known.get(title, {}).get("rows", [])} | {row[0]: row for row in rows}
        known[title] = {"title": title, "columns": heads, "rows": list(rows_by_name.values())}
    content = {
        "title": "Model diff",
        "order": 12,
        "command": "python benchmarks/diff.py planted formats memory --write",
        "machine": "2 virtual cores of an Intel Xeon with AVX512-VNNI",
        "measured": datetime.now(UTC).date().isoformat(),
        "text": "What `compress diff` says of changes that were planted into a decoder of drawn weights: whether the "
        "right place is named first, and no other; of tiny models beside themselves in another format; and what it "
        "takes. Of the 3B pair the table and one layer are others; one stretch in sixteen of each file has numbers.",
        "tables": [known[title] for title, _ in _HEADS.values() if title in known],
    }
    RESULT.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()

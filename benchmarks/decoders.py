"""Which decoders become one ONNX graph: tiny models of every architecture, in fp32 and in 4 bits, proven against torch.

    python benchmarks/decoders.py [NAMES...] [--write]

Each is read in one go, token by token, padded, and past the chunks by which recurrences go. Exits with 1 where a model
that `benchmarks/results/decoders.json` has as equal is so no more; `--write` writes that file anew.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file
from tiny_decoders import DECODERS, save, some_ids

from compress.checkpoints.checkpoint import Checkpoint
from compress.checkpoints.gptq_layout import pack_layer
from compress.errors import CompressError
from compress.formats.onnx.decoder import GraphSettings, export_proven
from compress.numerics.integer_grid import QuantizedWeight

RESULTS = Path(__file__).parent / "results" / "decoders.json"
COLUMNS = ["model", "fp32", "4 bits", "attention", "nodes", "seconds", "why"]
_LENGTH, _GROUP, _BITS, _LIMIT_SECONDS = 20, 32, 4, 300
_TOLERANCE = 1e-3


def judge(name: str, folder: Path) -> list[str]:
    """The row of a model."""
    model = save(name, folder / "float")
    windows = some_ids(2, _LENGTH).numpy()
    started = time.perf_counter()
    try:
        found = export_proven(Checkpoint(folder / "float"), GraphSettings(), windows, _TOLERANCE, 1.0)
    except CompressError as error:
        return [name, "no", "no", "", "", "", error.what]
    seconds = time.perf_counter() - started
    kinds = Counter(node.op_type for node in found.model.graph.graph.node)
    few = _in_four_bits(model, Checkpoint(folder / "float"), folder / "few")
    try:
        settings = GraphSettings(accuracy_level=1)
        few_bits = f"{export_proven(few, settings, windows, _TOLERANCE, 1.0).equality.difference:.0e}"
    except CompressError as error:
        few_bits = f"no: {error.what}"
    fused = f"{kinds['GroupQueryAttention']} fused" if not found.unfused else "as it is"
    nodes = str(sum(kinds.values()))
    return [name, f"{found.equality.difference:.0e}", few_bits, fused, nodes, f"{seconds:.0f}", found.unfused]


def _in_four_bits(model: Any, source: Checkpoint, folder: Path) -> Checkpoint:
    """The linear layers of a model rounded to the nearest of 4 bits in groups of 32, in GPTQ's layout."""
    folder.mkdir(parents=True)
    head = model.get_output_embeddings()
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    names = {
        name
        for name, layer in layers.items()
        if layer is not head and not layer.in_features % _GROUP and not layer.out_features % _GROUP
    }
    tensors: dict[str, torch.Tensor] = {}
    for name in source.files:
        module = name.removesuffix(".weight")
        if module in names and name.endswith(".weight"):
            parts = pack_layer(_rounded(source.stored(name)), stored_less_one=True)
            tensors |= {f"{module}.{part}": value.contiguous() for part, value in parts.items()}
        else:
            tensors[name] = source.stored(name).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    quantization = {"quant_method": "gptq", "bits": _BITS, "group_size": _GROUP, "sym": True, "desc_act": False}
    config = json.loads((source.folder / "config.json").read_text())
    config["quantization_config"] = {**quantization, "checkpoint_format": "gptq"}
    (folder / "config.json").write_text(json.dumps(config))
    for path in source.folder.glob("tokenizer*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return Checkpoint(folder)


def _rounded(weight: torch.Tensor) -> QuantizedWeight:
    middle = 1 << (_BITS - 1)
    groups = weight.float().reshape(len(weight), -1, _GROUP)
    scales = (groups.abs().amax(-1) / (middle - 1)).clamp(min=1e-6).half().float()
    integers = (groups / scales[..., None]).round().clamp(-middle, middle - 1) + middle
    zeros = torch.full_like(scales, middle).to(torch.uint8)
    return QuantizedWeight(integers.reshape(weight.shape).to(torch.uint8), scales, zeros, _BITS, _GROUP)


def in_a_process(name: str) -> list[str]:
    """`judge` where nothing that ends the process, or takes too long, ends this one."""
    with tempfile.TemporaryDirectory() as folder:
        here, there = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(target=_answer, args=(name, Path(folder), there))
        process.start()
        there.close()
        try:
            row: list[str] = here.recv() if here.poll(_LIMIT_SECONDS) else [name, "no", "no", "", "", "", "too slow"]
        except EOFError:
            row = [name, "no", "no", "", "", "", "the process ended"]
        process.kill()
        process.join()
    return row


def _answer(name: str, folder: Path, connection: Connection) -> None:
    with (folder / "stderr.txt").open("w") as log:
        os.dup2(log.fileno(), 2)
        try:
            row = judge(name, folder)
        except Exception as error:  # noqa: BLE001 - whatever a row ends in is what it shows
            row = [name, "no", "no", "", "", "", f"{type(error).__name__}: {str(error).splitlines()[0]}"]
        connection.send(row)


def main(
    names: Annotated[list[str] | None, typer.Argument()] = None,
    write: Annotated[bool, typer.Option(help="write benchmarks/results/decoders.json")] = False,
) -> None:
    """Print a row for each model."""
    torch.set_num_threads(1)
    before = json.loads(RESULTS.read_text())["tables"][0]["rows"] if RESULTS.is_file() else []
    typer.echo(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    rows = []
    for name in names or list(DECODERS):
        rows.append(in_a_process(name))
        typer.echo(f"| {' | '.join(rows[-1])} |")
    equal = [row for row in rows if row[1] != "no"]
    few = sum(not row[2].startswith("no") for row in rows)
    fused = sum(row[3].endswith("fused") for row in rows)
    summary = (
        f"{len(equal)} of {len(rows)} models are equal to torch in fp32, {few} in 4 bits, {fused} with fused attention."
    )
    typer.echo(f"\n{summary}")
    if write:
        about = {
            "title": "Decoders as one ONNX graph",
            "order": 1,
            "page": "architectures.md",
            "command": "python benchmarks/decoders.py --write",
            "machine": "any processor: tiny random models, largest difference of a logit from torch",
            "measured": datetime.now(UTC).date().isoformat(),
            "text": summary,
            "tables": [{"columns": COLUMNS, "rows": rows}],
        }
        RESULTS.write_text(json.dumps(about, indent=1) + "\n")
    worse = {row[0] for row in before if row[1] != "no"} & {row[0] for row in rows if row[1] == "no"}
    typer.echo(f"No longer equal: {', '.join(sorted(worse))}." if worse else "None is worse than it was.")
    raise typer.Exit(1 if worse else 0)


if __name__ == "__main__":
    typer.run(main)

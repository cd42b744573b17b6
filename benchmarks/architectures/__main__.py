"""Test which features work for which architecture, on tiny models with random weights.

    python benchmarks/architectures [NAMES...] [--group decoders] [--write]

Decoders are exported to one ONNX graph with a cache, in fp32 and 4 bits, and to a GGUF file. Encoders and image models
are exported to an ONNX graph in fp32 and INT8, encoder-decoders to two graphs in all three. Heads, neurons and layers
of all models are pruned. Outputs are verified against torch or llama.cpp. The exit code is 1 if a row is worse than in
`benchmarks/results/architectures.json`; `--write` updates the rows there.
"""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import cut_architectures
import gguf_families
import onnx_decoders
import onnx_encoder_decoders
import onnx_encoders
import torch
import typer
from tiny_decoders import DECODERS
from tiny_encoder_decoders import PAIRS
from tiny_encoders import IMAGES, MORE_TEXTS, TEXTS
from trials import Group

from compress.formats.quiet_output import quiet_libraries

RESULTS = Path(__file__).parents[1] / "results" / "architectures.json"
_ENCODER_TRIALS = (onnx_encoders.TRIAL, cut_architectures.TRIAL)
GROUPS = {
    "decoders": Group("Decoders", tuple(DECODERS), (onnx_decoders.TRIAL, gguf_families.TRIAL, cut_architectures.TRIAL)),
    "texts": Group("Text encoders", (*TEXTS, *MORE_TEXTS), _ENCODER_TRIALS),
    "pairs": Group("Encoder-decoders", tuple(PAIRS), (onnx_encoder_decoders.TRIAL, cut_architectures.PAIR_TRIAL)),
    "images": Group("Image models", tuple(IMAGES), _ENCODER_TRIALS),
}
Record = dict[str, dict[str, list[str]]]
"""Group, then model, then the row."""


def recorded() -> Record:
    """Return the stored rows."""
    tables = json.loads(RESULTS.read_text())["tables"] if RESULTS.is_file() else []
    known = {table["title"]: {row[0]: row for row in table["rows"]} for table in tables}
    return {key: known.get(group.title, {}) for key, group in GROUPS.items()}


def write(record: Record) -> None:
    """Write the rows into the results file."""
    page = {
        "title": "What works for which architecture",
        "order": 1,
        "page": "architectures.md",
        "command": "python benchmarks/architectures --write",
        "machine": "tiny models with random weights; the kind of processor does not matter",
        "measured": datetime.now(UTC).date().isoformat(),
        "text": "*ONNX, 4 bits*: largest difference of a logit from torch. *attention*: fused operators. *GGUF*: "
        "llama.cpp's family, if logits and tokens equal those of transformers. *INT8 error*: RMS error divided by "
        "the standard deviation of the logits. *INT8 size*: INT8 bytes / fp32 bytes. *pruned heads, neurons, "
        "layers*: 'yes' if the pruned model equals the original with those weights set to zero.",
        "tables": [
            {
                "title": group.title,
                "columns": group.columns,
                "rows": (rows := [record[key][name] for name in group.names if name in record[key]]),
                "notes": [group.summary(rows)],
            }
            for key, group in GROUPS.items()
        ],
    }
    RESULTS.write_text(json.dumps(page, indent=1) + "\n")


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Models; default: all.")] = None,
    group: Annotated[list[str] | None, typer.Option(help=f"{', '.join(GROUPS)}; default: all.")] = None,
    store: Annotated[bool, typer.Option("--write", help="Write the rows into benchmarks/results.")] = False,
) -> None:
    """Print a row for each model."""
    torch.set_num_threads(1)
    quiet_libraries()
    recorded_rows, record, worse = recorded(), recorded(), []
    for key in group or GROUPS:
        models = GROUPS[key]
        selected = [name for name in models.names if not names or name in names]
        if not selected:
            continue
        typer.echo(f"\n| {' | '.join(models.columns)} | seconds |\n|{'---|' * (len(models.columns) + 1)}")
        for name in selected:
            started = time.perf_counter()
            row = record[key][name] = models.row(name)
            typer.echo(f"| {' | '.join(row)} | {time.perf_counter() - started:.0f} |")
            if name in recorded_rows[key]:
                worse += [f"{name} ({column})" for column in models.worse(recorded_rows[key][name], row)]
            if store:
                write(record)
        typer.echo(f"\n{models.summary([record[key][name] for name in selected])}")
    typer.echo(f"Worse than stored: {', '.join(worse)}." if worse else "No row is worse than stored.")
    raise typer.Exit(1 if worse else 0)


if __name__ == "__main__":
    typer.run(main)

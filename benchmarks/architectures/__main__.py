"""What works for which architecture: tiny models with random weights, tried one by one.

    python benchmarks/architectures [NAMES...] [--group decoders] [--write]

Decoders become one ONNX graph with a cache, in fp32 and in 4 bits, and a GGUF file; encoders and image models an ONNX
graph and INT8; encoders with decoders two graphs, in all three; of all of them heads, neurons and layers are cut. Each
is proven against torch or llama.cpp. Exits with 1 where a row is worse than in `benchmarks/results/architectures.json`;
`--write` puts the rows there.
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
    """The rows that are committed."""
    tables = json.loads(RESULTS.read_text())["tables"] if RESULTS.is_file() else []
    known = {table["title"]: {row[0]: row for row in table["rows"]} for table in tables}
    return {key: known.get(group.title, {}) for key, group in GROUPS.items()}


def write(record: Record) -> None:
    """Put the rows where the page is made from."""
    about = {
        "title": "What works for which architecture",
        "order": 1,
        "page": "architectures.md",
        "command": "python benchmarks/architectures --write",
        "machine": "any processor: tiny models with random weights",
        "measured": datetime.now(UTC).date().isoformat(),
        "text": "ONNX, 4 bits: largest difference of a logit from torch. GGUF: llama.cpp's name of the family, where "
        "its logits and tokens are transformers' own. INT8: its error as a share of the spread of the logits, and its "
        "bytes over those of fp32. A cut model answers as the whole one with zeros in place of what went.",
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
    RESULTS.write_text(json.dumps(about, indent=1) + "\n")


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Models; default: all.")] = None,
    group: Annotated[list[str] | None, typer.Option(help=f"{', '.join(GROUPS)}; default: all.")] = None,
    keep: Annotated[bool, typer.Option("--write", help="write the rows into benchmarks/results")] = False,
) -> None:
    """Print a row for each model."""
    torch.set_num_threads(1)
    quiet_libraries()
    recorded_rows, record, worse = recorded(), recorded(), []
    for key in group or GROUPS:
        chosen = GROUPS[key]
        tried = [name for name in chosen.names if not names or name in names]
        if not tried:
            continue
        typer.echo(f"\n| {' | '.join(chosen.columns)} | seconds |\n|{'---|' * (len(chosen.columns) + 1)}")
        for name in tried:
            started = time.perf_counter()
            row = record[key][name] = chosen.row(name)
            typer.echo(f"| {' | '.join(row)} | {time.perf_counter() - started:.0f} |")
            if name in recorded_rows[key]:
                worse += [f"{name} ({column})" for column in chosen.worse(recorded_rows[key][name], row)]
            if keep:
                write(record)
        typer.echo(f"\n{chosen.summary([record[key][name] for name in tried])}")
    typer.echo(f"Worse than it was: {', '.join(worse)}." if worse else "None is worse than it was.")
    raise typer.Exit(1 if worse else 0)


if __name__ == "__main__":
    typer.run(main)

"""Peak memory and time of a stage that processes one block at a time, on Llama-shaped models of several sizes.

    python benchmarks/quantizer_memory.py 3B                                             gptq
    python benchmarks/quantizer_memory.py 3B --stage prune_decoder --set feed_forward=0.25
    python benchmarks/quantizer_memory.py 3B --stage block_qat --set epochs=1 held_out=2

Each size runs in its own process. The time per parameter is processor time, which depends less on other processes than
wall time. The models have random bfloat16 weights and are written in shards; the 3B model takes 6.4 GB of disk, and its
result 3 GB.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, int]] = {
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "vocab_size": 49152},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
    "3B": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
           "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip
"""Shapes of SmolLM2-135M, Llama 3.2 1B and Llama 3.2 3B."""
SHARD_BYTES = 1_000_000_000


def main() -> None:
    """Measure each size and print a line for it, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sizes", nargs="*", help=f"of: {', '.join(SHAPES)} (default: all)")
    parser.add_argument("--stage", default="gptq", choices=("gptq", "block_qat", "prune_decoder", "sparsify_decoder"))
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=JSON", help="fields of the stage")
    parser.add_argument("--folder", type=Path, help="folder for the models (default: a temporary folder)")
    parser.add_argument("--json", action="store_true", help="write JSON")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := sorted(set(options.sizes) - set(SHAPES)):
        parser.error(f"{unknown[0]!r} is not one of {', '.join(SHAPES)}")
    changes = dict(entry.split("=", 1) for entry in options.set)
    fields = {"samples": options.samples, "sequence_length": options.sequence_length}
    fields |= {name: json.loads(value) for name, value in changes.items()}
    if options.measure:
        sys.stdout.write(json.dumps(measure(options.measure, options.stage, fields)))
        return
    rows = []
    for size in options.sizes or SHAPES:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            parameters = write_model(Path(folder), SHAPES[size])
            rows.append({"size": size, "parameters": parameters} | measure_in_child(Path(folder), sys.argv[1:]))
        if not options.json:
            sys.stdout.write(format_row(rows[-1]))
            sys.stdout.flush()
    if options.json:
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")


def format_row(row: dict[str, Any]) -> str:
    return (
        f"{row['size']:>5} {row['parameters'] / 1e6:7.0f}M parameters  peak {row['peak_rss_bytes'] / 1e9:5.2f} GB "
        f"(imports only {row['imports_rss_bytes'] / 1e9:.2f}, a block in float32 {row['block_bytes'] / 1e9:.2f})  "
        f"{row['seconds']:7.1f} s; {row['cpu_seconds']:7.1f} s of processor time, "
        f"{row['cpu_seconds'] / row['parameters'] * 1e9:5.0f} ns per parameter\n"
    )


def measure_in_child(folder: Path, arguments: list[str]) -> dict[str, Any]:
    """Run `measure` in a new process, since the peak memory of a process never falls."""
    command = [sys.executable, __file__, *arguments, "--measure", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def measure(folder: Path, stage: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Run the stage on the model in ``folder`` and return its time and memory."""
    import pyarrow as pa
    import torch

    from compress.data.dataset import Dataset
    from compress.models.checkpoint import Checkpoint
    from compress.stages.base import Context
    from compress.stages.blockwise.blockwise_model import build_blockwise_model
    from compress.stages.registry import STAGES
    from compress.tasks.registry import TASKS
    from compress.utils.progress import SilentProgress

    class TimedNotes(SilentProgress):
        def note(self, message: str) -> None:
            sys.stderr.write(f"{time.perf_counter() - start:7.1f} s {peak_bytes() / 1e9:5.2f} GB  {message}\n")

    task = TASKS["text-generation"]
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 123, (fields["samples"] * (fields["sequence_length"] + 1),), generator=generator)
    rows = pa.table({"text": [bytes(letters.tolist()).decode()]})
    data = Dataset(task.columns, {"train": rows}, ())

    def no_earlier_model(label: str) -> Any:
        raise LookupError(label)

    decoder = build_blockwise_model(Checkpoint(folder))
    block = sum(parameter.numel() for parameter in decoder.blocks[0].parameters())
    del decoder
    context = Context(
        task, data, fields["sequence_length"], 0, TimedNotes(), no_earlier_model, Path, folder / "scratch"
    )
    imports, start, cpu_start = peak_bytes(), time.perf_counter(), time.process_time()
    STAGES[stage].model_validate({"kind": stage, **fields}).run(Checkpoint(folder), context)
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu_start,
        "peak_rss_bytes": peak_bytes(),
        "imports_rss_bytes": imports,
        "block_bytes": 4 * block,
        "fields": fields,
    }


def peak_bytes() -> int:
    """Return the peak resident memory of this process, including pages of mapped files."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def write_model(folder: Path, shape: dict[str, int]) -> int:
    """Write a Llama model with random weights and a byte-level tokenizer; return its parameter count."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    from compress.models.checkpoint import write_shards

    config = LlamaConfig(**shape, tie_word_embeddings=True, dtype="bfloat16", bos_token_id=0, eos_token_id=1)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    write_shards(folder, random_tensors(config), SHARD_BYTES)
    return (
        sum(rows * columns for _, rows, columns in matrices(config))
        + (2 * shape["num_hidden_layers"] + 1) * shape["hidden_size"]
    )


def matrices(config: Any) -> Iterator[tuple[str, int, int]]:
    """Yield name, rows and columns of every matrix."""
    hidden, middle = config.hidden_size, config.intermediate_size
    keys = config.num_key_value_heads * hidden // config.num_attention_heads
    yield "model.embed_tokens", config.vocab_size, hidden
    for index in range(config.num_hidden_layers):
        prefix = f"model.layers.{index}"
        for name, rows, columns in (
            ("self_attn.q_proj", hidden, hidden),
            ("self_attn.k_proj", keys, hidden),
            ("self_attn.v_proj", keys, hidden),
            ("self_attn.o_proj", hidden, hidden),
            ("mlp.gate_proj", middle, hidden),
            ("mlp.up_proj", middle, hidden),
            ("mlp.down_proj", hidden, middle),
        ):
            yield f"{prefix}.{name}", rows, columns


def random_tensors(config: Any) -> Iterator[tuple[str, Any]]:
    """Yield every tensor."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for name, rows, columns in matrices(config):
        # Variance 1 / inputs keeps the scale of the activations.
        scale = 0.02 if "embed" in name else columns**-0.5
        weight = torch.empty(rows, columns, dtype=torch.bfloat16)
        for part in weight.split(8192):
            part.copy_(torch.randn(part.shape, generator=generator) * scale)
        yield f"{name}.weight", weight
    for index in range(config.num_hidden_layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{index}.{norm}.weight", torch.ones(config.hidden_size, dtype=torch.bfloat16)
    yield "model.norm.weight", torch.ones(config.hidden_size, dtype=torch.bfloat16)


if __name__ == "__main__":
    main()

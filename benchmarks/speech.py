"""Word error rate, size and latency of quantized Whisper, on clean and noisy recordings.

    python benchmarks/speech.py --output speech.json        # 20 minutes on two idle cores

Whisper tiny.en as a torch model, as fp32 ONNX graphs, and with each kind of quantization, all on the same recordings.
The ONNX models are timed in one interleaved session. `--skip-noise` and `--skip-timing` skip a part; `--clips N` limits
the number of recordings.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import wave
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
from noise import add_noise, babble, white_noise

from compress.benchmark.session import measure_side_by_side
from compress.data.config import DataConfig
from compress.data.dataset import Dataset, load_dataset
from compress.data.media import content
from compress.data.samples.fetch import sample_directory
from compress.evaluation.evaluate import encode_for_model, predict
from compress.formats.onnx.decoder import export_encoder_decoder
from compress.formats.onnx.int8.dynamic import quantize_products
from compress.formats.onnx.model import quantized_name, weight_only_name
from compress.formats.onnx.weight_only_quantization import WeightOnlySettings, quantize_matrices
from compress.formats.quiet_output import quiet_libraries
from compress.formats.targets import TARGETS
from compress.models.checkpoint import Checkpoint
from compress.recipe.recipe import Benchmark
from compress.results.report import Measurement
from compress.tasks.registry import TASKS
from compress.tasks.task import Examples
from compress.utils.progress import SilentProgress
from compress.utils.storage import size_bytes

TASK = TASKS["automatic-speech-recognition"]
CPU = TARGETS["cpu"]
RATIOS_DB = (20.0, 10.0, 5.0)
RATE = 16_000
BASELINE, SHIPPED = "fp32", "int8 + 4-bit"
MODELS = {
    BASELINE: ("fp32", "fp32"),
    "dynamic int8": ("int8", "int8"),
    "8-bit weights": ("8", "8"),
    "4-bit weights": ("4", "4"),
    "int8 + 8-bit": ("int8", "8"),
    SHIPPED: ("int8", "4"),
    "int8 + 4-bit, zero points": ("int8", "4 with zero points"),
    "int8 + 4-bit, blocks of 16": ("int8", "4 in blocks of 16"),
}
"""Formats of encoder and decoder; `SHIPPED` is that of `recipes/whisper-int8.yaml`."""
IN_NOISE = (BASELINE, *(name for name in MODELS if name.startswith(SHIPPED)))


def main() -> None:
    """Measure and print tables."""
    options = _options()
    quiet_libraries()
    data = {name: load_recordings(name) for name in ("librivox", "prompts-audio")}
    tests = {name: dataset.split("test").slice(0, options.clips) for name, dataset in data.items()}
    with tempfile.TemporaryDirectory() as scratch:
        folders = _write_models(Path(scratch))
        rows = _measure_quality(folders, tests)
        rows += [] if options.skip_noise else _measure_in_noise(folders, tests, data["prompts-audio"].split("train"))
        notes: list[str] = []
        if not options.skip_timing:
            timed, notes = _measure_latency(folders, tests["prompts-audio"], options.seconds)
            rows += timed
    sys.stdout.write("\n".join(notes) + "\n")
    if options.output:
        options.output.write_text(json.dumps({"rows": [row.model_dump() for row in rows], "notes": notes}, indent=1))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=60, help="test recordings of prompts-audio")
    parser.add_argument("--seconds", type=float, default=30, help="time budget of a model in the timed session")
    parser.add_argument("--skip-noise", action="store_true")
    parser.add_argument("--skip-timing", action="store_true")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def load_recordings(name: str) -> Dataset:
    """Load a sample data set of recordings."""
    splits = {"test": "test"} if name == "librivox" else {split: split for split in ("train", "test")}
    return load_dataset(DataConfig(source=f"sample:{name}", splits=splits), TASK.columns, Path(), SilentProgress())


def _write_models(scratch: Path) -> dict[str, Path]:
    """Write every variant of the model; return the folders by name."""
    model = export_encoder_decoder(Checkpoint(sample_directory("whisper-tiny-en")))
    encoders, decoders = (_variants(name, graph) for name, graph in model.graphs.items())
    folders = {}
    for number, (name, (encoder, decoder)) in enumerate(MODELS.items()):
        folders[name] = scratch / str(number)
        folders[name].mkdir()
        model.with_graphs(dict([encoders[encoder], decoders[decoder]])).save(folders[name])
    return folders


def _variants(name: str, graph: onnx.ModelProto) -> dict[str, tuple[str, onnx.ModelProto]]:
    """Return file name and graph of each format, as the stages `onnx_int8` and `onnx_weight_only` write them."""
    products = quantize_products(graph, per_channel=True, reduce_range=False)
    return {
        "fp32": (name, graph),
        "int8": (quantized_name(name), quantize_matrices(products, WeightOnlySettings(8, 32), only_tied=True)[0]),
        "8": (weight_only_name(name, 8), quantize_matrices(graph, WeightOnlySettings(8, 32))[0]),
        "4": (weight_only_name(name, 4), quantize_matrices(graph, WeightOnlySettings(4, 32))[0]),
        "4 with zero points": (
            weight_only_name(name, 4),
            quantize_matrices(graph, WeightOnlySettings(4, 32, symmetric=False))[0],
        ),
        "4 in blocks of 16": (weight_only_name(name, 4), quantize_matrices(graph, WeightOnlySettings(4, 16))[0]),
    }


def _measure_quality(folders: Mapping[str, Path], tests: Mapping[str, pa.Table]) -> list[Measurement]:
    rows = []
    for data, table in tests.items():
        _print(f"\n{data}: {len(table)} recordings", "WER", "as written", "errors / words", "same as fp32", "size")
        reference = None
        for name, folder in folders.items():
            predictions = predict(folder, TASK, encode_recordings(folder, table), CPU, 2, SilentProgress(), name)
            reference = predictions.kept if reference is None else reference
            measurements = TASK.measure(predictions.kept, predictions.labels, name, CPU.name)
            measurements += TASK.compare(predictions.kept, reference, name, CPU.name)
            _print_quality(name, measurements, size_bytes(folder))
            rows += [_label(row, data) for row in measurements]
        transcripts = _torch_transcripts(encode_recordings(folders[BASELINE], table))
        same = float(np.mean(transcripts == reference["transcripts"])) if reference is not None else 0.0
        measurements = TASK.measure(
            {"transcripts": transcripts}, np.array(table["text"].to_pylist()), "torch", CPU.name
        )
        _print_quality("torch fp32", measurements, 0, same)
        rows += [_label(row, data) for row in measurements]
    return rows


def encode_recordings(folder: Path, table: pa.Table) -> Examples:
    """Encode recordings for the model in ``folder``."""
    return encode_for_model(folder, TASK, table, max_length=448)


def _torch_transcripts(examples: Examples) -> np.ndarray:
    """Transcribe recordings with transformers' greedy generation, window by window."""
    import torch

    folder = sample_directory("whisper-tiny-en")
    model = TASK.load(folder, None, trust_remote_code=False)
    transcripts = []
    for example in examples.inputs:
        features = example["input_features"]
        windows = np.split(features, features.shape[-1] // 3000, axis=-1)
        ids = [
            token for window in windows for token in model.module.generate(torch.from_numpy(window[None]))[0].tolist()
        ]
        transcripts.append(model.processor.tokenizer.decode(ids, skip_special_tokens=True).strip())
    return np.array(transcripts)


def _measure_in_noise(
    folders: Mapping[str, Path], tests: Mapping[str, pa.Table], voices: pa.Table
) -> list[Measurement]:
    babble_voices = [_samples(value) for value in voices["audio"].to_pylist()[:40]]
    rows = []
    _print("\nin noise", *IN_NOISE, width=28)
    for data, table in tests.items():
        for kind in ("white", "babble"):
            for ratio in RATIOS_DB:
                noisy = add_noise_to_recordings(table, kind, ratio, babble_voices)
                rates = []
                for name in IN_NOISE:
                    predictions = predict(
                        folders[name], TASK, encode_recordings(folders[name], noisy), CPU, 2, SilentProgress(), name
                    )
                    measurements = TASK.measure(predictions.kept, predictions.labels, name, CPU.name)
                    rates.append(measurements[0].value)
                    rows += [_label(row, f"{data},{kind},{ratio:g}dB") for row in measurements]
                _print(f"{data}, {kind}, {ratio:g} dB", *(f"{rate:.2%}" for rate in rates), width=28)
    return rows


def add_noise_to_recordings(table: pa.Table, kind: str, ratio: float, voices: Sequence[np.ndarray]) -> pa.Table:
    """Return the rows with noise added to their recordings; each row has its own seed."""
    values = []
    for seed, value in enumerate(table["audio"].to_pylist()):
        samples = _samples(value)
        noise = white_noise(len(samples), seed) if kind == "white" else babble(voices, len(samples), seed)
        values.append({"bytes": _wav(add_noise(samples, noise, ratio)), "path": None, "sha256": ""})
    return pa.table({"audio": pa.array(values, table.schema.field("audio").type), "text": table["text"]})


def _samples(value: Mapping[str, Any]) -> np.ndarray:
    with wave.open(io.BytesIO(content(value))) as file:
        assert (file.getframerate(), file.getsampwidth(), file.getnchannels()) == (RATE, 2, 1)
        return np.frombuffer(file.readframes(file.getnframes()), np.int16).astype(np.float32) / 2**15


def _wav(samples: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((np.clip(samples, -1, 1) * (2**15 - 1)).astype(np.int16).tobytes())
    return buffer.getvalue()


def _measure_latency(
    folders: Mapping[str, Path], table: pa.Table, seconds: float
) -> tuple[list[Measurement], list[str]]:
    examples = {name: encode_recordings(folder, table) for name, folder in folders.items()}
    settings = Benchmark(threads=2, batched=False, seconds=seconds, examples=max(8, len(table)))
    timings = measure_side_by_side(folders, examples, CPU, settings, BASELINE, SilentProgress(), seed=0)
    by_name = {(row.model, row.metric): row for row in timings.measurements}
    _print("\ntime", "latency", "speed-up", "real-time factor", "peak memory", "")
    for name in folders:
        latency, speedup, factor, memory = (
            by_name[name, metric] for metric in ("latency_ms", "speedup", "real_time_factor", "peak_memory_bytes")
        )
        interval = f" ({speedup.low:.2f}-{speedup.high:.2f})" if speedup.low and speedup.high else ""
        shown = (f"{latency.value:.0f} ms", f"{speedup.value:.2f}x{interval}", f"{factor.value:.4f}")
        _print(name, *shown, f"{memory.value / 1e6:.0f} MB", "")
    return timings.measurements, timings.notes


def _label(row: Measurement, data: str) -> Measurement:
    return row.model_copy(update={"metric": f"{row.metric}[{data}]"})


def _print_quality(name: str, rows: Sequence[Measurement], size: int, same: float | None = None) -> None:
    rows_by_metric = {row.metric: row for row in rows}
    rate, written = rows_by_metric["word_error_rate"], rows_by_metric["word_error_rate_as_written"]
    share = rows_by_metric["agreement"].value if same is None else same
    counts = f"{rows_by_metric['word_errors'].value:.0f} / {rows_by_metric['words'].value:.0f}"
    interval = f"{rate.value:.2%} ({rate.low:.1%}-{rate.high:.1%})"
    _print(name, interval, f"{written.value:.2%}", counts, f"{share:.1%}", f"{size / 1e6:.1f} MB" if size else "")


def _print(name: str, *cells: str, width: int = 18) -> None:
    first, *others = cells
    sys.stdout.write(f"{name:34s}{first:>24s}" + "".join(f"{cell:>{width}s}" for cell in others) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()

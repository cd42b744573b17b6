"""How far each way of writing Whisper moves its answers: a finer measure than words that go wrong, on training data.

    python benchmarks/speech_divergence.py                      # a quarter of an hour on two idle cores
    python benchmarks/speech_divergence.py --clips 14 --calibration 16

Every model reads along what fp32 says of recordings in quiet, and the Kullback-Leibler divergence of its next token
from fp32's is taken, in nats a token; in quiet, and with white noise at 5 dB. The recordings are of the training split,
so that what is chosen by it is not chosen on the test.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import pyarrow as pa
import speech
from scipy.special import log_softmax

from compress.data.samples.fetch import sample_directory
from compress.formats.generation.speech_recognition import Transcriber, read_rules
from compress.formats.onnx.decoder import export_encoder_decoder
from compress.formats.onnx.int8.dynamic import quantize_products
from compress.formats.onnx.int8.settings import Int8Options
from compress.formats.onnx.int8.static import StaticQuantizer
from compress.formats.onnx.model import OnnxModel, find_graphs
from compress.formats.onnx.weight_only_quantization import WeightOnlySettings, quantize_matrices
from compress.formats.quiet_output import quiet_libraries
from compress.formats.runtime import Session, get_runtime
from compress.models.checkpoint import Checkpoint
from compress.models.processor import load_processor

RATIO_DB = 5.0
Windows = Sequence[np.ndarray]


def main() -> None:
    """Print a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=40, help="training recordings that are read along")
    parser.add_argument("--calibration", type=int, default=32, help="others, for static ranges")
    options = parser.parse_args()
    quiet_libraries()
    whole = export_encoder_decoder(Checkpoint(sample_directory("whisper-tiny-en")))
    rows = speech._data("prompts-audio").split("train")
    with tempfile.TemporaryDirectory() as name:
        whole.save(Path(name))
        heard = rows.slice(0, options.clips)
        noisy = speech._noisy(heard, "white", RATIO_DB, [])
        recordings = {"quiet": _windows(Path(name), heard), "5 dB": _windows(Path(name), noisy)}
        others = _windows(Path(name), rows.slice(options.clips, options.calibration))
        encoder, decoder = _open(whole)
        transcriber = Transcriber(encoder, decoder, Path(name))
        prompt = read_rules(Path(name)).prompt
        texts = [[*prompt, *transcriber.tokens(window)] for window in recordings["quiet"]]
    reference = {kind: _read(encoder, decoder, windows, texts) for kind, windows in recordings.items()}
    for label, model in _ways(whole, others).items():
        pair = _open(model)
        log_probabilities = [
            _divergence(reference[kind], _read(*pair, recordings[kind], texts), len(prompt) - 1) for kind in recordings
        ]
        size = sum(graph.ByteSize() for graph in model.graphs.values())
        cells = "".join(f"  {kind} {value:.4f}" for kind, value in zip(recordings, log_probabilities, strict=True))
        sys.stdout.write(f"{label:40s}{cells}  {size / 1e6:.1f} MB\n")
        sys.stdout.flush()


def _ways(whole: OnnxModel, calibration: Windows) -> Mapping[str, OnnxModel]:
    (encoder, first), (decoder, second) = whole.graphs.items()

    def made(**changed: onnx.ModelProto) -> OnnxModel:
        return whole.with_graphs({encoder: changed.get("encoder", first), decoder: changed.get("decoder", second)})

    def static() -> onnx.ModelProto:
        feeds = [{"input_features": window[np.newaxis]} for window in calibration]
        return StaticQuantizer(first, feeds, Int8Options(reduce_range=False, calibration_method="mse")).quantize()

    dynamic = quantize_products(first, per_channel=True, reduce_range=False)
    few = {bits: quantize_matrices(second, WeightOnlySettings(bits, 32))[0] for bits in (4, 8)}
    table = {bits: quantize_matrices(second, WeightOnlySettings(bits, 32), only_tied=True)[0] for bits in (4, 8)}
    return {
        "encoder in dynamic INT8": made(encoder=dynamic),
        "encoder in static INT8": made(encoder=static()),
        "decoder in 8 bits": made(decoder=few[8]),
        "decoder in 4 bits": made(decoder=few[4]),
        "decoder in 4 bits with zero points": made(
            decoder=quantize_matrices(second, WeightOnlySettings(4, 32, symmetric=False))[0]
        ),
        "decoder in 4 bits, blocks of 16": made(decoder=quantize_matrices(second, WeightOnlySettings(4, 16))[0]),
        "decoder in 8 bits, its table in 4": made(decoder=quantize_matrices(table[4], WeightOnlySettings(8, 32))[0]),
        "decoder in 4 bits, its table in 8": made(decoder=quantize_matrices(table[8], WeightOnlySettings(4, 32))[0]),
        "both as the recipe has them": made(encoder=dynamic, decoder=few[4]),
    }


def _windows(folder: Path, rows: pa.Table) -> Windows:
    """The first window of each recording, [features, frames]."""
    frames = load_processor(folder).feature_extractor.nb_max_frames
    return [example["input_features"][:, :frames] for example in speech._encoded(folder, rows).inputs]


def _open(model: OnnxModel) -> tuple[Session, Session]:
    with tempfile.TemporaryDirectory() as name:
        model.save(Path(name))
        encoder, decoder = (get_runtime("onnxruntime").open(graph, speech.CPU, 2) for graph in find_graphs(Path(name)))
    return encoder, decoder


def _read(encoder: Session, decoder: Session, windows: Windows, texts: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Logarithms of the probabilities of what may follow each token, [tokens, vocabulary] for each recording."""
    log_probabilities = []
    for window, text in zip(windows, texts, strict=True):
        audio = encoder.predict({"input_features": window[np.newaxis]})["last_hidden_state"]
        feed = {"input_ids": np.array([text]), "encoder_hidden_states": audio, "use_cache_branch": np.array([False])}
        past = {name: kind.shape for name, kind in decoder.input_types.items() if name.startswith("past_key_values.")}
        empty = {name: np.zeros((1, shape[1], 0, shape[3]), np.float32) for name, shape in past.items()}
        log_probabilities.append(log_softmax(decoder.predict({**feed, **empty})["logits"][0], axis=-1))
    return log_probabilities


def _divergence(expected: Sequence[np.ndarray], found: Sequence[np.ndarray], start: int) -> float:
    """Mean over the tokens from place ``start`` on, in nats."""
    divergences = [
        (np.exp(p[start:]) * (p[start:] - q[start:])).sum(axis=-1) for p, q in zip(expected, found, strict=True)
    ]
    return float(np.concatenate(divergences).mean())


if __name__ == "__main__":
    main()

"""KL divergence of quantized Whisper models from fp32 on training recordings, a finer measure than the word error rate.

    python benchmarks/speech_divergence.py                      # 15 minutes on two idle cores
    python benchmarks/speech_divergence.py --clips 14 --calibration 16

Every model gets fp32's transcripts of clean recordings (teacher forcing); the divergence of its next-token distribution
from that of fp32 is averaged over tokens, in nats, on clean recordings and with white noise at 5 dB. The recordings are
from the training split, so that no variant is selected on the test split.
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
    """Print a line for each variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=40, help="training recordings")
    parser.add_argument("--calibration", type=int, default=32, help="other recordings, for static calibration")
    options = parser.parse_args()
    quiet_libraries()
    model = export_encoder_decoder(Checkpoint(sample_directory("whisper-tiny-en")))
    rows = speech.load_recordings("prompts-audio").split("train")
    with tempfile.TemporaryDirectory() as name:
        model.save(Path(name))
        clean = rows.slice(0, options.clips)
        noisy = speech.add_noise_to_recordings(clean, "white", RATIO_DB, [])
        recordings = {"quiet": _windows(Path(name), clean), "5 dB": _windows(Path(name), noisy)}
        calibration = _windows(Path(name), rows.slice(options.clips, options.calibration))
        encoder, decoder = _open(model)
        transcriber = Transcriber(encoder, decoder, Path(name))
        prompt = read_rules(Path(name)).prompt
        texts = [[*prompt, *transcriber.tokens(window)] for window in recordings["quiet"]]
    reference = {kind: _log_probabilities(encoder, decoder, windows, texts) for kind, windows in recordings.items()}
    for label, variant in _variants(model, calibration).items():
        sessions = _open(variant)
        divergences = [
            _divergence(reference[kind], _log_probabilities(*sessions, recordings[kind], texts), len(prompt) - 1)
            for kind in recordings
        ]
        size = sum(graph.ByteSize() for graph in variant.graphs.values())
        cells = "".join(f"  {kind} {value:.4f}" for kind, value in zip(recordings, divergences, strict=True))
        sys.stdout.write(f"{label:40s}{cells}  {size / 1e6:.1f} MB\n")
        sys.stdout.flush()


def _variants(model: OnnxModel, calibration: Windows) -> Mapping[str, OnnxModel]:
    (encoder, float_encoder), (decoder, float_decoder) = model.graphs.items()

    def variant(**changed: onnx.ModelProto) -> OnnxModel:
        return model.with_graphs(
            {encoder: changed.get("encoder", float_encoder), decoder: changed.get("decoder", float_decoder)}
        )

    def static() -> onnx.ModelProto:
        feeds = [{"input_features": window[np.newaxis]} for window in calibration]
        return StaticQuantizer(
            float_encoder, feeds, Int8Options(reduce_range=False, calibration_method="mse")
        ).quantize()

    dynamic = quantize_products(float_encoder, per_channel=True, reduce_range=False)
    by_bits = {bits: quantize_matrices(float_decoder, WeightOnlySettings(bits, 32))[0] for bits in (4, 8)}
    table = {bits: quantize_matrices(float_decoder, WeightOnlySettings(bits, 32), only_tied=True)[0] for bits in (4, 8)}
    return {
        "encoder in dynamic INT8": variant(encoder=dynamic),
        "encoder in static INT8": variant(encoder=static()),
        "decoder in 8 bits": variant(decoder=by_bits[8]),
        "decoder in 4 bits": variant(decoder=by_bits[4]),
        "decoder in 4 bits with zero points": variant(
            decoder=quantize_matrices(float_decoder, WeightOnlySettings(4, 32, symmetric=False))[0]
        ),
        "decoder in 4 bits, blocks of 16": variant(
            decoder=quantize_matrices(float_decoder, WeightOnlySettings(4, 16))[0]
        ),
        "decoder in 8 bits, embeddings in 4": variant(
            decoder=quantize_matrices(table[4], WeightOnlySettings(8, 32))[0]
        ),
        "decoder in 4 bits, embeddings in 8": variant(
            decoder=quantize_matrices(table[8], WeightOnlySettings(4, 32))[0]
        ),
        "encoder and decoder of the recipe": variant(encoder=dynamic, decoder=by_bits[4]),
    }


def _windows(folder: Path, rows: pa.Table) -> Windows:
    """Return the first window of each recording, [features, frames]."""
    frames = load_processor(folder).feature_extractor.nb_max_frames
    return [example["input_features"][:, :frames] for example in speech.encode_recordings(folder, rows).inputs]


def _open(model: OnnxModel) -> tuple[Session, Session]:
    with tempfile.TemporaryDirectory() as name:
        model.save(Path(name))
        encoder, decoder = (get_runtime("onnxruntime").open(graph, speech.CPU, 2) for graph in find_graphs(Path(name)))
    return encoder, decoder


def _log_probabilities(
    encoder: Session, decoder: Session, windows: Windows, texts: Sequence[Sequence[int]]
) -> list[np.ndarray]:
    """Return next-token log probabilities [tokens, vocabulary] for each recording."""
    results = []
    for window, text in zip(windows, texts, strict=True):
        audio = encoder.predict({"input_features": window[np.newaxis]})["last_hidden_state"]
        feed = {"input_ids": np.array([text]), "encoder_hidden_states": audio, "use_cache_branch": np.array([False])}
        past = {name: kind.shape for name, kind in decoder.input_types.items() if name.startswith("past_key_values.")}
        empty = {name: np.zeros((1, shape[1], 0, shape[3]), np.float32) for name, shape in past.items()}
        results.append(log_softmax(decoder.predict({**feed, **empty})["logits"][0], axis=-1))
    return results


def _divergence(expected: Sequence[np.ndarray], actual: Sequence[np.ndarray], start: int) -> float:
    """Return the mean KL divergence over the tokens from index ``start``, in nats."""
    divergences = [
        (np.exp(p[start:]) * (p[start:] - q[start:])).sum(axis=-1) for p, q in zip(expected, actual, strict=True)
    ]
    return float(np.concatenate(divergences).mean())


if __name__ == "__main__":
    main()

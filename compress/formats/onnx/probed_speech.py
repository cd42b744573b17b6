"""What a speech model of two graphs answers to a few recordings, for the integrity check."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from compress.checkpoints.companions import write_companions
from compress.formats.onnx.model import OnnxModel
from compress.formats.probed import Encode

_RECORDINGS = 3


def speech_logits(model: OnnxModel, encode: Encode) -> np.ndarray:
    """Logits of the first word, [recordings, vocabulary]: what follows the prompt in a recording's first window."""
    from compress.checkpoints.processor import load_processor
    from compress.formats.onnx.speech.parity import teacher_forced
    from compress.runtimes.speech_rules import read_rules

    with tempfile.TemporaryDirectory() as name:
        write_companions(Path(name), model.companions)
        processor, rules = load_processor(Path(name)), read_rules(Path(name))
    frames = processor.feature_extractor.nb_max_frames
    prompt = np.array(rules.prompt, dtype=np.int64)
    inputs = encode(processor).inputs[:_RECORDINGS]
    return np.stack([teacher_forced(model, example["input_features"][:, :frames], prompt)[-1] for example in inputs])

"""Hooks for the integrity check of an ONNX model of one graph or several."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from compress.formats.integrity import Encode, ModelInspector, Stored, answers_of, stored_arrays
from compress.formats.onnx.model import VISION, OnnxModel, all_graphs
from compress.formats.runtime import open_model
from compress.models.model import write_companions
from compress.models.pipeline_folder import image_generation_hook
from compress.models.processor import processor_of

_RECORDINGS = 3


def stored(model: OnnxModel) -> Stored:
    """Return every stored tensor of every graph, branches included, by the name of its module's weight."""
    from onnx import numpy_helper

    tensors = (
        tensor
        for model_graph in model.graphs.values()
        for graph in all_graphs(model_graph.graph)
        for tensor in graph.initializer
    )
    return stored_arrays((tensor.name, numpy_helper.to_array(tensor)) for tensor in tensors)


def logits(model: OnnxModel, encode: Encode) -> np.ndarray:
    """Return the answers of ONNX Runtime."""
    if model.is_diffusion:
        images: np.ndarray = image_generation_hook("open_onnx")(model).probe(encode(processor_of(model)))
        return images
    if model.others:
        return _first_token_logits(model, encode)
    return answers_of(open_model(model), encode(processor_of(model)))


def _first_token_logits(model: OnnxModel, encode: Encode) -> np.ndarray:
    """Return logits [examples, vocabulary] of the first token of a few outputs.

    For speech it follows the prompt in a recording's first window.
    """
    from compress.formats.generation.speech_recognition import read_rules
    from compress.formats.onnx.decoder import teacher_forced_logits
    from compress.models.processor import load_processor

    with tempfile.TemporaryDirectory() as name:
        write_companions(Path(name), model.companions)
        if next(iter(model.graphs)).startswith(VISION):
            return _next_token_logits(model, Path(name), encode)
        processor, rules = load_processor(Path(name)), read_rules(Path(name))
    if not hasattr(processor, "feature_extractor"):
        start = np.array([rules.prompt[0]])
        names = ("input_ids", "attention_mask")
        texts = [{name: example[name] for name in names} for example in encode(processor).inputs]
        return np.stack([teacher_forced_logits(model, text, start)[-1] for text in texts[:_RECORDINGS]])
    frames = processor.feature_extractor.nb_max_frames
    prompt = np.array(rules.prompt, dtype=np.int64)
    inputs = encode(processor).inputs[:_RECORDINGS]
    windows = [{"input_features": example["input_features"][:, :frames]} for example in inputs]
    return np.stack([teacher_forced_logits(model, window, prompt)[-1] for window in windows])


def _next_token_logits(model: OnnxModel, folder: Path, encode: Encode) -> np.ndarray:
    """Return logits [examples, vocabulary] of the token after a few images with their texts."""
    from compress.formats.generation.image_text import IDS, PIXELS, read_rules
    from compress.formats.onnx.decoder import open_image_reader
    from compress.models.processor import load_processor

    examples, graphs = encode(load_processor(folder)), open_image_reader(model, read_rules(folder).image)
    batches = (examples.batch([index]) for index in range(min(len(examples), _RECORDINGS)))
    return np.concatenate([graphs.begin(batch[IDS], batch[PIXELS])[:, -1] for batch in batches])


PROBED = ModelInspector(stored, logits)

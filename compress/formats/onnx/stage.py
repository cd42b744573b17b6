"""Stage that writes a model as ONNX."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from compress.formats.onnx.model import FLOAT_GRAPH, OnnxModel
from compress.models.checkpoint import Checkpoint
from compress.models.model import TorchModel
from compress.models.pipeline_folder import image_generation_hook
from compress.stages.base import AppliesTo, Context, OutputSpec, Requirements, Stage
from compress.stages.cost_model import PlanContext, Prediction, Shape, handling, predicted
from compress.tasks.capability import (
    DESCRIBES_IMAGES,
    EMBEDS,
    EXPORTED_FROM_CHECKPOINT,
    GENERATES,
    TAKES_TEXT,
    TRANSCRIBES,
    Capabilities,
)
from compress.utils.errors import DataError

if TYPE_CHECKING:
    import numpy as np

    from compress.formats.onnx.export import ExportedGraph
    from compress.tasks.task import Examples


_BEGINNING_SECONDS, _TENSOR_SECONDS = 4.0, 0.065
"""Seconds for loading the exporter and opening a session, and per tensor for tracing and rewriting (Xeon of 2023)."""
_TRACED_ONLY = AppliesTo(excludes=frozenset({EXPORTED_FROM_CHECKPOINT}))
"""Fields that concern graphs traced from torch."""
_DECODERS_ONLY = AppliesTo(requires=frozenset({GENERATES}))
"""Fields that concern graphs of decoders, which are written node by node."""
_SPEECH, _SPOKEN_TOKENS = 2, 32
"""Number of recordings that a speech model is compared on, and of tokens of their transcripts."""
_ANSWERS = 4
"""Number of images with questions and answers that a vision-language model is compared on."""
_TEXTS, _MORE = 4, 10
"""Number of texts that an encoder-decoder is compared on, in one batch, and of tokens that it generates."""
_WINDOWS, _WINDOW_LENGTH = 2, 64
_SHAPE_EXAMPLES = 8
"""Number of examples for tracing a graph that will not be run."""


class Onnx(Stage[TorchModel, OnnxModel]):
    """ONNX with dynamic batch and length, compared with torch on real examples.

    Encoders are traced, and compared on padded batches. Decoders are written from the checkpoint, quantized or not,
    with the keys and values of earlier tokens as inputs and outputs, and compared on whole texts and token by token.
    Whisper, T5, BART and similar models become an encoder and a decoder with the names of transformers.js and optimum.
    LLaVA and similar models become a vision encoder, a token embedding and a decoder. Diffusion models become a text
    encoder, a denoiser and a decoder in the folders that optimum opens, compared at several sizes and batches.
    """

    version = 6
    packages = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime")
    # The graph is traced with training rows, and compared with torch on them.
    required_data = Requirements(splits=("train",))
    guarantees = OutputSpec(changes_weights=False)
    kind: Literal["onnx"] = "onnx"
    opset: Annotated[int | None, _TRACED_ONLY] = Field(
        None, ge=17, description="ONNX operator set of an encoder; default: the newest one that the exporter supports"
    )
    fusions: Annotated[bool, _TRACED_ONLY] = Field(
        True, description="use ONNX Runtime's fused attention and normalization operators in an encoder"
    )
    tolerance: float = Field(
        1e-3,
        gt=0,
        description="maximum absolute difference of a logit or embedding element from torch in fp32",
    )
    sentence_embedding: Annotated[
        bool, AppliesTo(frozenset({EMBEDS, TAKES_TEXT}), frozenset({EXPORTED_FROM_CHECKPOINT}))
    ] = Field(
        False,
        description="feature extraction: include pooling and later modules in the graph as a second output "
        "`sentence_embedding`; otherwise the reader must pool as `modules.json` describes",
    )
    accuracy_level: Annotated[Literal[1, 4], _DECODERS_ONLY] = Field(
        4,
        description="decoders: 4 quantizes the activations of low-bit matrix products to 8 bits per block, 1 "
        "computes in fp32",
    )
    rounding_limit: Annotated[float, _DECODERS_ONLY] = Field(
        0.2, gt=0, description="maximum effect of 8-bit activations, relative to the standard deviation of the logits"
    )
    last_token_only: Annotated[bool, _DECODERS_ONLY] = Field(
        False,
        description="decoders: return logits of the last position only, which suffices for generation but not "
        "for perplexity",
    )
    expand_on_load: Annotated[bool, _DECODERS_ONLY] = Field(
        False,
        description="decoders: dequantize 4- and 8-bit weights when the file is opened. The file stays small, memory "
        "is that of the float model, and fp32 is used; for web pages, since WebAssembly is slow at low-bit products",
    )

    def preferred_input(self, task: Capabilities) -> type[Any]:
        """Return a folder for tasks whose models are exported from checkpoints, else a module."""
        return Checkpoint if EXPORTED_FROM_CHECKPOINT in task else TorchModel
        return Requirements(splits=("train",))

    def predict(self, before: Shape | None, plan: PlanContext) -> Prediction:
        """Predict unpacked weights, and a time that grows with the number of tensors."""
        tracing = _BEGINNING_SECONDS + _TENSOR_SECONDS * before.tensors if before else 0.0
        seconds = handling(before, tracing, f", tracing and verification: {_TENSOR_SECONDS} s a tensor")
        return predicted(before, before and replace(before, packed_bytes=None), seconds)

    def run(self, model: TorchModel | Checkpoint, context: Context) -> OnnxModel:
        """Export ``model`` and compare its answers with torch. Raises `StageError` where they differ."""
        if not isinstance(model, Checkpoint) and model.generates_images:
            write_onnx = image_generation_hook("write_onnx")
            graphs: OnnxModel = write_onnx(model, context, self.opset, self.fusions, self.tolerance)
            return graphs
        if not isinstance(model, Checkpoint):
            return self._trace(model, context)
        if GENERATES in context.task.capabilities:
            return self._write(model, context)
        if DESCRIBES_IMAGES in context.task.capabilities:
            # Write and compare the three graphs of a vision-language model.
            from compress.formats.generation.image_text import read_rules
            from compress.formats.onnx.decoder import GraphSettings, export_image_reader, verify_image_reader
            from compress.models.processor import load_processor

            rows = context.data.split("train").slice(0, _ANSWERS)
            examples = context.task.encode(rows, load_processor(model.folder), None, context.max_length)
            exported = export_image_reader(model, examples, GraphSettings(), self.tolerance)
            image = read_rules(model.folder).image
            limits = (self.tolerance, self.rounding_limit)
            # The graphs together must answer as torch does.
            equality = verify_image_reader(exported.model, model, examples, image, *limits)
            context.note(f"onnx: image features differ by at most {exported.difference:.1e} from torch; {equality}")
            attention = f"not fused: {exported.unfused}" if exported.unfused else "one operator"
            context.note(f"onnx: attention is {attention}")
            return exported.model
        return self._write_pair(model, context)

    def infer_shapes(self, model: TorchModel | Checkpoint, context: Context) -> OnnxModel | None:
        """Return the traced graph without a comparison; None for other models than traced ones."""
        exported_otherwise = EXPORTED_FROM_CHECKPOINT in context.task.capabilities
        if isinstance(model, Checkpoint) or model.generates_images or exported_otherwise:
            return None
        rows = context.data.split("train").slice(0, _SHAPE_EXAMPLES)
        exported = self._traced(model, context.task.encode(rows, model.processor, None, context.max_length))
        return OnnxModel(exported.graph, FLOAT_GRAPH, model.companions())

    def _traced(self, model: TorchModel, examples: Examples) -> ExportedGraph:
        """Trace the model, with pooling if the recipe asks for it."""
        from compress.formats.onnx.embedding_graphs import add_sentence_embedding
        from compress.formats.onnx.export import export_onnx

        exported = export_onnx(model, examples, self.opset, self.fusions)
        if self.sentence_embedding:
            add_sentence_embedding(exported.graph, model.processor.modules)
        return exported

    def _trace(self, model: TorchModel, context: Context) -> OnnxModel:
        """Trace the model and compare the graph with torch."""
        from compress.formats.onnx.export import verify_parity

        examples = context.encode("train", model)
        exported = self._traced(model, examples)
        difference = verify_parity(exported.graph, model, examples, self.tolerance)
        # The report names every rewrite, so that a rewrite that stops matching is noticed.
        matched = ", ".join(f"{name} {count}" for name, count in exported.rewrites.items()) or "none"
        context.note(
            f"onnx: checked, {examples.answer_label} differ by at most {difference:.1e} from torch, "
            f"and {self.tolerance:g} is allowed"
        )
        context.detail(f"onnx: graph rewrites: {matched}")
        if exported.unfused:
            context.note(f"onnx: {exported.unfused}")
        return OnnxModel(exported.graph, FLOAT_GRAPH, model.companions())

    def _write(self, checkpoint: Checkpoint, context: Context) -> OnnxModel:
        """Write and compare a decoder."""
        from compress.formats.onnx.decoder import GraphSettings, export_verified_decoder

        settings = GraphSettings(self.accuracy_level, self.last_token_only, self.expand_on_load)
        sequences = comparison_sequences(checkpoint, context)
        written = export_verified_decoder(checkpoint, settings, sequences, self.tolerance, self.rounding_limit)
        context.note(f"onnx: {written.equality}; {written.attention}")
        return written.model

    def _write_pair(self, checkpoint: Checkpoint, context: Context) -> OnnxModel:
        """Write and compare an encoder and its decoder."""
        from compress.formats.onnx.decoder import export_encoder_decoder, verify_encoder_decoder

        model = export_encoder_decoder(checkpoint)
        speech = TRANSCRIBES in context.task.capabilities
        inputs, texts = (_speech_samples if speech else _text_samples)(checkpoint, context)
        limits, more = (self.tolerance, self.rounding_limit), 0 if speech else _MORE
        equality = verify_encoder_decoder(model, checkpoint, inputs, texts, *limits, more)
        context.note(f"onnx: encoder and decoder; {equality}")
        return model


def _speech_samples(checkpoint: Checkpoint, context: Context) -> tuple[list[dict[str, np.ndarray]], list[np.ndarray]]:
    """Return the first windows of some recordings [1, features, frames] and the beginnings of their transcripts."""
    import numpy as np

    from compress.formats.generation.speech_recognition import read_rules
    from compress.models.processor import load_processor

    rows = context.data.split("train").slice(0, _SPEECH)
    processor, prompt = load_processor(checkpoint.folder), read_rules(checkpoint.folder).prompt
    examples = context.task.encode(rows, processor, None, context.max_length)
    frames = processor.feature_extractor.nb_max_frames
    sequences = [np.ascontiguousarray(example["input_features"][np.newaxis, :, :frames]) for example in examples.inputs]
    texts = [processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in rows["text"].to_pylist()]
    spoken = [np.array([[*prompt, *ids[:_SPOKEN_TOKENS]]], dtype=np.int64) for ids in texts]
    return [{"input_features": window} for window in sequences], spoken


def _text_samples(checkpoint: Checkpoint, context: Context) -> tuple[list[dict[str, np.ndarray]], list[np.ndarray]]:
    """Return some texts in one padded batch, and the first decoder token of each [rows, 1]."""
    import numpy as np

    from compress.formats.generation.seq2seq import IDS, MASK, read_rules
    from compress.models.processor import load_tokenizer

    rows = context.data.split("train").slice(0, _TEXTS)
    examples = context.task.encode(rows, load_tokenizer(checkpoint.folder), None, context.max_length)
    batch = examples.batch(range(len(examples)))
    start = np.full((len(examples), 1), read_rules(checkpoint.folder).start, np.int64)
    return [{name: batch[name] for name in (IDS, MASK)}], [start]


def comparison_sequences(checkpoint: Checkpoint, context: Context) -> np.ndarray:
    """Return the first tokens of the two longest of the first examples [2, length]. Raises `DataError` if too short."""
    import numpy as np

    from compress.models.processor import load_tokenizer

    rows = context.data.split("train").slice(0, 64)
    tokenizer = load_tokenizer(checkpoint.folder)
    examples = context.task.encode(rows, tokenizer, None, context.max_length)
    longest = np.argsort(-examples.lengths(), kind="stable")[:_WINDOWS]
    # Recurrences go by chunks, and are proven past the first.
    chunk = max(checkpoint.config.get(name) or 0 for name in ("chunk_size", "mamba_chunk_size"))
    length = min([_WINDOW_LENGTH + chunk, *(int(examples.lengths()[index]) for index in longest)])
    if len(longest) < _WINDOWS or length < 4:
        raise DataError(
            "The training text is too short to verify the export.",
            where="data, split train",
            expected=f"{_WINDOWS} examples of 4 tokens or more",
        )
    return np.stack([examples.inputs[index]["input_ids"][:length] for index in longest])

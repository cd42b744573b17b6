"""Image-text-to-text: small vision-language models, trained and evaluated on answers to questions about images.

Importing this imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from compress.data.columns import Column
from compress.data.slices import Slice
from compress.models.chat_template import apply_chat_template
from compress.models.model import TorchModel
from compress.tasks.capability import (
    DESCRIBES_IMAGES,
    EXPORTED_FROM_CHECKPOINT,
    HAS_LABELS,
    PREDICTS_TOKENS,
    READS_ROWS,
    TAKES_IMAGES,
    TAKES_TEXT,
)
from compress.tasks.classes import cross_entropy, mean_row, outcome_row
from compress.tasks.image_inputs import PIXELS, encode_images, mode_of, one_by_one
from compress.tasks.lazy_modules import np, pa, torch
from compress.tasks.loading import Origin, load_by
from compress.tasks.spans import exact, word_f1
from compress.tasks.task import (
    LOGITS,
    Examples,
    Head,
    Joined,
    relative_limit,
    split_files,
    starter_recipe,
)
from compress.tasks.text_metrics import TextWriting
from compress.tasks.tokens import ragged, text_inputs
from compress.utils.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers.utils import ModelOutput

    from compress.models.model import Processor
    from compress.results.report import Measurement
    from compress.tasks.evaluation import Evaluation

_IDS, _MASK = "input_ids", "attention_mask"
_IGNORED = -100
"""Label of positions without a loss, as in transformers."""
_SUPPORTED_INPUTS = frozenset({_IDS, _MASK, "pixel_values"})
"""Inputs of the supported models. Other inputs, such as `image_grid_thw`, have a different batch axis or none."""
_DROPPABLE_INPUTS = frozenset({"pixel_attention_mask"})
"""Inputs that say nothing if each image is resized to one square without padding, so that they can be dropped."""

_FAMILIES = """
    Apertus1p5 Aria AyaVision Blip Blip2 Chameleon Cohere2Vision CohereCompass Cosmos3Edge Cosmos3Omni DeepseekOcr2
    DeepseekVL DeepseekVLHybrid Ernie4_5_VLMoe Exaone4_5_ FastVlm Florence2 Glm46V Glm4v Glm4vMoe Glm5Next GlmOcr
    Granite4Vision GraniteDocling HYV4VL HunYuanVL HyperCLOVAXVisionV2 Idefics2 Idefics3 Inkling Inkling2
    Inkling2Loop InstructBlip InstructBlipVideo InternVL Janus Kimi_K25 Kosmos2 Kosmos2_5 Lfm2Vl Lfm3Vl LightOnOcr
    Llava LlavaNext LlavaNextVideo LlavaOnevision MiniCPMOcr MiniCPMV4_6 MiniCPMV4_7 MiniMaxM3Sparse Mistral3
    MistralLarge4 Molmo2 MuseGlimmer MuseSpark Ovis2 PI0 PPFormulaNet PaddleOCRVL PaliGemma PerceptionLM Pix2Struct
    QianfanOCR Qwen2VL Qwen2_5OmniThinker Qwen2_5_VL Qwen3OmniMoeThinker Qwen3VL Qwen3VLMoe SmolVLM Step3p7 Udop
    UnlimitedOcr VideoLlama3 VideoLlava VipLlava
"""
"""Families whose classes transformers has only for this task. The processor decides which of them are supported."""


@dataclass(frozen=True)
class AnswerLogits(Head):
    """Logits that predict each token of an answer, without those of prompt and image, padded with 0."""

    answer: ClassVar[str] = "answer_logits"

    def read(self, outputs: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return logits [B, longest answer, vocabulary]."""
        from torch.nn.utils.rnn import pad_sequence

        logits = outputs[LOGITS]
        pairs = zip(logits[:, :-1], _next_token_labels(logits, batch["labels"]), strict=True)
        padded: torch.Tensor = pad_sequence([row[labels != _IGNORED] for row, labels in pairs], batch_first=True)
        return padded


def _next_token_labels(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the labels that the logits of each position but the last predict, [B, length - 1].

    Labels may be longer than the logits because of padding, which is cut off.
    """
    return labels[:, 1 : logits.shape[1]].long()


class ImageTextToText(TextWriting):
    """Hugging Face `image-text-to-text`: models such as LLaVA, which read an image as tokens of a text.

    `text` is the question about `image`, `target` the answer. With a chat template, `text` is a user's message after
    the image; otherwise it is the whole prompt with the image token. The model is trained on the answer only, and
    generates greedily.
    """

    name = "image-text-to-text"
    columns = (Column("image", kind="image"), Column("text"), Column("target"))
    capabilities = frozenset(
        {READS_ROWS, TAKES_IMAGES, TAKES_TEXT, HAS_LABELS, PREDICTS_TOKENS, EXPORTED_FROM_CHECKPOINT, DESCRIBES_IMAGES}
    )
    architectures = tuple(f"{family}ForConditionalGeneration" for family in _FAMILIES.split())
    metrics = ("exact_match", "f1", "next_token_accuracy", "agreement")
    starter = starter_recipe(
        "my-picture-reader",
        "a small vision-language model that answers questions about my own pictures",
        "llava-hf/llava-interleave-qwen-0.5b-hf",
        split_files("jsonl", {"image": "image", "text": "question", "target": "answer"}, max_length=1024),
        {
            "finetune": {"epochs": 1, "batch_size": 4},
            "onnx": {},
            "onnx_weight_only": {"part": "decoder", "bits": 4},
        },
        relative_limit("exact_match", 0.97),
        baseline="onnx",
    )
    slices = (Slice(length="quartiles"),)
    batch_size = 16

    def load(self, directory: Path, labels: Sequence[str] | None, trust_remote_code: bool) -> TorchModel:
        """Load weights in fp32 and the processor. Raises `ModelError` for files that do not load."""
        from compress.models.processor import load_processor

        expected = (
            "a vision-language model such as LLaVA, with its tokenizer, preprocessor_config.json and, for the size of "
            "its patches, processor_config.json"
        )
        origin = Origin(self.name, directory, load_processor, expected)
        model = load_by("AutoModelForImageTextToText", origin, trust_remote_code, dtype=torch.float32)
        problem = unfit_processor(model.processor) or _unfit_tokens(model.module, model.processor)
        if problem:
            fault = f"The model cannot be loaded for {self.name}: {problem}"
            raise ModelError(fault, where=str(directory), expected=expected)
        return model

    def encode(self, rows: pa.Table, processor: Processor, labels: Sequence[str] | None, max_length: int) -> Examples:
        """Return prompts with answers; ``labels`` [n, longest] are the answer's tokens in place, -100 elsewhere.

        Raises `DataError` for a broken image, a prompt without the image, or a prompt that leaves no room for an
        answer.

        Args:
            rows: Rows with the task's columns; label columns are optional.
            processor: Processor of the model.
            labels: Has no effect, since there are no classes.
            max_length: Most tokens of prompt and answer. A longer prompt is an error; an answer is truncated.
        """
        # Leave room for at least one token of the answer.
        images, prompts = _prompts(rows, processor, max_length - 1)
        if "target" not in rows.column_names:
            return _join_inputs(images, prompts, processor)
        eos = processor.tokenizer.eos_token_id
        answers = processor.tokenizer(rows["target"].to_pylist(), add_special_tokens=False)[_IDS]
        answers = [[*ids, eos][: max_length - len(prompt)] for prompt, ids in zip(prompts, answers, strict=True)]
        texts = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
        label_rows = [[_IGNORED] * len(prompt) + answer for prompt, answer in zip(prompts, answers, strict=True)]
        return replace(_join_inputs(images, texts, processor), labels=ragged(label_rows, _IGNORED), head=AnswerLogits())

    def eval_examples(
        self,
        rows: pa.Table,
        processor: Processor,
        labels: Sequence[str] | None,
        max_length: int,
        evaluation: Evaluation,
    ) -> Examples:
        """Return the prompt of every row, with its answer as text.

        Args:
            rows: Rows of the test split.
            processor: Processor of the model.
            labels: Class names of the model.
            max_length: Most tokens of a prompt. A longer one is an error.
            evaluation: The recipe's `evaluation` section.
        """
        targets = np.array(rows["target"].to_pylist()) if "target" in rows.column_names else None
        return replace(_join_inputs(*_prompts(rows, processor, max_length), processor), labels=targets)

    def loss(self, outputs: ModelOutput, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy of the answer's tokens."""
        targets = _next_token_labels(outputs.logits, labels)
        in_answer = targets != _IGNORED
        return cross_entropy(outputs.logits[:, :-1][in_answer].float(), targets[in_answer])

    def text_rows(self, texts: Sequence[str], references: Sequence[str], model: str, target: str) -> list[Measurement]:
        """Return exact match and word F1 with intervals over rows.

        Both ignore case, punctuation and articles, as in SQuAD (Rajpurkar et al. 2016, section 6.1).

        Args:
            texts: Generated texts.
            references: Target of each text.
            model: Name of the model in the report.
            target: Name of the target in the report.
        """
        pairs = list(zip(texts, references, strict=True))
        return [
            outcome_row("exact_match", np.array([exact(*pair) for pair in pairs]), model, target),
            mean_row("f1", np.array([word_f1(*pair) for pair in pairs]), model, target),
        ]


def unfit_processor(processor: Processor) -> str:
    """Return why a processor is not supported, or an empty string.

    Supported are processors that make one array of pixels of each image and repeat an image token in the text.
    """
    if not hasattr(processor, "image_token"):
        return f"its {type(processor).__name__} has no token that stands for an image"
    if processor.tokenizer.eos_token_id is None:
        return "its tokenizer has no eos_token, which an answer ends in"
    # True, False, or None for processors that never cut images into tiles.
    splits_images = getattr(processor.image_processor, "do_image_splitting", None)
    if splits_images:
        return "it cuts an image into tiles, unless preprocessor_config.json says do_image_splitting: false"
    droppable = _DROPPABLE_INPUTS if splits_images is False else frozenset()
    others = sorted(set(processor.model_input_names) - _SUPPORTED_INPUTS - droppable)
    return f"beside tokens and the pixels of one image it is given {', '.join(others)}" if others else ""


def _unfit_tokens(module: Any, processor: Processor) -> str:
    """Return why the number of image tokens differs from the number of image features, or an empty string."""
    from PIL import Image

    # `image_size` is a number, or height and width.
    side = int(np.ravel(module.config.vision_config.image_size)[0])
    black = Image.new(mode_of(processor.image_processor), (side, side))
    pixels = torch.as_tensor(np.array(one_by_one(processor.image_processor)([black])[PIXELS]))
    try:
        tokens = _image_tokens(processor, pixels).count(processor.image_token)
    except TypeError:
        return "its processor_config.json says no patch_size"
    with torch.inference_mode():
        features = len(module.get_image_features(pixel_values=pixels).pooler_output[0])
    if tokens == features:
        return ""
    return (
        f"an image has {features} features, and its processor writes {tokens} tokens for it (patch_size, "
        "vision_feature_select_strategy and num_additional_image_tokens in processor_config.json say how many)"
    )


def _image_tokens(processor: Processor, pixels: Any) -> str:
    """Return the text that stands for an image with ``pixels`` [1, ...], which is not split into tiles."""
    # Processors of models with tiles also read their numbers of rows and columns, which are 0 without tiles.
    tokens: str = processor.replace_image_token({"pixel_values": pixels, "rows": [[0]], "cols": [[0]]}, 0)
    return tokens


def prompt_of(processor: Processor, text: str, row: int) -> str:
    """Return the prompt: ``text`` in the processor's chat template, or unchanged without one.

    Raises `DataError` if the image token does not occur exactly once; ``row`` counts from 0.
    """
    token, prompt = processor.image_token, text
    if processor.chat_template is not None and token not in text:
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        prompt = apply_chat_template(processor, messages, add_generation_prompt=True)
    count = prompt.count(token)
    # With a chat template, an image token in the text itself is an error, since the template writes another.
    if count == 1 and (processor.chat_template is None or prompt is not text):
        return prompt
    if processor.chat_template is None:
        hint = f"write {token} into the text where the image belongs, or give the model a chat_template.jinja"
    else:
        hint = f"take {token} out of the text: the chat template puts the image before it"
    raise DataError(
        f"The prompt {text[:60]!r} has the image's token {token} {count} times.",
        where=f"row {row + 1}",
        expected="one image in each prompt, where its token or the model's chat template has it",
        hint=hint,
    )


def _prompts(rows: pa.Table, processor: Processor, longest: int) -> tuple[Examples, list[list[int]]]:
    """Return the images and each row's prompt as tokens, with one image token per image feature. Raises `DataError`."""
    images = encode_images(rows["image"].to_pylist(), one_by_one(processor.image_processor))
    prompts = [prompt_of(processor, text, row) for row, text in enumerate(rows["text"].to_pylist())]
    if not prompts:
        return images, []
    # All images have one shape, and therefore the same number of features, for each of which the text has a token.
    tokens = _image_tokens(processor, images.inputs[0][PIXELS][None])
    texts = [prompt.replace(processor.image_token, tokens) for prompt in prompts]
    has_bos = processor.tokenizer.bos_token is not None and texts[0].startswith(processor.tokenizer.bos_token)
    # A chat template may have written the BOS token already.
    token_rows: list[list[int]] = processor.tokenizer(texts, add_special_tokens=not has_bos)[_IDS]
    row = max(range(len(token_rows)), key=lambda index: len(token_rows[index]))
    if len(token_rows[row]) > longest:
        raise DataError(
            f"The prompt of row {row + 1} has {len(token_rows[row])} tokens, those of its image included.",
            where="data.max_length",
            expected=f"at most {longest}: one that is cut has lost its image or its question",
            hint="raise data.max_length",
        )
    return images, token_rows


def _join_inputs(images: Examples, texts: Sequence[Sequence[int]], processor: Processor) -> Examples:
    """Return the images merged with the tokens of their prompts."""
    inputs, padding = text_inputs({_IDS: texts}, processor.tokenizer)
    sizes = np.array([len(ids) for ids in texts], dtype=np.int64)
    joined = Joined(inputs, images.inputs)
    return replace(images, inputs=joined, padding={**padding, PIXELS: None}, sizes=sizes, black_pixel=None)


TASK = ImageTextToText()

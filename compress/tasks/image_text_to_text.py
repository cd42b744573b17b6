"""Text from an image and a text: small vision-language models, judged by what they answer. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from compress.data.columns import Column
from compress.data.slices import Slice
from compress.models.torch_model import TorchModel
from compress.tasks.capability import (
    DESCRIBES_IMAGES,
    EXPORTED_FROM_CHECKPOINT,
    HAS_LABELS,
    PREDICTS_TOKENS,
    READS_ROWS,
    TAKES_IMAGES,
    TAKES_TEXT,
)
from compress.tasks.task import LOGITS, CollectedOutputs, Examples, Task
from compress.utils.errors import DataError, ModelError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import torch

    from compress.results.measurement import Measurement
    from compress.tasks.evaluation import Evaluation

_IDS, _MASK = "input_ids", "attention_mask"
_IGNORED = -100
_READ = frozenset({_IDS, _MASK, "pixel_values"})
"""What models of this task are given; others have a batch axis of their own, or none."""
_WHOLE = frozenset({"pixel_attention_mask"})
"""What says nothing where each image is brought to one square: it has no padding."""

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
"""Whose classes transformers has for this task and for no other; which of them can be taken, their processors say."""

_STARTER: dict[str, Any] = {
    "name": "my-picture-reader",
    "description": "a small vision-language model that answers questions about my own pictures",
    "model": "llava-hf/llava-interleave-qwen-0.5b-hf",
    "data": {
        "splits": {"train": "train.jsonl", "validation": "validation.jsonl", "test": "test.jsonl"},
        "columns": {"image": "image", "text": "question", "target": "answer"},
        "max_length": 1024,
    },
    "stages": [
        {"finetune": {"epochs": 1, "batch_size": 4}},
        {"onnx": {}},
        {"onnx_weight_only": {"part": "decoder", "bits": 4}},
    ],
    "baseline": "onnx",
    "targets": ["cpu"],
    "benchmark": {},
    "limits": [{"metric": "exact_match", "at_least": 0.97, "of": "baseline"}],
}


@dataclass(frozen=True)
class AnswerLogits:
    """The logits that foretell each token of an answer, 0 behind the last: a `Head`."""

    outputs: ClassVar[tuple[str, ...]] = (LOGITS,)
    answer: ClassVar[str] = "answer_logits"
    answer_label: ClassVar[str] = "logits"

    def read(self, outputs: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """[B, longest answer, vocabulary]."""
        from torch.nn.utils.rnn import pad_sequence

        logits = outputs[LOGITS]
        pairs = zip(logits[:, :-1], _foretold(logits, batch["labels"]), strict=True)
        found: torch.Tensor = pad_sequence([row[labels != _IGNORED] for row, labels in pairs], batch_first=True)
        return found


def _foretold(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The label of each place but the first, [B, length - 1]; those of longer examples are cut."""
    return labels[:, 1 : logits.shape[1]].long()


class ImageTextToText(Task):
    """Hugging Face `image-text-to-text`: LLaVA and its like, which read an image as tokens of a text.

    `text` is what is asked of `image`, `target` the answer. Where the processor has a chat template, `text` is a user's
    message behind the image; else it is the whole prompt, with the image's token in it. A model learns the answer
    alone, and writes greedily.
    """

    name = "image-text-to-text"
    columns = (Column("image", kind="image"), Column("text"), Column("target"))
    capabilities = frozenset(
        {READS_ROWS, TAKES_IMAGES, TAKES_TEXT, HAS_LABELS, PREDICTS_TOKENS, EXPORTED_FROM_CHECKPOINT, DESCRIBES_IMAGES}
    )
    architectures = tuple(f"{family}ForConditionalGeneration" for family in _FAMILIES.split())
    starter = _STARTER
    slices = (Slice(length="quartiles"),)
    batch_size = 16

    def load(self, directory: Path, labels: Sequence[str] | None, trust_remote_code: bool) -> TorchModel:
        """Load weights in fp32 and the processor. Raises `ModelError` for files that do not load."""
        import torch
        from transformers import AutoModelForImageTextToText

        from compress.models.config_checks import explain_load_failure, load_error_types
        from compress.models.folder_checks import refuse_quantized
        from compress.models.processor import load_processor

        refuse_quantized(directory)
        try:
            processor = load_processor(directory)
            module = AutoModelForImageTextToText.from_pretrained(
                directory, trust_remote_code=trust_remote_code, use_safetensors=True, dtype=torch.float32
            )
        except load_error_types() as error:
            raise explain_load_failure(directory, trust_remote_code) or self._unfit(directory, str(error)) from error
        problem = unfit_processor(processor) or _unfit_tokens(module, processor)
        if problem:
            raise self._unfit(directory, problem)
        return TorchModel(module.eval(), processor)

    def _unfit(self, directory: Path, why: str) -> ModelError:
        return ModelError(
            f"The model cannot be loaded for {self.name}: {why}",
            where=str(directory),
            expected="a vision-language model such as LLaVA, with its tokenizer, preprocessor_config.json and, for the "
            "size of its patches, processor_config.json",
        )

    def encode(self, rows: pa.Table, processor: Any, labels: Sequence[str] | None, max_length: int) -> Examples:
        """Prompt and answer; ``labels`` [n, longest] are the answer's tokens in their places, -100 elsewhere.

        Raises `DataError` for a broken image, a prompt without the image, or one that leaves no room for an answer.
        """
        from compress.tasks.tokens import ragged

        images, prompts = _prompts(rows, processor, max_length - 1)
        if "target" not in rows.column_names:
            return _joined(images, prompts, processor)
        end = processor.tokenizer.eos_token_id
        answers = processor.tokenizer(rows["target"].to_pylist(), add_special_tokens=False)[_IDS]
        pairs = [(asked, [*ids, end][: max_length - len(asked)]) for asked, ids in zip(prompts, answers, strict=True)]
        whole = [[*asked, *ids] for asked, ids in pairs]
        wanted = [[_IGNORED] * len(asked) + ids for asked, ids in pairs]
        return replace(_joined(images, whole, processor), labels=ragged(wanted, _IGNORED), head=AnswerLogits())

    def eval_examples(
        self, rows: pa.Table, processor: Any, labels: Sequence[str] | None, max_length: int, evaluation: Evaluation
    ) -> Examples:
        """Every row's prompt, with its answer as text."""
        import numpy as np

        targets = np.array(rows["target"].to_pylist()) if "target" in rows.column_names else None
        return replace(_joined(*_prompts(rows, processor, max_length), processor), labels=targets)

    def loss(self, outputs: Any, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of the answer's tokens, each foretold by what stands before it."""
        from compress.tasks.classes import cross_entropy

        wanted = _foretold(outputs.logits, labels)
        chosen = wanted != _IGNORED
        return cross_entropy(outputs.logits[:, :-1][chosen].float(), wanted[chosen])

    def collect(
        self, outputs: Mapping[str, np.ndarray], examples: Examples, indices: Sequence[int]
    ) -> CollectedOutputs:
        """See `keep_texts`."""
        from compress.tasks.generation import keep_texts

        return keep_texts(outputs, examples, indices)

    def measure(self, kept: CollectedOutputs, labels: np.ndarray | None, model: str, target: str) -> list[Measurement]:
        """How many answers are the right ones, and the F1 of their words; intervals are over rows.

        Both without case, punctuation and articles, as SQuAD's are (Rajpurkar et al. 2016, section 6.1).
        """
        import numpy as np

        from compress.tasks.classes import mean_row, outcome_row
        from compress.tasks.generation import TEXTS, next_token_row
        from compress.tasks.spans import exact, word_f1

        if TEXTS not in kept:
            return [next_token_row(kept, model, target)]
        assert labels is not None, "keep asks for targets"
        pairs = list(zip(map(str, kept[TEXTS]), map(str, labels), strict=True))
        return [
            outcome_row("exact_match", np.array([exact(*pair) for pair in pairs]), model, target),
            mean_row("f1", np.array([word_f1(*pair) for pair in pairs]), model, target),
        ]

    def compare(
        self, kept: CollectedOutputs, reference: CollectedOutputs, model: str, target: str
    ) -> list[Measurement]:
        """How many answers are the baseline's to the letter."""
        from compress.tasks.generation import same_texts

        return same_texts(kept, reference, model, target)

    def probabilities(self, kept: CollectedOutputs) -> np.ndarray | None:
        """None: texts are no classes."""
        return None


def unfit_processor(processor: Any) -> str:
    """Why it prepares no images that are tokens of a text, or nothing."""
    if not hasattr(processor, "image_token"):
        return f"its {type(processor).__name__} has no token that stands for an image"
    if processor.tokenizer.eos_token_id is None:
        return "its tokenizer has no eos_token, which an answer ends in"
    tiles = getattr(processor.image_processor, "do_image_splitting", None)
    if tiles:
        return "it cuts an image into tiles, unless preprocessor_config.json says do_image_splitting: false"
    others = sorted(set(processor.model_input_names) - _READ - (_WHOLE if tiles is False else frozenset()))
    return f"beside tokens and the pixels of one image it is given {', '.join(others)}" if others else ""


def _unfit_tokens(module: Any, processor: Any) -> str:
    """Why an image's tokens are not as many as its features, or nothing."""
    import numpy as np
    import torch
    from PIL import Image

    from compress.tasks.image_inputs import PIXELS, mode_of, one_by_one

    side = int(np.ravel(module.config.vision_config.image_size)[0])
    black = Image.new(mode_of(processor.image_processor), (side, side))
    pixels = torch.as_tensor(np.array(one_by_one(processor.image_processor)([black])[PIXELS]))
    try:
        tokens = _image_tokens(processor, pixels).count(processor.image_token)
    except TypeError:
        return "its processor_config.json says no patch_size"
    with torch.inference_mode():
        features = len(module.get_image_features(pixel_values=pixels).pooler_output[0])
    return (
        ""
        if tokens == features
        else (
            f"an image has {features} features, and its processor writes {tokens} tokens for it (patch_size, "
            "vision_feature_select_strategy and num_additional_image_tokens in processor_config.json say how many)"
        )
    )


def _image_tokens(processor: Any, pixels: Any) -> str:
    """What stands for an image in a text, by its ``pixels`` [1, ...]; it is cut into no rows and columns."""
    tokens: str = processor.replace_image_token({"pixel_values": pixels, "rows": [[0]], "cols": [[0]]}, 0)
    return tokens


def prompt_of(processor: Any, text: str, row: int) -> str:
    """What a model is asked: ``text`` in the processor's chat template, or as it stands.

    Raises `DataError` where the image does not stand in it once; ``row`` counts from 0.
    """
    token, prompt = processor.image_token, text
    if processor.chat_template is not None and token not in text:
        content = [{"type": "image"}, {"type": "text", "text": text}]
        messages = [{"role": "user", "content": content}]
        prompt = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    count = prompt.count(token)
    if count == 1 and (processor.chat_template is None or prompt is not text):
        return prompt
    if processor.chat_template is None:
        hint = f"write {token} into the text where the image belongs, or give the model a chat_template.jinja"
    else:
        hint = f"take {token} out of the text: the chat template puts the image before it"
    raise DataError(
        f"The prompt {text[:60]!r} has the image's token {token} {text.count(token)} times.",
        where=f"row {row + 1}",
        expected="one image in each prompt, where its token or the model's chat template has it",
        hint=hint,
    )


def _prompts(rows: pa.Table, processor: Any, longest: int) -> tuple[Examples, list[list[int]]]:
    """The images, and each row's prompt as tokens, the image's as many as it has features. Raises `DataError`."""
    from compress.tasks.image_inputs import PIXELS, encode_images, one_by_one

    images = encode_images(rows["image"].to_pylist(), one_by_one(processor.image_processor))
    prompts = [prompt_of(processor, text, row) for row, text in enumerate(rows["text"].to_pylist())]
    if not prompts:
        return images, []
    # All images have one shape, and so as many features.
    tokens = _image_tokens(processor, images.inputs[0][PIXELS][None])
    texts = [prompt.replace(processor.image_token, tokens) for prompt in prompts]
    begun = processor.tokenizer.bos_token is not None and texts[0].startswith(processor.tokenizer.bos_token)
    found: list[list[int]] = processor.tokenizer(texts, add_special_tokens=not begun)[_IDS]
    row = max(range(len(found)), key=lambda place: len(found[place]))
    if len(found[row]) > longest:
        raise DataError(
            f"The prompt of row {row + 1} has {len(found[row])} tokens, those of its image included.",
            where="data.max_length",
            expected=f"at most {longest}: one that is cut has lost its image or its question",
            hint="raise data.max_length",
        )
    return images, found


def _joined(images: Examples, texts: Sequence[Sequence[int]], processor: Any) -> Examples:
    """Images with the tokens that stand beside them."""
    import numpy as np

    from compress.tasks.image_inputs import PIXELS
    from compress.tasks.lazy_examples import Joined
    from compress.tasks.tokens import text_inputs

    inputs, padding = text_inputs({_IDS: texts}, processor.tokenizer)
    sizes = np.array([len(ids) for ids in texts], dtype=np.int64)
    joined = Joined(inputs, images.inputs)
    return replace(images, inputs=joined, padding={**padding, PIXELS: None}, sizes=sizes, black=None)


TASK = ImageTextToText()

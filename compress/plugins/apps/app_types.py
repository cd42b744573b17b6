"""Table of all application types by the steps before and after the model."""

from __future__ import annotations

from pathlib import Path

from compress.models.pipeline_folder import model_config
from compress.plugins.apps.answers import (
    Boxes,
    Embeddings,
    ImageEmbeddings,
    Labels,
    MaskedTokens,
    Masks,
    PairScores,
    Spans,
    Tags,
    Transcripts,
    WrittenTexts,
)
from compress.plugins.apps.app_type import AppType
from compress.plugins.apps.audio import Recordings, Sounds
from compress.plugins.apps.chat import ChatPrompts, Replies
from compress.plugins.apps.client import ONNXRUNTIME_WEB_PARTS, TRANSFORMERS_JS
from compress.plugins.apps.image import ImageInputs, UncroppedImages
from compress.plugins.apps.image_generation import ImageLevels, ImagePrompts
from compress.plugins.apps.text import MaskedTexts, QuestionPairs, RankingPairs, Sentences, SourceTexts, Texts, Words
from compress.tasks.registry import TASKS
from compress.utils.errors import InputError

APP_TYPES: dict[tuple[str, str], AppType] = {
    ("tokenize", "softmax"): AppType("text-classification", Texts, Labels(), "text"),
    ("prepare-image", "softmax"): AppType("image-classification", ImageInputs, Labels(), "image"),
    ("prepare-image", "boxes"): AppType("object-detection", UncroppedImages, Boxes(), "boxes"),
    ("prepare-image", "segment"): AppType("image-segmentation", UncroppedImages, Masks(), "masks"),
    ("prepare-image", "embed"): AppType("image-feature-extraction", ImageInputs, ImageEmbeddings(), "nearest"),
    ("tokenize", "embed"): AppType("feature-extraction", Sentences, Embeddings(), "sentence"),
    ("tokenize", "tag"): AppType("token-classification", Words, Tags(), "tags"),
    ("tokenize-pair", "relevance"): AppType("text-ranking", RankingPairs, PairScores(), "ranking"),
    ("tokenize-pair", "span"): AppType("question-answering", QuestionPairs, Spans(), "answer"),
    ("tokenize", "unmask"): AppType("fill-mask", MaskedTexts, MaskedTokens(), "unmask"),
    ("log-mel", "transcribe"): AppType(
        "automatic-speech-recognition", Recordings, Transcripts(), "audio", graphs=2, client=TRANSFORMERS_JS
    ),
    ("hear", "softmax"): AppType("audio-classification", Sounds, Labels(), "sound"),
    ("tokenize", "rewrite"): AppType(
        "text2text-generation", SourceTexts, WrittenTexts(), "rewrite", graphs=2, client=TRANSFORMERS_JS
    ),
    ("tokenize-prompt", "draw"): AppType(
        "text-to-image", ImagePrompts, ImageLevels(), "draw", graphs=3, client=ONNXRUNTIME_WEB_PARTS
    ),
    ("prompt", "generate"): AppType("text-generation", ChatPrompts, Replies(), "chat", client=TRANSFORMERS_JS),
}


def find_app_type(task: str, model: Path | None = None) -> AppType:
    """Return the application type of a task.

    Args:
        task: Name of the task.
        model: Folder of the model, whose config may select other steps.

    Raises:
        InputError: The task or the model has no application type.
    """
    task_definition = TASKS[task]
    config = {} if model is None else model_config(model)
    steps = (task_definition if model is None else task_definition.specialize(config)).app_steps
    # The task has applications, but none for this architecture.
    if steps is None and task_definition.app_steps in APP_TYPES:
        raise InputError(
            f"There is no app yet for a {config.get('model_type')} of {task}.",
            where="model",
            expected="a model whose answers the task's app reads; other kinds of it have one",
            hint="run the ONNX file of the run's folder model/ by code of your own, or take another architecture",
        )
    # Plug-in tasks get an application by stating steps that exist here.
    if steps is None or steps not in APP_TYPES:
        available = [name for name, other in TASKS.items() if other.app_steps in APP_TYPES]
        raise InputError(
            f"There is no app for a model of {task}.",
            where="task",
            expected=f"one of {', '.join(available)}",
            hint="name the task in the recipe, and put config.json and the processor's files beside a bare graph; "
            "a task of a plug-in states `app_steps`",
        )
    return APP_TYPES[steps]

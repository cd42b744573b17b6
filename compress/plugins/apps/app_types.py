"""Table of all application types by the steps before and after the model."""

from __future__ import annotations

from pathlib import Path

from compress.models.pipeline_folder import model_config
from compress.plugins.apps.answers import (
    BOXES,
    EMBEDDINGS,
    IMAGE_EMBEDDINGS,
    LABELS,
    MASKED,
    MASKS,
    RELEVANCE,
    SPANS,
    TAGS,
    TRANSCRIPTS_OF_SPEECH,
    WRITTEN_TEXTS,
)
from compress.plugins.apps.app_type import AppType
from compress.plugins.apps.audio import RECORDINGS, SOUNDS
from compress.plugins.apps.chat import PROMPTS, REPLIES
from compress.plugins.apps.client import ONNXRUNTIME_WEB_PARTS, TRANSFORMERS_JS
from compress.plugins.apps.image import IMAGES, UNCROPPED_IMAGES
from compress.plugins.apps.image_generation import GENERATED_IMAGES, IMAGE_PROMPTS
from compress.plugins.apps.text import MASKED_TEXTS, QUESTION_PAIRS, RANKING_PAIRS, SENTENCES, SOURCES, TEXTS, WORDS
from compress.tasks.registry import TASKS, get_task
from compress.utils.errors import InputError

APP_TYPES: dict[tuple[str, str], AppType] = {
    ("tokenize", "softmax"): AppType("text-classification", TEXTS, LABELS, "text"),
    ("prepare-image", "softmax"): AppType("image-classification", IMAGES, LABELS, "image"),
    ("prepare-image", "boxes"): AppType("object-detection", UNCROPPED_IMAGES, BOXES, "boxes"),
    ("prepare-image", "segment"): AppType("image-segmentation", UNCROPPED_IMAGES, MASKS, "masks"),
    ("prepare-image", "embed"): AppType("image-feature-extraction", IMAGES, IMAGE_EMBEDDINGS, "nearest"),
    ("tokenize", "embed"): AppType("feature-extraction", SENTENCES, EMBEDDINGS, "sentence"),
    ("tokenize", "tag"): AppType("token-classification", WORDS, TAGS, "tags"),
    ("tokenize-pair", "relevance"): AppType("text-ranking", RANKING_PAIRS, RELEVANCE, "ranking"),
    ("tokenize-pair", "span"): AppType("question-answering", QUESTION_PAIRS, SPANS, "answer"),
    ("tokenize", "unmask"): AppType("fill-mask", MASKED_TEXTS, MASKED, "unmask"),
    ("log-mel", "transcribe"): AppType(
        "automatic-speech-recognition",
        RECORDINGS,
        TRANSCRIPTS_OF_SPEECH,
        "audio",
        graphs=2,
        client=TRANSFORMERS_JS,
    ),
    ("hear", "softmax"): AppType("audio-classification", SOUNDS, LABELS, "sound"),
    ("tokenize", "rewrite"): AppType(
        "text2text-generation", SOURCES, WRITTEN_TEXTS, "rewrite", graphs=2, client=TRANSFORMERS_JS
    ),
    ("tokenize-prompt", "draw"): AppType(
        "text-to-image", IMAGE_PROMPTS, GENERATED_IMAGES, "draw", graphs=3, client=ONNXRUNTIME_WEB_PARTS
    ),
    ("prompt", "generate"): AppType("text-generation", PROMPTS, REPLIES, "chat", client=TRANSFORMERS_JS),
}


def find_app_type(task: str, model: Path | None = None) -> AppType:
    """Return the application type of a task.

    Args:
        task: Name of the task.
        model: Folder of the model, whose config may select other steps.

    Raises:
        InputError: The task or the model has no application type.
    """
    task_definition = get_task(task)
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
            hint=f"give the task app_steps, which are {' or '.join(map(' and '.join, APP_TYPES))}",
        )
    return APP_TYPES[steps]

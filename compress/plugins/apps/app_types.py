"""The kinds of apps that a bundle may be for, by their steps."""

from __future__ import annotations

from pathlib import Path

from compress.models.pipeline_folder import model_config
from compress.plugins.apps.app_type import Kind
from compress.plugins.apps.audio import RECORDINGS
from compress.plugins.apps.audio_classification import SOUNDS
from compress.plugins.apps.boxes import FOUND_BOXES, MASKS, WHOLE_IMAGES
from compress.plugins.apps.chat import REPLIES
from compress.plugins.apps.client import ONNXRUNTIME_WEB_PARTS, TRANSFORMERS_JS
from compress.plugins.apps.image import IMAGES
from compress.plugins.apps.image_generation import DRAWN_PICTURES, DRAWN_PROMPTS
from compress.plugins.apps.pairs import ASKED, RANKED
from compress.plugins.apps.prompt import PROMPTS
from compress.plugins.apps.scores import MASKED, RELEVANCE, SPANS, TAGS
from compress.plugins.apps.text import MASKED_TEXTS, SENTENCES, SOURCES, TEXTS, WORDS
from compress.plugins.apps.transcript import TRANSCRIPTS_OF_SPEECH, WRITTEN_TEXTS
from compress.plugins.apps.vectors import EMBEDDINGS, IMAGE_EMBEDDINGS, LABELS
from compress.tasks.registry import TASKS, get_task
from compress.utils.errors import InputError

KINDS: dict[tuple[str, str], Kind] = {
    ("tokenize", "softmax"): Kind("text-classification", TEXTS, LABELS, "text"),
    ("prepare-image", "softmax"): Kind("image-classification", IMAGES, LABELS, "image"),
    ("prepare-image", "boxes"): Kind("object-detection", WHOLE_IMAGES, FOUND_BOXES, "boxes"),
    ("prepare-image", "segment"): Kind("image-segmentation", WHOLE_IMAGES, MASKS, "masks"),
    ("prepare-image", "embed"): Kind("image-feature-extraction", IMAGES, IMAGE_EMBEDDINGS, "nearest"),
    ("tokenize", "embed"): Kind("feature-extraction", SENTENCES, EMBEDDINGS, "sentence"),
    ("tokenize", "tag"): Kind("token-classification", WORDS, TAGS, "tags"),
    ("tokenize-pair", "relevance"): Kind("text-ranking", RANKED, RELEVANCE, "ranking"),
    ("tokenize-pair", "span"): Kind("question-answering", ASKED, SPANS, "answer"),
    ("tokenize", "unmask"): Kind("fill-mask", MASKED_TEXTS, MASKED, "unmask"),
    ("log-mel", "transcribe"): Kind(
        "automatic-speech-recognition",
        RECORDINGS,
        TRANSCRIPTS_OF_SPEECH,
        "audio",
        graphs=2,
        client=TRANSFORMERS_JS,
    ),
    ("hear", "softmax"): Kind("audio-classification", SOUNDS, LABELS, "sound"),
    ("tokenize", "rewrite"): Kind(
        "text2text-generation", SOURCES, WRITTEN_TEXTS, "rewrite", graphs=2, client=TRANSFORMERS_JS
    ),
    ("tokenize-prompt", "draw"): Kind(
        "text-to-image", DRAWN_PROMPTS, DRAWN_PICTURES, "draw", graphs=3, client=ONNXRUNTIME_WEB_PARTS
    ),
    ("prompt", "generate"): Kind("text-generation", PROMPTS, REPLIES, "chat", client=TRANSFORMERS_JS),
}


def kind_of(task: str, model: Path | None = None) -> Kind:
    """Return the app type of a task, by the `app_steps` that ``model`` has.

    Raises `InputError` for a task without one.
    """
    found = get_task(task)
    config = {} if model is None else model_config(model)
    steps = (found if model is None else found.specialize(config)).app_steps
    if steps is None and found.app_steps in KINDS:
        raise InputError(
            f"There is no app yet for a {config.get('model_type')} of {task}.",
            where="model",
            expected="a model whose answers the task's app reads; other kinds of it have one",
            hint="run the ONNX file of the run's folder model/ by code of your own, or take another architecture",
        )
    if steps is None or steps not in KINDS:
        made = [name for name, other in TASKS.items() if other.app_steps in KINDS]
        raise InputError(
            f"There is no app for a model of {task}.",
            where="task",
            expected=f"one of {', '.join(made)}",
            hint=f"give the task app_steps, which are {' or '.join(map(' and '.join, KINDS))}",
        )
    return KINDS[steps]

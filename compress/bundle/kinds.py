"""The tasks that a bundle may be for."""

from __future__ import annotations

from compress.bundle.audio import RECORDINGS
from compress.bundle.embedding import EMBEDDINGS
from compress.bundle.image import IMAGES
from compress.bundle.kind import Kind
from compress.bundle.labels import LABELS
from compress.bundle.prompt import PROMPTS
from compress.bundle.reply import REPLIES
from compress.bundle.text import SENTENCES, TEXTS
from compress.bundle.transcript import TRANSCRIPTS_OF_SPEECH
from compress.bundle.transformers_js import TRANSFORMERS_JS

KINDS: dict[str, Kind] = {
    kind.task: kind
    for kind in (
        Kind("text-classification", TEXTS, LABELS, examples="text", app="Classifier"),
        Kind("image-classification", IMAGES, LABELS, examples="image", app="Classifier"),
        Kind("feature-extraction", SENTENCES, EMBEDDINGS, examples="sentence", app="Encoder"),
        Kind(
            "automatic-speech-recognition",
            RECORDINGS,
            TRANSCRIPTS_OF_SPEECH,
            examples="audio",
            app="Transcriber",
            languages=frozenset({"python", "node"}),
            graphs=2,
            client=TRANSFORMERS_JS,
        ),
        Kind(
            "text-generation",
            PROMPTS,
            REPLIES,
            examples="chat",
            app="Chat",
            languages=frozenset({"python", "node"}),
            client=TRANSFORMERS_JS,
        ),
    )
}

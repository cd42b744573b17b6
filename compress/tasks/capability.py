"""Properties of tasks, by which stages, recipes, apps and runtimes state which tasks they support.

They are plain strings, so that another package can add its own.
"""

from __future__ import annotations

Capabilities = frozenset[str]

READS_ROWS = "reads rows"
"""Example i is row i, so slices exist. Otherwise rows are running text that is divided into sequences."""
TAKES_TEXT = "takes text"
TAKES_PAIRS = "takes pairs"
"""Two texts form one input."""
TAKES_IMAGES = "takes images"
TAKES_AUDIO = "takes audio"
VARIABLE_LENGTH = "variable length"
"""Recordings keep their length instead of being padded or cut to a fixed one."""
HAS_LABELS = "has labels"
"""Rows have labels to train on. Tasks with classes always have them."""
TAKES_ARRAYS = "takes arrays"
"""Inputs are arrays of a graph, including the batch axis, without a known meaning."""
HAS_CLASSES = "has classes"
"""Answers are logits: of classes, of positions in a text, of characters, or of relevance."""
ANSWERS_PER_TOKEN = "answers per token"
"""Each token of a text, or frame of a recording, has its own answer, so that all must be computed."""
LOCALIZES = "localizes"
"""Answers are positions in an image, such as boxes or pixels, which move with image augmentation."""
PREDICTS_TOKENS = "predicts tokens"
"""Answers are tokens of the model's vocabulary, which must not change."""
EMBEDS = "embeds"
"""The answer is an embedding."""
DUAL_ENCODER = "dual encoder"
"""Images and texts are embedded separately; the similarity of two embeddings is the answer."""
GENERATES = "generates"
"""The answer is text generated token by token. Generation is timed."""
TRANSCRIBES = "transcribes"
"""The answer is the transcript of a recording, generated token by token."""
REWRITES = "rewrites"
"""The answer is text that an encoder-decoder generates from other text."""
DESCRIBES_IMAGES = "describes images"
"""The answer is text that a decoder generates after an image and a text."""
GENERATES_IMAGES = "generates images"
"""The answer is an image; one of several model parts is called once per step."""
SINGLE_CALL = "single call"
"""One call of the model returns the whole answer. Otherwise there is one call per token or step."""
EXPORTED_FROM_CHECKPOINT = "exported from checkpoint"
"""The graph is written node by node from a checkpoint, quantized or not. Otherwise a torch module is traced."""


def suits(capabilities: Capabilities, requires: Capabilities, excludes: Capabilities = frozenset()) -> bool:
    """Return whether a task with ``capabilities`` has all required and none of the excluded ones."""
    if HAS_CLASSES in capabilities:
        capabilities |= {HAS_LABELS}
    return requires <= capabilities and not excludes & capabilities


def takes_media(capabilities: Capabilities) -> bool:
    """Return whether inputs are images or recordings, which have no tokens."""
    return bool(capabilities & {TAKES_IMAGES, TAKES_AUDIO})

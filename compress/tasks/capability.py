"""What a task can be: the names by which stages, recipes, apps and runtimes say which tasks they are for.

They are plain text, so that another package may have further ones for its tasks and stages.
"""

from __future__ import annotations

Capabilities = frozenset[str]

READS_ROWS = "reads rows"
"""Example i is row i, so that there are slices; else rows are running text that is cut elsewhere."""
TAKES_TEXT = "takes text"
TAKES_PAIRS = "takes pairs"
"""Two texts are read as one input."""
TAKES_IMAGES = "takes images"
TAKES_AUDIO = "takes audio"
OF_ANY_LENGTH = "of any length"
"""Recordings come as long as they are, and are not brought to one length before a model."""
HAS_LABELS = "has labels"
"""There are labels to learn from; whatever has classes has them."""
TAKES_ARRAYS = "takes arrays"
"""Inputs are those of a graph as they stand, batch axis and all, and nobody knows what they mean."""
HAS_CLASSES = "has classes"
"""There are labels to learn from, and answers have logits: of classes, of places in a text, of letters, or of being
relevant."""
BY_TOKEN = "answers by token"
"""Each token of a text, or frame of a recording, has an answer of its own, so that none may be left uncomputed."""
BY_PLACE = "answers by place"
"""Answers are places in a picture, such as boxes or pixels, so that who varies the picture moves them too."""
NAMES_TOKENS = "names tokens"
"""Answers are tokens of the model's vocabulary, which has to stay as it is."""
EMBEDS = "embeds"
"""The answer is an embedding."""
HAS_TWO_TOWERS = "has two towers"
"""Images and texts are embedded apart, and one embedding is as near to another as what they show and say."""
GENERATES = "generates"
"""The answer is text, token by token, so that generation is what is timed and tried."""
TRANSCRIBES = "transcribes"
"""The answer is what a recording says, token by token."""
REWRITES = "rewrites"
"""The answer is text, token by token, that an encoder of other text and a decoder make."""
TELLS_OF_IMAGES = "tells of images"
"""The answer is text, token by token, that a decoder writes behind an image and a text."""
DRAWS = "draws"
"""The answer is a picture, for which one part of several is called once a step."""
ANSWERS_AT_ONCE = "answers at once"
"""One call of the model gives the whole answer; else there is a call for each token or step."""
IS_WRITTEN = "is written"
"""The graph is written node by node from a checkpoint, quantized or not; else it is traced from a torch module."""


def suits(capabilities: Capabilities, requires: Capabilities, excludes: Capabilities = frozenset()) -> bool:
    """Whether a task with ``capabilities`` has all that is required and nothing that is excluded."""
    if HAS_CLASSES in capabilities:
        capabilities |= {HAS_LABELS}
    return requires <= capabilities and not excludes & capabilities


def takes_media(capabilities: Capabilities) -> bool:
    """Whether inputs are images or recordings, so that there are no tokens to speak of."""
    return bool(capabilities & {TAKES_IMAGES, TAKES_AUDIO})

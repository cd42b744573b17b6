"""`compress bench --steps --size`: options of pictures, and where they mean nothing."""

from __future__ import annotations

import pytest

from compress.cli.bench import refuse_idle
from compress.cli.bench_generation import refuse_together
from compress.tasks.registry import get_task
from compress.utils.errors import InputError

PICTURES = {"picture_steps": (4, 50), "picture_sizes": (64,)}


def test_steps_and_sizes_are_for_models_that_draw() -> None:
    refuse_idle(get_task("text-to-image").capabilities, PICTURES)
    others = get_task("text-classification").capabilities
    refuse_idle(others, {"threads": 2})
    with pytest.raises(InputError, match="--steps and --size means nothing here"):
        refuse_idle(others, PICTURES)
    with pytest.raises(InputError, match="--size means nothing here"):
        refuse_idle(others, {"picture_sizes": (64,)})


def test_they_do_not_go_with_a_context_of_text() -> None:
    idle = dict.fromkeys(("recipe", "batch_size", "rate", "size", "tokens", "text"))
    with pytest.raises(InputError, match="--steps and --context don't go together"):
        refuse_together([128], steps=[4], **idle)
    refuse_together(None, steps=[4], **idle)

"""Key under which a search remembers that a check of a model's widths has passed."""

from __future__ import annotations

from pathlib import Path

import tiny_run
from tiny_generation import write_all

from compress.plugins.search.shape_inference import stages_key
from compress.stages.protocols import model_checks

ROUNDS = {"gptq": {"group_size": 128}}


def test_a_passed_check_of_widths_is_known_by_what_cuts_before_it(tmp_path: Path) -> None:
    """A search, which asks once, asks again where other shares go, and not where columns are made alike otherwise."""

    def known(share: float, strength: float) -> str:
        stages = [
            {"prune_decoder": {"feed_forward": share}},
            {"equalize": {"strength": strength}},
            ROUNDS,
            {"onnx": {}},
        ]
        recipe = tiny_run.load(write_all(tmp_path, stages=stages))
        checks = [check for check in model_checks(recipe.stages) if check.of_widths]
        (found,) = (check for check in checks if check.stages[-1].kind == "gptq")
        assert [stage.kind for stage in found.stages] == ["prune_decoder", "gptq"]
        return stages_key(found.stages)

    assert known(0.5, 0.5) == known(0.5, 0.7) != known(0.25, 0.5)

"""A target with a draft: what is counted, and who is refused."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quantized import save_tiny_llama

from compress.errors import InputError, StageError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def drafts(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("drafts")


def test_figures_are_sums_over_prompts_and_other_tokens_are_named(drafts: Any) -> None:
    one = drafts.Reply([1, 2, 3, 4], 2.0), drafts.Reply([1, 2, 3, 4], 1.0, 6, 3)
    two = drafts.Reply([5, 6], 1.0), drafts.Reply([5, 7], 0.5, 2, 0)
    found = drafts.judged([one, two])
    assert found.differing == (1,) and found.prompts == 2
    assert found.acceptance.value == pytest.approx(3 / 8) and found.tokens_per_reading == pytest.approx(6 / 3)
    assert found.alone_tokens_per_second == pytest.approx(6 / 3) and found.pair_tokens_per_second == pytest.approx(4.0)
    assert tuple(found.speedup) == pytest.approx((2.0, 2.0, 2.0))
    assert "1 of 2 prompts (not 1)" in str(found)
    looked_up = drafts.judged([(one[0], drafts.Reply([1, 2, 3, 4], 1.0, accepted=1))])
    assert looked_up.acceptance is None and looked_up.tokens_per_reading == pytest.approx(4 / 3)
    with pytest.raises(InputError, match="Nothing was drafted"):
        drafts.judged([(one[0], one[0])])


def test_who_cannot_be_a_pair_is_refused(drafts: Any, tmp_path: Path) -> None:
    source = save_tiny_llama(tmp_path / "source").folder
    for name, suffix in (("ir", "xml"), ("gguf", "gguf"), ("trimmed", "gguf")):
        shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors"))
        (tmp_path / name / f"model.{suffix}").touch()
    with pytest.raises(InputError, match="The target is OPENVINO and the draft GGUF"):
        drafts.check_pair(tmp_path / "ir", tmp_path / "gguf")
    text = (tmp_path / "trimmed" / "tokenizer.json").read_text()
    (tmp_path / "trimmed" / "tokenizer.json").write_text(text.replace('"!"', '"!!"'))
    with pytest.raises(StageError, match=r"of the draft's .* tokens are not those of the model"):
        drafts.check_pair(tmp_path / "gguf", tmp_path / "trimmed")
    assert np.size(drafts.PROMPTS) == 20

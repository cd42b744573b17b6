"""Cuts tried on a model without weights say what the same cuts of the model say."""

from __future__ import annotations

from pathlib import Path

import pytest
from cut_architectures import build

from compress.models import PRUNING_TESTED_TYPES
from compress.models.prune_dry_run import check_layer_selection, check_prunable
from compress.utils.errors import ModelError, StageError


def config_of(name: str, folder: Path) -> Path:
    build(name)[0].config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", [*sorted(PRUNING_TESTED_TYPES), "deepseek_v3", "segformer"])
def test_what_can_be_cut_is_taken(name: str, tmp_path: Path) -> None:
    check_prunable(config_of(name, tmp_path), layers=True, heads=0.4, neurons=0.5)


@pytest.mark.parametrize(
    ("name", "part", "reason"),
    [
        ("bloom", "heads", r"follows from the number of heads \(ALiBi\)"),
        ("mpnet", "heads", r"all layers share relative_attention_bias|share encoder\.relative_attention_bias"),
        ("mixtral", "neurons", "has no feed-forward layer that can be cut"),
        ("minicpm3", "layers", "cannot say which of layers are left"),
    ],
)
def test_what_cannot_go_is_refused_by_its_config_alone(name: str, part: str, reason: str, tmp_path: Path) -> None:
    folder = config_of(name, tmp_path)
    with pytest.raises(StageError, match=reason):
        check_prunable(
            folder, **{name_of_part: 0.5 * (name_of_part == part) for name_of_part in ("layers", "heads", "neurons")}
        )


def test_layers_that_a_model_does_not_have_cannot_be_kept(tmp_path: Path) -> None:
    folder = config_of("bert", tmp_path)
    check_layer_selection(folder, (1,))
    with pytest.raises(StageError, match=r"Layers \[0, 2\] cannot be kept"):
        check_layer_selection(folder, (0, 2))


def test_a_config_that_makes_no_model_is_named(tmp_path: Path) -> None:
    folder = config_of("bert", tmp_path)
    text = (folder / "config.json").read_text().replace('"num_attention_heads": 4', '"num_attention_heads": 5')
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"transformers cannot build a model from this config: The hidden size"):
        check_prunable(folder, layers=False, heads=0.5, neurons=0.0)


def test_a_folder_of_other_files_is_passed_over(tmp_path: Path) -> None:
    check_prunable(tmp_path, layers=True, heads=0.4, neurons=0.5)


@pytest.mark.parametrize(("heads", "says"), [(0.1, "heads 0.1 would remove nothing"), (0.9, "leaves none")])
def test_shares_that_come_to_no_head_or_to_all_are_refused(heads: float, says: str, tmp_path: Path) -> None:
    """A tenth of a few heads is none of them, and nine tenths leave none."""
    with pytest.raises(StageError, match=says):
        check_prunable(config_of("bert", tmp_path), layers=False, heads=heads, neurons=0.0)

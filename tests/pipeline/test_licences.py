"""Tests of licences: detection in model cards, files and packages, duties of the result, and forbidden runs."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from packaging.licenses import canonicalize_license_expression

from compress.data.samples.sample import known_samples
from compress.pipeline.licence_detection import (
    NOT_STATED,
    canonical,
    duties,
    find_licence,
    hub_name,
    is_known,
    joined,
    package_licence,
)
from compress.pipeline.licences import carried, find_licences, refuse_forbidden, remarks_on
from compress.recipe.recipe import Recipe
from compress.results.report import Report
from compress.utils.errors import InputError


def recipe(**changes: Any) -> Recipe:
    """Return a recipe of a text classifier with the top-level fields in ``changes`` replaced."""
    values: dict[str, Any] = {
        "name": "toy",
        "task": "text-classification",
        "model": "model",
        "data": {"splits": {"train": "train.csv", "test": "test.csv"}},
        "stages": ["onnx_int8"],
    }
    return Recipe.model_validate({**values, **changes})


def model_folder_with_card(folder: Path, name: str, licence: str | None = None) -> Path:
    """Create a model folder with a model card that states ``licence``, or an empty folder without one."""
    model_folder = folder / name
    model_folder.mkdir(parents=True)
    if licence is not None:
        (model_folder / "README.md").write_text(f"---\nlanguage: en\nlicense: {licence}\n---\n# A model\n")
    return model_folder


@pytest.mark.parametrize(
    ("licence", "expected", "asks"),
    [
        ("apache-2.0", "Apache-2.0", ()),
        ("CC BY-SA 3.0", "CC-BY-SA-3.0", ("share-alike",)),
        ("cc-by-nc-nd-4.0", "CC-BY-NC-ND-4.0", ("non-commercial", "no-derivatives")),
        ("llama2", "LicenseRef-llama2", ("use-restrictions", "no-training")),
        ("llama3.1", "LicenseRef-llama3.1", ("use-restrictions",)),
        ("creativeml-openrail-m", "LicenseRef-creativeml-openrail-m", ("use-restrictions",)),
        # OR has only the duties that both licences share, AND has those of either; AND binds tighter than OR.
        ("MIT OR GPL-2.0-only", "MIT OR GPL-2.0-only", ()),
        ("(MIT OR GPL-2.0-only) AND CC-BY-NC-4.0", "(MIT OR GPL-2.0-only) AND CC-BY-NC-4.0", ("non-commercial",)),
        ("MIT OR GPL-2.0-only AND CC-BY-NC-4.0", "MIT OR GPL-2.0-only AND CC-BY-NC-4.0", ()),
        ("gpl-3.0-only with gcc-exception-3.1", "GPL-3.0-only WITH GCC-exception-3.1", ("share-alike",)),
        ("other", NOT_STATED, ()),
        ("", NOT_STATED, ()),
    ],
)
def test_licence_becomes_spdx_expression_with_duties(licence: str, expected: str, asks: tuple[str, ...]) -> None:
    assert (canonical(licence), duties(canonical(licence))) == (expected, asks)
    if expected != NOT_STATED:
        assert canonicalize_license_expression(expected) == expected


def test_licences_are_joined_and_mapped_to_hub_names() -> None:
    assert joined(["MIT", "Apache-2.0", "MIT"]) == "Apache-2.0 AND MIT"
    assert joined(["MIT OR ISC", "Zlib"]) == "(MIT OR ISC) AND Zlib"
    assert joined(["MIT", NOT_STATED]) == joined([]) == NOT_STATED
    names = ["Apache-2.0", "GPL-3.0-only", "LicenseRef-llama3.1", "LicenseRef-mine", "MIT AND Zlib", NOT_STATED]
    assert [hub_name(name) for name in names] == ["apache-2.0", "gpl-3.0", "llama3.1", None, None, "unknown"]
    known = ["MIT", "LicenseRef-gemma", "LicenseRef-public-domain", "LicenseRef-mine", "MIT AND LicenseRef-mine"]
    assert [is_known(licence) for licence in known] == [True, True, True, False, False]


def test_every_sample_has_an_spdx_expression() -> None:
    for name, sample in known_samples().items():
        if sample.kind != "runtime":
            assert sample.spdx == canonical(sample.spdx or "") != NOT_STATED, name


def _gguf(path: Path, licence: str) -> Path:
    """Write a GGUF file with the metadata key `general.license` and no tensor, as the specification defines it."""
    text = lambda value: struct.pack("<Q", len(value)) + value.encode()  # noqa: E731
    entry = text("general.license") + struct.pack("<I", 8) + text(licence)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + entry)
    return path


def test_licence_is_read_from_card_config_gguf_and_reuse_file(tmp_path: Path) -> None:
    assert find_licence(model_folder_with_card(tmp_path, "card", "bigscience-openrail-m")) == (
        "LicenseRef-bigscience-openrail-m",
        "README.md",
    )
    assert find_licence(model_folder_with_card(tmp_path, "several", "[mit, cc-by-4.0]")).licence == "CC-BY-4.0 AND MIT"
    assert (
        find_licence(model_folder_with_card(tmp_path, "other", "other\nlicense_name: my-terms")).licence
        == "LicenseRef-my-terms"
    )
    assert find_licence(_gguf(tmp_path / "model.gguf", "llama3.1")) == ("LicenseRef-llama3.1", "model.gguf")
    config = model_folder_with_card(tmp_path, "config")
    (config / "config.json").write_text(json.dumps({"license": "mit"}))
    assert find_licence(config) == ("MIT", "config.json")
    (tmp_path / "rows.csv").write_text("text,label\n")
    assert find_licence(tmp_path / "rows.csv") == (NOT_STATED, "")
    # REUSE 3.3: the licence of a file that cannot hold comments is stated in a file `NAME.license` beside it.
    (tmp_path / "rows.csv.license").write_text(
        "SPDX-FileCopyrightText: 2026 Me\n\nSPDX-License-Identifier: CC-BY-4.0\n"
    )
    assert find_licence(tmp_path / "rows.csv") == ("CC-BY-4.0", "rows.csv.license")
    (model_folder_with_card(tmp_path, "broken") / "README.md").write_text("---\nlicense: [mit\n---\n")
    assert find_licence(tmp_path / "broken" / "rows.csv") == (NOT_STATED, "")
    with pytest.raises(InputError, match="front matter is no YAML"):
        find_licence(tmp_path / "broken")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("SPDX-License-Identifier: CC-BY-NC-SA-4.0\n\nCreative Commons", "CC-BY-NC-SA-4.0"),
        ("You may look at this.", "LicenseRef-LICENSE-of-the-source"),
    ],
)
def test_licence_text_is_identified_only_by_spdx_tag(text: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "LICENSE").write_text(text)
    assert find_licence(tmp_path) == (expected, "LICENSE")


def test_licence_of_package_is_read_from_its_metadata() -> None:
    # The expected licences are those on the packages' PyPI pages.
    assert (package_licence("onnxruntime"), package_licence("huggingface_hub")) == ("MIT", "Apache-2.0")
    assert package_licence("no-such-package") == NOT_STATED


def test_licences_of_all_sources_and_runtimes_are_listed(tmp_path: Path) -> None:
    model_folder_with_card(tmp_path, "model", "apache-2.0")
    model_folder_with_card(tmp_path, "adapter", "cc-by-nc-4.0")
    merged = recipe(
        stages=[{"merge_lora": {"adapter": "adapter"}}, "onnx"], licences={"stated": {"train.csv": "CC BY-SA 4.0"}}
    )
    licences = find_licences(merged, tmp_path)
    assert {licensed.of: (licensed.licence, licensed.stated_in, licensed.binds) for licensed in licences} == {
        "model": ("Apache-2.0", "README.md", True),
        "adapter adapter": ("CC-BY-NC-4.0", "README.md", True),
        "data train.csv": ("CC-BY-SA-4.0", "the recipe", False),
        "test data test.csv": (NOT_STATED, "", False),
        "runtime onnxruntime": ("MIT", "its metadata", False),
    }
    assert carried(licences) == "Apache-2.0 AND CC-BY-NC-4.0"
    words = remarks_on(licences, merged)
    assert "adapter adapter, CC-BY-NC-4.0: no commercial use" in words
    assert [line for line in words if "contradict" in line] == [
        "adapter adapter, CC-BY-NC-4.0 and data train.csv, CC-BY-SA-4.0 may contradict each other: "
        "one requires its own terms for derived models, and the other has further duties"
    ]
    assert words[-1] == "no licence is stated for test data test.csv; `licences.stated` of the recipe may say it"


def test_no_derivatives_model_is_rejected_unless_recipe_allows_it(tmp_path: Path) -> None:
    model_folder_with_card(tmp_path, "model", "cc-by-nd-4.0")
    forbidden = recipe()
    with pytest.raises(InputError, match=r"model model, CC-BY-ND-4\.0 permits no derivatives") as caught:
        refuse_forbidden(find_licences(forbidden, tmp_path), forbidden)
    assert "licences.allowed" in str(caught.value)
    # Writing the same weights in another format makes no derivative (CC BY-ND 4.0, section 2(a)(4)).
    written = recipe(stages=["onnx"])
    refuse_forbidden(find_licences(written, tmp_path), written)
    allowed = recipe(licences={"allowed": {"model": "letter of 2 May"}})
    licences = find_licences(allowed, tmp_path)
    refuse_forbidden(licences, allowed)
    assert "the recipe gives the reason for an exception: letter of 2 May" in remarks_on(licences, allowed)[0]
    with pytest.raises(ValueError, match="a reason for each"):
        recipe(licences={"allowed": {"model": " "}})


def test_teacher_whose_licence_forbids_training_is_rejected(tmp_path: Path) -> None:
    model_folder_with_card(tmp_path, "big", "llama2")
    model_folder_with_card(tmp_path, "small", "apache-2.0")
    stages = [{"distill": {"student": {"model": "small"}}}, "onnx"]
    taught = recipe(model="big", stages=stages)
    licences = find_licences(taught, tmp_path)
    # Only the student's weights ship, so only its licence is carried over.
    assert carried(licences) == "Apache-2.0"
    with pytest.raises(InputError, match=r"forbids training other models .*does for small"):
        refuse_forbidden(licences, taught)
    (tmp_path / "small" / "README.md").write_text("---\nlicense: llama2\n---\n")
    refuse_forbidden(find_licences(taught, tmp_path), taught)


def test_run_of_earlier_run_inherits_licences_of_its_data(tmp_path: Path) -> None:
    model_folder_with_card(tmp_path, "model", "apache-2.0")
    first = recipe(licences={"stated": {"train.csv": "CC-BY-NC-4.0"}})
    report = Report(recipe="first", licences=find_licences(first, tmp_path))
    (tmp_path / "runs" / "model").mkdir(parents=True)
    (tmp_path / "runs" / "report.json").write_text(report.to_json())
    (tmp_path / "runs" / "lock.json").write_text("{}")
    second = recipe(model="runs/model", data={"splits": {"train": "mine.csv", "test": "mine.csv"}})
    licences = {licensed.of: licensed for licensed in find_licences(second, tmp_path)}
    assert (licences["model"].licence, licences["model"].stated_in) == ("Apache-2.0", "run first")
    assert licences["data train.csv of run first"].duties == ("non-commercial",)
    assert "data train.csv of run first, CC-BY-NC-4.0: no commercial use" in remarks_on(
        tuple(licences.values()), second
    )


def test_stated_licence_of_unknown_source_is_rejected(tmp_path: Path) -> None:
    strange = recipe(licences={"stated": {"trian.csv": "MIT"}})
    with pytest.raises(InputError, match=r"no source named 'trian\.csv'. Did you mean 'train\.csv'"):
        find_licences(strange, tmp_path)


def test_stated_licences_survive_absolute_paths(tmp_path: Path) -> None:
    from compress.pipeline.run import with_absolute_paths

    model_folder_with_card(tmp_path, "model")
    (tmp_path / "train.csv").write_text("text,label\n")
    stated_recipe = recipe(licences={"stated": {"model": "mit", "train.csv": "cc0-1.0"}})
    moved = with_absolute_paths(stated_recipe, tmp_path)
    assert moved.licences.stated.keys() == {str(tmp_path / "model"), str(tmp_path / "train.csv")}
    licences = {licensed.of: licensed.licence for licensed in find_licences(moved, Path("/"))}
    assert (licences["model"], licences["data train.csv"]) == ("MIT", "CC0-1.0")

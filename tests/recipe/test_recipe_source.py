"""Tests of reading recipes: all problems with lines, overrides, the YAML dialect, writing and the schema."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from imported import packages_imported_by

from compress.recipe.loading import dump_recipe, read_recipe, recipe_schema
from compress.recipe.old_names import OLD_NAMES
from compress.recipe.recipe import Recipe
from compress.stages.onnx_int8.stage import OnnxInt8
from compress.utils.errors import Problem, RecipeError

GOOD = """\
name: good
task: text-classification
model: org/model
data:
  splits: {train: train.csv, test: test.csv}
stages:
  - finetune: {epochs: 2, learning_rate: 5e-5}
  - distill:
      teacher: finetune
      student: {layers: [0, 2]}
  - onnx
  - onnx_int8:
limits:
  - {metric: accuracy, at_least: 0.9, of: baseline}
"""

TEN_MISTAKES = """\
name: two words
task: text-clasification
model: org/model
data:
  splits: {train: train.csv, validation: valid.csv}
stages:
  - finetune:
      epochs: many
      learning_rte: 5e-5
  - distil: {teacher: finetune}
  - distill:
      teacher: finetun
      precision: fastst
  - onnx
  - prune: {heads: 0.1}
limits:
  - {metric: accuracy}
"""


def write(folder: Path, text: str | bytes, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def problems_of(path: Path, overrides: tuple[str, ...] = ()) -> list[Problem]:
    with pytest.raises(RecipeError) as caught:
        read_recipe(path, overrides)
    return list(caught.value.problems)


def only_problem(path: Path, overrides: tuple[str, ...] = ()) -> Problem:
    problems = problems_of(path, overrides)
    assert len(problems) == 1, problems
    return problems[0]


def test_reads_a_recipe(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path, GOOD))
    assert recipe.labels() == ("finetune", "distill", "onnx", "onnx_int8")
    assert recipe.stages[0].learning_rate == 0.00005
    assert recipe.stages[1].student.layers == (0, 2)
    assert recipe.limits[0].of == "baseline"


def test_ten_mistakes_give_ten_problems_with_lines(tmp_path: Path) -> None:
    problems = problems_of(write(tmp_path, TEN_MISTAKES))
    assert [(problem.line, problem.field, problem.nearest) for problem in problems] == [
        (1, "name", None), (2, "task", "text-classification"), (5, "data.splits", None),
        (8, "stages.0.finetune.epochs", None), (9, "stages.0.finetune.learning_rte", "learning_rate"),
        (10, "stages.1.distil", "distill"), (12, "stages.2.distill.teacher", "finetune"),
        (13, "stages.2.distill.precision", "fastest"), (15, "stages.4.prune", None), (17, "limits.0", None),
    ]  # fmt: skip


def test_every_problem_names_file_and_found_value(tmp_path: Path) -> None:
    path = write(tmp_path, TEN_MISTAKES)
    by_line = {p.line: p for p in problems_of(path)}
    assert {p.file for p in by_line.values()} == {str(path)}
    assert by_line[8].found == "'many'"
    assert by_line[8].expected == "a number"
    assert (by_line[10].expected, by_line[10].nearest) == ("a known stage", "distill")


@pytest.mark.parametrize(
    ("old", "new", "line", "field", "expected"),
    [
        ("epochs: 2", "epochs: 0", 7, "stages.0.finetune.epochs", "a number above 0"),
        ("epochs: 2", "epochs: 1001", 7, "stages.0.finetune.epochs", "a number of at most 1000"),
        ("epochs: 2", "epochs: '2'", 7, "stages.0.finetune.epochs", "a number"),
        ("epochs: 2", "batch_size: 1.5", 7, "stages.0.finetune.batch_size", "a whole number"),
        ("epochs: 2", "keep_best: yes", 7, "stages.0.finetune.keep_best", "true or false"),
        ("epochs: 2", "epochs: .nan", 7, "stages.0.finetune.epochs", "a finite number"),
        ("layers: [0, 2]", "layers: 3", 10, "stages.1.distill.student.layers", "a list"),
        ("layers: [0, 2]", "layers: []", 10, "stages.1.distill.student.layers", "a list of at least 1"),
        ("layers: [0, 2]", "layers: [0, x]", 10, "stages.1.distill.student.layers.1", "a whole number"),
        ("{layers: [0, 2]}", "{layers: [1], model: a/b}", 10, "stages.1.distill.student", "exactly one"),
        ("model: org/model", "model: [a]", 3, "model", "text"),
        ("model: org/model", "seed: 1", 1, "model", "the field is required"),
        ("at_least: 0.9", "at_least: 0.9, at_most: 1", 14, "limits.0", "exactly one of at_least and at_most"),
        ("onnx_int8:", "onnx_int8: {embedding_bits: 5}", 12, "stages.3.onnx_int8.embedding_bits", "4, 8 or 32"),
        ("onnx_int8:", "{onnx_int8: , onnx: }", 12, "stages.3", "one stage as a single name"),
    ],
)  # fmt: skip
def test_one_mistake_is_one_problem(tmp_path: Path, old: str, new: str, line: int, field: str, expected: str) -> None:
    assert old in GOOD
    problem = only_problem(write(tmp_path, GOOD.replace(old, new)))
    assert (problem.line, problem.field) == (line, field)
    assert expected in problem.expected


@pytest.mark.parametrize(
    ("old", "new", "line", "field", "words"),
    [
        ("teacher: finetune", "teacher: onnx", 9, "stages.1.distill.teacher", "a later stage"),
        ("teacher: finetune", "teacher: distill", 9, "stages.1.distill.teacher", "its own output"),
        ("of: baseline", "of: basline", 14, "limits.0.of", "'basline'"),
        ("of: baseline", "target: gpu", 14, "limits.0.target", "'gpu'"),
        ("name: good", "name: good\nbaseline: distil", 2, "baseline", "'distil'"),
        ("name: good", "name: good\ntargets: [cpu, gpuu]", 2, "targets.1", "'gpuu'"),
        ("train: train.csv, ", "", 5, "data.splits", "the splits test"),
        ("train: train.csv", "train: test.csv", 5, "data.splits.train", "the same as test"),
        ("train: train.csv", "train: train", 4, "data.source", "'train'"),
        ("teacher: finetune", "use_unlabeled: true", 4, "data.unlabeled", "no unlabeled text"),
        ("model: org/model", "model: sample:minilmm", 3, "model", "'sample:minilmm'"),
        ("model: org/model", "model: sample:movie-reviews", 3, "model", "'sample:movie-reviews'"),
    ],
)
def test_incompatible_parts_are_refused(tmp_path: Path, old: str, new: str, line: int, field: str, words: str) -> None:
    assert old in GOOD
    problem = only_problem(write(tmp_path, GOOD.replace(old, new)))
    assert (problem.line, problem.field) == (line, field)
    assert words in problem.found


def test_incompatible_stages_are_named_with_alternatives(tmp_path: Path) -> None:
    problem = only_problem(write(tmp_path, GOOD.replace("  - onnx\n", "")))
    assert problem.field == "stages.2.onnx_int8"
    assert "onnx_int8, which takes an OnnxModel" in problem.found
    assert "stage 1 (distill), which is a TorchModel" in problem.found
    assert "or onnx between the two" in problem.expected


def test_first_stage_must_accept_the_starting_model(tmp_path: Path) -> None:
    text = GOOD[: GOOD.index("stages:")] + "stages: [onnx_int8]\n"
    problem = only_problem(write(tmp_path, text))
    assert "the starting model, which is a TorchModel" in problem.found


def test_semantic_problems_are_reported_beside_field_errors(tmp_path: Path) -> None:
    text = GOOD.replace("teacher: finetune", "teacher: finetun\n      epochs: -1").replace(
        "at_least: 0.9, of: baseline", "at_least: x, of: nobody"
    )
    fields = {p.field for p in problems_of(write(tmp_path, text))}
    assert fields == {"stages.1.distill.teacher", "stages.1.distill.epochs", "limits.0.at_least", "limits.0.of"}


@pytest.mark.parametrize("stages", ["", "stages:\n", "stages: []\n", "stages: {onnx: }\n"])
def test_missing_stages_are_reported(tmp_path: Path, stages: str) -> None:
    problem = only_problem(write(tmp_path, GOOD[: GOOD.index("stages:")] + stages))
    assert problem.field == "stages"


def test_explicit_kind_is_the_same_stage_with_the_same_lines(tmp_path: Path) -> None:
    text = GOOD.replace("  - onnx\n", "  - kind: onnx\n    opset: 18\n")
    assert read_recipe(write(tmp_path, text)).stages[2].opset == 18
    problem = only_problem(write(tmp_path, text.replace("18", "1")))
    assert (problem.line, problem.field) == (12, "stages.2.onnx.opset")


# overrides


def test_overrides_reach_bare_stages_missing_mappings_lists_and_whole_stages(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path, GOOD), ["stages.2.opset=18", "stages.3.onnx_int8.embedding_bits=4",
        "benchmark.seconds=1.5", "limits.0.at_least=5e-1", "stages.0={finetune: {epochs: 7}}",
        "stages.1.student.layers=[1]"])  # fmt: skip
    assert recipe.stages[2].opset == 18
    assert recipe.stages[3].embedding_bits == 4
    assert recipe.benchmark.seconds == 1.5
    assert recipe.limits[0].at_least == 0.5
    assert recipe.stages[0].epochs == 7
    assert recipe.stages[1].student.layers == (1,)


@pytest.mark.parametrize(
    ("option", "epochs"),
    [
        ("finetune.epochs=7", (7, 4)),
        ("finetune-2.epochs=7", (2, 7)),
        ("finetune={epochs: 7}", (7, 4)),
        ("stages.1.finetune.epochs=7", (2, 7)),
    ],
)
def test_override_names_a_stage_by_its_label_or_position(tmp_path: Path, option: str, epochs: tuple[int, int]) -> None:
    path = write(tmp_path, GOOD.replace("  - distill:", "  - finetune: {epochs: 4}\n  - distill:"))
    assert tuple(stage.epochs for stage in read_recipe(path, [option]).stages[:2]) == epochs


def test_override_of_an_unknown_stage_names_the_labels(tmp_path: Path) -> None:
    problem = only_problem(write(tmp_path, GOOD), ("distil.epochs=2",))
    assert problem.nearest == "distill"
    assert "a stage (finetune, distill, onnx, onnx_int8)" in problem.expected


@pytest.mark.parametrize(
    ("option", "field"),
    [
        ("distil.epochs=1", "distil"),
        ("distill.epoch=1", "stages.1.distill.epoch"),
        ("distill-2.epochs=1", "distill-2"),
        ("stages.9.epochs=1", "stages.9"),
        ("stages.0.prune.epochs=1", "stages.0.prune"),
        ("stages.0.epoch=1", "stages.0.finetune.epoch"),
        ("name.x=1", "name.x"),
        ("stages.0.epochs=-1", "stages.0.finetune.epochs"),
        ("stages.0.epochs=[1", "recipe"),
        ("=1", "recipe"),
        ("stages.1.student.layers.5=1", "stages.1.distill.student.layers.5"),
    ],
)
def test_invalid_override_is_reported_without_a_line(tmp_path: Path, option: str, field: str) -> None:
    problem = only_problem(write(tmp_path, GOOD), (option,))
    assert (problem.file, problem.line, problem.field) == (f"--set {option}", None, field)


# files and YAML


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        ("eagle3: {steps: 5}", "eagle3"),
        ("openvino: {draft_of: start}", "draft_of"),
        ("lora: {rank: 8}", "lora"),
        ("finetune: {weight_decay: 0.1}", "weight_decay"),
    ],
)
def test_removed_stage_or_field_error_gives_advice(stage: str, name: str, tmp_path: Path) -> None:
    text = GOOD.replace("  - onnx\n  - onnx_int8:\n", f"  - {stage}\n")
    (problem,) = problems_of(write(tmp_path, text))
    assert problem.field.split(".")[-1] == name and problem.line == 11
    assert problem.found.startswith("an unknown") and problem.expected == OLD_NAMES[name] and problem.nearest is None


@pytest.mark.parametrize(
    ("stage", "name", "new_name"),
    [
        ("prune: {sparsity: 0.5, heads: 0.5}", "prune.sparsity", "the stage sparsify"),
        ("prune: {experts: 0.25, heads: 0.5}", "prune.experts", "the stage prune_decoder"),
        ("prune: {bridge: false, heads: 0.5}", "prune.bridge", "the stage prune_decoder"),
        ("distill: {teacher: finetune, top_k: 8}", "distill.top_k", "the stage distill_language_model"),
    ],
)
def test_moved_field_error_names_its_new_path(stage: str, name: str, new_name: str, tmp_path: Path) -> None:
    text = GOOD.replace("  - onnx\n  - onnx_int8:\n", f"  - {stage}\n")
    (problem,) = problems_of(write(tmp_path, text))
    assert problem.field.endswith(name) and problem.line == 11
    assert problem.found == "an unknown field" and problem.expected.startswith(new_name)


def test_missing_file_error_suggests_the_nearest_name(tmp_path: Path) -> None:
    write(tmp_path, GOOD, "quickstart.yaml")
    problem = only_problem(tmp_path / "quikstart.yaml")
    assert (problem.found, problem.nearest) == ("no such file", "quickstart.yaml")


def test_a_folder_an_empty_file_and_a_list_are_refused(tmp_path: Path) -> None:
    assert only_problem(tmp_path).found == "a folder"
    assert only_problem(write(tmp_path, "")).found == "an empty file"
    assert only_problem(write(tmp_path, "# nothing\n")).found == "an empty file"
    assert only_problem(write(tmp_path, "- a\n")).found == "a list of 1"


def test_invalid_utf8_error_has_its_line(tmp_path: Path) -> None:
    problem = only_problem(write(tmp_path, b"name: a\ntask: \xff\n"))
    assert problem.line == 2
    assert "0xff" in problem.found


def test_syntax_error_has_line_and_column(tmp_path: Path) -> None:
    problem = only_problem(write(tmp_path, "name: a\ntask: b: c\n"))
    assert problem.line == 2
    assert "column 8" in problem.found


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: a\x00b\n", "the character"),
        ("a: &x [*x]\n", "an alias to itself"),
        ("a: " + "[" * 60 + "]" * 60, "too many or too deeply"),
        ("a: " + "[" * 5000, "deeply nested"),
        ("a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
            f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 10)}]\n" for i in range(9)
        ), "too many or too deeply"),
        ("a: 1\n---\nb: 2\n", "invalid YAML"),
    ],
    ids=["control", "loop", "deep", "very deep", "billion laughs", "two documents"],
)  # fmt: skip
def test_hostile_yaml_is_refused(tmp_path: Path, text: str, words: str) -> None:
    assert words in only_problem(write(tmp_path, text)).found


@pytest.mark.parametrize("value", ["!!python/object/apply:os.system [ls]", "!env HOME", "!!binary aGk="])
def test_yaml_tags_construct_no_objects(tmp_path: Path, value: str) -> None:
    problem = only_problem(write(tmp_path, GOOD.replace("org/model", value)))
    assert (problem.line, problem.field) == (3, "model")
    assert "the YAML tag" in problem.found


def test_duplicate_key_error_names_both_lines(tmp_path: Path) -> None:
    problem = only_problem(write(tmp_path, GOOD + "name: again\n"))
    assert (problem.line, problem.field) == (15, "name")
    assert "the first is on line 1" in problem.found


def test_environment_variables_are_not_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "x")
    recipe = read_recipe(write(tmp_path, GOOD.replace("org/model", "$SECRET/${SECRET}")))
    assert recipe.model == "$SECRET/${SECRET}"


@pytest.mark.parametrize(
    ("text", "value"), [("no", "no"), ("on", "on"), ("2024-01-01", "2024-01-01"), ("1:30", "1:30"), ("1_000", "1_000")]
)
def test_yaml_1_1_special_values_stay_strings(tmp_path: Path, text: str, value: str) -> None:
    recipe = read_recipe(write(tmp_path, GOOD.replace("name: good", f"name: good\ndescription: {text}")))
    assert recipe.description == value


@pytest.mark.parametrize(
    ("text", "value"), [("1e-5", 1e-5), ("5E-5", 5e-5), (".5", 0.5), ("1.", 1.0), ("0x10", 16), ("+3", 3)]
)
def test_common_number_formats_are_read(tmp_path: Path, text: str, value: float) -> None:
    recipe = read_recipe(write(tmp_path, GOOD.replace("epochs: 2", f"optimizer: {{weight_decay: {text}}}")))
    assert recipe.stages[0].optimizer.weight_decay == value


def test_anchors_and_merge_keys(tmp_path: Path) -> None:
    text = GOOD.replace("finetune: {epochs: 2, learning_rate: 5e-5}", "finetune: &t {epochs: 2, batch_size: 8}")
    text = text.replace("      teacher: finetune\n", "      <<: *t\n      epochs: 3\n")
    stage = read_recipe(write(tmp_path, text)).stages[1]
    assert (stage.epochs, stage.batch_size) == (3, 8)


def test_invalid_merge_key_hides_no_other_problem(tmp_path: Path) -> None:
    problems = problems_of(write(tmp_path, GOOD.replace("org/model", "[1]") + "<<: 3\n"))
    assert [(p.line, p.field) for p in problems] == [(3, "model"), (15, "<<")]


def test_override_below_a_non_mapping_stage_is_reported(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD.replace("onnx_int8:", "onnx_int8: x"))
    problems = problems_of(path, ("stages.3.embedding_bits=4",))
    assert {p.field for p in problems} == {"stages.3.onnx_int8", "stages.3.embedding_bits"}


# writing

TRICKY = ("no", "5e-5", "~", "<<", "1:30", "0x1F", "null", "- a", "#", "'", '"', "a\nb", "é\u2028", "=", ".nan", "x: y")
STUDENTS = ({"layers": (0, 7)}, {"config": {"a": [None, True, 1.5e-9, "1e3"]}}, {"model": "org/student"})


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("text", TRICKY)
def test_recipe_survives_a_round_trip(tmp_path: Path, text: str, student: dict[str, Any]) -> None:
    data = {"splits": {"train": "a.csv", "test": "b.csv", text: "other.csv"}, "columns": {text: text}}
    distill = {"kind": "distill", "student": student, "epochs": 1e-9, "learning_rate": 1e-300, "teacher": "start"}
    limits = [{"metric": "accuracy", "at_least": 1e-9, "of": "start"}]
    values = {"name": "r", "description": text, "task": "text-classification", "model": "org/model", "data": data}
    recipe = Recipe.model_validate(
        {**values, "seed": 2**31 - 1, "stages": [distill, {"kind": "onnx"}], "limits": limits}
    )
    assert read_recipe(write(tmp_path, dump_recipe(recipe))) == recipe


def test_written_stages_have_a_single_key_and_all_defaults(tmp_path: Path) -> None:
    values = yaml.safe_load(dump_recipe(read_recipe(write(tmp_path, GOOD))))
    assert [list(stage) for stage in values["stages"]] == [["finetune"], ["distill"], ["onnx"], ["onnx_int8"]]
    quantize = values["stages"][3]["onnx_int8"]
    assert {name: quantize[name] for name in ("method", "per_channel", "reduce_range", "embedding_bits")} == {
        "method": "dynamic",
        "per_channel": True,
        "reduce_range": "auto",
        "embedding_bits": 8,
    }
    # What has no value by default is left out.
    assert {name for name, field in OnnxInt8.model_fields.items() if field.default is not None} == {"kind", *quantize}


# schema


def valid(values: Any) -> bool:
    return jsonschema.Draft202012Validator(recipe_schema()).is_valid(values)


def good_values() -> dict[str, Any]:
    values = yaml.safe_load(GOOD)
    values["stages"][0]["finetune"]["learning_rate"] = 5e-5  # YAML 1.1 reads 5e-5 as text
    return copy.deepcopy(values)


def test_schema_is_valid_and_accepts_a_recipe() -> None:
    jsonschema.Draft202012Validator.check_schema(recipe_schema())
    assert valid(good_values())


def test_schema_refuses_what_the_reader_refuses() -> None:
    changes = [
        lambda v: v.update(sed=1),
        lambda v: v.pop("model"),
        lambda v: v.update(stages=[]),
        lambda v: v["stages"][0]["finetune"].update(epochs=0),
        lambda v: v["stages"].append({"exprt": {}}),
        lambda v: v["stages"].append({"onnx": {}, "onnx_int8": {}}),
        lambda v: v["stages"].append({"kind": "onnx"}),
        lambda v: v["limits"].append({"metric": "accuracy"}),
        lambda v: v["stages"][1]["distill"].update(student={"layer": [1]}),
    ]
    for number, change in enumerate(changes):
        values = good_values()
        change(values)
        assert not valid(values), number


def test_schema_describes_every_field() -> None:
    schema = recipe_schema()
    stages = schema["properties"]["stages"]["items"]["anyOf"][0]["properties"]
    assert set(stages) >= {"finetune", "distill", "prune", "trim_vocabulary", "onnx", "onnx_int8"}
    for kind, stage in stages.items():
        assert stage["description"], kind
        assert all("description" in field for field in stage["properties"].values()), kind


def test_reading_loads_no_heavy_package() -> None:
    heavy = {"torch", "transformers", "onnxruntime", "pyarrow", "datasets"}
    assert packages_imported_by("import compress.recipe.loading").isdisjoint(heavy)

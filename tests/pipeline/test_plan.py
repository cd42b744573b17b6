"""Tests of the plan: predicted parameters, time, memory and disk, and input errors found before a model is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch
from adapters import save_adapter
from imported import packages_imported_by
from narrow import shown
from quantized import save_tiny_llama
from transformers import BertConfig, BertForSequenceClassification, MPNetConfig, MPNetForSequenceClassification

import compress.pipeline.planning
import compress.utils.environment
from compress.data.config import DataConfig
from compress.pipeline.plan import render_plan, render_warnings
from compress.pipeline.planning import machine_flops_per_second, make_plan
from compress.pipeline.recipe_sources import read_shape
from compress.pipeline.stage_costs import GRAPH_BYTES, LIBRARIES_BYTES
from compress.recipe.recipe import Recipe
from compress.sources.build_model import ModelOrigin
from compress.stages.cost_model import PlanContext, Shape, Text
from compress.stages.distill.stage import Distill
from compress.stages.distill_language_model.stage import DistillLanguageModel
from compress.stages.finetune import Finetune
from compress.stages.prune.stage import Prune
from compress.stages.training.length import activation_bytes
from compress.utils.errors import InputError
from compress.utils.progress import SilentProgress

CONFIG: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 24,
}
PLAN = PlanContext(
    max_length=8, reads_text=True, splits={}, unlabeled={}, find_model=lambda name, drawn: None, rate=lambda: 1e9
)
STAGES = [{"finetune": {"epochs": 2}}, {"onnx": {}}, {"onnx_int8": {}}]


def bert(**changes: Any) -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**{**CONFIG, **changes}))


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    bert().save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{i}" for i in range(35))]
    (folder / "vocab.txt").write_text("\n".join(words))
    return folder


@pytest.fixture
def folder(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with a model and three splits of 100, 10 and 20 rows of 40 bytes each."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty-cache"))
    monkeypatch.setattr("compress.pipeline.planning.machine_flops_per_second", lambda: 1e9)
    for split, rows in (("train", 100), ("validation", 10), ("test", 20)):
        lines = [f"{split + ' ' + str(row):w<36},{('no', 'ok')[row % 2]}\n" for row in range(rows)]
        (tmp_path / f"{split}.csv").write_text("text,label\n" + "".join(lines))
    return tmp_path


def recipe(stages: list[dict[str, Any]] | None = None, **changes: Any) -> Recipe:
    splits = {split: f"{split}.csv" for split in ("train", "validation", "test")}
    data = {"splits": splits, "max_length": 8, **changes.pop("data", {})}
    values = {"name": "r", "task": "text-classification", "model": "model", "data": data}
    return Recipe.model_validate({**values, "stages": stages or STAGES, **changes})


def refusal(recipe_to_plan: Recipe, folder: Path, artifacts: Path) -> str:
    with pytest.raises(InputError) as caught:
        make_plan(recipe_to_plan, folder, None, artifacts)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_parameter_counts_equal_those_of_torch(model: Path) -> None:
    shape, module = read_shape(model), bert()
    embeddings = sum(parameter.numel() for name, parameter in module.named_parameters() if "_embeddings.weight" in name)
    attention = sum(parameters(layer.attention) for layer in module.bert.encoder.layer)
    feed_forward = sum(parameters(layer.intermediate) + parameters(layer.output) for layer in module.bert.encoder.layer)
    assert shape.parameters == parameters(module)
    assert (shape.embeddings, shape.attention, shape.feed_forward) == (embeddings, attention, feed_forward)
    assert (shape.layers, shape.hidden, shape.intermediate, shape.heads) == (4, 16, 32, 2)


def test_predicted_size_of_student_with_fewer_layers_is_exact(model: Path) -> None:
    stage = Distill.model_validate({"student": {"layers": [0, 3]}})
    student = stage.predict(read_shape(model), PLAN).shape
    assert student is not None
    assert student.parameters == parameters(bert(num_hidden_layers=2))


@pytest.mark.parametrize(
    "changes", [{"hidden_size": 8}, {"intermediate_size": 64}, {"num_hidden_layers": 2, "hidden_size": 64}]
)
def test_predicted_size_of_student_from_config_is_close(model: Path, changes: dict[str, int]) -> None:
    stage = Distill.model_validate({"student": {"config": changes}})
    student = stage.predict(read_shape(model), PLAN).shape
    assert student is not None
    assert student.parameters == pytest.approx(parameters(bert(**changes)), rel=0.1)


def test_size_is_unknown_for_other_config_changes(model: Path) -> None:
    stage = Distill.model_validate({"student": {"config": {"vocab_size": 10}}})
    assert stage.predict(read_shape(model), PLAN).shape is None


def test_pruning_reduces_predicted_parameters() -> None:
    shape = Shape(embeddings=100, attention=80, feed_forward=160, other=10, layers=4, intermediate=32)
    pruned = Prune.model_validate({"heads": 0.5, "feed_forward": 0.25, "layers": 1}).predict(shape, PLAN).shape
    assert pruned is not None
    # 3 of 4 layers remain; attention keeps 1/2 of 60, feed-forward 3/4 of 120.
    assert (pruned.layers, pruned.attention, pruned.feed_forward, pruned.embeddings) == (3, 30, 90, 100)


def test_pruning_every_layer_is_rejected(folder: Path, tmp_path: Path) -> None:
    text = refusal(recipe([{"prune": {"layers": 4}}]), folder, tmp_path)
    assert "Pruning removes 4 layers of a model that has 4" in text


def test_head_pruning_of_mpnet_is_rejected(folder: Path, tmp_path: Path) -> None:
    MPNetForSequenceClassification(MPNetConfig(**CONFIG)).save_pretrained(folder / "model")
    text = refusal(recipe([{"prune": {"heads": 0.5}}]), folder, tmp_path / "artifacts")
    assert "Heads of a 'mpnet' model cannot be pruned: all layers share encoder.relative_attention_bias" in text
    assert make_plan(recipe([{"prune": {"feed_forward": 0.5}}]), folder, artifacts=tmp_path / "artifacts").stages


def test_training_time_is_flops_over_rate(folder: Path, tmp_path: Path) -> None:
    plan = make_plan(recipe(), folder, None, tmp_path)
    module = bert()
    working = parameters(module) - sum(
        parameter.numel() for name, parameter in module.named_parameters() if "_embeddings.weight" in name
    )
    tokens = 100 * 8  # 40 bytes are estimated as 10 tokens, truncated at max_length 8
    assert plan.stages[0].seconds.value == pytest.approx(6 * working * tokens * 2 / 1e9)
    assert "estimate" in plan.stages[0].seconds.note
    # Both stages copy 4 bytes per parameter at 200 MB/s plus 0.5 s; tracing takes 4 s plus 65 ms per tensor.
    handled = 0.5 + 4 * parameters(module) / 2e8
    traced = 4 + 0.065 * len(list(module.parameters()))
    assert plan.stages[1].seconds.value == pytest.approx(handled + traced)
    assert plan.stages[2].seconds.value == pytest.approx(handled)
    assert plan.seconds.note == ""
    parts = [*(stage.seconds for stage in plan.stages), plan.measuring]
    for end in ("value", "low", "high"):
        assert getattr(plan.seconds, end) == pytest.approx(sum(getattr(part, end) for part in parts))


def test_training_time_counts_epochs_teacher_and_generated_text() -> None:
    """Each of the model's 4 layers has 20 attention and 40 feed-forward parameters."""
    shape = Shape(embeddings=100, attention=80, feed_forward=160, other=10, layers=4, hidden=8)
    plan = replace(PLAN, splits={"train": Text(rows=10, size_bytes=400)}, rate=lambda: 1.0)
    tokens = 10 * 8

    def seconds(stage: Finetune | Distill | DistillLanguageModel, plan: PlanContext = plan) -> float | None:
        return stage.predict(shape, plan).seconds.value

    assert seconds(Finetune(epochs=3)) == pytest.approx(6 * 3 * 250 * tokens)
    distill = Distill(student={"layers": [0, 3]}, epochs=3)  # type: ignore[arg-type]
    assert seconds(distill) == pytest.approx((6 * 3 * 130 + 2 * 250) * tokens)
    # The student trains only on the teacher's text; the teacher runs twice per token, to write and to score it.
    writes = DistillLanguageModel(teacher="start", epochs=3, teacher_writes={"conversations": 1})  # type: ignore[arg-type]
    assert seconds(writes, replace(plan, shapes={"start": shape})) == pytest.approx(
        (6 * 3 * 250 + 2 * 250 + 2 * 250) * 200
    )


def test_training_memory_is_16_bytes_per_parameter_plus_activations(folder: Path, tmp_path: Path) -> None:
    plan = make_plan(recipe(), folder, None, tmp_path)
    # 4 layers x length 8 x batch 32 x (34 x hidden 16 + 5 x 2 heads x length 8) bytes in fp16, doubled for fp32
    activations = 2 * 4 * 8 * 32 * (34 * 16 + 5 * 2 * 8)
    assert plan.stages[0].peak_memory_bytes.value == LIBRARIES_BYTES + 16 * parameters(bert()) + activations
    shape = Shape(0, 0, 0, 0, layers=4, hidden=16, heads=2)
    assert activation_bytes(shape, batch=32, length=8) == activations


def test_memory_without_training_is_libraries_plus_three_weight_copies(folder: Path, tmp_path: Path) -> None:
    export, quantize = make_plan(recipe(STAGES[1:]), folder, None, tmp_path).stages
    expected = LIBRARIES_BYTES + GRAPH_BYTES + 3 * 4 * parameters(bert())
    assert export.peak_memory_bytes.value == quantize.peak_memory_bytes.value == expected
    save_tiny_llama(folder / "decoder")
    decoder = recipe([{"onnx": {}}], task="text-generation", model="decoder")
    assert make_plan(decoder, folder, None, tmp_path).stages[0].peak_memory_bytes.value is None


def test_disk_use_of_stages_and_run_is_predicted(folder: Path, tmp_path: Path, model: Path) -> None:
    plan = make_plan(recipe(), folder, None, tmp_path)
    processor = sum(file.stat().st_size for file in model.iterdir() if file.suffix != ".safetensors")
    full, eighth = 4 * parameters(bert()) + processor, parameters(bert()) + processor
    assert [stage.disk_bytes.value for stage in plan.stages] == [full, full, eighth]
    assert plan.disk_needed_bytes.value == 2 * full + 2 * eighth  # the final model is copied into the run folder


def test_cached_stages_cost_nothing(folder: Path, tmp_path: Path) -> None:
    plan = make_plan(recipe(), folder, lambda label, data: label != "onnx_int8", tmp_path)
    assert [stage.cached for stage in plan.stages] == [True, True, False]
    assert plan.stages[0].seconds.value == 0
    quantized = plan.stages[2].disk_bytes.value
    assert quantized is not None
    assert plan.disk_needed_bytes.value == 2 * quantized


def test_plan_lists_inputs_and_outputs_of_stages(folder: Path, tmp_path: Path) -> None:
    plan = make_plan(recipe(), folder, None, tmp_path)
    assert [(s.label, s.takes, s.gives, s.reads, s.cached) for s in plan.stages] == [
        ("finetune", "TorchModel", "TorchModel", ("train",), None),
        ("onnx", "TorchModel", "OnnxModel", ("train",), None),
        ("onnx_int8", "OnnxModel", "OnnxModel", (), None),
    ]
    assert [(row.role, row.rows) for row in plan.sources] == [
        ("model", None),
        ("split train", 100),
        ("split validation", 10),
        ("split test", 20),
    ]


def test_plan_lists_licences_and_rejects_forbidden_ones(folder: Path, tmp_path: Path) -> None:
    (folder / "model" / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    plan = make_plan(recipe(), folder, None, tmp_path)
    assert {part.of: part.licence for part in plan.licences}["model"] == "CC-BY-NC-4.0"
    assert plan.licence_remarks[0] == "model model, CC-BY-NC-4.0: no commercial use"
    (folder / "model" / "README.md").write_text("---\nlicense: cc-by-nd-4.0\n---\n")
    assert "permits no derivatives" in refusal(recipe(), folder, tmp_path)
    make_plan(recipe(licences={"allowed": {"model": "it is mine"}}), folder, None, tmp_path)


def test_plan_checks_adapter_folder(folder: Path, tmp_path: Path) -> None:
    stages = [{"merge_lora": {"adapter": "adapter"}}, {"onnx": {}}]
    assert "There is no folder 'adapter'" in refusal(recipe(stages), folder, tmp_path)
    (folder / "adapter").mkdir()
    assert "holds no adapter" in refusal(recipe(stages), folder, tmp_path)
    save_adapter(bert(), folder / "adapter", "query")
    row = next(row for row in make_plan(recipe(stages), folder, None, tmp_path).sources if row.role == "adapter")
    assert row.path == str(folder / "adapter")
    assert row.size_bytes == sum(path.stat().st_size for path in (folder / "adapter").iterdir())


def test_scale_tuning_time_counts_student_teacher_and_validation(folder: Path, tmp_path: Path) -> None:
    save_tiny_llama(folder / "decoder")
    tuning = {"steps": 10, "batch_size": 3, "sequence_length": 20, "validation_windows": 5}
    stages = [{"gptq": {"group_size": 32}}, {"tune_scales": tuning}, {"onnx": {}}]
    plan = make_plan(recipe(stages, task="text-generation", model="decoder"), folder, None, tmp_path)
    weights = read_shape(folder / "decoder").parameters
    # 10 steps of 3 windows: student forward and backward (6), teacher forward (2); 15 forward passes to validate.
    assert plan.stages[1].seconds.value == pytest.approx((30 * 8 + 15 * 2) * 20 * weights / 1e9)
    assert plan.stages[1].disk_bytes == plan.stages[0].disk_bytes


def test_measuring_time_of_language_model_counts_prefill_and_decode(folder: Path, tmp_path: Path) -> None:
    """Both models read 4 windows of 8 tokens and 16 tokens in each of 4 launches, and write 48 tokens."""
    save_tiny_llama(folder / "decoder")
    changes = {
        "evaluation": {"windows": 4, "prompts": 2, "tokens": 8},
        "benchmark": {"every_stage": False, "launches": 2, "contexts": [16], "tokens": 4, "seconds": 1},
    }
    plan = make_plan(recipe([{"onnx": {}}], task="text-generation", model="decoder", **changes), folder, None, tmp_path)
    shape = read_shape(folder / "decoder")
    reading = 1.2 * 2 * shape.parameters * (4 * 8 + 4 * 16) / 1e9
    writing = (2 * 2 * 8 + 4 * 4) * 4 * shape.parameters / 1e10
    exported = 0.5 + 4 * shape.parameters / 2e8 + 4 + 0.065 * shape.tensors
    assert plan.measuring.value == pytest.approx(6 + exported + 2 * (reading + writing + 1 + 4 * 0.35))


def test_nncf_loads_whole_model_and_writes_as_much_as_gptq(folder: Path, tmp_path: Path) -> None:
    save_tiny_llama(folder / "decoder")
    first = [
        {"nncf_weights": {"group_size": 32}},
        {"gptq": {"group_size": 32, "embedding_bits": 8, "embedding_group_size": 256}},
    ]
    plans = [
        make_plan(recipe([stage, {"tune_scales": {}}], task="text-generation", model="decoder"), folder, None, tmp_path)
        for stage in first
    ]
    memory = LIBRARIES_BYTES + 4 * read_shape(folder / "decoder").parameters
    assert plans[0].stages[0].peak_memory_bytes.value == memory
    disks = [[stage.disk_bytes.value for stage in plan.stages] for plan in plans]
    assert disks[0] == disks[1]
    assert None not in disks[0]


def test_sample_not_downloaded_has_unknown_time_and_known_disk_use(folder: Path, tmp_path: Path) -> None:
    plan = make_plan(recipe(model="sample:minilm"), folder, None, tmp_path)
    assert plan.sources[0].status == "unknown until fetched"
    assert plan.stages[0].seconds.value is None
    assert plan.disk_needed_bytes.value == 2 * 83_506_384


def _pickled(folder: Path) -> None:
    (folder / "model" / "model.safetensors").unlink()
    (folder / "model" / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")


def _quantized(folder: Path) -> None:
    config = folder / "model" / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "quantization_config": {"quant_method": "gptq", "bits": 4}}))


def _truncated(folder: Path) -> None:
    weights = folder / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_pickled, "is a pickle"),
        (_truncated, "truncated"),
        (_quantized, "quantized already"),
        (lambda folder: (folder / "model" / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "model" / "model.safetensors").unlink(), "no safetensors weights"),
        (lambda folder: (folder / "train.csv").unlink(), "train.csv does not exist"),
        (lambda folder: (folder / "train.csv").write_text(""), "train.csv is empty"),
        (lambda folder: (folder / "train.csv").write_text("text,label\n"), "a header and no rows"),
        (lambda folder: (folder / "artifacts").write_text(""), "artifacts folder is a file"),
    ],
)
def test_damaged_inputs_are_rejected_by_plan(
    folder: Path, tmp_path: Path, damage: Callable[[Path], object], words: str
) -> None:
    damage(folder)
    assert words in refusal(recipe(), folder, tmp_path / "artifacts")


def test_model_that_is_neither_path_nor_hub_id_is_rejected(folder: Path, tmp_path: Path) -> None:
    assert "there/is/none" in refusal(recipe(model="there/is/none"), folder, tmp_path)
    assert "./none" in refusal(recipe(model="./none"), folder, tmp_path)


def test_missing_column_is_rejected_with_known_columns(folder: Path, tmp_path: Path) -> None:
    text = refusal(recipe(data={"columns": {"text": "review"}}), folder, tmp_path)
    assert "train.csv has no column 'review'" in text
    assert "text, label" in text


def test_all_problems_are_reported_together(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _pickled(folder)
    (folder / "test.csv").unlink()
    monkeypatch.setattr(compress.utils.environment, "version", _without("onnxscript"))
    text = refusal(recipe(), folder, tmp_path)
    assert "3 reasons" in text
    for words in ("is a pickle", "test.csv does not exist", "onnx needs the package 'onnxscript'"):
        assert words in text


def _without(missing: str) -> Callable[[str], str]:
    def version(package: str) -> str:
        if package == missing:
            raise PackageNotFoundError(package)
        return "1"

    return version


def test_missing_package_error_names_pip_command(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compress.utils.environment, "version", _without("onnxscript"))
    needs = ["onnx>=1", "onnxscript>=0.7; extra == 'export'"]
    monkeypatch.setattr(compress.utils.environment, "_requirements", lambda: needs)
    assert "pip install 'compress-models[export]'" in refusal(recipe(), folder, tmp_path)


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
def test_row_counts_are_exact(suffix: str, folder: Path, tmp_path: Path) -> None:
    # One text is longer than the others by far, and another one has two lines.
    rows = [{"text": text, "label": "no"} for text in ("word " * 30_000, "two\nlines", *map(str, range(48)))]
    table, path = pa.Table.from_pylist([*rows, {"text": "last", "label": "ok"}]), folder / f"train.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(table, path)
    elif suffix == "csv":
        pyarrow.csv.write_csv(table, path)
    elif suffix == "json":
        path.write_text(json.dumps(table.to_pylist()))
    else:
        path.write_text("\n".join(map(json.dumps, table.to_pylist())))
    splits = {"train": path.name, "validation": "validation.csv", "test": "test.csv"}
    plan = make_plan(recipe(data={"splits": splits, "unlabeled": ["validation.csv"]}), folder, None, tmp_path)
    rows_by_role = {row.role: row.rows for row in plan.sources}
    assert (rows_by_role["split train"], rows_by_role["unlabeled validation.csv"]) == (51, 10)


def test_measured_flops_per_second_are_plausible() -> None:
    assert 1e8 < machine_flops_per_second() < 1e14


@pytest.mark.parametrize(("kind", "decided"), [("x86-vnni", "false"), ("x86-avx2", "saturating")])
def test_plan_resolves_auto_settings_for_this_processor(
    kind: str, decided: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (compress.pipeline.planning, compress.formats.target_profile):
        monkeypatch.setattr(module, "processor_class", lambda: kind)
    limits = [{"metric": "speedup", "at_least": 2, "processor": "x86-vnni"}]
    plan = make_plan(recipe(limits=limits, stages=STAGES[1:]), folder, None, tmp_path)
    assert (plan.processor, plan.decided) == (kind, {"onnx_int8": f"reduce_range: auto is {decided}"})
    assert "at least 2 on x86-vnni" in shown(render_plan(plan), 200)


def test_planning_loads_no_torch(folder: Path) -> None:
    code = (
        "from pathlib import Path\n"
        "from compress.pipeline.planning import make_plan\nfrom compress.recipe.recipe import Recipe\n"
        "folder = Path(sys.argv[1])\n"
        "make_plan(Recipe.model_validate_json(sys.argv[2]), folder, None, folder)"
    )
    imported = packages_imported_by(code, folder, json.dumps(recipe().model_dump(mode="json")))
    assert imported.isdisjoint({"torch", "transformers", "datasets"})


def test_problems_of_all_data_files_are_reported_at_once_on_every_call(folder: Path, tmp_path: Path) -> None:
    valid = (folder / "test.csv").read_text()
    (folder / "missing.csv").write_text("text,label\n,no\na,ok\nb,\n")
    (folder / "quote.tsv").write_text('text\tlabel\n"open\tno\nx\tok\n')
    (folder / "dicts.jsonl").write_text('{"text": "a", "label": "no"}\n{"text": {"en": "b"}, "label": "no"}\n')
    (folder / "overlap.csv").write_text("text,label\nnew,no\n" + valid.splitlines()[3] + "\n")
    names = {"train": "missing.csv", "a": "quote.tsv", "b": "dicts.jsonl", "c": "overlap.csv", "d": "none.csv"}
    read = recipe(data={"splits": {**names, "test": "test.csv"}, "unlabeled": ["quote.tsv"]})
    text = refusal(read, folder, tmp_path / "artifacts")
    assert "for 6 reasons" in text  # one file is named twice
    for words in (
        "'text' has 1 of 3 values missing or empty.\n  where:    missing.csv:2\n",
        "'label' has 1 of 3 values missing or empty.\n  where:    missing.csv:4\n",
        "quote.tsv:2\n",
        "dicts.jsonl:2\n",
        "overlap.csv:3: ",
        "none.csv does not exist",
    ):
        assert words in text
    (tmp_path / "artifacts" / "cache").mkdir(parents=True)
    assert refusal(read, folder, tmp_path / "artifacts") == text


def test_local_splits_are_read_although_others_must_be_downloaded(folder: Path, tmp_path: Path) -> None:
    splits = {"train": "sample:movie-reviews/train", "validation": "validation.csv", "test": "test.csv"}
    read = recipe(data={"splits": splits, "unlabeled": ["sample:snippets"], "hold_out": [{"rows": 5}]})
    rows = {row.role: row.rows for row in make_plan(read, folder, None, tmp_path / "artifacts").sources}
    assert rows == {
        "model": None,
        "split train": None,
        "split validation": 10,
        "split test": 20,
        "unlabeled sample:snippets": None,
    }
    (folder / "test.csv").write_text("text,label\n,no\n")
    assert "test.csv:2" in refusal(read, folder, tmp_path / "artifacts")


@pytest.mark.parametrize(
    ("limit", "least_rows"),
    [
        # Of 20 rows, one is 5%.
        ({"metric": "accuracy", "at_least": 0.96, "of": "baseline"}, "25"),
        ({"metric": "agreement", "at_least": 0.999}, "1,000"),
        ({"metric": "accuracy", "at_least": 0.95, "of": "baseline"}, None),
        ({"metric": "speedup", "at_least": 0.99}, None),
        ({"metric": "accuracy", "at_least": 1}, None),
    ],
)
def test_limit_that_one_test_row_decides_is_refused(
    limit: dict[str, Any], least_rows: str | None, folder: Path, tmp_path: Path
) -> None:
    limited = recipe(limits=[limit])
    if least_rows is None:
        assert make_plan(limited, folder, None, tmp_path)
    else:
        text = refusal(limited, folder, tmp_path)
        assert "cannot be tested with 20 test rows" in text and "limits.0.at_least" in text
        assert f"at least {least_rows} test rows, or a bound of at most 0.95" in text


@pytest.mark.parametrize(
    ("stages", "limit", "half_width", "rows", "bound"),
    [
        # 1.96 sqrt(0.1 / 20) / 0.8 after training, 1.96 sqrt(0.02 / 20) / 0.8 after an export.
        (["finetune"], {"at_least": 0.9, "of": "start"}, "17.3%", "60", "0.82"),
        (["finetune", "onnx"], {"at_least": 0.9, "of": "finetune"}, "7.7%", None, None),
        (["finetune", "onnx"], {"at_least": 0.94, "of": "finetune"}, "7.7%", "33", "0.92"),
        (["finetune"], {"at_least": 0.82, "of": "start"}, "", None, None),
        (["finetune"], {"at_least": 0.9}, "", None, None),
    ],
)
def test_limit_that_the_test_rows_will_hardly_decide_is_a_warning(
    stages: list[str],
    limit: dict[str, Any],
    half_width: str,
    rows: str | None,
    bound: str,
    folder: Path,
    tmp_path: Path,
) -> None:
    limited = recipe(stages=stages, limits=[{"metric": "accuracy", **limit}])
    plan = make_plan(limited, folder, None, tmp_path)
    if rows is None:
        assert plan.limit_warnings == ()
        return
    (warning,) = plan.limit_warnings
    assert f"with 20 test rows the interval of the ratio is about \u00b1{half_width}" in warning
    assert warning.endswith(f"about {rows} test rows, or a bound of about {bound}")
    for render in (render_plan, render_warnings):
        assert warning in " ".join(shown(render(plan), 100).split())


def test_measuring_is_a_row_that_completes_the_total_and_names_its_fields(folder: Path, tmp_path: Path) -> None:
    plan = make_plan(recipe(stages=["finetune", "onnx", "onnx_int8"]), folder, None, tmp_path)
    known = [stage.seconds for stage in plan.stages] + [plan.measuring]
    assert plan.seconds.value == pytest.approx(sum(estimate.value or 0 for estimate in known))
    assert plan.seconds.high == pytest.approx(sum(estimate.high or estimate.value or 0 for estimate in known))
    (row,) = [line for line in shown(render_plan(plan), 100).splitlines() if line.startswith("measure ")]
    assert row.split()[1:3] == ["report", "test"]
    fields = "set benchmark.every_stage: false, benchmark.budget_seconds, lower benchmark.seconds"
    assert plan.measuring.note.endswith(f"to shorten it, {fields}")
    limited = recipe(stages=["finetune", "onnx"], benchmark={"budget_seconds": 9, "every_stage": False})
    measuring = make_plan(limited, folder, None, tmp_path).measuring
    assert measuring.note.endswith("to shorten it, set a lower benchmark.budget_seconds")


def test_size_of_a_file_is_shown_once_for_all_its_splits(folder: Path, tmp_path: Path) -> None:
    lines = [f"text {number},{('bad', 'good')[number % 2]}" for number in range(100)]
    (folder / "all.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
    read = recipe()
    alone = read.model_copy(update={"data": DataConfig(source="all.csv", max_length=8)})
    text = shown(render_plan(make_plan(alone, folder, None, tmp_path)), 100)
    rows = [line for line in text.splitlines() if line.startswith("split ")]
    assert len(rows) == 3 and [" kB" in row or " B" in row for row in rows] == [True, False, False]


def test_size_of_random_weights_is_that_of_the_made_model(folder: Path, model: Path, tmp_path: Path) -> None:
    only_config = folder / "config-only"
    only_config.mkdir()
    for file in model.iterdir():
        if file.suffix != ".safetensors":
            shutil.copyfile(file, only_config / file.name)
    read = recipe(model="config-only", random_weights=True, stages=["finetune"])
    plan = make_plan(read, folder, None, tmp_path)
    made = ModelOrigin(None, True, 0, folder).make(only_config, tmp_path / "made", SilentProgress())
    assert plan.sources[0].parameters == read_shape(made).parameters
    of_made = make_plan(recipe(model=str(made), stages=["finetune"]), folder, None, tmp_path)
    assert plan.stages[0].disk_bytes.value == pytest.approx(of_made.stages[0].disk_bytes.value, rel=0.02)
    assert plan.stages[0].seconds.value == pytest.approx(of_made.stages[0].seconds.value)


def test_stage_without_prediction_names_its_libraries(folder: Path, tmp_path: Path) -> None:
    note = make_plan(recipe(stages=["openvino"]), folder, None, tmp_path).stages[0].seconds.note
    assert note.startswith("not predicted: openvino calls ") and "openvino" in note.split("calls", 1)[1]


def test_only_a_detailed_plan_says_how_known_numbers_are_estimated(folder: Path, tmp_path: Path) -> None:
    plan = make_plan(recipe(), folder, None, tmp_path)
    brief, detailed = shown(render_plan(plan), 200), shown(render_plan(plan, details=True), 200)
    known = [line for line in detailed.splitlines() if line.startswith(("time of ", "memory of "))]
    assert len(known) > 2 and [line for line in known if line in brief.splitlines()] == [known[-1]]
    assert known[-1].startswith("time of measure: ")
    assert str(plan).splitlines() == shown(render_plan(plan), 100).rstrip().splitlines()


def test_folder_that_cannot_be_written_is_a_problem_of_the_plan(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def access(path: Path, mode: int) -> bool:
        asked.append(path)
        return False

    monkeypatch.setattr("compress.pipeline.run_checks.os.access", access)
    with pytest.raises(InputError, match="The artifacts folder cannot be written"):
        make_plan(recipe(), folder, None, tmp_path / "no" / "such")
    assert asked == [tmp_path], "the nearest folder that exists"

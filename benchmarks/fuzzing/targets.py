"""Kinds of untrusted files: for each its seeds, the function that reads it, and the mutations of its structure.

The readers are those that the commands call, in one process. They may raise `CompressError` and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import random
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fuzzing import contents, references, seeds, values
from fuzzing.contents import Mutator, either, mutate_bytes

Read = Callable[[Path], object]


class BrokenPromiseError(Exception):
    """A reader returned, but not what it promises: another reader disagrees, or a file lies outside its folder."""


@dataclass(frozen=True)
class Target:
    """One kind of input.

    Attributes:
        kind: Its name on the command line.
        seeds: Writes valid folders.
        read: Reads a folder as the commands do. What it returns is passed to ``compare``.
        mutators: Pattern of file names -> mutation of such files.
        compare: Compares what was read with another reader. Raises `BrokenPromiseError`.
        finish: Mends digests after a file of the folder was mutated. Returns the names of other files that it changed.
        writes: The reader creates files, which are removed after each case.
    """

    kind: str
    seeds: Callable[[Path], None]
    read: Read
    mutators: Mapping[str, Mutator]
    compare: Callable[[Path, Any], None] | None = None
    finish: Callable[[Path, str], Sequence[str]] | None = None
    writes: bool = False
    expected: tuple[str, ...] = field(default=("compress.utils.errors:CompressError",))


def one_in(share: int, folder: Path) -> bool:
    """Return True for one in ``share`` folders, chosen by the content of their files."""
    parts = (path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink())
    return zlib.crc32(b"".join(parts)) % share == 0


# Readers.


def read_recipe(folder: Path) -> object:
    """Read a recipe, and what is written for it again."""
    from compress.recipe.loading import dump_recipe
    from compress.recipe.loading import read_recipe as read

    recipe = read(folder / "recipe.yaml")
    text = dump_recipe(recipe)
    (folder / "again.yaml").write_text(text, encoding="utf-8")
    if read(folder / "again.yaml") != recipe:
        raise BrokenPromiseError("the recipe that was written is another one")
    return recipe


def read_suite(folder: Path) -> object:
    """Read a nightly suite."""
    from compress.plugins.nightly.suite import read_suite as read
    from compress.plugins.nightly.suite import select_entries

    suite = read(folder / "suite.yaml")
    select_entries(suite, ())
    return [(entry.label, entry.overrides) for entry in suite.entries]


def read_policy(folder: Path) -> object:
    """Read a policy, and judge by it."""
    from compress.report.compare.gate import read_policy as read

    policy = read(folder / "policy.yaml")
    return [rule.margin for rule in policy.rules]


def read_target(folder: Path) -> object:
    """Read the description of a target."""
    from compress.recipe.target_entries import read_target_file

    return read_target_file(folder / "target.yaml")


def read_devices(folder: Path) -> object:
    """Read an inventory of devices."""
    from compress.plugins.devices.inventory import choose_devices, read_inventory

    file = folder / "devices.yaml"
    return choose_devices(read_inventory(file), ["all"], file)


def inspect(name: str) -> Read:
    """Return a function that does what `compress inspect --weights --json` and `check` do with a model."""

    def read(folder: Path) -> object:
        from compress.inspection.budget import budget_of
        from compress.inspection.budget_rendering import write_budget
        from compress.inspection.tensors import read_model
        from compress.pipeline.licence_detection import find_licence
        from compress.pipeline.recipe_sources import read_shape
        from compress.utils.terminal import Console

        path = folder / name
        contents_read = read_model(path)
        if path.suffix in (".gguf", ".onnx"):
            read_shape(path)
        find_licence(path)
        # Statistics and tables take ten times as long as reading.
        if one_in(4, folder):
            budget = budget_of(path, weights=True)
            budget.model_dump_json().encode()
            write_budget(budget, 3, 10, Console(file=io.StringIO(), width=100))
        return contents_read

    return read


def read_weights(folder: Path) -> object:
    """Dequantize every weight of a folder, as `compress diff` does."""
    from compress.inspection.tensors import read_model
    from compress.plugins.diff.dequantize import read_weights as read

    model = read_model(folder)
    weights, _ = read(model, folder)
    for weight in weights.values():
        weight.chunks()
    return weights


def read_folder(folder: Path) -> object:
    """Check a model folder as `compress check` does."""
    from compress.models.config_checks import check_config, explain_load_failure, max_positions
    from compress.models.folder_checks import check_model_folder, check_weights_finite, refuse_quantized
    from compress.models.json_file import read_json
    from compress.models.processor import has_preprocessor
    from compress.pipeline.licence_detection import find_licence
    from compress.pipeline.recipe_sources import read_shape
    from compress.recipe.loading import infer_task_of_reference

    check_config(folder, trust_remote_code=False)
    check_model_folder(folder)
    has_preprocessor(folder)
    infer_task_of_reference(str(folder), folder)
    read_shape(folder)
    find_licence(folder)
    max_positions(read_json(folder / "config.json"))
    explain_load_failure(folder, trust_remote_code=False)
    check_weights_finite(folder)
    refuse_quantized(folder)
    return None


def build_model(folder: Path) -> object:
    """Build the model of a config without memory for its weights, as the stages do."""
    from compress.pipeline.recipe_sources import random_shape

    read_folder(folder)
    return random_shape(folder)


def read_tokenizer(folder: Path) -> object:
    """Load a tokenizer, tokenize a text, and shrink its vocabulary."""
    from compress.models.folder_checks import check_processor
    from compress.models.json_file import read_json
    from compress.models.processor import load_processor

    check_processor(folder, read_json(folder / "config.json"))
    processor: Any = load_processor(folder)
    return processor


def render_template(folder: Path) -> object:
    """Render a conversation in a chat template."""
    from compress.models.chat_template import apply_chat_template

    template = (folder / "chat_template.jinja").read_text(encoding="utf-8", errors="replace")
    processor = SimpleNamespace(chat_template=template, special_tokens_map={"bos_token": "<s>", "eos_token": "</s>"})
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    return apply_chat_template(processor, messages, add_generation_prompt=True)


def read_generation_rules(folder: Path) -> object:
    """Read how a model's answers are generated, for three kinds of models."""
    from compress.formats.generation import image_text, seq2seq, speech_recognition

    readers = (seq2seq.read_rules, image_text.read_rules, speech_recognition.read_rules)
    return each(*(lambda read=read: read(folder) for read in readers))


def each(*actions: Callable[[], object]) -> object:
    """Call every function. Raise the first `CompressError` at the end, if there was one."""
    from compress.utils.errors import CompressError

    errors = []
    for action in actions:
        try:
            action()
        except CompressError as error:
            errors.append(error)
    if errors:
        raise errors[0]
    return None


def read_quantized(folder: Path) -> object:
    """Read the integers of every layer of a quantized checkpoint."""
    from compress.models.checkpoint import Checkpoint

    read_folder_parts(folder)
    checkpoint = Checkpoint.load(folder, None)
    for layer in checkpoint.integer_layers:
        checkpoint.integer_shape(layer)
        checkpoint.weight(layer)
    for table in checkpoint.tables:
        checkpoint.weight(table)
    return read_weights(folder)


def read_folder_parts(folder: Path) -> None:
    """Inspect a folder."""
    inspect(".")(folder)


def read_adapter(folder: Path) -> object:
    """Check a LoRA adapter and whether it fits a model."""
    from compress.models.lora_adapter import check_adapter, check_fits, merge

    check_adapter(folder)
    module = _decoder()
    check_fits(folder, module)
    return merge(module, folder)


def _decoder() -> Any:
    from quantized import tiny_llama_config
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM(tiny_llama_config(hidden_size=32, num_hidden_layers=1, intermediate_size=32))


def read_processor(folder: Path) -> object:
    """Load the processor of images or recordings."""
    from compress.models.processor import load_processor

    return load_processor(folder)


def read_sentence_modules(folder: Path) -> object:
    """Read the modules of a sentence encoder."""
    from compress.models.sentence_modules import read_modules

    modules = read_modules(folder)
    return modules.files(32)


def read_graph_inputs(folder: Path) -> object:
    """Read the inputs of a graph, sample them, and read arrays for them."""
    from compress.models.graph_inputs import read_graph_inputs as read

    inputs = read(folder)
    inputs.read((folder / "arrays.npz").read_bytes(), "arrays.npz")
    inputs.draw(0)
    return inputs


def read_card(folder: Path) -> object:
    """Find the licence of a model."""
    from compress.pipeline.licence_detection import find_licence

    return find_licence(folder)


def read_pipeline(folder: Path) -> object:
    """Check the folder of a diffusion pipeline."""
    from compress.inspection.budget import budget_of
    from compress.models.folder_checks import check_model_folder
    from compress.models.pipeline_folder import model_config

    check_model_folder(folder)
    model_config(folder)
    return budget_of(folder)


def read_rows(name: str) -> Read:
    """Return a function that reads a data file as `check` and `run` do."""

    def read(folder: Path) -> object:
        from compress.data.column_names import column_names, match_columns
        from compress.data.config import DataConfig
        from compress.data.dataset import load_dataset
        from compress.data.files import read_file
        from compress.data.summary import summarize
        from compress.tasks.registry import TASKS
        from compress.utils.progress import SilentProgress

        task = TASKS["text-classification" if name != "rows.txt" else "fill-mask"]
        test = folder / "test.json"
        splits = {"train": name, "test": "test.json"} if test.is_file() else {"train": name}
        nested = test.is_file() and b'"doc"' in test.read_bytes()
        columns = {"text": "doc.body"} if nested else {}
        config = DataConfig(splits=splits, columns=columns, drop_overlap=True)
        each(
            lambda: match_columns(task.columns, column_names(folder / name)),
            lambda: read_file(folder / name, ("text", "label", "doc.body", "list", "when", "file")),
        )
        data = load_dataset(config, task.columns, folder, SilentProgress())
        return summarize(data) if test.is_file() else data

    return read


def read_image(folder: Path) -> object:
    """Decode an image in both modes."""
    from collections import Counter

    from compress.data.media import decode, media, picture_size

    value = media(str(folder / "image"), None)
    assert value is not None, "the path is no empty text"
    counts: Counter[str] = Counter()
    return each(lambda: decode(value, "RGB", counts), lambda: decode(value, "L", counts), lambda: picture_size(value))


def read_annotations(folder: Path) -> object:
    """Read boxes and masks of an image."""
    from compress.data.annotations import MaskIds, check_as_large, check_inside, read_objects
    from compress.data.media import media
    from compress.utils.errors import DataError

    image, mask = (media(str(folder / name), None) for name in ("image.png", "mask.png"))
    assert image is not None and mask is not None, "the paths are no empty texts"
    try:
        objects = read_objects((folder / "objects.json").read_text(encoding="utf-8", errors="replace"))
    except TypeError as error:  # the caller adds the place
        raise DataError(str(error)) from error
    MaskIds().find(mask)
    row = {"image": image, "mask": mask, "objects": objects}
    check_as_large(row)
    check_inside(row)
    return None


def read_recording(folder: Path) -> object:
    """Decode a recording."""
    from compress.tasks.audio import Remarks
    from compress.tasks.audio import read_recording as read

    return read((folder / "recording").read_bytes(), 16_000, "recording", Remarks())


def read_judged(folder: Path) -> object:
    """Read questions, rated pairs and instructions, and check answers."""
    from compress.data.judged import read_instructions, read_questions, read_rated_pairs

    read_questions(folder / "questions.jsonl")
    read_rated_pairs(folder / "pairs.jsonl")
    for instruction in read_instructions(folder / "instructions.jsonl"):
        for answer in ("", "A b c.", '{"x": 1}'):
            instruction.passed(answer)
    return None


def read_traffic(folder: Path) -> object:
    """Read requests and late labels."""
    from compress.plugins.monitoring.traffic import read_traffic as read
    from compress.tasks.registry import TASKS

    columns = [column for column in TASKS["text-classification"].columns if column.is_input]
    return read(folder / "requests.jsonl", columns, folder / "late.jsonl")


def unpack_bundle(folder: Path) -> object:
    """Unpack the zip of a bundle."""
    from compress.plugins.apps.archive import unpack

    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        target = Path(scratch) / "target"
        target.mkdir()
        unpack(folder / "bundle.zip", target)
        if [*Path(scratch).iterdir()] != [target] or any(path.is_symlink() for path in target.rglob("*")):
            raise BrokenPromiseError("a file lies outside the folder, or is a link")
    return None


def verify_bundle(folder: Path) -> object:
    """Verify the folder of a bundle."""
    from compress.plugins.apps.verify import verify_folder

    return verify_folder(folder / "bundle", None)


def read_registry(folder: Path) -> object:
    """Read a registry and do what `list`, `show`, `pull` and `verify` do."""
    from compress.plugins.registry.registry import Registry
    from compress.plugins.registry.upkeep import verify
    from compress.utils.errors import CompressError

    registry = Registry(folder / "registry")
    try:
        state = registry.state()
    finally:
        verify(registry)
    actions: list[Callable[[], object]] = []
    for version in state.all():
        actions.append(lambda version=version: state.entries_of(version.name, version.number))
        actions.append(lambda version=version: registry.contents(version))
        actions.append(lambda version=version: registry.pull(version.reference, folder / "pulled", replace=True))
        for selector in (*state.aliases(version.name), "latest", "7", "x"):
            actions.append(lambda version=version, selector=selector: state.find(f"{version.name}@{selector}"))
            actions.append(lambda version=version, selector=selector: state.previous(version.name, selector))
    with contextlib.suppress(CompressError):  # most versions have no earlier one
        each(*actions)
    return state


def read_version_record(folder: Path) -> object:
    """Read the record of a version."""
    from compress.plugins.registry.contents import needed_by, parse_contents
    from compress.plugins.registry.state import Version

    version = Version("m", 1, "0" * 64, "2026-01-01T00:00:00+00:00", "a", "run", "", "")
    contents_read = parse_contents(version, (folder / "record.json").read_bytes())
    _ = contents_read.model_digest, contents_read.size_bytes
    if any(path.startswith("/") or ".." in Path(path).parts for path in contents_read.files):
        raise BrokenPromiseError("a file lies outside the folder")
    return needed_by(version, contents_read)


def read_report(folder: Path) -> object:
    """Show a report in every format."""
    from compress.report.console import console_table
    from compress.report.junit import junit_report
    from compress.report.pages import html_page, markdown_report
    from compress.results.report import load_report
    from compress.utils.terminal import Console

    report = load_report(folder / "report.json")
    Console(file=io.StringIO(), width=100).print(console_table(report))
    for view in (junit_report, markdown_report, *([html_page] if one_in(4, folder) else [])):
        view(report).encode()
    return report


def read_baseline(folder: Path) -> object:
    """Judge a run by a baseline, both ways round."""
    from compress.recipe.policy import Policy, comparison_policy
    from compress.report.compare.baseline import load_baseline
    from compress.report.compare.gate import judge_comparison
    from compress.report.compare.reports import compare_reports
    from compress.report.compare.views import comparison_view, gate_view
    from compress.utils.terminal import Console

    first, second = load_baseline(folder / "baseline.json"), load_baseline(folder / "report.json")
    policy = Policy()
    views: list[Any] = []
    for pair in ((first, second), (second, first)):
        judged = judge_comparison(compare_reports(*pair, policy, names=("a", "b")), policy)
        views += [gate_view(judged, name) for name in ("console", "markdown", "json", "junit", "github")]
    comparison = compare_reports(first, second, comparison_policy(), names=("a", "b"))
    views += [comparison_view(comparison, name) for name in ("console", "markdown", "json")]
    # Rendering takes ten times as long as judging.
    if one_in(8, folder):
        console = Console(file=io.StringIO(), width=100)
        for view in views:
            console.print(view)
    return None


def read_predictions(folder: Path) -> object:
    """Read the answers of a run's model."""
    from compress.report.run_folder import read_predictions as read

    return read(folder, "final", "cpu")


def verify_run(folder: Path) -> object:
    """Verify the provenance of a run, and write its papers."""
    from compress.plugins.provenance.run_view import read_lock
    from compress.plugins.provenance.slsa import verify_statement

    lock = read_lock(folder / "lock.json")
    _ = {**lock.get("packages", {})} if isinstance(lock.get("packages", {}), dict) else {}
    return verify_statement(folder, None)


def read_ledger(folder: Path) -> object:
    """Read the ledger of a search."""
    from compress.plugins.search.observations import Ledger
    from compress.plugins.search.outcome import unpack_rows

    header, entries = Ledger(folder).read(repair=False)
    header.check_same(header)
    for entry in entries:
        for rows in entry.outcome.rows.values():
            for packed in rows.values():
                unpack_rows(packed)
    return entries


def read_history(folder: Path) -> object:
    """Read the history of nights, and find drifts in it."""
    from nights import SUITE

    from compress.plugins.nightly.history import NightHistory

    history = NightHistory(folder / "history.sqlite", lambda note: None)
    nights = history.read(SUITE)
    return nights, history.series(SUITE)


# Digests that a forger would mend.


def _reseal(folder: Path, name: str) -> Sequence[str]:
    """Give the manifest of a bundle the digests of the files, and its own."""
    from compress.plugins.apps.manifest import Manifest

    manifest = folder / "bundle/manifest.json"
    try:
        fields = json.loads(manifest.read_bytes())
        if name.startswith("bundle/") and name != "bundle/manifest.json":
            content = (folder / name).read_bytes()
            record = {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            fields["files"][name.removeprefix("bundle/")] = record
        manifest.write_bytes(Manifest.model_validate(fields).sealed())
    except (ValueError, TypeError, KeyError, RecursionError):
        return ()
    return ("bundle/manifest.json",)


def _chained(content: bytes, others: Sequence[bytes], chance: random.Random) -> bytes:
    from compress.plugins.registry.log import line_check

    bodies = b"\n".join(line[65:] for line in content.splitlines())
    mutated = values.mutate_json_lines(chance, bodies, ())
    check, lines = b"", []
    for body in mutated.split(b"\n")[:-1]:
        check = line_check(check, body)
        lines.append(check + b" " + body + b"\n")
    return b"".join(lines)


def mutate_log(chance: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    """Mutate the entries of a registry's log, whose chain stays valid, or any of its bytes."""
    return mutate_bytes(chance, content, others) if chance.randrange(5) == 0 else _chained(content, others, chance)


def mutate_sqlite(chance: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    """Change values, types, tables and pragmas of a history."""
    import sqlite3

    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.deserialize(content)
    connection.execute("PRAGMA writable_schema = ON")
    found = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    for _ in range(chance.choice((1, 1, 2))):
        table = chance.choice(found)[0]
        columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
        options = (None, -1, 0, 2**63 - 1, 1e308, "", "x", "[]", "{}", "[1]", "null", "[" * 2000, b"\xff", "9" * 5000)
        value = chance.choice((*options, "\ud83d".encode("utf-8", "surrogatepass"), "nan", "a\x00b", "\x1b[2J"))
        statements: tuple[tuple[str, tuple[object, ...]], ...] = (
            (f"UPDATE {table} SET {chance.choice(columns)} = ?", (value,)),
            (f"UPDATE {table} SET {chance.choice(columns)} = CAST(? AS TEXT)", (b"\xff\xfe",)),
            (f"DELETE FROM {table}", ()),
            (f"DROP TABLE {table}", ()),
            (f"ALTER TABLE {table} ADD COLUMN extra", ()),
            (f"ALTER TABLE {table} RENAME COLUMN {chance.choice(columns)} TO other", ()),
            (f"PRAGMA user_version = {chance.choice((0, 1, 2, 99))}", ()),
            (f"PRAGMA application_id = {chance.choice((0, 1))}", ()),
            (f"CREATE VIEW v AS SELECT * FROM {table}", ()),
        )
        try:
            connection.execute(*chance.choice(statements))
        except sqlite3.Error:
            continue
    return connection.serialize()


# The table of all kinds.

_JSON = values.mutate_json
_YAML = values.mutate_yaml
_LINES = values.mutate_json_lines
_TEXT = values.mutate_table
_SQLITE = either(mutate_sqlite, mutate_sqlite, contents.by_fields(contents.sqlite_fields))
_FLAT = contents.by_fields(contents.table_fields)
_PARQUET = contents.by_fields(contents.parquet_fields)
_ZIP = either(contents.mutate_zip, contents.by_fields(contents.zip_fields))


def _sealed(mutate: Mutator) -> Mutator:
    def sealed(chance: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
        changed = mutate(chance, content, others)
        return contents.resealed(changed) if chance.random() < 0.95 else changed

    return sealed


def mutate_image(chance: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    """Mutate an image by the structure of its format."""
    return _IMAGES.get(content[:2], mutate_bytes)(chance, content, others)


_IMAGES: Mapping[bytes, Mutator] = {
    b"\x89P": contents.mutate_png,
    b"\xff\xd8": contents.by_fields(contents.jpeg_fields),
    b"II": contents.by_fields(contents.tiff_fields),
    b"RI": contents.mutate_riff,
    b"BM": contents.by_fields(contents.header_fields(60)),
    b"GI": contents.by_fields(contents.header_fields(40)),
    b"P5": values.mutate_text,
}


def mutate_recording(chance: random.Random, content: bytes, others: Sequence[bytes]) -> bytes:
    """Mutate a recording by the structure of its format."""
    big = contents.by_fields(contents.header_fields(60, "big"))
    return (contents.mutate_riff if content[:4] == b"RIFF" else big)(chance, content, others)


TARGETS = (
    Target("recipe", seeds.recipes, read_recipe, {"recipe.yaml": _YAML}, writes=True),
    Target("suite", seeds.suites, read_suite, {"suite.yaml": _YAML}),
    Target("policy", seeds.policies, read_policy, {"policy.yaml": _YAML}),
    Target("target", seeds.target_files, read_target, {"target.yaml": _YAML}),
    Target("devices", seeds.inventories, read_devices, {"devices.yaml": _YAML}),
    Target("gguf", seeds.gguf_files, inspect("model.gguf"), {"*.gguf": contents.mutate_gguf}, references.compare_gguf),
    Target("onnx", seeds.onnx_files, inspect("model.onnx"), {"*.onnx": contents.mutate_onnx}, references.compare_onnx),
    Target(
        "onnx-external", seeds.external_onnx_files, inspect("model.onnx"), {"*.onnx": contents.mutate_onnx},
        references.compare_onnx,
    ),
    Target("ort", seeds.ort_files, inspect("model.ort"), {"*.ort": _FLAT}),
    Target("litert", seeds.litert_files, inspect("model.tflite"), {"*.tflite": _FLAT}),
    Target("openvino", seeds.openvino_files, inspect("model.xml"), {"*.xml": values.mutate_xml}),
    Target(
        "safetensors", seeds.safetensors_files, inspect("model.safetensors"),
        {"*.safetensors": contents.mutate_safetensors}, references.compare_safetensors,
    ),
    Target("safetensors-index", seeds.sharded, read_folder, {"*.index.json": _JSON}),
    Target("config", seeds.classifiers, read_folder, {"config.json": _JSON}),
    Target("config-built", seeds.classifiers, build_model, {"config.json": _JSON}),
    Target("tokenizer", seeds.tokenizers, read_tokenizer, {"tokenizer.json": _JSON}),
    Target(
        "tokenizer-config", seeds.tokenizers, read_tokenizer,
        {"tokenizer_config.json": _JSON, "special_tokens_map.json": _JSON},
    ),
    Target("chat-template", seeds.templates, render_template, {"*.jinja": values.mutate_template}),
    Target(
        "generation-config", seeds.generation_folders, read_generation_rules,
        {"generation_config.json": _JSON, "config.json": _JSON},
    ),
    Target(
        "quantization-config", seeds.quantized_folders, read_quantized,
        {"config.json": _JSON, "*.safetensors": contents.mutate_safetensors},
    ),
    Target(
        "adapter", seeds.adapters, read_adapter,
        {"adapter_config.json": _JSON, "*.safetensors": contents.mutate_safetensors},
    ),
    Target("preprocessor", seeds.preprocessors, read_processor, {"preprocessor_config.json": _JSON}),
    Target(
        "sentence-modules", seeds.sentence_folders, read_sentence_modules,
        {"modules.json": _JSON, "config.json": _JSON, "sentence_bert_config.json": _JSON,
         "*.safetensors": contents.mutate_safetensors},
    ),
    Target("graph-inputs", seeds.graph_inputs, read_graph_inputs, {"*.json": _JSON, "*.npz": _ZIP}),
    Target("pipeline", seeds.pipelines, read_pipeline, {"*.json": _JSON}),
    Target("model-card", seeds.cards, read_card, {"README.md": values.mutate_front_matter}),
    Target("csv", seeds.tables, read_rows("rows.csv"), {"*.csv": _TEXT}),
    Target("tsv", seeds.tab_tables, read_rows("rows.tsv"), {"*.tsv": _TEXT}),
    Target("jsonl", seeds.line_files, read_rows("rows.jsonl"), {"*.jsonl": _LINES}),
    Target("json", seeds.json_tables, read_rows("rows.json"), {"rows.json": _JSON}),
    Target("parquet", seeds.parquet_files, read_rows("rows.parquet"), {"*.parquet": _PARQUET}),
    Target("text", seeds.text_files, read_rows("rows.txt"), {"*.txt": _TEXT}),
    Target("image", seeds.images, read_image, {"image": mutate_image}),
    Target("annotations", seeds.masks, read_annotations, {"*.png": contents.mutate_png, "objects.json": _JSON}),
    Target("audio", seeds.recordings, read_recording, {"recording": mutate_recording}),
    Target("judged", seeds.judged, read_judged, {"*.jsonl": _LINES}),
    Target("traffic", seeds.traffic, read_traffic, {"*.jsonl": _LINES}),
    Target("bundle-zip", seeds.bundles, unpack_bundle, {"*.zip": _sealed(_ZIP)}, writes=True),
    Target(
        "bundle", seeds.bundles, verify_bundle,
        {"*/manifest.json": _JSON, "*/selftest.json": _JSON, "*/config.json": _JSON}, finish=_reseal,
    ),
    Target("registry-log", seeds.registries, read_registry, {"*/log": mutate_log}, writes=True),
    Target("registry-record", seeds.records, read_version_record, {"record.json": _JSON}),
    Target("report", seeds.reports, read_report, {"report.json": _JSON}),
    Target("baseline", seeds.baselines, read_baseline, {"*.json": _JSON}),
    Target("predictions", seeds.predictions, read_predictions, {"*.parquet": _PARQUET}),
    Target("provenance", seeds.runs, verify_run, {"provenance.json": _JSON, "lock.json": _JSON}),
    Target("search-ledger", seeds.ledgers, read_ledger, {"*.jsonl": _LINES}),
    Target("night-history", seeds.histories, read_history, {"*.sqlite": _SQLITE}, writes=True),
)  # fmt: skip
"""Every kind of input."""

"""Tests that execute the code of README, home page, installation and tutorials, and of the guide for Python.

Commands are run in the order of a page, files are written, and recipes are run. Where a page names a model or data that
is not here, `documented` has small ones.
"""

from __future__ import annotations

import contextlib
import csv
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import documented
import pytest
import yaml
from documented import ROOT, SETTINGS, Block, Setting, code_blocks, complete, quick

import compress
from compress.data.samples.fetch import sample_directory
from compress.recipe.loading import read_recipe

PAGES = (
    "README.md",
    "docs/index.md",
    "docs/install.md",
    *sorted(f"docs/tutorials/{path.name}" for path in (ROOT / "docs/tutorials").glob("*.md")),
)
SHELL = ("console", "bash")
NOT_RUN = {
    r"pip install .*": "it downloads from a package index; tests/test_wheel.py installs the wheel",
    r"python3 -m venv .*": "the tests run in an environment of their own",
}
"""Pattern of a command that tests do not run -> the reason."""
ELSEWHERE = {
    ("docs/tutorials/classifier.md", "yaml"): "`compress init` writes the same file in test_commands_of_a_page_work",
    ("docs/tutorials/detection-segmentation.md", "json"): "test_processor_with_the_documented_size_resizes_images",
    ("docs/tutorials/embeddings.md", "python"): "tests/clients, in an environment with transformers 4",
    ("docs/tutorials/embeddings.md", "js"): "tests/clients, with Node.js",
}
"""Page and language of the only such block -> where it is executed."""


def write_reviews(path: Path, count: int = 400) -> None:
    """Write the file that the reader of a page has: rows of the sample under other names of columns."""
    import pyarrow.parquet as pq

    rows = pq.read_table(sample_directory("movie-reviews") / "train.parquet").slice(0, count).to_pylist()
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("review", "sentiment"), *((row["text"], row["label"]) for row in rows)])


def quick_quickstart(folder: Path) -> list[str]:
    """Write few of the sample's rows; return the fields that make the recipe read them."""
    import pyarrow.parquet as pq

    rows = pq.read_table(sample_directory("movie-reviews") / "train.parquet").to_pylist()
    parts = {"train": rows[:160], "validation": rows[160:200], "test": rows[200:260], "unlabeled": rows[260:300]}
    (folder / "small").mkdir()
    for split, part in parts.items():
        with (folder / f"small/{split}.csv").open("w", newline="") as file:
            columns = ["text"] if split == "unlabeled" else ["text", "label"]
            csv.writer(file).writerows([columns, *([row[column] for column in columns] for row in part)])
    unlabeled = (folder / "small/unlabeled.csv").rename(folder / "unlabeled.csv")
    return [
        f"data.source={folder / 'small'}",
        f'data.unlabeled=["{unlabeled}"]',
        "finetune.epochs=1",
        "distill.epochs=1",
        "limits.0.at_least=0.5",
    ]


def quick_decoder(folder: Path) -> list[str]:
    place = folder / "tiny"
    place.mkdir()
    documented.texts(place)
    model = (place / "model").rename(folder / "tiny-model")
    train = (place / "train.jsonl").read_text().splitlines(keepends=True)
    for split, lines in (("train", train[:-4]), ("validation", train[-4:])):
        (place / f"{split}.jsonl").write_text("".join(lines))
    fields = {"model": model, "data.source": place, "data.max_length": 32, "evaluation.windows": 6}
    fields |= {"gptq.samples": 4, "gptq.sequence_length": 16, "evaluation.prompts": 2}
    fields |= {"tune_scales.steps": 2, "tune_scales.sequence_length": 32}
    return [f"{field}={value}" for field, value in fields.items()]


def quick_images(folder: Path) -> list[str]:
    place = folder / "tiny"
    place.mkdir()
    documented.photos(place)
    fields = [f"data.splits.{split}={place / 'photos' / split}" for split in ("train", "validation", "test")]
    return [
        f"model={place / 'residual-net'}",
        "random_weights=false",
        "finetune.epochs=1",
        "limits.0.at_least=0.5",
        *fields,
    ]


SHIPPED: dict[str, Callable[[Path], list[str]]] = {
    "quickstart": quick_quickstart,
    "smollm2-int4": quick_decoder,
    "image-search": quick_images,
}
"""Shipped recipe -> function that writes less data, or a small model, and returns the fields to replace."""


def write_photos(folder: Path) -> None:
    """Write a model, and `photos/` with a folder for each class."""
    documented.photos(folder)
    (folder / "photos").rename(folder / "splits")
    (folder / "splits" / "train").rename(folder / "photos")


FOLLOWED: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "README.md": (lambda folder: write_reviews(folder / "reviews.csv"), ("quickstart", "reviews")),
    "docs/index.md": (lambda folder: write_reviews(folder / "my.csv"), ("quickstart",)),
    "docs/install.md": (lambda folder: None, ("quickstart",)),
    "docs/tutorials/classifier.md": (lambda folder: write_reviews(folder / "reviews.csv"), ("reviews",)),
    "docs/tutorials/images.md": (write_photos, ("image-search", "mine")),
    "docs/tutorials/language-models.md": (lambda folder: None, ("smollm2-int4",)),
    "docs/tutorials/onnx-file.md": (lambda folder: None, ("smaller",)),
}
"""Page with commands -> function that writes the reader's files, and the names of the runs."""


def commands_of(block: Block) -> list[str]:
    lines = [line.split(" #")[0].strip() for line in block.text.replace("\\\n", "").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def run_line(line: str, folder: Path) -> None:
    """Run a command of a page in ``folder``, with less work where it names a shipped recipe."""
    program, *arguments = shlex.split(line.replace("google/vit-base-patch16-224", "vit"))
    words = [sys.executable, "-P", *(["-m", "compress"] if program == "compress" else []), *arguments]
    if arguments[:1] == ["run"]:
        fields = SHIPPED[arguments[1]](folder) if arguments[1] in SHIPPED else []
        for field in (*fields, "benchmark.seconds=0.2", "benchmark.every_stage=false"):
            words += ["--set", field]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=900, check=False)
    # A missed limit, exit code 1, is a result: times and accuracy depend on the machine.
    assert done.returncode in (0, 1) and "Traceback" not in done.stderr, f"{line}\n{done.stdout}{done.stderr}"


@pytest.mark.slow
@pytest.mark.parametrize("page", FOLLOWED)
def test_commands_of_a_page_work(page: str, tmp_path: Path) -> None:
    prepare, runs = FOLLOWED[page]
    prepare(tmp_path)
    for block in code_blocks(page):
        if block.file:
            (tmp_path / block.file).write_text(block.text)
        for line in commands_of(block) if block.language in SHELL else ():
            if not any(re.fullmatch(pattern, line) for pattern in NOT_RUN):
                run_line(line, tmp_path)
    for name in runs:
        run = tmp_path / "artifacts" / "runs" / name / "latest"
        assert json.loads((run / "report.json").read_text())["schema"] == 1
        assert any((run / "model").rglob("*.onnx"))
    if (page, "yaml") in ELSEWHERE:
        # The page's numbers are those of more rows, by which epochs and limits are chosen.
        (tmp_path / "more").mkdir()
        write_reviews(tmp_path / "more" / "reviews.csv", 1500)
        run_line("compress init --model sample:minilm --data reviews.csv", tmp_path / "more")
        written = (tmp_path / "more" / "reviews.yaml").read_text()
        assert [block.text for block in code_blocks(page) if block.language == "yaml"] == [written]


def recipes(page: str) -> list[Block]:
    """Return the recipes and parts of recipes of a page that no command reads from a file."""
    blocks = [block for block in code_blocks(page) if block.language == "yaml" and not block.file]
    return [] if (page, "yaml") in ELSEWHERE else blocks


EXAMPLES = [
    pytest.param(block, setting, id=f"{page}:{number}")
    for page, settings in SETTINGS.items()
    for number, (block, setting) in enumerate(zip(recipes(page), settings, strict=True), 1)
]


@pytest.mark.parametrize(("block", "setting"), EXAMPLES)
def test_stages_and_fields_of_recipes_exist(block: Block, setting: Setting, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(complete(block, setting)))
    assert read_recipe(path).labels()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning:torch", "ignore::DeprecationWarning")
@pytest.mark.parametrize(("block", "setting"), EXAMPLES)
def test_recipes_run_with_a_small_model(block: Block, setting: Setting, tmp_path: Path) -> None:
    setting.prepare(tmp_path)
    fields = quick(complete(block, setting))
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(fields))
    report = compress.run(path, artifacts=tmp_path / "artifacts").report
    assert len(report.stages) == len(fields["stages"])
    assert report.find("final", "size_bytes", report.targets[0])


def test_every_code_block_is_executed() -> None:
    for page in PAGES:
        blocks = code_blocks(page)
        assert len(recipes(page)) == len(SETTINGS.get(page, ())), page
        followed = page in FOLLOWED
        for block in blocks:
            language = block.language
            if (page, language) in ELSEWHERE:
                assert [other.language for other in blocks].count(language) == 1, page
            else:
                assert (language == "yaml" and not block.file) or (followed and (block.file or language in SHELL)), page


def test_installation_commands_name_the_distribution_and_its_extras() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    found = []
    for page in PAGES:
        for name, listed in re.findall(r"pip install '?(compress[a-z-]*)(?:\[([^]]+)\])?", (ROOT / page).read_text()):
            assert name == compress.DISTRIBUTION, page
            assert {*filter(None, listed.split(","))} <= {*extras}, page
            found.append(page)
    assert {"README.md", "docs/index.md", "docs/install.md"} <= {*found}


def test_clients_make_the_documented_calls_for_embeddings() -> None:
    calls = {block.language: block.text for block in code_blocks("docs/tutorials/embeddings.md")}
    clients = ROOT / "tests" / "clients"
    assert 'backend="onnx"' in calls["python"] and '"file_name"' in calls["python"]
    python = (clients / "sentence_transformers_embeds.py").read_text()
    assert "SentenceTransformer(folder, backend=backend" in python and '"file_name"' in python
    embed = (clients / "embed.mjs").read_text()
    for part in ('pipeline("feature-extraction", ', '{ pooling: "mean", normalize: true }'):
        assert part in calls["js"] and part in embed


def test_processor_with_the_documented_size_resizes_images() -> None:
    from PIL import Image
    from transformers import DetrImageProcessorPil

    [block] = [block for block in code_blocks("docs/tutorials/detection-segmentation.md") if block.language == "json"]
    processor = DetrImageProcessorPil(**json.loads(f"{{{block.text}}}"))
    assert processor(Image.new("RGB", (40, 30)), return_tensors="np")["pixel_values"].shape == (1, 3, 512, 512)


def test_names_in_the_guide_for_python_exist() -> None:
    blocks = [block.text for block in code_blocks("docs/guides/python.md") if block.language == "python"]
    for block in blocks:
        compile(block, "docs/guides/python.md", "exec")
    assert {*re.findall(r"\bcompress\.(\w+)", "\n".join(blocks))} <= {*compress.__all__}
    assert len(blocks) == len(code_blocks("docs/guides/python.md"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning:torch", "ignore::DeprecationWarning")
def test_code_of_the_guide_for_python_works(tmp_path: Path) -> None:
    write_reviews(tmp_path / "reviews.csv")
    namespace: dict[str, object] = {}
    with contextlib.chdir(tmp_path):
        for block in code_blocks("docs/guides/python.md"):
            exec(compile(block.text, "docs/guides/python.md", "exec"), namespace)


@pytest.mark.slow
def test_notebook_works(tmp_path: Path) -> None:
    """The cells are executed in one process, as by a kernel; the last expression of a cell is shown."""
    notebook = json.loads((ROOT / "docs/tutorials/python.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 5
    program = "\n".join(["import ast", "names = {}", f"for cell in {cells!r}:", SHOW])
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "'onnx_int8': 'ran'" in done.stdout.splitlines()[-1]
    assert "test rows are right" in done.stdout


SHOW = """
    tree = ast.parse(cell)
    shown = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    if shown:
        value = eval(compile(ast.Expression(shown.value), "cell", "eval"), names)
        getattr(value, "_repr_html_", lambda: None)()
        print(repr(value))
"""

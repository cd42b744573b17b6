"""Whether a task's answers are those of transformers' own pipeline: real examples, the float model of each recipe.

    python benchmarks/pipelines.py [NAMES...] [--artifacts FOLDER] [--write]

Ours are those of an evaluation: the ONNX file in fp32, through ONNX Runtime, padded in batches. Theirs are the
checkpoint's, which `pipeline(task)` opens by itself, one by one. A model is what the recipe of its name teaches first,
taken from the cache of the artifacts' folder where it lies there; without a training, what it begins with. Exits with
1 where an answer differs; `--write` puts the rows that were tried into `benchmarks/results/pipelines.json`, beside the
others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple

import pyarrow as pa
import torch
import transformers
import typer
import yaml
from pipeline_answers import COMPARED, Case

from compress.evaluation.evaluate import encode_for_model
from compress.formats.onnx.stage import Onnx
from compress.formats.quiet_output import quiet_libraries
from compress.pipeline.runner import StageRunner
from compress.recipe.loading import read_recipe
from compress.recipe.recipe import START, Recipe
from compress.utils.progress import SilentProgress

RESULTS = Path(__file__).parent / "results" / "pipelines.json"
RECIPES = Path(__file__).parents[1] / "recipes"
ROWS = 200
NEAR = 1e-4
COLUMNS = ["task", "model", "examples", "same answers", "scores apart, at most"]


NOTES = [
    "Labels, spans, boxes (to a pixel), masks, tokens and texts are the same, and scores within 1e-4. transformers 5 "
    "has no pipeline for `question-answering`, `text2text-generation` and `text-ranking`: theirs are what is left of "
    "the first (answers of up to 30 tokens), `generate`, and `text-classification` of pairs. Texts with a mask are "
    "those that the pipeline still cuts into the same tokens. Pictures of one channel, which pipelines make three of, "
    "are given to the processor as they were. Boxes are all that score above 1%. Whisper hears recordings of a "
    "telephone exchange's sentences, of which 60 are test rows and none is longer than 30 seconds; it learned from "
    "none of them; the pipeline's five beams are one here. SmolLM2 goes on with paragraphs of 12 articles, after 100 "
    "letters, by the likeliest 8 tokens.",
]


class Row(NamedTuple):
    """Where a task's model and examples come from: a recipe with ``changes``, or ``values`` of one of its own.

    Examples are those of ``splits``, in this order; only a model that learned from none of them may be given more than
    the test split. ``make`` writes the folder of a model with random weights, where no small one is to be had that has
    learned.
    """

    recipe: str = ""
    changes: tuple[str, ...] = ()
    rows: int = ROWS
    values: Mapping[str, Any] = MappingProxyType({})
    make: Callable[[Path], None] | None = None
    splits: tuple[str, ...] = ("test",)


def letters(folder: Path) -> None:
    """A wav2vec2 that spells, with random weights."""
    words = ["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdefghijklmnopqrstuvwxyz'"]
    (folder / "vocab.json").write_text(json.dumps({word: at for at, word in enumerate(words)}))
    transformers.Wav2Vec2CTCTokenizer(str(folder / "vocab.json")).save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(return_attention_mask=False).save_pretrained(folder)
    size = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
    sounds = {"conv_dim": (64,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(vocab_size=len(words), pad_token_id=0, initializer_range=0.2, **size, **sounds)
    transformers.Wav2Vec2ForCTC(config).save_pretrained(folder)


SPOKEN = {
    "name": "spelled",
    "task": "automatic-speech-recognition",
    "model": "made",
    "data": {"source": "sample:languages-audio", "columns": {"text": "prompt"}},
    "stages": ["onnx"],
}
PICTURED = {
    "name": "pictured",
    "task": "image-classification",
    "model": str(RECIPES / "fashion-vit"),
    "random_weights": True,
    "data": {"splits": {"train": "sample:fashion-mnist/train", "test": "sample:fashion-mnist/test"}},
    "stages": [{"finetune": {"epochs": 0.5, "learning_rate": 1e-3, "batch_size": 128, "precision": "fp32"}}],
}


TRIED: Mapping[str, Row] = {
    "quickstart": Row("quickstart"),
    "names": Row("names"),
    "answers": Row("answers"),
    "masked": Row("masked", rows=3 * ROWS),  # some of which the pipeline would cut into other tokens
    "rerank": Row("rerank"),
    "verses": Row("verses"),
    "image-search": Row("image-search"),
    "image-text": Row("image-text"),
    "embeddings-small": Row("embeddings-small"),
    "fashion-vit, half an epoch": Row(values=PICTURED),
    "boxes, 2 epochs of 16": Row("boxes", ("stages.0.finetune.epochs=2",)),
    "masks": Row("masks"),
    "sounds": Row("sounds"),
    "wav2vec2, random weights": Row(values=SPOKEN, make=letters),
    "whisper-int8": Row("whisper-int8", rows=2 * ROWS, splits=("test", "validation", "train")),
    "smollm2-int4": Row("smollm2-int4"),
}


def taught(recipe: Recipe) -> Recipe:
    """Its first training alone, and then ONNX in fp32."""
    first = tuple(stage for stage in recipe.stages[:1] if stage.kind == "finetune")
    return recipe.model_copy(update={"stages": (*first, Onnx(kind="onnx")), "slices": ()})


def case_of(name: str, artifacts: Path) -> Case:
    """The rows of a recipe's test split, the model that it teaches first, and its graph."""
    row, home = TRIED[name], RECIPES
    if row.values:
        home = artifacts / "made" / name.partition(",")[0]
        (home / "made").mkdir(parents=True, exist_ok=True)
        (home / "own.yaml").write_text(yaml.safe_dump(dict(row.values)))
        if row.make is not None:
            row.make(home / "made")
    recipe = taught(read_recipe(home / f"{row.recipe or 'own'}.yaml", row.changes))
    runner = StageRunner(recipe, home, artifacts, SilentProgress())
    runner.run_all()
    labels = recipe.labels()
    folder, graph = (runner.folder_of(label) for label in (labels[-2] if len(labels) > 1 else START, labels[-1]))
    rows = pa.concat_tables([runner.inputs.data.split(name) for name in row.splits]).slice(0, row.rows)
    examples = encode_for_model(graph, runner.inputs.task, rows, recipe.data.max_length)
    return Case(runner.inputs.task, folder, graph, rows, examples)


def row_of(name: str, artifacts: Path) -> tuple[list[str], bool]:
    """The row of the table, and whether all answers are the same."""
    case = case_of(name, artifacts)
    pairs = list(islice(COMPARED[case.task.name](case), ROWS))
    same, apart = sum(pair.same for pair in pairs), [pair.apart for pair in pairs if pair.apart is not None]
    shown = f"{max(apart):.0e}" if apart else "no scores"
    return [case.task.name, name, str(len(pairs)), str(same), shown], same == len(pairs) and max(
        apart, default=0
    ) < NEAR


def write(rows: Mapping[str, list[str]]) -> None:
    """Put the rows where the page is made from."""
    about: dict[str, Any] = {
        "title": "Answers of transformers' own pipelines",
        "order": 9,
        "command": "python benchmarks/pipelines.py --write",
        "machine": "any processor",
        "measured": datetime.now(UTC).date().isoformat(),
        "text": "The float model that a recipe teaches first, as its ONNX file in fp32 answers test rows in an "
        f"evaluation, beside `pipeline(task)` of transformers {transformers.__version__} on the checkpoint.",
        "tables": [{"columns": COLUMNS, "rows": list(rows.values()), "notes": NOTES}],
    }
    RESULTS.write_text(json.dumps(about, indent=1) + "\n")


def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"{', '.join(TRIED)}; default: all.")] = None,
    artifacts: Annotated[Path, typer.Option(help="Where runs are kept.")] = Path("artifacts"),
    keep: Annotated[bool, typer.Option("--write", help="Write the rows into benchmarks/results.")] = False,
) -> None:
    """Print a row for each."""
    torch.set_num_threads(1)
    quiet_libraries()
    known = json.loads(RESULTS.read_text())["tables"][0]["rows"] if RESULTS.is_file() else []
    rows: dict[str, list[str]] = {row[1]: row for row in known}
    different = []
    for name in names or TRIED:
        rows[name], same = row_of(name, artifacts)
        typer.echo(f"| {' | '.join(rows[name])} |")
        different += [] if same else [name]
        if keep:
            write({name: rows[name] for name in TRIED if name in rows})
    raise typer.Exit(1 if different else 0)


if __name__ == "__main__":
    typer.run(main)

"""Comparison of our predictions with those of transformers' pipeline for each task, with the float model of a recipe.

    python benchmarks/pipelines.py [NAMES...] [--artifacts FOLDER] [--write]

Ours are those of an evaluation: the fp32 ONNX file in ONNX Runtime, in padded batches. Theirs are those of
`pipeline(task)` on the checkpoint, one example at a time. The model is the output of the first stage of the recipe if
that trains, from the cache of the artifacts folder if it is there, and otherwise the model that the recipe starts from.
The exit code is 1 if a prediction differs. `--write` updates these rows in `benchmarks/results/pipelines.json`.
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
TOLERANCE = 1e-4
COLUMNS = ["task", "model", "examples", "same answers", "largest score difference"]


NOTES = [
    "Labels, spans, boxes (to a pixel), masks, tokens and texts are the same, and scores within 1e-4. transformers 5 "
    "has no pipeline for `question-answering`, `text2text-generation` and `text-ranking`; the comparison uses the span "
    "selection of `document-question-answering` (answers of up to 30 tokens), `generate`, and `text-classification` of "
    "pairs. Masked texts that the pipeline tokenizes differently are skipped. Images of one channel, which pipelines "
    "convert to RGB, are converted back. All boxes that score above 1% are compared. Whisper transcribes telephone "
    "prompts, of which 60 are test rows and none is longer than 30 seconds; it was trained on none of them, and the "
    "pipeline decodes greedily instead of with five beams. SmolLM2 continues paragraphs of 12 articles after 100 "
    "characters with 8 greedily decoded tokens.",
]


class Row(NamedTuple):
    """Model and examples of a task: a shipped recipe with ``changes``, or a recipe with these ``values``.

    Examples are those of ``splits``, in this order; other splits than test are only for models that were not trained on
    them. ``make`` writes a model folder with random weights, if there is no small trained model.
    """

    recipe: str = ""
    changes: tuple[str, ...] = ()
    rows: int = ROWS
    values: Mapping[str, Any] = MappingProxyType({})
    make: Callable[[Path], None] | None = None
    splits: tuple[str, ...] = ("test",)


def write_wav2vec2(folder: Path) -> None:
    """Write a small wav2vec2 model for CTC over characters, with random weights."""
    tokens = ["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdefghijklmnopqrstuvwxyz'"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    transformers.Wav2Vec2CTCTokenizer(str(folder / "vocab.json")).save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(return_attention_mask=False).save_pretrained(folder)
    shape = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
    convolutions = {"conv_dim": (64,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        vocab_size=len(tokens), pad_token_id=0, initializer_range=0.2, **shape, **convolutions
    )
    transformers.Wav2Vec2ForCTC(config).save_pretrained(folder)


SPEECH_RECIPE = {
    "name": "speech",
    "task": "automatic-speech-recognition",
    "model": "model",
    "data": {"source": "sample:languages-audio", "columns": {"text": "prompt"}},
    "stages": ["onnx"],
}
IMAGE_RECIPE = {
    "name": "images",
    "task": "image-classification",
    "model": str(RECIPES / "fashion-vit"),
    "random_weights": True,
    "data": {"splits": {"train": "sample:fashion-mnist/train", "test": "sample:fashion-mnist/test"}},
    "stages": [{"finetune": {"epochs": 0.5, "learning_rate": 1e-3, "batch_size": 128, "precision": "fp32"}}],
}


ROWS_BY_MODEL: Mapping[str, Row] = {
    "quickstart": Row("quickstart"),
    "names": Row("names"),
    "answers": Row("answers"),
    "masked": Row("masked", rows=3 * ROWS),  # the pipeline tokenizes some of them differently
    "rerank": Row("rerank"),
    "verses": Row("verses"),
    "image-search": Row("image-search"),
    "image-text": Row("image-text"),
    "embeddings-small": Row("embeddings-small"),
    "fashion-vit, half an epoch": Row(values=IMAGE_RECIPE),
    "boxes, 2 epochs of 16": Row("boxes", ("stages.0.finetune.epochs=2",)),
    "masks": Row("masks"),
    "sounds": Row("sounds"),
    "wav2vec2, random weights": Row(values=SPEECH_RECIPE, make=write_wav2vec2),
    "whisper-int8": Row("whisper-int8", rows=2 * ROWS, splits=("test", "validation", "train")),
    "smollm2-int4": Row("smollm2-int4"),
}


def float_recipe(recipe: Recipe) -> Recipe:
    """Return the recipe with only its first training stage, and then ONNX in fp32."""
    first = tuple(stage for stage in recipe.stages[:1] if stage.kind == "finetune")
    return recipe.model_copy(update={"stages": (*first, Onnx(kind="onnx")), "slices": ()})


def case_of(name: str, artifacts: Path) -> Case:
    """Train and export the model of a row, and return it with its examples."""
    row, home = ROWS_BY_MODEL[name], RECIPES
    if row.values:
        home = artifacts / "pipelines" / name.partition(",")[0]
        (home / "model").mkdir(parents=True, exist_ok=True)
        (home / "own.yaml").write_text(yaml.safe_dump(dict(row.values)))
        if row.make is not None:
            row.make(home / "model")
    recipe = float_recipe(read_recipe(home / f"{row.recipe or 'own'}.yaml", row.changes))
    runner = StageRunner(recipe, home, artifacts, SilentProgress())
    runner.run_all()
    labels = recipe.labels()
    folder, graph = (runner.folder_of(label) for label in (labels[-2] if len(labels) > 1 else START, labels[-1]))
    rows = pa.concat_tables([runner.inputs.data.split(name) for name in row.splits]).slice(0, row.rows)
    examples = encode_for_model(graph, runner.inputs.task, rows, recipe.data.max_length)
    return Case(runner.inputs.task, folder, graph, rows, examples)


def row_of(name: str, artifacts: Path) -> tuple[list[str], bool]:
    """Return the row of the table, and whether all predictions are the same."""
    case = case_of(name, artifacts)
    pairs = list(islice(COMPARED[case.task.name](case), ROWS))
    same = sum(pair.same for pair in pairs)
    differences = [pair.difference for pair in pairs if pair.difference is not None]
    shown = f"{max(differences):.0e}" if differences else "no scores"
    is_equal = same == len(pairs) and max(differences, default=0) < TOLERANCE
    return [case.task.name, name, str(len(pairs)), str(same), shown], is_equal


def write(rows: Mapping[str, list[str]]) -> None:
    """Write the rows to the results file."""
    page: dict[str, Any] = {
        "title": "Answers of transformers' own pipelines",
        "order": 9,
        "command": "python benchmarks/pipelines.py --write",
        "machine": "one thread; the kind of processor does not matter",
        "measured": datetime.now(UTC).date().isoformat(),
        "text": "The float model of a recipe as an fp32 ONNX file, evaluated on test rows, is compared with "
        f"`pipeline(task)` of transformers {transformers.__version__} on the checkpoint.",
        "tables": [{"columns": COLUMNS, "rows": list(rows.values()), "notes": NOTES}],
    }
    RESULTS.write_text(json.dumps(page, indent=1) + "\n")


def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"Of: {', '.join(ROWS_BY_MODEL)}. Default: all.")] = None,
    artifacts: Annotated[Path, typer.Option(help="Artifacts folder, with the stage cache.")] = Path("artifacts"),
    write_results: Annotated[bool, typer.Option("--write", help="Write the rows to benchmarks/results.")] = False,
) -> None:
    """Print a row for each model."""
    torch.set_num_threads(1)
    quiet_libraries()
    recorded = json.loads(RESULTS.read_text())["tables"][0]["rows"] if RESULTS.is_file() else []
    rows: dict[str, list[str]] = {row[1]: row for row in recorded}
    different = []
    for name in names or ROWS_BY_MODEL:
        rows[name], same = row_of(name, artifacts)
        typer.echo(f"| {' | '.join(rows[name])} |")
        different += [] if same else [name]
        if write_results:
            write({name: rows[name] for name in ROWS_BY_MODEL if name in rows})
    raise typer.Exit(1 if different else 0)


if __name__ == "__main__":
    typer.run(main)

"""Whether models can be made, judged and timed as the recipe says, asked before its stages begin."""

from __future__ import annotations

import numpy as np

from compress.data.membership import character_lengths, find_parts
from compress.data.slices import Unit
from compress.evaluation.evaluate import encode_for
from compress.evaluation.image_judge import check_classes
from compress.evaluation.instruction_following import turns_of
from compress.models.config_checks import positions_of
from compress.models.json_file import read_json
from compress.models.processor import load_processor
from compress.pipeline.format_support import check_formats
from compress.pipeline.runner import StageRunner
from compress.pipeline.target_session import SPLIT
from compress.stages.model_checks import check_stages
from compress.tasks.capability import READS_ROWS
from compress.utils.errors import DataError


def prove(runner: StageRunner) -> None:
    """Everything of this module, and whether its formats can be written. Raises a `CompressError`."""
    check_slices(runner)
    check_judge(runner)
    check_running_text(runner)
    check_formats(runner.recipe, runner.inputs.start)
    check_stages(runner.recipe.stages, runner.inputs.start)


def check_judge(runner: StageRunner) -> None:
    """Whether the judge of pictures knows the classes of the rows. Raises `DataError` or `ModelError`."""
    rows = runner.inputs.data.split(SPLIT)
    if runner.inputs.judge is not None:
        check_classes(runner.inputs.judge, rows["label"].to_pylist() if "label" in rows.column_names else ())


def check_slices(runner: StageRunner) -> None:
    """Read what every slice reads, so that a wrong one ends the run now and not after training. Raises `DataError`."""
    if READS_ROWS not in runner.inputs.task.capabilities and any(part.length is not None for part in runner.inputs.slices):
        raise DataError(
            f"There are no slices by length of running text, which {runner.inputs.task.name} is judged on.",
            where="slices",
            expected="slices by a column of its rows, such as their domain",
        )

    def lengths(unit: Unit) -> np.ndarray:
        """Tokens are not counted before there is a tokenizer."""
        return character_lengths(runner.inputs.data, SPLIT) if unit == "characters" else np.ones(len(runner.inputs.data.split(SPLIT)))

    find_parts(runner.inputs.slices, runner.inputs.data, SPLIT, lengths)


def check_running_text(runner: StageRunner) -> None:
    """Cut all text as the starting model's tokenizer reads it, so that a wrong length ends the run now.

    Raises `DataError`; of tasks whose examples are rows nothing is asked.
    """
    if READS_ROWS in runner.inputs.task.capabilities:
        return
    recipe = runner.recipe
    for number, stage in enumerate(recipe.stages):
        try:
            stage.check_data(runner.inputs.start, runner.context(runner.digest_of(START)))
        except DataError as error:
            error.where = f"stages.{number}.{stage.kind}, {error.where}"
            raise
    processor = load_processor(runner.inputs.start)
    for split, language in recipe.data.also.items():
        rows = runner.inputs.data.split(split)
        found = encode_for(runner.inputs.start, runner.inputs.task, rows, recipe.data.max_length, recipe.evaluation)
        runner.inputs.task.kinds_of_tokens(rows, processor, found, language)
    turns = turns_of(runner.inputs.start, [one.prompt for one in runner.inputs.instructions]) if runner.inputs.instructions else []
    examples = encode_for(runner.inputs.start, runner.inputs.task, runner.inputs.data.split(SPLIT), recipe.data.max_length, recipe.evaluation)
    read, timed = int(examples.lengths().sum()), max(recipe.benchmark.contexts)
    if timed > read:
        raise DataError(
            f"A prompt of {timed} tokens is to be timed, and the text that is judged by has {read}.",
            where="benchmark.contexts",
            hint="give more text, raise evaluation.windows, or lower benchmark.contexts",
        )
    positions = positions_of(read_json(runner.inputs.start / "config.json"))
    wanted = {
        "data.max_length": recipe.data.max_length,
        "benchmark.contexts": timed + recipe.benchmark.tokens,
        "evaluation.answer_tokens": max(map(len, turns), default=0) + recipe.evaluation.answer_tokens * bool(turns),
        "evaluation.tokens": recipe.evaluation.prompt_tokens + recipe.evaluation.tokens,
    }
    for field, length in wanted.items():
        if positions is not None and length > positions:
            raise DataError(
                f"The model would read {length} tokens, more than it can place.",
                where=field,
                expected=f"at most {positions}, its max_position_embeddings, with what is generated after a prompt",
            )

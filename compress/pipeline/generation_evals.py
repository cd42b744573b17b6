"""What models are asked beside the rows that they are judged on: texts to go on with, choices, instructions, pairs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from compress.data.instructions import USUAL, find_instructions
from compress.evaluation.generate import (
    Step,
    as_ids,
    as_text,
    continue_prompts,
    fallen,
    loop_row,
    prompts_of,
    repetition_note,
    repetition_row,
    steps_of,
)
from compress.evaluation.instruction_following import answer_perplexity, answers_of, chats, instruction_rows, turns_of
from compress.evaluation.zero_shot import choice_rows, choice_scores, cosines, similarity_rows
from compress.models.config_checks import max_positions
from compress.models.json_file import read_json
from compress.pipeline.target_session import TargetSession, windows_digest
from compress.results.measurement import Measurement
from compress.results.report import BASELINE, FINAL, AnswerRecord, ContinuationRecord, GeneratedToken, LostToken
from compress.tasks.capability import GENERATES
from compress.tasks.sequences import spread
from compress.utils.errors import DataError


def generations(session: TargetSession) -> tuple[list[Measurement], list[ContinuationRecord], list[str]]:
    """How each model repeats itself; what baseline and final model wrote, and words on who repeats more.

    A model that chats is asked too, and judged by how likely it finds what the baseline answers.
    """
    wanted = session.runner.recipe.evaluation
    if not (GENERATES in session.runner.inputs.task.capabilities and wanted.prompts):
        return [], [], []
    begun = {label: _begun(session, label) for label in session.artifacts}
    written = {label: _written(session, label, prompts) for label, prompts in begun.items()}
    rows = {label: repetition_row(texts, label, session.target.name) for label, texts in written.items()}
    note = repetition_note(rows[FINAL], rows[BASELINE]) if FINAL in rows else None
    loops = [loop_row(texts, label, session.target.name) for label, texts in written.items()]
    records = [record for label in written for record in _records(session, label, begun[label], written[label])]
    near, answers, reason = _talk(session)
    notes = [f"{session.target.name}: {text}" for text in (note, reason) if text is not None]
    return [*rows.values(), *loops, *near], [*records, *answers], notes


def _begun(session: TargetSession, label: str) -> list[list[int]]:
    """The beginnings of texts, as token ids of a model."""
    usual = BASELINE if BASELINE in session.artifacts else label
    return _as_read_by(session, label, prompts_of(session.examples(usual), session.runner.recipe.evaluation))


def _as_read_by(session: TargetSession, label: str, texts: list[list[int]]) -> list[list[int]]:
    """The baseline's token ids as a model has them, whose tokenizer may be another."""
    if BASELINE not in session.artifacts or label == BASELINE:
        return texts
    if windows_digest(session.examples(BASELINE)) == windows_digest(session.examples(label)):
        return texts
    return as_ids(session.artifacts[label], as_text(session.artifacts[BASELINE], texts))


def _talk(session: TargetSession) -> tuple[list[Measurement], list[ContinuationRecord], str | None]:
    """How likely each model finds what the baseline answers, and what baseline and final model do; nothing of others.

    It is asked some of the usual instructions, each alone, in its chat template; why not where that template refuses.
    """
    wanted = session.runner.recipe.evaluation
    if BASELINE not in session.artifacts or not chats(session.artifacts[BASELINE]):
        return [], [], None
    known = find_instructions(USUAL, session.runner.recipe_folder)
    questions = [known[place].prompt for place in spread(len(known), wanted.prompts)]
    try:
        turns = {label: turns_of(folder, questions) for label, folder in session.artifacts.items()}
    except DataError as error:
        return [], [], f"not asked as a chat: {error.what}"
    positions, longest = (
        max_positions(read_json(session.runner.inputs.start / "config.json")),
        max(map(len, turns[BASELINE])),
    )
    if positions is not None and longest + wanted.tokens > positions:
        return [], [], f"not asked as a chat: it reads {positions} tokens, and a question has {longest}"
    written = {label: _written(session, label, prompts) for label, prompts in turns.items()}
    rows, tokens = list[Measurement](), [len(ids) for ids in written[BASELINE]]
    for label, prompts in turns.items():
        steps = _steps(session, label, prompts, _as_read_by(session, label, written[BASELINE]))
        rows.append(answer_perplexity(steps, tokens, label, session.target.name))
    records = [
        record for label in written for record in _records(session, label, turns[label], written[label], questions)
    ]
    return rows, records, None


def _written(session: TargetSession, label: str, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """What a model wrote after prompts, as token ids."""
    tokens = session.runner.recipe.evaluation.tokens
    find = partial(continue_prompts, session.artifacts[label], prompts, tokens)
    parts, names = (
        {"prompts": prompts, "tokens": tokens},
        (f"generation of {label}", f"continue texts with {label}"),
    )
    found: list[list[int]] = session.kept_json("generation", label, parts, "written.json", names, find)
    return found


def _records(
    session: TargetSession,
    label: str,
    prompts: Sequence[Sequence[int]],
    written: Sequence[Sequence[int]],
    shown: Sequence[str] | None = None,
) -> list[ContinuationRecord]:
    """What the report shows of a model's texts behind prompts, where it is the baseline or the final one."""
    if FINAL not in session.artifacts or label not in (BASELINE, FINAL):
        return []
    folder = session.artifacts[label]
    repeated = repetition_row(written, label, session.target.name).raw or ()
    steps = _in_words(folder, _steps(session, label, prompts, written))
    told = zip(shown or as_text(folder, prompts), as_text(folder, written), repeated, steps, strict=True)
    return [
        ContinuationRecord(model=label, target=session.target.name, prompt=prompt, text=text, repeated=share, steps=own)
        for prompt, text, share, own in told
    ]


def _steps(
    session: TargetSession, label: str, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]
) -> list[list[Step]]:
    """How likely a model finds each token of texts behind prompts, and the likeliest other one."""
    find = partial(steps_of, session.artifacts[label], prompts, texts)
    names = (f"steps of {label}", f"ask {label} how likely it finds what was written")
    found = session.kept_json("steps", label, {"prompts": prompts, "texts": texts}, "steps.json", names, find)
    return [[Step(*step) for step in steps] for steps in found]


def _in_words(folder: Path, texts: Sequence[Sequence[Step]]) -> list[tuple[GeneratedToken, ...]]:
    pieces = iter(as_text(folder, [[token] for steps in texts for step in steps for token in (step.token, step.other)]))
    return [
        tuple(
            GeneratedToken(next(pieces), round(step.probability, 4), next(pieces), round(step.other_probability, 4))
            for step in steps
        )
        for steps in texts
    ]


def lost_tokens(session: TargetSession) -> list[LostToken]:
    """The tokens of test text whose probability fell most, where baseline and final model read the same ones."""
    if GENERATES not in session.runner.inputs.task.capabilities or not {BASELINE, FINAL} <= session.found.keys():
        return []
    examples = session.examples(BASELINE)
    if windows_digest(examples) != windows_digest(session.examples(FINAL)):
        return []
    old, new = (session.found[label].kept["loss"] for label in (BASELINE, FINAL))
    found = fallen(examples, old, new)
    before, tokens = (
        as_text(session.artifacts[BASELINE], texts)
        for texts in ([one.before for one in found], [[one.token] for one in found])
    )
    return [
        LostToken(target=session.target.name, before=text, token=token, baseline=one.old, final=one.new)
        for text, token, one in zip(before, tokens, found, strict=True)
    ]


def choices(session: TargetSession) -> list[Measurement]:
    """How often each model finds the right one of several choices likeliest, where the recipe asks any."""
    questions, rows = session.runner.inputs.questions, list[Measurement]()
    parts = {"questions": [[question.prompt, *question.choices] for question in questions]}
    for label in session.artifacts if questions else ():
        find = partial(choice_scores, session.artifacts[label], questions)
        what = f"choices of {label}"
        scores = session.kept_json("choices", label, parts, "scores.json", (what, what), find)
        rows += choice_rows(questions, scores, label, session.target.name)
    return rows


def instructed(session: TargetSession) -> tuple[list[Measurement], list[AnswerRecord]]:
    """How well each model follows the recipe's instructions, and what baseline and final model answered."""
    asked, rows, records = session.runner.inputs.instructions, list[Measurement](), list[AnswerRecord]()
    tokens, target = session.runner.recipe.evaluation.answer_tokens, session.target.name
    parts = {"prompts": [one.prompt for one in asked], "tokens": tokens}
    for label in session.artifacts if asked else ():
        names = (f"answers of {label}", f"instruct {label}")
        find = partial(answers_of, session.artifacts[label], asked, tokens)
        answers = session.kept_json("answers", label, parts, "answers.json", names, find)
        rows += instruction_rows(asked, answers, label, target)
        records += [
            AnswerRecord(model=label, target=target, prompt=one.prompt, text=text, missed=tuple(one.missed(text)))
            for one, text in zip(asked, answers, strict=True)
            if label in (BASELINE, FINAL)
        ]
    return rows, records


def similarities(session: TargetSession) -> list[Measurement]:
    """How each model's cosines follow human similarities, where the recipe names any."""
    rated, length, rows = session.runner.inputs.rated_pairs, session.runner.recipe.data.max_length, list[Measurement]()
    parts = {"texts": [[part.texts, part.pairs] for part in rated], "max_length": length}
    for label in session.artifacts if rated else ():
        find = partial(cosines, session.artifacts[label], session.runner.inputs.task, rated, length)
        what = f"similarities by {label}"
        found = session.kept_json("similarity", label, parts, "cosines.json", (what, what), find)
        rows += similarity_rows(rated, found, label, session.target.name)
    return rows

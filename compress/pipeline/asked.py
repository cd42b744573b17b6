"""What models are asked beside the rows that they are judged on: texts to go on with, choices, instructions, pairs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from compress.evaluation.generate import (
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
from compress.evaluation.instructed import answers_of, instruction_rows
from compress.evaluation.judged import choice_rows, choice_scores, cosines, similarity_rows
from compress.measurement import Measurement
from compress.pipeline.target_session import TargetSession, windows_digest
from compress.report.schema import BASELINE, FINAL, AnswerRecord, ContinuationRecord, LostToken, WrittenToken
from compress.tasks.capability import GENERATES


def generations(session: TargetSession) -> tuple[list[Measurement], list[ContinuationRecord], list[str]]:
    """How each model repeats itself; what baseline and final model wrote, and words on who repeats more."""
    if not (GENERATES in session.road.task.capabilities and session.road.recipe.evaluation.prompts):
        return [], [], []
    written = {label: _written(session, label) for label in session.artifacts}
    rows = {label: repetition_row(texts, label, session.target.name) for label, (_, texts) in written.items()}
    records = []
    for label in (BASELINE, FINAL) if FINAL in rows else ():
        prompts, texts = (as_text(session.artifacts[label], ids) for ids in written[label])
        told = zip(prompts, texts, rows[label].raw or (), _steps(session, label, *written[label]), strict=True)
        records += [
            ContinuationRecord(
                model=label, target=session.target.name, prompt=prompt, text=text, repeated=repeated, steps=steps
            )
            for prompt, text, repeated, steps in told
        ]
    note = repetition_note(rows[FINAL], rows[BASELINE]) if FINAL in rows else None
    loops = [loop_row(texts, label, session.target.name) for label, (_, texts) in written.items()]
    return [*rows.values(), *loops], records, [] if note is None else [f"{session.target.name}: {note}"]


def _written(session: TargetSession, label: str) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and what a model wrote after them, as token ids."""
    wanted = session.road.recipe.evaluation
    usual = BASELINE if BASELINE in session.artifacts else label
    prompts = prompts_of(session.examples(usual), wanted)
    if windows_digest(session.examples(usual)) != windows_digest(session.examples(label)):
        prompts = as_ids(session.artifacts[label], as_text(session.artifacts[usual], prompts))
    find = partial(continue_prompts, session.artifacts[label], prompts, wanted.tokens)
    parts, names = (
        {"prompts": prompts, "tokens": wanted.tokens},
        (f"generation of {label}", f"continue texts with {label}"),
    )
    return prompts, session.kept_json("generation", label, parts, "written.json", names, find)


def _steps(
    session: TargetSession, label: str, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]
) -> list[tuple[WrittenToken, ...]]:
    """How likely a model finds each token that it wrote, and the likeliest other one."""
    folder, find = session.artifacts[label], partial(steps_of, session.artifacts[label], prompts, texts)
    names = (f"steps of {label}", f"ask {label} how likely it finds what it wrote")
    found = session.kept_json("steps", label, {"prompts": prompts, "texts": texts}, "steps.json", names, find)
    pieces = iter(as_text(folder, [[token] for steps in found for step in steps for token in (step[0], step[2])]))
    return [
        tuple(WrittenToken(next(pieces), round(own, 4), next(pieces), round(other, 4)) for _, own, _, other in steps)
        for steps in found
    ]


def lost_tokens(session: TargetSession) -> list[LostToken]:
    """The tokens of test text whose probability fell most, where baseline and final model read the same ones."""
    if GENERATES not in session.road.task.capabilities or not {BASELINE, FINAL} <= session.found.keys():
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
    questions, rows = session.road.questions, list[Measurement]()
    parts = {"questions": [[question.prompt, *question.choices] for question in questions]}
    for label in session.artifacts if questions else ():
        find = partial(choice_scores, session.artifacts[label], questions)
        what = f"choices of {label}"
        scores = session.kept_json("choices", label, parts, "scores.json", (what, what), find)
        rows += choice_rows(questions, scores, label, session.target.name)
    return rows


def instructed(session: TargetSession) -> tuple[list[Measurement], list[AnswerRecord]]:
    """How well each model follows the recipe's instructions, and what baseline and final model answered."""
    asked, rows, records = session.road.instructions, list[Measurement](), list[AnswerRecord]()
    tokens, target = session.road.recipe.evaluation.answer_tokens, session.target.name
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
    rated, length, rows = session.road.rated_pairs, session.road.recipe.data.max_length, list[Measurement]()
    parts = {"texts": [[part.texts, part.pairs] for part in rated], "max_length": length}
    for label in session.artifacts if rated else ():
        find = partial(cosines, session.artifacts[label], session.road.task, rated, length)
        what = f"similarities by {label}"
        found = session.kept_json("similarity", label, parts, "cosines.json", (what, what), find)
        rows += similarity_rows(rated, found, label, session.target.name)
    return rows

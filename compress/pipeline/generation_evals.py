"""Evaluations by generated text: continuations, multiple choice, instructions and sentence similarity."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from compress.data.judged import USUAL, find_instructions
from compress.data.membership import Part
from compress.evaluation.generate import (
    TokenProbability,
    answer_instructions,
    answer_perplexity,
    choose_prompts,
    continue_prompts,
    decode_tokens,
    encode_chats,
    encode_texts,
    find_fallen_tokens,
    has_chat_template,
    instruction_rows,
    looping_row,
    repetition_note,
    repetition_row,
    token_probabilities,
)
from compress.evaluation.zero_shot import choice_rows, choice_scores, pair_cosines, similarity_rows
from compress.models.config_checks import max_positions
from compress.models.json_file import read_json
from compress.models.pipeline_folder import image_generation_hook
from compress.pipeline.target_session import TargetSession, windows_digest
from compress.results.report import (
    BASELINE,
    FINAL,
    AnswerRecord,
    ContinuationRecord,
    GeneratedToken,
    LostToken,
    Measurement,
)
from compress.tasks.capability import GENERATES, GENERATES_IMAGES
from compress.tasks.token_sequences import spread
from compress.utils.errors import DataError


def generations(session: TargetSession) -> tuple[list[Measurement], list[ContinuationRecord], list[str]]:
    """Let each model continue prompts, and return how much it repeats itself.

    Chat models also answer instructions, and are measured by the perplexity of the baseline's answers.

    Returns:
        Measurements, the texts of the baseline and the final model, and notes.
    """
    settings = session.runner.recipe.evaluation
    if not (GENERATES in session.runner.inputs.task.capabilities and settings.prompts):
        return [], [], []
    prompts_by_label = {
        label: _as_read_by(
            session,
            label,
            choose_prompts(session.examples(BASELINE if BASELINE in session.artifacts else label), settings),
        )
        for label in session.artifacts
    }
    texts_by_label = {label: _written(session, label, prompts) for label, prompts in prompts_by_label.items()}
    rows = {label: repetition_row(texts, label, session.target.name) for label, texts in texts_by_label.items()}
    note = repetition_note(rows[FINAL], rows[BASELINE]) if FINAL in rows else None
    loop_rows = [looping_row(texts, label, session.target.name) for label, texts in texts_by_label.items()]
    records = [
        record
        for label in texts_by_label
        for record in _records(session, label, prompts_by_label[label], texts_by_label[label])
    ]
    answer_rows, answer_records, reason = _talk(session)
    notes = [f"{session.target.name}: {text}" for text in (note, reason) if text is not None]
    return [*rows.values(), *loop_rows, *answer_rows], [*records, *answer_records], notes


def _as_read_by(session: TargetSession, label: str, texts: list[list[int]]) -> list[list[int]]:
    """Return the baseline's token ids, converted if the model has another tokenizer."""
    if BASELINE not in session.artifacts or label == BASELINE:
        return texts
    if windows_digest(session.examples(BASELINE)) == windows_digest(session.examples(label)):
        return texts
    return encode_texts(session.artifacts[label], decode_tokens(session.artifacts[BASELINE], texts))


def _talk(session: TargetSession) -> tuple[list[Measurement], list[ContinuationRecord], str | None]:
    """Return each model's perplexity on the baseline's answers, and the answers of the baseline and the final model.

    Models without a chat template return nothing. The third value is the reason why a template could not be used.
    """
    settings = session.runner.recipe.evaluation
    if BASELINE not in session.artifacts or not has_chat_template(session.artifacts[BASELINE]):
        return [], [], None
    instructions = find_instructions(USUAL, session.runner.recipe_folder)
    questions = [instructions[index].prompt for index in spread(len(instructions), settings.prompts)]
    try:
        turns = {label: encode_chats(folder, questions) for label, folder in session.artifacts.items()}
    except DataError as error:
        return [], [], f"not evaluated as a chat: {error.what}"
    positions = max_positions(read_json(session.runner.inputs.start / "config.json"))
    longest = max(map(len, turns[BASELINE]))
    if positions is not None and longest + settings.tokens > positions:
        return [], [], f"not evaluated as a chat: its maximum length is {positions} tokens, and a prompt has {longest}"
    texts_by_label = {label: _written(session, label, prompts) for label, prompts in turns.items()}
    rows, tokens = list[Measurement](), [len(ids) for ids in texts_by_label[BASELINE]]
    for label, prompts in turns.items():
        steps = _steps(session, label, prompts, _as_read_by(session, label, texts_by_label[BASELINE]))
        rows.append(answer_perplexity(steps, tokens, label, session.target.name))
    records = [
        record
        for label in texts_by_label
        for record in _records(session, label, turns[label], texts_by_label[label], questions)
    ]
    return rows, records, None


def _written(session: TargetSession, label: str, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the texts that a model generates after prompts, as token ids."""
    tokens = session.runner.recipe.evaluation.tokens
    generate = partial(continue_prompts, session.artifacts[label], prompts, tokens)
    parts = {"prompts": prompts, "tokens": tokens}
    names = (f"generation of {label}", f"continue texts with {label}")
    texts: list[list[int]] = session.cached_json("generation", label, parts, "written.json", names, generate)
    return texts


def _records(
    session: TargetSession,
    label: str,
    prompts: Sequence[Sequence[int]],
    written: Sequence[Sequence[int]],
    shown: Sequence[str] | None = None,
) -> list[ContinuationRecord]:
    """Return the report's records of generated texts, empty for models other than the baseline and the final one.

    Args:
        session: Measurements of one target.
        label: Label of the model.
        prompts: Prompts as token ids.
        written: Generated texts as token ids.
        shown: Prompts as text, if they are not the decoded token ids.
    """
    if FINAL not in session.artifacts or label not in (BASELINE, FINAL):
        return []
    folder = session.artifacts[label]
    repeated = repetition_row(written, label, session.target.name).raw or ()
    # The tokens as text, with rounded probabilities.
    texts = _steps(session, label, prompts, written)
    pieces = iter(
        decode_tokens(folder, [[token] for steps in texts for step in steps for token in (step.token, step.other)])
    )
    steps = [
        tuple(
            GeneratedToken(next(pieces), round(step.probability, 4), next(pieces), round(step.other_probability, 4))
            for step in steps
        )
        for steps in texts
    ]
    rows = zip(shown or decode_tokens(folder, prompts), decode_tokens(folder, written), repeated, steps, strict=True)
    return [
        ContinuationRecord(
            model=label, target=session.target.name, prompt=prompt, text=text, repeated=share, steps=tokens
        )
        for prompt, text, share, tokens in rows
    ]


def _steps(
    session: TargetSession, label: str, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]
) -> list[list[TokenProbability]]:
    """Return the probability of each token of texts after prompts, and the likeliest other token.

    Args:
        session: Measurements of one target.
        label: Label of the model.
        prompts: Prompts as token ids.
        texts: Texts as token ids.
    """
    compute = partial(token_probabilities, session.artifacts[label], prompts, texts)
    names = (f"steps of {label}", f"evaluate the likelihood of the generated texts with {label}")
    steps_by_text = session.cached_json(
        "steps", label, {"prompts": prompts, "texts": texts}, "steps.json", names, compute
    )
    return [[TokenProbability(*step) for step in steps] for steps in steps_by_text]


def lost_tokens(session: TargetSession) -> list[LostToken]:
    """Return the tokens of the test text whose probability fell most from the baseline to the final model.

    It is empty if the two have different tokenizers.
    """
    if GENERATES not in session.runner.inputs.task.capabilities or not {BASELINE, FINAL} <= session.predictions.keys():
        return []
    examples = session.examples(BASELINE)
    if windows_digest(examples) != windows_digest(session.examples(FINAL)):
        return []
    old, new = (session.predictions[label].kept["loss"] for label in (BASELINE, FINAL))
    losses = find_fallen_tokens(examples, old, new)
    contexts, tokens = (
        decode_tokens(session.artifacts[BASELINE], texts)
        for texts in ([loss.before for loss in losses], [[loss.token] for loss in losses])
    )
    return [
        LostToken(target=session.target.name, before=context, token=token, baseline=loss.old, final=loss.new)
        for context, token, loss in zip(contexts, tokens, losses, strict=True)
    ]


def choices(session: TargetSession) -> list[Measurement]:
    """Return the accuracy of each model on the recipe's multiple-choice questions."""
    questions, rows = session.runner.inputs.questions, list[Measurement]()
    parts = {"questions": [[question.prompt, *question.choices] for question in questions]}
    for label in session.artifacts if questions else ():
        compute = partial(choice_scores, session.artifacts[label], questions)
        name = f"choices of {label}"
        scores = session.cached_json("choices", label, parts, "scores.json", (name, name), compute)
        rows += choice_rows(questions, scores, label, session.target.name)
    return rows


def instructed(session: TargetSession) -> tuple[list[Measurement], list[AnswerRecord]]:
    """Let each model answer the recipe's instructions.

    Returns:
        Measurements, and the answers of the baseline and the final model.
    """
    instructions, rows, records = session.runner.inputs.instructions, list[Measurement](), list[AnswerRecord]()
    tokens, target = session.runner.recipe.evaluation.answer_tokens, session.target.name
    parts = {"prompts": [instruction.prompt for instruction in instructions], "tokens": tokens}
    for label in session.artifacts if instructions else ():
        names = (f"answers of {label}", f"instruct {label}")
        generate = partial(answer_instructions, session.artifacts[label], instructions, tokens)
        answers = session.cached_json("answers", label, parts, "answers.json", names, generate)
        rows += instruction_rows(instructions, answers, label, target)
        records += [
            AnswerRecord(
                model=label, target=target, prompt=instruction.prompt, text=text, missed=tuple(instruction.missed(text))
            )
            for instruction, text in zip(instructions, answers, strict=True)
            if label in (BASELINE, FINAL)
        ]
    return rows, records


def similarities(session: TargetSession) -> list[Measurement]:
    """Return the rank correlation of each model's cosines with the recipe's human similarity scores."""
    rated, length, rows = session.runner.inputs.rated_pairs, session.runner.recipe.data.max_length, list[Measurement]()
    parts = {"texts": [[part.texts, part.pairs] for part in rated], "max_length": length}
    for label in session.artifacts if rated else ():
        compute = partial(pair_cosines, session.artifacts[label], session.runner.inputs.task, rated, length)
        name = f"similarities by {label}"
        cosine_values = session.cached_json("similarity", label, parts, "cosines.json", (name, name), compute)
        rows += similarity_rows(rated, cosine_values, label, session.target.name)
    return rows


def judgements(session: TargetSession, parts: Sequence[Part]) -> list[Measurement]:
    """Return the metrics that the recipe's judge computes from each model's images, on all rows and each slice."""
    if GENERATES_IMAGES not in session.runner.inputs.task.capabilities:
        return []
    rows: list[Measurement] = image_generation_hook("judgements")(session, parts)
    return rows

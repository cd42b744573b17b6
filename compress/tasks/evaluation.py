"""The `evaluation` section of a recipe."""

from __future__ import annotations

from pydantic import Field, field_validator

from compress.utils.pydantic_models import Frozen

_TEMPLATES = ("This is a photo of {}.",)
"""Template of transformers' zero-shot pipeline."""


class Evaluation(Frozen):
    """Part of the test split that language models are evaluated on, and evaluations besides the test split."""

    windows: int | None = Field(
        None,
        ge=1,
        description="how many windows of `max_length` tokens, spread evenly over the test split; left out: all",
    )
    stride: int | None = Field(
        None,
        ge=1,
        description="tokens from one window's beginning to the next; what a window shares with the one before is "
        "context and does not count. Left out: `max_length`, so that windows share nothing",
    )
    questions: str | None = Field(
        None,
        description="a JSONL, JSON or Parquet file of multiple-choice questions: `prompt`, `choices` (a list), and "
        "`answer`, its place from 0 or its text; or `sample:analogies`",
    )
    instructions: str | None = Field(
        None,
        description="`usual`, or a JSONL or JSON file of `prompt` and `checks`: what a chat model is asked, and what "
        "its answer must be, such as {words_at_most: 20}",
    )
    answer_tokens: int = Field(128, ge=1, description="tokens of each answer to an instruction, at most")
    similarity: str | None = Field(
        None,
        description="feature extraction: `sample:similarity`, or a CSV, JSONL or Parquet file of `text`, `pair` and "
        "`score`; how well cosines follow the scores is a metric of its own",
    )
    templates: tuple[str, ...] = Field(
        _TEMPLATES,
        min_length=1,
        description="zero-shot classification: sentences with {} for a class's name; a class is the mean of theirs",
    )
    prompts: int = Field(
        8,
        ge=0,
        description="beginnings of windows that every model continues, greedily, and as many questions where the model "
        "has a chat template; 0: none",
    )
    prompt_tokens: int = Field(32, ge=1, description="tokens of each of them")
    tokens: int = Field(64, ge=4, description="tokens of each continuation, at most")

    judge: str | None = Field(
        None,
        description="text to image: an image classifier of the rows' labels (a folder or Hugging Face id): how often "
        "it sees what a prompt says, and how near pictures are to the rows' own in its features",
    )
    pictures: int = Field(
        8,
        ge=0,
        description="text to image: prompts, the first of the test rows, whose pictures the report shows; 0: none",
    )

    @field_validator("templates")
    @classmethod
    def _each_takes_a_name(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if any(template.count("{}") != 1 for template in value):
            raise ValueError("sentences with one {} each, where the class's name goes")
        return value

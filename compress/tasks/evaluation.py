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
        description="number of windows of `max_length` tokens, evenly spaced over the test split; default: all",
    )
    stride: int | None = Field(
        None,
        ge=1,
        description="tokens between the starts of two windows; overlapping tokens are context and are not scored. "
        "Default: `max_length`, without overlap",
    )
    questions: str | None = Field(
        None,
        description="JSONL, JSON or Parquet file of multiple-choice questions: `prompt`, `choices` (a list) and "
        "`answer` (index from 0, or text); or `sample:analogies`",
    )
    instructions: str | None = Field(
        None,
        description="instructions for a chat model: `usual`, or a JSONL or JSON file of `prompt` and `checks` that "
        "the answer must pass, such as {words_at_most: 20}",
    )
    answer_tokens: int = Field(128, ge=1, description="maximum number of tokens of an answer to an instruction")
    similarity: str | None = Field(
        None,
        description="feature extraction: `sample:similarity`, or a CSV, JSONL or Parquet file of `text`, `pair` and "
        "`score`; adds the rank correlation of cosines and scores as a metric",
    )
    index: str | None = Field(
        None,
        description="feature extraction: evaluate models as query encoders of an existing index. `baseline`: the "
        "baseline embeds the documents; or a Parquet or JSONL file of `text` and `embedding` (float, int8 or packed "
        "bits), the vectors that the index stores",
    )
    templates: tuple[str, ...] = Field(
        _TEMPLATES,
        min_length=1,
        description="zero-shot classification: templates with {} for the class name; a class embedding is the mean "
        "over templates",
    )
    prompts: int = Field(
        8,
        ge=0,
        description="number of texts that every model continues with greedy decoding, and of questions if it has a "
        "chat template; 0: none",
    )
    prompt_tokens: int = Field(32, ge=1, description="tokens of each prompt")
    tokens: int = Field(64, ge=4, description="maximum number of tokens of a continuation")

    judge: str | None = Field(
        None,
        description="text to image: image classifier (folder or Hugging Face id) that predicts the prompt's label of "
        "generated images and gives the features of the Frechet distance",
    )
    pictures: int = Field(
        8,
        ge=0,
        description="text to image: number of test prompts whose images the report shows; 0: none",
    )

    @field_validator("templates")
    @classmethod
    def _each_takes_a_name(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if any(template.count("{}") != 1 for template in value):
            raise ValueError("sentences with one {} each, where the class's name goes")
        return value

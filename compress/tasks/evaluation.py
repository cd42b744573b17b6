"""How text that a model is judged by is cut and continued, as a recipe says it."""

from __future__ import annotations

from pydantic import Field

from compress.frozen import Frozen


class Evaluation(Frozen):
    """What of the test split a language model is judged by, and what models are judged by beside the test split."""

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
        "`answer`, its place from 0 or its text",
    )
    similarity: str | None = Field(
        None,
        description="feature extraction: `sample:similarity`, or a CSV, JSONL or Parquet file of `text`, `pair` and "
        "`score`; how well cosines follow the scores is a metric of its own",
    )
    prompts: int = Field(8, ge=0, description="beginnings of windows that every model continues, greedily; 0: none")
    prompt_tokens: int = Field(32, ge=1, description="tokens of each of them")
    tokens: int = Field(64, ge=4, description="tokens of each continuation, at most")

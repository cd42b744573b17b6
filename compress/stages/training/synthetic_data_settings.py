"""How much of what a student reads its teacher writes itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from compress.formats.registry import RUNTIMES
from compress.utils.pydantic_models import Frozen

TORCH = "torch"
if TYPE_CHECKING:
    WritingRuntime = str
else:
    WritingRuntime = Literal[(TORCH, *(name for name, spec in RUNTIMES.items() if spec.many_texts))]


class TeacherWrites(Frozen):
    """Settings of text that a teacher generates for its student."""

    beginnings: int = Field(0, ge=0, description="windows of the text whose beginnings it goes on with")
    conversations: int = Field(
        0, ge=0, description="questions that it makes up, as its chat template has them, and answers"
    )
    share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="of the windows that are learned, repeated as often as it takes; the text's are the rest",
    )
    runtime: WritingRuntime = Field(
        TORCH,
        description="what it writes by; any but torch takes texts in as others end, which on processors is several "
        "times as fast",
    )

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not (self.beginnings or self.conversations):
            raise ValueError("beginnings, conversations, or both")
        return self

    def check(self, tokenizer: Any) -> None:
        """Raise `DataError` if conversations are requested and the tokenizer has no chat template for them."""
        from compress.tasks.conversations import before_question

        if self.conversations:
            before_question(tokenizer)

    def tokens(self, length: int) -> int:
        """Return the approximate number of generated tokens for sequences of a ``length``: 200 a conversation."""
        return self.beginnings * length + 200 * self.conversations


TEACHER_WRITES: Any = Field(
    None, description="language models: learn from what the teacher writes itself, in place of the text or beside it"
)


def writing_packages(settings: TeacherWrites | None) -> tuple[str, ...]:
    """Return the distributions that generate text, besides torch."""
    return () if settings is None or settings.runtime == TORCH else RUNTIMES[settings.runtime].writing_packages

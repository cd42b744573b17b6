"""How much of what a student reads its teacher writes itself."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, model_validator

from compress.frozen import Frozen


class TeacherWrites(Frozen):
    """Windows that a teacher writes for its student."""

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

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not (self.beginnings or self.conversations):
            raise ValueError("beginnings, conversations, or both")
        return self

    def check(self, tokenizer: Any) -> None:
        """Raises `DataError` where conversations are wanted, and the tokenizer does not say how they are written."""
        from compress.tasks.conversations import before_question

        if self.conversations:
            before_question(tokenizer)

    def tokens(self, length: int) -> int:
        """About how many it writes where windows have that ``length``: 200 a conversation."""
        return self.beginnings * length + 200 * self.conversations


TEACHER_WRITES: Any = Field(
    None, description="language models: learn from what the teacher writes itself, in place of the text or beside it"
)

"""Rendering of chat templates in a child process of bounded time, memory and output.

A chat template is a program of whoever made the model. The sandbox of transformers keeps it from the system, but not
from endless loops and from texts of any length. Run as a program, this module is the child process.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import select
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from compress.utils.errors import DataError
from compress.utils.read_limits import LIMITS, ReadLimitError

_WAIT_SECONDS = 60.0
_OPTIONS = ("add_generation_prompt", "continue_final_message")
_WHERE = "chat_template.jinja"


def apply_chat_template(processor: Any, messages: Sequence[Mapping[str, Any]], **options: bool) -> str:
    """Return messages in the chat template of a tokenizer or processor, as its `apply_chat_template` does.

    Args:
        processor: Tokenizer, or processor with one.
        messages: The conversation.
        **options: `add_generation_prompt` or `continue_final_message`.

    Raises:
        DataError: If the template fails, or needs too much time, memory or text.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    named = isinstance(processor.chat_template, dict) and hasattr(processor, "get_chat_template")
    template = processor.get_chat_template() if named else processor.chat_template
    request = {
        "template": template,
        "messages": [{name: value for name, value in message.items() if value is not None} for message in messages],
        "tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)},
        "options": {name: options.get(name, False) for name in _OPTIONS},
    }
    answer = _child.ask(request)
    if "error" in answer:
        raise DataError(
            f"The model's chat template refuses a conversation: {answer['error']}",
            where=_WHERE,
            hint="use the roles that the template supports, in the order that it supports",
        )
    return str(answer["text"])


class _Child:
    """Process that renders conversations one by one. It is started at the first one, and again if it has ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: dict[str, Any]) -> dict[str, str]:
        """Return the child's answer. Raises `DataError` if it does not come within the limits."""
        if self._process is None or self._process.poll() is not None:
            command = [sys.executable, "-P", "-m", "compress.models.chat_template"]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        source, sink = self._process.stdout, self._process.stdin
        assert source is not None and sink is not None, "both are pipes"
        line = b""
        with contextlib.suppress(BrokenPipeError):
            sink.write(json.dumps(request).encode() + b"\n")
            sink.flush()
            if select.select([source], [], [], _WAIT_SECONDS)[0]:
                line = source.readline()
        if not line.endswith(b"\n"):
            self.close()
            raise ReadLimitError(
                "The model's chat template does not end, or needs too much memory.",
                where=_WHERE,
                expected=f"a conversation in {LIMITS.template_seconds} s and {LIMITS.template_bytes // 1_000_000} MB",
                hint="look at the template: it may be a stranger's attempt to stop this program",
            )
        answer: dict[str, str] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


_child = _Child()
atexit.register(_child.close)


def _render(request: dict[str, Any]) -> dict[str, str]:
    """Return the text of a conversation, or the error of its template."""
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        (text,), _ = render_jinja_template(
            conversations=[request["messages"]],
            chat_template=request["template"],
            **request["options"],
            **request["tokens"],
        )
    except Exception as error:  # noqa: BLE001 - a template may raise anything
        return {"error": (str(error).strip().splitlines() or [type(error).__name__])[0][:500]}
    allowed = LIMITS.template_characters + len(json.dumps(request["messages"]))
    return {"text": text} if len(text) <= allowed else {"error": f"it writes {len(text):,} characters"}


def main() -> None:
    """Answer requests, one JSON object a line, until the parent process ends."""
    import resource
    from pathlib import Path

    from transformers.utils import chat_template_utils  # noqa: F401 - it is loaded before memory is bounded

    if (statm := Path("/proc/self/statm")).exists():
        used_bytes = int(statm.read_text().split()[0]) * resource.getpagesize()
        limit = used_bytes + LIMITS.template_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(used.ru_utime + used.ru_stime) + LIMITS.template_seconds + 1
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        sys.stdout.write(json.dumps(_render(json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

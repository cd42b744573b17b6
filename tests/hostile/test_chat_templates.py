"""Chat templates of strangers end within bounded time, memory and output, and run no code."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mergeable import train_tokenizer
from transformers import PreTrainedTokenizerFast

from compress.models import chat_template
from compress.models.chat_template import apply_chat_template
from compress.utils.errors import DataError

MESSAGES = [{"role": "user", "content": "Hi \u00e9"}, {"role": "assistant", "content": "Hello"}]
PLAIN = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ESCAPES = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ lipsum.__globals__['os'].popen('touch TRACE').read() }}",
    "init": "{{ cycler.__init__.__globals__.os.system('touch TRACE') }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os.system('touch TRACE') }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
}
FAILURES = {
    "division": "{{ 1/0 }}",
    "range": "{% for i in range(10**9) %}x{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "refusal": "{{ raise_exception('no system message') }}",
    "undefined": "{{ messages[99].x.y }}",
    "syntax": "{% if %}",
    "pop": "{{ [].pop() }}",
    "long output": "{% for i in range(2000) %}{{ 'x' * 1000 }}{% endfor %}",
    "multiplied": "{{ ('a' * 10**10)|length }}",
    "centred": "{{ 'a'|center(10**10) }}",
    "doubled": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
}
ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "power": "{{ 10**(10**8) }}",
}


def processor(template: str) -> Any:
    return SimpleNamespace(chat_template=template, special_tokens_map={"bos_token": "<s>", "eos_token": "</s>"})


def test_text_is_that_of_the_tokenizer(tmp_path: Path) -> None:
    tokenizer: PreTrainedTokenizerFast = train_tokenizer()
    tokenizer.chat_template = PLAIN
    for options in ({}, {"add_generation_prompt": True}, {"continue_final_message": True}):
        expected = tokenizer.apply_chat_template(MESSAGES, tokenize=False, **options)
        assert apply_chat_template(tokenizer, MESSAGES, **options) == expected


@pytest.mark.parametrize("template", [*ESCAPES.values(), *FAILURES.values()], ids=[*ESCAPES, *FAILURES])
def test_template_that_fails_or_asks_for_too_much_is_refused(template: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    with pytest.raises(DataError, match=r"The model's chat template (refuses a conversation|does not end)"):
        apply_chat_template(processor(template.replace("TRACE", str(trace))), MESSAGES)
    assert not trace.exists()
    # The next template is rendered as if nothing had happened.
    assert apply_chat_template(processor("{{ messages[0].content }}"), MESSAGES) == "Hi \u00e9"


@pytest.mark.parametrize("template", ENDLESS.values(), ids=ENDLESS)
def test_template_that_does_not_end_is_stopped(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "_WAIT_SECONDS", 30.0)
    began = time.process_time()
    with pytest.raises(DataError, match="does not end, or needs too much memory"):
        apply_chat_template(processor(template), MESSAGES)
    assert time.process_time() - began < 5, "the time is the child's"

"""Tests of devices that return wrong data: each benchmark ends with a result or with an error about the device."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from loopback_sshd import Server
from soak_device import _DEVICE, LyingHost, bench, lie, make_examples

from compress.plugins.devices.replies import read_reply
from compress.plugins.devices.session import open_session
from compress.utils.errors import DeviceError

Change = Callable[[dict[str, Any]], object]
LIES: dict[str, Change] = {
    "no result": lambda result: result.clear(),
    "no models": lambda result: result["timed"]["record"]["timings"]["single"]["times"].clear(),
    "another model": lambda result: _single(result)["times"].update(other=_single(result)["times"]["final"]),
    "a negative time": lambda result: _times(result).__setitem__(0, -1.0),
    "no time": lambda result: _times(result).__setitem__(0, 0.0),
    "not a number": lambda result: _times(result).__setitem__(0, float("nan")),
    "a missing time": lambda result: _times(result).pop(),
    "a time of 401 digits": lambda result: _times(result).__setitem__(0, 10**400),
    "a round without calls": lambda result: _clear_first(result),
    "no reference": lambda result: result["timed"]["record"]["reference"].clear(),
    "a missing round": lambda result: _single(result)["times"]["final"].pop(),
    "a call of no example": lambda result: _single(result)["calls"][0].__setitem__(0, 2**32),
    "no memory": lambda result: result["timed"]["record"]["figures"].clear(),
    "no versions": lambda result: result["timed"]["environment"].pop("packages"),
    "text as cores": lambda result: result["timed"]["environment"].update(cores="two"),
    "no duration": lambda result: result["timed"]["record"]["usage"].update(elapsed=0.0),
    "strange settings": lambda result: result["timed"]["record"]["settings"].update(final={"intra_op_threads": []}),
}


def _single(result: dict[str, Any]) -> dict[str, Any]:
    rounds: dict[str, Any] = result["timed"]["record"]["timings"]["single"]
    return rounds


def _clear_first(result: dict[str, Any]) -> None:
    _single(result)["calls"][0].clear()
    for times in _single(result)["times"].values():
        times[0].update(latencies_ms=[], disturbed=[])


def _times(result: dict[str, Any]) -> list[float]:
    times: list[float] = _single(result)["times"]["final"][0]["latencies_ms"]
    return times


@pytest.fixture(scope="module")
def truthful(tmp_path_factory: pytest.TempPathFactory) -> LyingHost:
    """Return a host that has measured once."""
    host = LyingHost("loop", _DEVICE, tmp_path_factory.mktemp("models"))
    bench(host.folder, host, make_examples(60))
    return host


@pytest.mark.parametrize("what", LIES)
def test_impossible_result_is_an_error_about_the_device(truthful: LyingHost, what: str) -> None:
    def change(truth: bytes) -> bytes:
        result = json.loads(truth)
        LIES[what](result)
        return json.dumps(result).encode()

    with pytest.raises(DeviceError, match=r"measured cannot be read|result\.timed"):
        bench(truthful.folder, replace(truthful, change=change), make_examples(60))


def test_changed_results_end_with_a_result_or_an_error(truthful: LyingHost) -> None:
    ends, problems = lie(truthful.folder, make_examples(60), mutations=80, seed=1)
    assert problems == []
    # Few changed results, or none, remain valid; `lie` measures an unchanged one before.
    assert ends["DeviceError"] > 20 and ends["DeviceError"] + ends["a result"] == 80


@pytest.mark.parametrize(
    "line",
    [
        b'{"offset": -1}',
        b'{"holder": "somebody"}',
        b'{"refusal": null, "done": "1"}',
        b'{"result": []}',
        b'{"parts": {"a": "b"}}',
        b'{"note": 1}',
    ],
)
def test_reply_with_a_wrong_field_is_refused(line: bytes) -> None:
    with pytest.raises(ValueError, match=r"^(offset|holder|done|result|parts\.a|note): "):
        read_reply(line)


def test_lines_of_a_login_script_are_skipped_and_escapes_are_not_shown() -> None:
    for line in (b"Welcome", b"[]", b"[" * 100_000, b"\xff"):
        assert read_reply(line) is None
    assert read_reply(b'{"note": "\\u001b[2Jgone", "more": 1}') == {"note": "?[2Jgone"}


@pytest.mark.parametrize(("printed", "reason"), [("{}", "no holder"), ('{"holder": 3}', "holder: ")])
def test_device_with_another_agent_is_an_error(server: Server, tmp_path: Path, printed: str, reason: str) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho '{printed}'\n")
    python.chmod(0o700)
    connection = server.connect(server.device(tmp_path / "cache", python=str(python)))
    with connection, pytest.raises(DeviceError, match=f"cannot be read: .*{reason}"), open_session(connection):
        pass

"""Exit codes of errors that no command expects, and of output that cannot be written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_run

from compress import cli

Main = Callable[..., tuple[int, str, str]]


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Main:
    """Return a function that runs a command whose check raises an error, and returns exit code and output."""

    def call(error: Exception, *arguments: str) -> tuple[int, str, str]:
        def fail(*_: Any, **__: Any) -> None:
            raise error

        monkeypatch.setenv("TMPDIR", str(tmp_path))
        monkeypatch.setattr("tempfile.tempdir", None)
        monkeypatch.setattr("compress.api.check", fail)
        monkeypatch.setattr(sys, "argv", ["compress", "check", "x.yaml", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert isinstance(end.value.code, int)
        return end.value.code, *capsys.readouterr()

    return call


def test_unexpected_exception_is_a_bug_with_its_own_exit_code(main: Main, tmp_path: Path) -> None:
    code, out, err = main(KeyError("secret"), "--json")
    assert code == 70
    (log,) = tmp_path.glob("compress-bug-*.log")
    text = log.read_text()
    assert "Traceback" in text and "compress check x.yaml --json" in text
    assert "This is a bug of compress, not of your input: KeyError: 'secret'" in err and str(log) in err
    assert "Traceback" not in err and json.loads(out)["error"]["type"] == "BugError"


def test_error_of_the_operating_system_is_no_bug(main: Main, tmp_path: Path) -> None:
    code, _, err = main(OSError(28, "No space left on device", "/some/file"))
    assert (code, list(tmp_path.iterdir())) == (3, [])
    assert err.splitlines()[0] == "error: The operating system refuses: No space left on device."


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("arguments", [["tasks", "--json"], ["tasks"]])
def test_output_on_a_full_disk_fails_without_a_traceback(arguments: list[str]) -> None:
    command = [sys.executable, "-P", "-m", "compress", *arguments]
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == 3 and "No space left" in ended.stderr
    assert "Traceback" not in ended.stderr and "Exception" not in ended.stderr


def test_characters_that_the_terminal_lacks_are_escaped(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "compress", "inspect", "r\u00e9sum\u00e9-\u4e2d"]
    env = os.environ | {"PYTHONIOENCODING": "latin-1"}
    ended = subprocess.run(command, capture_output=True, env=env, check=False)
    assert ended.returncode == 2 and b"\\u4e2d" in ended.stderr and b"Traceback" not in ended.stderr


def test_sigterm_ends_a_run_as_ctrl_c_does(tmp_path: Path) -> None:
    tiny_run.write_all(tmp_path)
    process = tiny_run.start_anew("run", "tiny.yaml", folder=tmp_path)
    log = tmp_path / "artifacts"
    end = time.monotonic() + 120
    while time.monotonic() < end and not any("[1/" in file.read_text() for file in log.glob("runs/*/*/run.log")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.splitlines()[-1].startswith("Interrupted. Finished stages are kept")
    assert "Traceback" not in err

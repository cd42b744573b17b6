"""A crash or an excess of a process that opens models of strangers is an error about the model."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gguf_samples import write_llama
from safetensors.numpy import save_file

from compress.benchmark.subprocess_client import WorkerProcess
from compress.cli.isolation import FETCHED_TARGETS, choose_limits
from compress.formats.runtime import Fetches, get_runtime
from compress.formats.targets import TARGETS
from compress.utils.errors import StageError
from compress.utils.isolation import NativeCrashError, call_in_copy

# The reader of `compress inspect` does something hostile in place of reading.
PROGRAM = """
import ctypes, os, pathlib, signal, socket, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # A background job of a shell ignores SIGINT, nohup SIGHUP.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from compress.sources import resolve
original = resolve.find_model
def find_model(reference, progress=None):
{attack}
    return original(reference, progress)
resolve.find_model = find_model
from compress.cli import main
main()
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_file({"w": np.zeros((4, 4), np.float32)}, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def start(model: Path, attack: str, *options: str, **variables: str) -> subprocess.Popen[str]:
    """Start `compress inspect` with a hostile reader."""
    code = PROGRAM.format(attack="\n".join(f"    {line}" for line in attack.splitlines()))
    command = [sys.executable, "-P", "-c", code, "inspect", str(model), *options]
    pipe, surroundings = subprocess.PIPE, {**os.environ, **variables}
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=surroundings, start_new_session=True)


def run(model: Path, attack: str, *options: str, **variables: str) -> tuple[int, str, str]:
    """Return exit code, standard output and standard error of a hostile reader."""
    process = start(model, attack, *options, **variables)
    stdout, stderr = process.communicate(timeout=60)
    return process.returncode, stdout, stderr


@pytest.mark.parametrize(
    ("attack", "variables", "expected"),
    [
        ("ctypes.string_at(0)", {}, "It made native code crash (SIGSEGV)."),
        ("os.abort()", {}, "It made native code crash (SIGABRT)."),
        ("import numpy; numpy.frombuffer(ctypes.string_at(0))", {}, "(SIGSEGV)."),
        ("os.kill(os.getpid(), 9)", {}, "Its process was killed, as the system does if memory is used up."),
        ("held = b'x' * 3_000_000_000", {"COMPRESS_MEMORY_LIMIT_GB": "1.5"}, "It needs more memory than"),
        ("while True: pass", {"COMPRESS_CPU_LIMIT_SECONDS": "2"}, "It needs more processor time than"),
    ],
)
def test_crash_or_excess_of_a_reader_is_an_error_about_the_model(
    model: Path, attack: str, variables: dict[str, str], expected: str
) -> None:
    code, stdout, stderr = run(model, attack, "--json", **variables)
    assert code == 2 and "Traceback" not in stderr, stderr
    assert expected in stderr and f"where:    {model}" in stderr and "hint:" in stderr
    error = json.loads(stdout)["error"]
    assert error["type"] == "ModelError" and error["where"] == str(model)
    assert all(f"set {name} to" in error["hint"] for name in variables)


def test_library_that_crashes_is_named(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "site-packages/parserlib"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("import ctypes\ndef parse():\n    ctypes.memmove(0, b'x', 1)\n")
    code, _, stderr = run(model, f"sys.path.insert(0, {str(folder.parent)!r}); import parserlib; parserlib.parse()")
    assert code == 2 and "It made parserlib crash (SIGSEGV)." in stderr


def test_gguf_file_that_makes_llama_cpp_abort_is_refused(tmp_path: Path) -> None:
    write_llama(tmp_path / "model.gguf")
    content = bytearray((tmp_path / "model.gguf").read_bytes())
    # The value is behind the key's text and type.
    position = content.index(b"llama.block_count") + len("llama.block_count") + 4
    content[position : position + 4] = (2**31).to_bytes(4, "little")
    (tmp_path / "model.gguf").write_bytes(content)
    options = ["--target", "llama-cpp", "--context", "4", "--tokens", "2", "--budget", "1"]
    command = [sys.executable, "-P", "-m", "compress", "bench", str(tmp_path), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 2 and "was killed by SIGABRT" in done.stderr, done.stderr
    assert f"where:    {tmp_path}" in done.stderr and len(done.stderr.splitlines()) < 8


def test_output_and_exit_codes_are_those_of_the_command(model: Path, tmp_path: Path) -> None:
    code, stdout, stderr = run(model, "pass", "--json", "-v")
    isolation = json.loads(stdout)["isolation"]
    assert code == 0 and isolation["memory_bytes"] > 0 and isolation["cpu_seconds"] == 61
    assert isolation["address_bytes"] == isolation["memory_bytes"] + model.stat().st_size
    assert stderr.startswith("limits of this process: ") and "61 s of processor time" in stderr
    assert run(model, "pass")[2] == ""
    assert run(model, "sys.exit(7)")[0] == 7
    code, stdout, stderr = run(tmp_path / "missing", "pass", "--json")
    assert code == 2 and json.loads(stdout)["error"]["type"] == "ModelError" and stderr.count("error:") == 1
    assert run(model, "pass", "--nonsense")[0] == 2
    code, _, stderr = run(model, "pass", COMPRESS_MEMORY_LIMIT_GB="much")
    assert code == 2 and "COMPRESS_MEMORY_LIMIT_GB is 'much'" in stderr


@pytest.fixture
def port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


CONNECT = """
try:
    socket.create_connection(("127.0.0.1", {port}), 5).close()
    print("connected")
except OSError as error:
    print("refused")
with socket.create_server(("127.0.0.1", 0)) as own:
    socket.create_connection(own.getsockname(), 5).close()
sys.exit(0)
"""


def test_network_is_blocked_but_for_the_own_loopback(model: Path, port: int) -> None:
    namespace = ["unshare", "-n" if os.geteuid() == 0 else "-Urn", "true"]
    if shutil.which("unshare") is None or subprocess.run(namespace, capture_output=True, check=False).returncode != 0:
        pytest.skip("the kernel grants no namespace")
    assert json.loads(run(model, "pass", "--json")[1])["isolation"]["network"] is False
    attack = CONNECT.format(port=port)
    assert run(model, attack)[:2] == (0, "refused\n")
    assert run(model, attack, COMPRESS_NETWORK="1")[:2] == (0, "connected\n")


UNPRIVILEGED = """
import ctypes, encodings.idna, os, socket, sys
from pathlib import Path
from compress.utils.isolation import Limits, isolate, network_is_blocked
if os.getuid() == 0:
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
    ctypes.CDLL(None).prctl(4, 1)  # dumpable, as a process that the user has started
user = os.getuid()
if len(sys.argv) > 1:
    def refuse(*_):
        raise PermissionError
    Path.write_text = refuse
isolate("a", Limits(network=False))
try:
    socket.create_connection(("127.0.0.1", {port}), 5)
    connected = True
except OSError:
    connected = False
print(os.getuid() == user, connected != network_is_blocked())
if len(sys.argv) > 1:
    assert connected, "a namespace without its rights is given up"
"""


@pytest.mark.parametrize("without_map", [[], ["without-map"]])
def test_user_without_rights_keeps_the_id_in_the_namespace(port: int, without_map: list[str]) -> None:
    command = [sys.executable, "-P", "-c", UNPRIVILEGED.format(port=port), *without_map]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "True True\n", done.stderr


WAIT = """
try:
    pathlib.Path({file!r}).write_text(str(os.getpid()))
    time.sleep(60)
finally:
    pathlib.Path({file!r} + ".cleaned").touch()
"""


def wait_for(file: Path) -> int:
    """Return the process id that a hostile reader writes once it runs."""
    for _ in range(300):
        if file.exists() and (content := file.read_text()):
            return int(content)
        time.sleep(0.1)
    raise AssertionError("the reader did not start")


def is_running(process: int) -> bool:
    """Return whether a process exists and is no zombie."""
    status = Path(f"/proc/{process}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL, signal.SIGHUP])
@pytest.mark.parametrize("to_group", [False, True])
def test_signals_reach_the_child_and_no_process_is_left(
    model: Path, tmp_path: Path, number: signal.Signals, to_group: bool
) -> None:
    file = tmp_path / "pid"
    process = start(model, WAIT.format(file=str(file)))
    child = wait_for(file)
    assert child != process.pid and is_running(child)
    (os.killpg if to_group else os.kill)(process.pid, number)
    _, stderr = process.communicate(timeout=20)
    interrupts = number in (signal.SIGINT, signal.SIGTERM)
    assert process.returncode == (130 if interrupts else -number)
    for _ in range(50):
        if not is_running(child):
            break
        time.sleep(0.1)
    assert not is_running(child)
    if interrupts:
        assert stderr.count("Interrupted") == 1 and "Traceback" not in stderr
        assert file.with_suffix(".cleaned").exists()


def test_ctrl_c_in_a_terminal_interrupts_once(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "pid"
    code = PROGRAM.format(attack="\n".join(f"    {line}" for line in WAIT.format(file=str(file)).splitlines()))
    process, terminal = pty.fork()
    if process == 0:
        os.execv(sys.executable, [sys.executable, "-P", "-c", code, "inspect", str(model)])
    wait_for(file)
    os.write(terminal, b"\x03")
    written = b""
    try:
        while part := os.read(terminal, 4096):
            written += part
    except OSError:  # the terminal has no more process
        pass
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 130
    assert written.count(b"Interrupted") == 1 and b"Traceback" not in written


def test_crash_of_a_measured_process_names_its_model(model: Path) -> None:
    crash = [sys.executable, "-c", "import ctypes, sys; sys.stdin.readline(); ctypes.string_at(0)"]
    with pytest.raises(StageError, match="was killed by SIGSEGV") as caught, WorkerProcess("artifact", crash) as worker:
        worker.open(model, TARGETS["cpu"], 1, [0], model, 20.0)
    assert caught.value.exit_code == 2 and caught.value.where == str(model)


@pytest.mark.parametrize(
    ("name", "options", "network"),
    [
        ("quickstart", {}, False),
        ("org/name", {"target": "cpu"}, False),
        ("quickstart", {"recipe": "own.yaml"}, True),
        ("quickstart", {"device": ["pi"]}, True),
        ("quickstart", {"target": "browser"}, True),
        ("sample:minilm", {}, True),
        ("s3://bucket/model", {}, True),
    ],
)
def test_command_line_decides_on_the_network(name: str, options: dict[str, object], network: bool) -> None:
    assert choose_limits([name], options, runs_models=True).network == network


def test_limits_of_reading_grow_with_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "big.safetensors").touch()
    os.truncate(tmp_path / "big.safetensors", 10**12)
    limits = choose_limits([str(tmp_path)], {}, runs_models=False)
    assert limits.cpu_seconds == 60 + 60 * 1000
    assert limits.memory_bytes is not None and limits.address_bytes == limits.memory_bytes + 10**12
    running = choose_limits([str(tmp_path)], {}, runs_models=True)
    assert running.address_bytes is None and running.cpu_seconds == 24 * 3600 * (os.cpu_count() or 1)
    monkeypatch.setenv("COMPRESS_MEMORY_LIMIT_GB", "64")
    monkeypatch.setenv("COMPRESS_CPU_LIMIT_SECONDS", "100")
    limits = choose_limits([str(tmp_path)], {}, runs_models=True)
    assert (limits.memory_bytes, limits.cpu_seconds) == (64 * 10**9, 100)


def test_targets_that_fetch_their_runtime_are_known() -> None:
    fetched = {name for name, target in TARGETS.items() if isinstance(get_runtime(target.runtime), Fetches)}
    assert fetched == set(FETCHED_TARGETS)


def test_action_in_a_copy_returns_raises_or_crashes_without_this_process() -> None:
    here = os.getpid()
    where: list[int] = call_in_copy(lambda: [os.getpid()])
    assert where != [here]
    with pytest.raises(NativeCrashError, match="SIGSEGV"):
        call_in_copy(lambda: os.kill(os.getpid(), signal.SIGSEGV))
    with pytest.raises(ZeroDivisionError):
        call_in_copy(lambda: 1 // 0)
    # More than a pipe holds at once.
    assert call_in_copy(lambda: list(range(100_000))) == list(range(100_000))

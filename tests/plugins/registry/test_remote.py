"""Tests of remote registries: interrupted and resumed transfers, damage, and a CI workflow."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from disks import mounted
from foreign_environments import S3
from loopback_sshd import find_binary, running
from onnx import helper
from onnx_graphs import onnx_model
from registry import write_run
from rotation import is_todays
from typer.testing import CliRunner

from compress.cli import app
from compress.plugins.registry import remote as remote_module
from compress.plugins.registry.contents import VersionContents
from compress.plugins.registry.promotion import PromotionRequest, promote
from compress.plugins.registry.registry import Registry
from compress.plugins.registry.remote import Remote, fetch, pull_remote, push, verify_remote
from compress.plugins.registry.upkeep import verify
from compress.utils.errors import CompressError, InputError, MissingExtraError, StorageError

pytest.importorskip("fsspec")
MODEL = "model/onnx/model.onnx"
WEIGHTS = random.Random(0).randbytes(35_000)


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """Return a registry of two versions whose models have four pieces each."""
    monkeypatch.setattr(remote_module, "PIECE_BYTES", 10_000)
    return made_registry(tmp_path)


def made_registry(folder: Path) -> Registry:
    registry = Registry(folder / "registry")
    for number in range(2):
        run = write_run(folder / f"run-{number}", WEIGHTS + bytes([number]))
        promote(registry, PromotionRequest(registry.register(run, "reviews")[0].reference))
    return registry


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"file://{tmp_path}/far"


def grow(registry: Registry, content: bytes = b"third") -> None:
    run = write_run(registry.root.parent / content[:9].decode(), content)
    registry.register(run, "reviews")


def test_pushed_registry_is_fetched_unchanged(registry: Registry, url: str, tmp_path: Path) -> None:
    sent = push(registry, Remote(url))
    assert sent.entries == 5 and sent.bytes > 70_000
    assert push(registry, Remote(url)).model_dump() == {"entries": 0, "files": sent.files, "bytes": 0}
    other = Registry(tmp_path / "other")
    assert fetch(other, Remote(url)) == sent
    assert other.log.path.read_bytes() == registry.log.path.read_bytes()
    assert verify(other) == () and verify_remote(Remote(url)) == ()
    grow(registry)
    assert push(registry, Remote(url)).entries == 1
    brought = fetch(other, Remote(url))
    # The model and the list of files; the other files are shared with earlier versions.
    assert (brought.entries, brought.files) == (1, 2)
    assert other.state().find("reviews@3") == registry.state().find("reviews@3")
    assert pull_remote(Remote(url), "reviews@champion", tmp_path / "out").number == 2
    assert (tmp_path / "out" / MODEL).read_bytes() == WEIGHTS + b"\1"
    assert sorted(path.name for path in tmp_path.glob(".out*")) == []


def copy_over(registry: Registry, url: str, folder: Path) -> Registry:
    """Push a registry and return another one that fetched it."""
    push(registry, Remote(url))
    other = Registry(folder / "other")
    fetch(other, Remote(url))
    return other


def test_diverged_registries_are_refused_and_unchanged(registry: Registry, url: str, tmp_path: Path) -> None:
    other = copy_over(registry, url, tmp_path)
    grow(registry)
    push(registry, Remote(url))
    grow(other, b"another")
    lines_before = Remote(url).lines()
    for act in (push, fetch):
        with pytest.raises(InputError, match="part after line 5"):
            act(other, Remote(url))
    assert Remote(url).lines() == lines_before and len(other.log.lines()) == 6
    with pytest.raises(InputError, match="no registry at this address"):
        fetch(other, Remote(f"{url}/elsewhere"))


def test_second_of_two_concurrent_pushes_is_refused(registry: Registry, url: str, tmp_path: Path) -> None:
    other = copy_over(registry, url, tmp_path)
    grow(registry)
    grow(other, b"another")
    far, put = Remote(url), Remote._put

    def meanwhile(path: str, content: bytes) -> None:
        if "/log/" in path:
            push(other, Remote(url))
        put(far, path, content)

    far._put = meanwhile  # type: ignore[method-assign]
    with pytest.raises(InputError, match="Somebody else is sending"):
        push(registry, far)
    assert Remote(url).lines() == other.log.lines()


def test_killed_concurrent_pushes_of_one_registry_leave_one_log(registry: Registry, url: str, tmp_path: Path) -> None:
    push(registry, Remote(url))
    present, log = registry.log.lines(), tmp_path / "far" / "log"
    for name in (b"third", b"fourth", b"fifth"):
        grow(registry, name)
    lines = registry.log.lines()
    # A sender that was killed before it looked for others, and one that is still writing its part.
    for count, size in ((1, 10_000), (3, 300)):
        new = lines[len(present) : len(present) + count]
        part = log / f"{len(present) + 1:010d}-{new[-1][:16].decode()}"
        part.write_bytes(b"\n".join([*new, b""])[:size])
    assert Remote(url).lines() == lines[: len(present) + 1]
    assert push(registry, Remote(url)).entries == 2
    assert Remote(url).lines() == lines
    part.write_bytes(b"\n".join([*lines[len(present) :], b""]))
    assert Remote(url).lines() == lines
    grow(registry, b"sixth")
    far, put = Remote(url), Remote._put

    def meanwhile(path: str, content: bytes) -> None:
        if "/log/" in path:
            push(registry, Remote(url))
        put(far, path, content)

    far._put = meanwhile  # type: ignore[method-assign]
    assert push(registry, far).entries == 1
    assert Remote(url).lines() == registry.log.lines()


@contextlib.contextmanager
def vanishing(url: str, name: str, calls: int) -> Iterator[Remote]:
    """Yield a remote that completes ``calls`` calls, truncates the next one and then refuses connections."""
    remote, left = Remote(url), calls
    true: Callable[..., Any] = getattr(remote._system, name)

    def call(path: str, *content: bytes) -> Any:
        nonlocal left
        left -= 1
        if left >= 0:
            return true(path, *content)
        if left == -1 and content:
            true(path, content[0][: len(content[0]) // 2])
        raise ConnectionResetError("Connection reset by peer")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(StorageError, match="went away"):
        patch.setattr(remote._system, name, call)
        yield remote


def test_interrupted_push_leaves_the_remote_log_unchanged(registry: Registry, url: str) -> None:
    push(registry, Remote(url))
    lines_before = Remote(url).lines()
    grow(registry, b"x" * 30_000)
    # The last trial truncates the log entry itself, since files sent earlier are not sent again.
    for calls in (0, 1, 2, 1):
        with vanishing(url, "pipe_file", calls) as remote:
            push(registry, remote)
        assert Remote(url).lines() == lines_before
        # Half a piece remains, of a file that no entry refers to.
        assert all(not fault.of for fault in verify_remote(Remote(url)))
    assert push(registry, Remote(url)).entries == 1
    assert Remote(url).lines() == registry.log.lines()
    assert verify_remote(Remote(url)) == ()


def test_resumed_push_sends_only_missing_pieces(registry: Registry, url: str) -> None:
    whole = push(registry, Remote(f"{url}-other")).bytes
    with vanishing(url, "pipe_file", 5) as remote:
        push(registry, remote)
    assert 0 < push(registry, Remote(url)).bytes < whole - 20_000


@pytest.mark.parametrize("which", ["/00001", "/log/"])
def test_what_arrived_with_other_bytes_is_sent_again(registry: Registry, url: str, which: str) -> None:
    far, put = Remote(url), Remote._put

    def garble(path: str, content: bytes) -> None:
        put(far, path, bytes(len(content)) if which in path else content)

    far._put = garble  # type: ignore[method-assign]
    with pytest.raises(StorageError, match="did not arrive as it was sent"):
        push(registry, far)
    assert Remote(url).lines() == []
    push(registry, Remote(url))
    assert verify_remote(Remote(url)) == () and Remote(url).lines() == registry.log.lines()


def test_interrupted_fetch_and_pull_are_resumed(registry: Registry, url: str, tmp_path: Path) -> None:
    whole = push(registry, Remote(url)).bytes
    other = Registry(tmp_path / "other")
    for calls in (0, 2, 5, 9):
        with vanishing(url, "cat_file", calls) as remote:
            fetch(other, remote)
        assert not other.log.path.exists() and not other.objects.names()
    assert 0 < fetch(other, Remote(url)).bytes < whole - 10_000
    assert verify(other) == ()
    with vanishing(url, "cat_file", 8) as remote:
        pull_remote(remote, "reviews@1", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    pull_remote(Remote(url), "reviews@1", tmp_path / "out")
    assert (tmp_path / "out" / MODEL).read_bytes() == WEIGHTS + b"\0"


def test_damaged_remote_file_is_named_and_not_fetched(registry: Registry, url: str, tmp_path: Path) -> None:
    push(registry, Remote(url))
    digest = registry.contents(registry.state().find("reviews@1")).files[MODEL].sha256
    piece = tmp_path / "far" / "objects" / digest / "00002"
    whole = piece.read_bytes()
    piece.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    (fault,) = verify_remote(Remote(url))
    assert (fault.path, fault.fault, fault.of) == (f"objects/{digest}", "damaged", (f"reviews@1 {MODEL}",))
    other = Registry(tmp_path / "other")
    with pytest.raises(StorageError, match="damaged at the other end"):
        fetch(other, Remote(url))
    assert not other.log.path.exists()
    piece.unlink()
    with pytest.raises(StorageError, match="damaged at the other end"):
        pull_remote(Remote(url), "reviews@1", tmp_path / "out")
    # Pieces of the right size are not checked again; missing ones are sent.
    push(registry, Remote(url))
    assert verify_remote(Remote(url)) == ()


def test_truncated_remote_log_is_read_to_its_last_complete_line(registry: Registry, url: str, tmp_path: Path) -> None:
    push(registry, Remote(url))
    (part,) = (tmp_path / "far" / "log").iterdir()
    whole = part.read_bytes()
    for cut in (0, 40, len(whole) // 2, len(whole) - 1):
        part.write_bytes(whole[:cut])
        lines = Remote(url).lines()
        assert lines == registry.log.lines()[: len(lines)] and len(lines) == whole[:cut].count(b"\n")
        push(registry, Remote(url))
        assert Remote(url).lines() == registry.log.lines()
        for other in part.parent.iterdir():
            if other != part:
                other.unlink()


def test_invalid_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no address of a remote"):
        Remote("carrier-pigeon://models")
    import fsspec

    def missing(*_: Any) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "get_filesystem_class", missing)
    with pytest.raises(MissingExtraError, match=re.escape("compress-models[remote]")):
        Remote("s3://models")


def test_file_name_outside_the_version_is_refused() -> None:
    files = {"../x": {"size_bytes": 1, "sha256": "0" * 64}}
    with pytest.raises(ValueError, match="points outside"):
        VersionContents.model_validate({"recipe": "x", "started": None, "files": files})


@pytest.mark.parametrize("url", ["data:,x", "data:text/plain,x"])
def test_address_without_folders_is_refused(registry: Registry, tmp_path: Path, url: str) -> None:
    other = Registry(tmp_path / "other")
    acts: list[Callable[[], object]] = [
        lambda: fetch(other, Remote(url)),
        lambda: push(registry, Remote(url)),
        lambda: pull_remote(Remote(url), "reviews@1", tmp_path / "out"),
        lambda: verify_remote(Remote(url)),
    ]
    for act in acts:
        with pytest.raises(InputError, match=r"no address of a remote: .* no folders") as caught:
            act()
        assert caught.value.where == url and "s3://" in str(caught.value)
    assert not other.root.exists()


def test_full_disk_is_named_by_fetch_and_pull(tmp_path: Path, url: str) -> None:
    registry = Registry(tmp_path / "registry")
    registry.register(write_run(tmp_path / "run", random.Random(1).randbytes(3_000_000)), "reviews")
    push(registry, Remote(url))
    with mounted(tmp_path / "disk", 2) as disk:
        other = Registry(disk / "other")
        acts: list[Callable[[], object]] = [
            lambda: fetch(other, Remote(url)),
            lambda: pull_remote(Remote(url), "reviews@1", disk / "out"),
        ]
        for act in acts:
            with pytest.raises(StorageError, match=r"The disk is full") as caught:
                act()
            assert str(disk) in str(caught.value) and "free space" in str(caught.value)
            assert "remote" not in str(caught.value)
            assert not other.log.path.exists() and not other.objects.names() and not (disk / "out").exists()
            # Only what can be resumed remains.
            for path in (other.root, disk / ".out.part"):
                shutil.rmtree(path, ignore_errors=True)
            assert not list(disk.iterdir())


@pytest.fixture
def sftp(tmp_path: Path) -> Iterator[tuple[str, Any]]:
    """Start a real SSH server on this machine and yield an SFTP address on it, and the server."""
    pytest.importorskip("sshfs")
    from fsspec.config import conf

    binary = find_binary()
    if binary is None:
        pytest.skip("no sshd here")
    folder = tmp_path / "sshd"
    folder.mkdir()
    with running(binary, folder) as server:
        known = folder / "known_hosts"
        known.write_text(server.scan())
        given = {"client_keys": [str(folder / "client")], "known_hosts": str(known), "agent_path": None}
        device = server.device(tmp_path)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(conf, "sftp", given)
            yield f"sftp://{device.user}@127.0.0.1:{server.port}{tmp_path}/far", server


def test_sftp_push_resumes_after_a_lost_connection(registry: Registry, sftp: tuple[str, Any], tmp_path: Path) -> None:
    url, server = sftp
    remote, sent = Remote(url), 0
    put = remote._put

    def dropping(path: str, content: bytes) -> None:
        nonlocal sent
        sent += 1
        if sent == 5:
            assert server.drop_connections()
        put(path, content)

    remote._put = dropping  # type: ignore[method-assign]
    with pytest.raises(StorageError, match="went away"):
        push(registry, remote)
    type(remote._system).clear_instance_cache()
    assert Remote(url).lines() == []
    push(registry, Remote(url))
    assert verify_remote(Remote(url)) == ()
    other = Registry(tmp_path / "other")
    fetch(other, Remote(url))
    assert verify(other) == () and other.log.path.read_bytes() == registry.log.path.read_bytes()


def test_unknown_sftp_host_key_is_refused(
    sftp: tuple[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.config import conf

    url, server = sftp
    known = tmp_path / ".ssh" / "known_hosts"
    known.parent.mkdir()
    known.write_text("")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delitem(conf["sftp"], "known_hosts")
    with pytest.raises(StorageError, match=r"[Hh]ost key"):
        Remote(url)
    known.write_text(server.scan())
    assert Remote(url).lines() == []


@pytest.mark.slow
@pytest.mark.skipif(not is_todays("s3"), reason="a real S3 server is begun every fourth day")
def test_s3_copy_behind_a_faulty_proxy_is_complete() -> None:
    findings = json.loads(S3.run(Path(__file__).parents[3] / "benchmarks" / "soak_s3.py", "--faults", "15"))
    assert findings["problems"] == [] and findings["versions"] > 0


ROOT = Path(__file__).parents[3]
WORKFLOW: dict[str, Any] = yaml.safe_load((ROOT / "docs" / "ci" / "weights.yml").read_text())
STEPS: list[dict[str, Any]] = WORKFLOW["jobs"]["weights"]["steps"]
COMPRESS = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as asked, asked.makefile("rw") as lines:
    asked.connect({address!r})
    print(json.dumps([os.getcwd(), sys.argv[1:]]), file=lines, flush=True)
    code, out, err = json.loads(lines.readline())
sys.stdout.write(out), sys.stderr.write(err)
sys.exit(code)
"""


def weights(text: str) -> bytes:
    """Return an ONNX file whose single weight matrix [1, 8] encodes a text."""
    matrix = np.frombuffer(text.ljust(8).encode(), np.uint8).astype(np.float32)[None]
    nodes = [helper.make_node("MatMul", ["x", "matrix"], ["y"])]
    return onnx_model(nodes, {"x": [1, 1]}, {"y": [1, 8]}, {"matrix": matrix}, opset=17).SerializeToString()


def answer(folder: Path, arguments: list[str]) -> tuple[int, str, str]:
    """Return the exit code, standard output and error of a command; `run` only writes the folder of a run."""
    with contextlib.chdir(folder):
        if arguments[0] == "run":
            recipe = yaml.safe_load(Path(arguments[1]).read_text())
            runs = Path("artifacts/runs") / recipe["name"]
            write_run(runs / "latest", weights(recipe["weights"]), recipe["accuracy"])
            return 0, "", ""
        done = CliRunner().invoke(app, arguments)
    failed = done.exception if isinstance(done.exception, CompressError) else None
    return (failed.exit_code, done.stdout, str(failed)) if failed else (done.exit_code, done.stdout, done.stderr)


GH = '#!/bin/sh\n[ "$1 $2 $4" = "pr comment --body-file" ] && cp "$5" "$COMMENTS/$3.md"\n'


def git(folder: Path, *arguments: str) -> str:
    names = {f"GIT_{role}_{part}": "ada@example.org" for role in ("AUTHOR", "COMMITTER") for part in ("NAME", "EMAIL")}
    environment = {**os.environ, **names, "GIT_CONFIG_GLOBAL": "/dev/null"}
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, env=environment, check=True)
    return done.stdout.strip()


class Ci:
    """A bare Git repository, and runners that check it out as GitHub's do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.origin, self.work, self.programs = (folder / name for name in ("origin.git", "work", "bin"))
        self.far, self.comments = folder / "far", folder / "comments"
        for folder_path in (self.programs, self.comments):
            folder_path.mkdir()
        self.socket = socket.socket(socket.AF_UNIX)
        address = str(folder / "socket")
        self.socket.bind(address)
        self.socket.listen()
        threading.Thread(target=self._answer, daemon=True).start()
        for name, text in (("compress", COMPRESS.format(python=sys.executable, address=address)), ("gh", GH)):
            (self.programs / name).write_text(text)
            (self.programs / name).chmod(0o755)
        git(folder, "init", "-q", "--bare", "-b", "main", "origin.git")
        git(folder, "clone", "-q", "origin.git", "work")
        git(self.work, "commit", "-q", "--allow-empty", "-m", "The beginning")
        git(self.work, "push", "-q", "origin", "HEAD:main")

    def _answer(self) -> None:
        """Serve the commands of the runners' program `compress`, one at a time."""
        while True:
            try:
                asked, _ = self.socket.accept()
            except OSError:
                return
            with asked, asked.makefile("rw") as lines:
                sent_path, arguments = json.loads(lines.readline())
                print(json.dumps(answer(Path(sent_path), arguments)), file=lines, flush=True)

    def change(self, branch: str, **recipe: Any) -> str:
        """Commit a changed recipe on a branch and return the commit before it."""
        git(self.work, "switch", "-q", "-C", branch, "origin/main")
        commit_before = git(self.work, "rev-parse", "HEAD")
        recipe_file = self.work / "recipes" / "reviews.yaml"
        recipe_file.parent.mkdir(exist_ok=True)
        recipe_file.write_text(yaml.safe_dump({"name": "reviews", **recipe}))
        git(self.work, "add", ".")
        git(self.work, "commit", "-q", "-m", f"Reviews: {recipe['weights']}")
        git(self.work, "push", "-q", "-f", "origin", branch)
        return commit_before

    def merge(self, branch: str) -> None:
        git(self.work, "push", "-q", "origin", f"{branch}:main")
        git(self.work, "fetch", "-q")

    def run(self, event: str, branch: str, base: str, number: int = 0) -> dict[str, int]:
        """Run the workflow's shell steps in a fresh clone, and return the exit code of each executed step by name."""
        runner = self.folder / f"runner-{len(list(self.folder.glob('runner-*')))}"
        git(self.folder, "clone", "-q", "-b", branch, "origin.git", runner.name)
        variables = {"REGISTRY": f"file://{self.far}", "BASE": base, "PULL_REQUEST": str(number)}
        environment = {**os.environ, **variables, "COMMENTS": str(self.comments)}
        environment |= {"PATH": f"{self.programs}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        codes: dict[str, int] = {}
        for step in STEPS:
            if "run" not in step or step["run"].startswith("pip install"):
                continue
            always, condition = "always()" in step.get("if", ""), step.get("if", event)
            if event not in condition or (any(codes.values()) and not always):
                continue
            done = subprocess.run(["bash", "-e", "-c", step["run"]], cwd=runner, env=environment, capture_output=True)
            codes[step["name"]] = done.returncode
            assert done.returncode in (0, 1), done.stderr.decode()
        return codes

    def champion(self) -> bytes:
        """Pull the champion and return its weights."""
        served_folder = self.folder / f"served-{len(list(self.folder.glob('served-*')))}"
        pull_remote(Remote(f"file://{self.far}"), "reviews@champion", served_folder)
        return (served_folder / "model" / "onnx" / "model.onnx").read_bytes()


@pytest.fixture
def ci(tmp_path: Path) -> Iterator[Ci]:
    pytest.importorskip("fsspec")
    service = Ci(tmp_path)
    yield service
    service.socket.close()


def test_workflow_promotes_good_changes_and_refuses_bad_ones(ci: Ci) -> None:
    base = ci.change("first", weights="first", accuracy=0.8)
    assert set(ci.run("pull_request", "first", base, 1).values()) == {0}
    assert "Nothing of this name is in use yet." in (ci.comments / "1.md").read_text()
    assert not ci.far.exists()
    ci.merge("first")
    assert ci.run("push", "main", base)["promote what was merged"] == 0
    assert ci.champion() == weights("first")

    base = ci.change("worse", weights="worse", accuracy=0.5)
    codes = ci.run("pull_request", "worse", base, 2)
    assert (codes["compare with what is in use"], codes["say so on the pull request"]) == (1, 0)
    comment = (ci.comments / "2.md").read_text()
    assert "## recipes/reviews.yaml" in comment and "80.00%" in comment and "50.00%" in comment
    assert "matrix" in comment.split("```text")[1], "which weights moved"
    # The change is merged despite the failed check.
    ci.merge("worse")
    assert ci.run("push", "main", base)["promote what was merged"] == 1
    assert ci.champion() == weights("first")

"""Signed logs: only what a named key signed, and nothing older than what was seen, is fetched, pulled or added to."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from registry import write_run
from ssh_keys import new_key
from typer.testing import CliRunner

from compress.cli import app
from compress.plugins.registry.log import LOG, LogHead, LogReader, line_check, split_signature
from compress.plugins.registry.promotion import PromotionRequest, promote
from compress.plugins.registry.registry import Registry
from compress.plugins.registry.remote import Remote, fetch, pull_remote, push, verify_remote
from compress.plugins.registry.state import Registered
from compress.plugins.registry.upkeep import collect, verify
from compress.utils.errors import CompressError, InputError, UntrustedError
from compress.utils.ssh_signatures import sign

pytest.importorskip("fsspec")
FORGED = {"kind": "retired", "name": "m", "version": 1, "at": "2026-01-01T00:00:00+00:00", "who": "a", "why": ""}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("keys")
    return {name: new_key(folder / name) for name in ("ada", "bob", "eve")}


def public(key: Path) -> Path:
    return key.with_suffix(".pub")


class Signed:
    """A registry that Ada signs, its remote, and another registry that trusts only Ada and has fetched it."""

    def __init__(self, folder: Path, keys: dict[str, Path]) -> None:
        self.folder, self.keys, self.url = folder, keys, f"file://{folder}/far"
        self.far = folder / "far" / "log"
        self.runs = 0
        self.origin = Registry(folder / "origin", key=keys["ada"])
        self.add()
        push(self.origin, Remote(self.url))
        self.copy = Registry(folder / "copy")
        self.copy.trust.name(public(keys["ada"]), None)
        fetch(self.copy, Remote(self.url))

    def run(self) -> Path:
        self.runs += 1
        return write_run(self.folder / f"run-{self.runs}", b"weights %d" % self.runs)

    def add(self, registry: Registry | None = None) -> None:
        """Register and promote a version."""
        target = registry or self.origin
        version, _ = target.register(self.run(), "m")
        promote(target, PromotionRequest(version.reference))

    def lines(self) -> list[bytes]:
        return Remote(self.url).lines()

    def serve(self, lines: list[bytes]) -> None:
        """Let the remote have other lines."""
        shutil.rmtree(self.far)
        self.far.mkdir()
        (self.far / f"0000000001-{lines[-1][:16].decode()}").write_bytes(b"".join(line + b"\n" for line in lines))

    def refused(self, message: str) -> None:
        """Check that the copy takes nothing from the remote, by any command."""
        before = self.copy.log.path.read_bytes()
        objects = self.copy.objects.names()
        with pytest.raises(UntrustedError, match=message):
            fetch(self.copy, Remote(self.url))
        with pytest.raises(UntrustedError, match=message):
            pull_remote(Remote(self.url), "m@1", self.folder / "out", trust=self.copy.trust)
        faults = [fault for fault in verify_remote(Remote(self.url), trust=self.copy.trust) if fault.path == LOG]
        assert [fault.fault for fault in faults] == ["untrusted"]
        assert not (self.folder / "out").exists() and self.copy.objects.names() == objects
        assert self.copy.log.path.read_bytes() == before and Registry(self.copy.root).state().find("m@1")


@pytest.fixture
def signed(tmp_path: Path, keys: dict[str, Path]) -> Signed:
    return Signed(tmp_path, keys)


def chained(bodies: list[bytes]) -> list[bytes]:
    """Return the lines of a log with valid checks."""
    lines, check = [], b""
    for body in bodies:
        check = line_check(check, body)
        lines.append(check + b" " + body)
    return lines


def test_signed_registry_is_fetched_pulled_and_verified(signed: Signed, tmp_path: Path) -> None:
    assert signed.copy.log.path.read_bytes() == signed.origin.log.path.read_bytes()
    assert all(split_signature(line[65:])[1] for line in signed.origin.log.lines())
    signed.add()
    push(signed.origin, Remote(signed.url))
    assert verify_remote(Remote(signed.url), trust=signed.copy.trust) == ()
    assert pull_remote(Remote(signed.url), "m@champion", tmp_path / "out", trust=signed.copy.trust).number == 2
    assert fetch(signed.copy, Remote(signed.url)).entries == 2
    assert verify(signed.copy) == verify(signed.origin) == ()
    assert signed.copy.pull("m@champion", tmp_path / "local").number == 2
    # A signature covers the number of its line and the check that the line has without the signature.
    lines = signed.origin.log.lines()
    entry, signature = split_signature(lines[2][65:])
    text = b"compress registry, line 3: " + line_check(lines[1][:64], entry) + b"\n"
    head = LogReader("").apply(lines[:3]).head
    assert (head.signed_text, head.signature) == (text, signature)
    allowed = tmp_path / "allowed_signers"
    allowed.write_text(f"ada@example.org {public(signed.keys['ada']).read_text()}")
    (tmp_path / "sig").write_text(f"-----BEGIN SSH SIGNATURE-----\n{signature.decode()}\n-----END SSH SIGNATURE-----\n")
    command = ["ssh-keygen", "-Y", "verify", "-f", allowed, "-I", "ada@example.org", "-n", "compress-registry"]
    subprocess.run([*map(str, command), "-s", str(tmp_path / "sig")], input=text, check=True, capture_output=True)


def with_forged_line(signed: Signed) -> list[bytes]:
    return chained([line[65:] for line in signed.lines()] + [json.dumps(FORGED).encode()])


def with_rewritten_history(signed: Signed) -> list[bytes]:
    bodies = [split_signature(line[65:])[0].replace(b'"note":""', b'"note":"x"') for line in signed.lines()]
    return chained(bodies)


def with_line_by_another_key(signed: Signed) -> list[bytes]:
    other = Registry(signed.folder / "eve", key=signed.keys["eve"])
    shutil.copytree(signed.origin.root, other.root)
    other.sign()
    return other.log.lines()


def with_signature_of_another_line(signed: Signed) -> list[bytes]:
    bodies = [line[65:] for line in signed.lines()]
    return chained([*bodies, json.dumps(FORGED).encode() + b" " + split_signature(bodies[-1])[1]])


def with_signatures_of_the_rewritten_lines(signed: Signed) -> list[bytes]:
    return chained([line[65:].replace(b'"note":""', b'"note":"x"') for line in signed.lines()])


def with_signature_for_another_kind_of_file(signed: Signed) -> list[bytes]:
    lines = signed.lines()
    entry = json.dumps(FORGED).encode()
    text = LogHead(len(lines) + 1, lines[-1][:64], b" " * 65 + entry).signed_text
    signature = sign(text, signed.keys["ada"], "compress-provenance")
    return chained([line[65:] for line in lines] + [entry + b" " + signature])


def with_another_registry(signed: Signed) -> list[bytes]:
    other = Registry(signed.folder / "other", key=signed.keys["ada"])
    for _ in range(3):
        signed.add(other)
    return other.log.lines()


def with_older_lines(signed: Signed) -> list[bytes]:
    return signed.lines()[:2]


ATTACKS: dict[str, tuple[Callable[[Signed], list[bytes]], str]] = {
    "a line is added": (with_forged_line, "Line 4 of the log, its last, is not signed"),
    "the history is rewritten without signatures": (with_rewritten_history, "its last, is not signed"),
    "the history is rewritten and keeps its signatures": (
        with_signatures_of_the_rewritten_lines,
        "The signature does not fit line 3 of the log",
    ),
    "a line has the signature of another": (with_signature_of_another_line, "does not fit line 4 of the log"),
    "a signature for another kind of file": (
        with_signature_for_another_kind_of_file,
        "does not fit line 4 of the log",
    ),
    "another key signs": (with_line_by_another_key, "Another key signed line 4 of the log"),
    "an older log that was signed": (with_older_lines, "has 2 lines, although 3 were seen there before"),
    "another registry of the same key": (with_another_registry, "The first 3 lines of the log are not those"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_lying_remote_is_refused(signed: Signed, attack: str) -> None:
    make, message = ATTACKS[attack]
    signed.serve(make(signed))
    signed.refused(message)


def test_machine_without_a_registry_remembers_what_it_pulled(signed: Signed, tmp_path: Path) -> None:
    server = Registry(tmp_path / "server")
    server.trust.name(public(signed.keys["ada"]), None)
    before = signed.lines()
    signed.add()
    push(signed.origin, Remote(signed.url))
    pull_remote(Remote(signed.url), "m@champion", tmp_path / "out", trust=server.trust)
    signed.serve(before)
    with pytest.raises(UntrustedError, match="has 3 lines, although 5 were seen"):
        pull_remote(Remote(signed.url), "m@champion", tmp_path / "out", replace=True, trust=server.trust)
    (server.root / "trust" / "seen").write_text("many\n")
    with pytest.raises(InputError, match="record of what the remote had is damaged"):
        pull_remote(Remote(signed.url), "m@champion", tmp_path / "out", replace=True, trust=server.trust)
    (server.root / "trust" / "signers").unlink()
    with pytest.raises(InputError, match="The keys that may sign this registry are gone"):
        pull_remote(Remote(signed.url), "m@champion", tmp_path / "out", replace=True, trust=server.trust)


def test_remote_cannot_replace_the_list_of_files_after_it_was_checked(signed: Signed, tmp_path: Path) -> None:
    record = signed.origin.state().find("m@1").record
    true_list = signed.origin.objects.read(record)
    sums = re.findall(rb'"([0-9a-f]{64})"', true_list)
    reads = 0

    def read(path: str) -> bytes:
        nonlocal reads
        reads += record in path
        content = Path(path).read_bytes()
        # Two files change places once the list was read and found to be right.
        places = {sums[0]: sums[1], sums[1]: sums[0]}
        lie = re.sub(rb"[0-9a-f]{64}", lambda match: places.get(match[0], match[0]), content)
        return lie if record in path and reads > 1 else content

    remote = Remote(signed.url)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(InputError, match="the list of its files is damaged"):
        patch.setattr(remote._system, "cat_file", read)
        pull_remote(remote, "m@1", tmp_path / "out", trust=signed.copy.trust)
    assert not (tmp_path / "out").exists() and reads > 1


def test_push_remembers_what_the_remote_has(signed: Signed, tmp_path: Path) -> None:
    before = signed.lines()
    signed.origin.trust.name(public(signed.keys["ada"]), None)
    signed.add()
    push(signed.origin, Remote(signed.url))
    # Another process that has read an older log does not make it the one to expect.
    signed.origin.trust.remember(before)
    signed.serve(before)
    with pytest.raises(UntrustedError, match="has 3 lines, although 5 were seen"):
        pull_remote(Remote(signed.url), "m@1", tmp_path / "out", trust=signed.origin.trust)
    # A registry that has all lines brings the remote forward again.
    assert push(signed.origin, Remote(signed.url)).entries == 2
    assert pull_remote(Remote(signed.url), "m@1", tmp_path / "out", trust=signed.origin.trust).number == 1


def test_log_of_a_revoked_key_is_refused_until_another_key_signs(signed: Signed, tmp_path: Path) -> None:
    ada, bob = signed.keys["ada"], signed.keys["bob"]
    both = tmp_path / "allowed_signers"
    both.write_text("".join(f"team,{key.parent.name}@example.org {public(key).read_text()}" for key in (ada, bob)))
    shown = subprocess.run(["ssh-keygen", "-lf", str(public(ada))], capture_output=True, text=True, check=True).stdout
    by_fingerprint, by_list = tmp_path / "fingerprints", tmp_path / "list"
    by_fingerprint.write_text(f"hash: {shown.split()[1]}\n")
    subprocess.run(["ssh-keygen", "-q", "-k", "-f", str(by_list), str(public(ada))], check=True)
    for revoked in (public(ada), by_fingerprint, by_list):
        signed.copy.trust.name(both, None)
        shutil.rmtree(signed.copy.root / "trust")
        signed.copy.trust.name(both, revoked)
        signed.refused("A revoked key signed line 3 of the log, SHA256:")
    # Naming the signers again does not forget the revoked keys.
    signed.copy.trust.name(both, None)
    signed.refused("A revoked key signed")
    with pytest.raises(UntrustedError, match="A revoked key signed"):
        signed.copy.pull("m@1", tmp_path / "out")
    assert [(fault.path, fault.fault) for fault in verify(signed.copy)] == [(LOG, "untrusted")]
    # The revoked key can sign nothing new, and another one must look at the history first.
    for key, message in ((ada, "A revoked key signed a trial of your key"), (bob, "A revoked key signed line 3")):
        with pytest.raises(UntrustedError, match=message):
            signed.add(Registry(signed.copy.root, key=key))
    heir = Registry(signed.copy.root, key=bob)
    assert heir.sign("Ada's laptop was stolen; all of this is right") and not heir.sign()
    signed.add(heir)
    push(heir, Remote(signed.url))
    assert fetch(signed.copy, Remote(signed.url)).entries == 0
    assert pull_remote(Remote(signed.url), "m@champion", tmp_path / "out", trust=signed.copy.trust).number == 2
    with pytest.raises(InputError, match="list of revoked keys cannot be used"):
        signed.copy.trust.name(both, write_run(tmp_path / "x", b"x") / "report.json")


def test_signed_log_is_not_continued_without_a_signature_that_counts(signed: Signed) -> None:
    def actions(registry: Registry) -> list[Callable[[], object]]:
        return [
            lambda: registry.register(signed.run(), "m"),
            lambda: registry.retire("m@1"),
            lambda: collect(registry, signed.folder / "none", dry_run=False),
        ]

    signed.add()
    before, objects = signed.origin.log.path.read_bytes(), signed.origin.objects.names()
    for act in actions(Registry(signed.origin.root)):
        with pytest.raises(InputError, match="is signed, and a new entry would not be"):
            act()
    for act in actions(Registry(signed.origin.root, key=signed.keys["eve"])):
        with pytest.raises(UntrustedError, match="Another key signed the last line"):
            act()
    for act in actions(Registry(signed.copy.root, key=signed.keys["eve"])):
        with pytest.raises(UntrustedError, match="Another key signed a trial of your key"):
            act()
    assert (signed.origin.log.path.read_bytes(), signed.origin.objects.names()) == (before, objects)


def test_signature_does_not_cover_what_the_signer_has_not_seen(signed: Signed, tmp_path: Path) -> None:
    # Someone who can write to the folder adds an entry; the next signature would make it right.
    lines = with_forged_line(signed)
    signed.origin.log.path.write_bytes(b"".join(line + b"\n" for line in lines))
    with pytest.raises(InputError, match="The 4 lines of the log are not signed"):
        signed.add(Registry(signed.origin.root, key=signed.keys["ada"]))
    with pytest.raises(UntrustedError, match="is not signed"):
        trusting = Registry(signed.origin.root)
        trusting.trust.name(public(signed.keys["ada"]), None)
        push(trusting, Remote(f"file://{tmp_path}/elsewhere"))
    assert not (tmp_path / "elsewhere").exists()


def test_unsigned_registry_is_signed_once_it_was_looked_at(tmp_path: Path, keys: dict[str, Path]) -> None:
    root = tmp_path / "registry"
    Registry(root).register(write_run(tmp_path / "run", b"weights"), "m")
    assert not LogReader("").apply(Registry(root).log.lines()).head.signature
    opened = Registry(root, key=keys["ada"])
    with pytest.raises(InputError, match="The 2 lines of the log are not signed"):
        opened.retire("m@1")
    assert opened.sign("looked at") and not opened.sign()
    opened.retire("m@1")
    assert [entry.kind for entry in opened.state().entries] == ["began", "registered", "signed", "retired"]
    assert opened.state().entries_of("m")[-1].kind == "retired"


PASSPHRASE = "a passphrase of the tests"


@pytest.fixture
def locked_key(tmp_path: Path) -> Path:
    return new_key(tmp_path / "locked", PASSPHRASE)


def test_key_with_a_passphrase_is_an_error_and_no_question(tmp_path: Path, locked_key: Path) -> None:
    run = write_run(tmp_path / "run", b"weights")
    asking = tmp_path / "asking"
    asking.write_text(f"#!/bin/sh\ntouch {tmp_path}/asked\necho {PASSPHRASE}\n")
    asking.chmod(0o755)
    environment = {**os.environ, "DISPLAY": ":0", "SSH_ASKPASS": str(asking), "SSH_AUTH_SOCK": ""}
    command = [sys.executable, "-m", "compress", "registry", "register", str(run), "--name", "m", "--registry", "r"]
    command += ["--sign", str(locked_key)]
    # `script` gives the command a terminal, at which ssh-keygen would ask and wait.
    if shutil.which("script") is not None:
        command = ["script", "-qec", shlex.join(command), "/dev/null"]
    began = time.monotonic()
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, stdin=subprocess.PIPE, capture_output=True, text=True, check=False
    )
    assert "The key has a passphrase, and ssh-agent does not hold it" in done.stdout + done.stderr
    assert f"ssh-add {locked_key}" in done.stdout + done.stderr
    assert done.returncode == 2 and time.monotonic() - began < 30 and not (tmp_path / "asked").exists()
    assert not (tmp_path / "r" / LOG).exists() and not (tmp_path / "r" / "objects").exists()


@pytest.fixture
def agent(tmp_path: Path, locked_key: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run an agent that holds the key with the passphrase."""
    address = tmp_path / "agent"
    with subprocess.Popen(["ssh-agent", "-D", "-a", str(address)], stdout=subprocess.DEVNULL) as process:
        monkeypatch.setenv("SSH_AUTH_SOCK", str(address))
        asking = tmp_path / "asking"
        asking.write_text(f"#!/bin/sh\necho {PASSPHRASE}\n")
        asking.chmod(0o755)
        while not address.exists():
            time.sleep(0.01)
        environment = {**os.environ, "SSH_ASKPASS": str(asking), "SSH_ASKPASS_REQUIRE": "force"}
        subprocess.run(["ssh-add", "-q", str(locked_key)], env=environment, check=True, stdin=subprocess.DEVNULL)
        yield
        process.terminate()


def test_agent_signs_for_a_key_with_a_passphrase(tmp_path: Path, locked_key: Path, agent: None) -> None:
    for name, key in (("a", locked_key), ("b", public(locked_key))):
        opened = Registry(tmp_path / name, key=key)
        opened.trust.name(public(locked_key), None)
        opened.register(write_run(tmp_path / f"run-{name}", b"weights"), "m")
        assert opened.signer() is not None


def test_missing_ssh_keygen_stops_what_needs_it(
    signed: Signed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without named keys, nothing is checked, and reading needs no ssh-keygen.
    unpinned = Registry(tmp_path / "unpinned")
    monkeypatch.setenv("PATH", str(tmp_path))
    fetch(unpinned, Remote(signed.url))
    unpinned.pull("m@1", tmp_path / "out")
    before = signed.copy.log.path.read_bytes()
    fresh = Registry(tmp_path / "fresh", key=signed.keys["ada"])
    acts: list[Callable[[], object]] = [
        lambda: fetch(signed.copy, Remote(signed.url)),
        lambda: signed.copy.pull("m@1", tmp_path / "other"),
        lambda: fresh.register(signed.run(), "m"),
    ]
    for act in acts:
        with pytest.raises(InputError, match="Signatures need ssh-keygen, which is not on PATH"):
            act()
    assert signed.copy.log.path.read_bytes() == before
    assert not fresh.log.path.exists() and not fresh.objects.names() and not (tmp_path / "other").exists()


def _register(root: Path, runs: list[Path], key: Path) -> None:
    registry = Registry(root, key=key)
    for run in runs:
        registry.register(run, "reviews")


def test_killed_and_concurrent_writers_leave_signed_lines_only(tmp_path: Path, keys: dict[str, Path]) -> None:
    root, context, chance = tmp_path / "registry", multiprocessing.get_context("fork"), random.Random(0)
    runs = [[write_run(tmp_path / f"{writer}-{n}", b"%d %d" % (writer, n)) for n in range(7)] for writer in range(2)]
    killed = 0
    for attempt in range(4):
        writers = [context.Process(target=_register, args=(root, each, keys["ada"])) for each in runs]
        for writer in writers:
            writer.start()
        for writer in writers if attempt < 3 else ():
            time.sleep(chance.uniform(0.05, 0.3))
            writer.kill()
        for writer in writers:
            writer.join()
            killed += writer.exitcode == -signal.SIGKILL
    assert killed and [writer.exitcode for writer in writers] == [0, 0]
    opened = Registry(root)
    opened.trust.name(public(keys["ada"]), None)
    reader = LogReader("")
    for line in opened.log.lines():
        assert opened.trust.signer(reader.apply([line]).head, "") is not None
    registered = [entry.record for entry in opened.state().entries if isinstance(entry, Registered)]
    assert len(registered) == len(set(registered)) == 14
    assert not [fault for fault in verify(opened) if fault.fault != "surplus"]


def test_line_that_was_cut_short_is_removed_with_its_signature(signed: Signed) -> None:
    whole = signed.copy.log.path.read_bytes()
    start = whole.rindex(b"\n", 0, -1) + 1
    writer = Registry(signed.copy.root, key=signed.keys["ada"])
    for cut in (start + 30, start + 100, whole.rindex(b" "), len(whole) - 20, len(whole) - 1):
        signed.copy.log.path.write_bytes(whole[:cut])
        assert len(Registry(signed.copy.root).state().entries) == 2
        writer.retire("m@1")
        assert Registry(signed.copy.root).signer() is not None


def test_writer_killed_while_it_signs_leaves_the_registry_as_it_was(signed: Signed, tmp_path: Path) -> None:
    # The program stands for ssh-keygen, and kills the writer when the new line is signed after a trial of the key.
    program = shutil.which("ssh-keygen")
    fake = tmp_path / "bin" / "ssh-keygen"
    fake.parent.mkdir()
    fake.write_text(
        f'#!/bin/sh\ncase "$*" in *sign*-f*) [ -e {tmp_path}/tried ] && kill -9 $PPID; touch {tmp_path}/tried;; esac\n'
        f'exec {program} "$@"\n'
    )
    fake.chmod(0o755)
    before = signed.origin.log.path.read_bytes()
    run = signed.run()
    child = os.fork()
    if not child:
        try:
            os.environ["PATH"] = f"{fake.parent}{os.pathsep}{os.environ['PATH']}"
            Registry(signed.origin.root, key=signed.keys["ada"]).register(run, "m")
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL and signed.origin.log.path.read_bytes() == before
    signed.add(Registry(signed.origin.root, key=signed.keys["ada"]))
    push(signed.origin, Remote(signed.url))
    assert fetch(signed.copy, Remote(signed.url)).entries == 2


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"kind": "upgraded", "version": 2}, "The registry is of version 2, since line 4 of its log, which is newer"),
        ({"kind": "archived", "name": "m", "version": 1}, "Line 4 .* of the kind 'archived'. Version 1 has no such"),
        ({"kind": "upgraded", "version": 10**400}, "newer than this compress reads|no such"),
    ],
)
def test_entries_of_a_newer_version_name_both_versions(signed: Signed, entry: dict[str, Any], message: str) -> None:
    body = json.dumps({"at": "2030-01-01T00:00:00+00:00", "who": "a later one", **entry}).encode()
    lines = chained([line[65:] for line in signed.lines()] + [body])
    signed.serve(lines)
    unpinned = Registry(signed.folder / "unpinned")
    signed.origin.log.path.write_bytes(b"".join(line + b"\n" for line in lines))
    acts: list[Callable[[], object]] = [
        lambda: fetch(unpinned, Remote(signed.url)),
        lambda: verify_remote(Remote(signed.url)),
        lambda: verify(Registry(signed.origin.root)),
        lambda: Registry(signed.origin.root, key=signed.keys["ada"]).retire("m@1"),
    ]
    for act in acts:
        with pytest.raises(InputError, match=message) as caught:
            act()
        assert caught.value.expected == "a registry of version 1" and "pip install --upgrade" in str(caught.value)
    assert not unpinned.log.path.exists()
    # Whoever trusts keys does not read what nobody signed.
    signed.refused("Line 4 of the log, its last, is not signed")


def test_bytes_that_are_no_signature_damage_the_line(signed: Signed) -> None:
    lines = signed.lines()
    for junk in (b" x", b" U1NIU0lH!", b" U1NIU0lHAAAA U1NIU0lHAAAA", b"\x00"):
        entry = split_signature(lines[1][65:])[0]
        with pytest.raises(InputError, match="Line 2 of the registry's log is damaged"):
            LogReader("").apply(chained([lines[0][65:], entry + junk]))
    # What has the form of a signature and is none fits nothing.
    reader = LogReader("").apply(chained([lines[0][65:], entry + b" U1NIU0lHAAAA"]))
    with pytest.raises(UntrustedError, match="The signature was changed"):
        signed.copy.trust.signer(reader.head, "")
    # Bits that base64 does not use would let a signature change without becoming invalid.
    head, last = LogReader("").apply(lines).head, lines[-1]
    assert last.endswith(b"==") and signed.copy.trust.signer(head, "") is not None
    with pytest.raises(UntrustedError, match="The signature was changed"):
        signed.copy.trust.signer(LogHead(head.number, head.previous, last[:-3] + bytes([last[-3] + 1]) + b"=="), "")
    assert LogHead().signature == b"" and not LogHead().number


def command(*arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, [*map(str, arguments)])
    if isinstance(done.exception, CompressError):
        assert done.exception.exit_code == code, done.exception
        return str(done.exception)
    assert done.exit_code == code, done.output
    return str(done.stdout)


def test_commands_sign_trust_and_verify(tmp_path: Path, keys: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", b"weights")
    command("registry", "register", "run", "--name", "m", "--sign", keys["ada"])
    assert "--sign KEY, or set COMPRESS_REGISTRY_KEY" in command("registry", "promote", "m@1", code=2)
    monkeypatch.setenv("COMPRESS_REGISTRY_KEY", str(keys["ada"]))
    command("registry", "promote", "m@1")
    command("registry", "push", "far")
    shown = subprocess.run(
        ["ssh-keygen", "-lf", str(public(keys["ada"]))], capture_output=True, text=True, check=True
    ).stdout.split()[1]
    assert f"3 lines of the log are signed by {shown}" in command("verify", "artifacts/registry")
    assert f"signed by {shown}" in command("verify", "artifacts/registry", "--signer", public(keys["ada"]))
    for signer in (keys["bob"], keys["eve"]):
        assert "Another key signed line 3" in command(
            "verify", "artifacts/registry", "--signer", public(signer), code=1
        )
    answer = json.loads(command("registry", "trust", public(keys["ada"]), "--registry", "server", "--json"))
    assert answer["signers"] == [shown] and answer["problem"] is None
    command("registry", "pull", "m@champion", "-o", "out", "--remote", "far", "--registry", "server")
    command("registry", "verify", "--remote", "far", "--registry", "server")
    command("registry", "trust", public(keys["bob"]), "--registry", "server")
    refused = command("registry", "fetch", "far", "--registry", "server", code=2)
    assert "Another key signed line 3 of the log" in refused and "expected: a signature by a key in" in refused
    assert "untrusted: log" in command("registry", "verify", "--remote", "far", "--registry", "server", code=1)
    assert "Another key signed line 3" in command("registry", "trust", public(keys["bob"]))
    assert "untrusted: log" in command("verify", "artifacts/registry", code=1)
    assert "4 lines of the log are now signed" in command("registry", "sign", keys["bob"], "--why", "looked at it")
    assert "4 lines of the log were already signed" in command("registry", "sign", keys["bob"])
    assert "signed: looked at it" in command("registry", "history")
    assert "This is no public key" in command("registry", "trust", keys["bob"], code=2)
    (tmp_path / "keys").write_text("ada@example.org ssh-ed25519 !\n")
    assert "This is no public key: ssh-ed25519 !" in command("registry", "trust", "keys", "--registry", "r", code=2)
    assert not (tmp_path / "r").exists()
    assert "no address of a remote" in command("registry", "fetch", "data:,x", code=2)

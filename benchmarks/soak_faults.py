"""Faults injected into the commands of a registry, and the proof that every acknowledged write is there once.

The command `faults` of `benchmarks/soak.py`. A command is a forked process that runs `compress registry ...`. A write
is acknowledged once its command ends with exit code 0. It carries a token in its note or reason, so that its entries in
the log can be counted.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from registry import write_run
from soak_page import Write, show

from compress.plugins.registry.registry import Registry
from compress.plugins.registry.remote import Remote
from compress.plugins.registry.state import Entry, Promoted, Registered, Retired, RolledBack
from compress.utils.errors import CompressError
from compress.utils.storage import digest_file

LANES = 4
"""Commands that run at the same time."""
MODELS, ALIASES = ("reviews", "names"), ("champion", "canary")
LIMIT_SECONDS = 120.0
"""Time after which a command counts as hanging."""
AUDIT_SECONDS = 60.0
DISK_MB = 200
DISK_FULL = 3
"""Exit code of a command whose disk is full."""
YEARS = 365 * 86400
_SOURCE = Path(__file__).parent / "soaking" / "faults.c"
_DOCUMENTED = (0, 1, 2, 3)
_PRELOAD = "LD_PRELOAD"
OPERATIONS = {
    "register": 30, "promote": 20, "rollback": 8, "retire": 6, "gc": 4, "push": 14, "fetch": 10, "pull": 5,
    "pull --remote": 3,
}  # fmt: skip
"""Commands with their weights."""
FAULTS = {"none": 10, "kill at an operation": 30, "kill at a moment": 20, "full disk": 25, "clock": 8, "slow": 7}
"""Faults with their weights. All processes together fill the real disk now and then in addition."""


def build_library(folder: Path) -> Path:
    """Compile the library that injects faults."""
    library = folder / "faults.so"
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", _SOURCE, "-o", library, "-ldl"], check=True)
    return library


def restart_with_library() -> None:
    """Replace this process by the same one with the library, which does nothing until a child asks for faults."""
    library = Path(os.environ.get(_PRELOAD, ""))
    if library.name != "faults.so":
        os.environ[_PRELOAD] = str(build_library(Path(tempfile.mkdtemp(prefix="soak-library-"))))
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    atexit.register(shutil.rmtree, library.parent)


@contextmanager
def small_disk(folder: Path, megabytes: int = DISK_MB) -> Iterator[bool]:
    """Mount a disk of that size at ``folder`` if this is permitted, and yield whether it is."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    mounted = not subprocess.run(mount, capture_output=True, check=False).returncode
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


@dataclass
class Command:
    """A running command, the fault it gets, and the write that it makes if it succeeds."""

    operation: str
    arguments: list[str]
    fault: str
    variables: dict[str, str]
    token: str
    folder: Path
    run: Path | None = None
    lines: int = 0
    pid: int = 0
    began: float = 0.0
    kill_at: float = float("inf")
    killed: bool = False

    def start(self) -> None:
        """Fork a process that runs the command."""
        self.folder.mkdir()
        # The process may be killed at any moment.
        for name in ("stdout", "stderr"):
            (self.folder / name).touch()
        self.began = time.monotonic()
        self.pid = os.fork()
        if self.pid:
            return
        code = 99
        try:
            for number, name in ((1, "stdout"), (2, "stderr")):
                os.dup2(os.open(self.folder / name, os.O_WRONLY), number)
            os.chdir(self.folder)
            os.environ.update(self.variables)
            sys.argv = ["compress", *self.arguments]
            from compress.cli import main

            main()
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)

    @property
    def fired(self) -> bool:
        """Return whether the fault happened before the command was done."""
        return self.killed or (self.folder / "fired").exists()

    @property
    def printed(self) -> dict[str, Any]:
        """Return what it has printed as JSON."""
        content: dict[str, Any] = json.loads((self.folder / "stdout").read_text())
        return content


@dataclass
class Soak:
    """Registry, its remote and a copy of the remote under faults, and the list of what was acknowledged."""

    folder: Path
    chance: random.Random
    is_disk: bool = False
    commands: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    acknowledged: dict[str, dict[str, Any]] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    unfinished: list[Path] = field(default_factory=list)
    pushed: int = 0
    fetched: int = 0
    problems: list[str] = field(default_factory=list)
    active: list[Command] = field(default_factory=list)

    @property
    def root(self) -> Path:
        """Return the folder of everything on the small disk."""
        return self.folder / "disk"

    @property
    def url(self) -> str:
        """Return the address of the remote."""
        return f"file://{self.root}/remote"

    def registry(self, name: str = "registry") -> Registry:
        """Open a registry of this soak."""
        return Registry(self.root / name)

    def run(self, seconds: float, most_faults: int) -> None:
        """Run commands for a time or until there were so many faults; audit each minute and at the end."""
        began = time.monotonic()
        try:
            self._run(began, seconds, most_faults)
        except CompressError as error:
            self.problems.append(f"corrupted: {error}")
        finally:
            for command in self.active:
                os.kill(command.pid, signal.SIGKILL)

    def _run(self, began: float, seconds: float, most_faults: int) -> None:
        audited = began
        while time.monotonic() - began < seconds and self.faults.total() < most_faults and not self.problems:
            while len(self.active) < LANES:
                self.active.append(self._next_command())
                self.active[-1].start()
            self._fill_disk()
            self._reap()
            time.sleep(0.005)
            if time.monotonic() - audited > AUDIT_SECONDS:
                self.audit()
                audited = time.monotonic()
                typer.echo(f"{(audited - began) / 60:.0f} min: {self}", err=True)
        self.audit()

    def __str__(self) -> str:
        """Return one line about the progress."""
        faults = ", ".join(f"{name} {count}" for name, count in self.faults.most_common())
        codes = ", ".join(f"{code}: {count}" for code, count in sorted(self.codes.items()))
        writes = f"{len(self.acknowledged)} acknowledged writes, {len(self.problems)} problems"
        return f"{self.commands} commands, {self.faults.total()} faults ({faults}), exit codes {codes}; {writes}"

    def command(self, operation: str, fault: str = "none") -> Command:
        """Return a command with random arguments."""
        self.commands += 1
        token, model = f"token-{self.commands}", self.chance.choice(MODELS)
        folder = self.folder / "commands" / str(self.commands)
        place = ["--registry", str(self.root / ("copy" if operation == "fetch" else "registry")), "--json"]
        made = Command(operation, [], fault, {}, token, folder)
        versions = self._versions(model)
        reference = f"{model}@{self.chance.randint(1, max(versions, 1))}"
        alias = self.chance.choice(ALIASES)
        match operation:
            case "register":
                made.run = self._take_run()
                words = [str(made.run), "--name", model, "--note", token]
            case "promote":
                words = [reference, "--as", alias, "--why", token]
            case "rollback":
                words = [model, "--as", alias, "--why", token]
            case "retire":
                words = [reference, "--why", token]
            case "gc":
                words = ["--artifacts", str(self.folder / "none")]
            case "push" | "fetch":
                words = [self.url]
                made.lines = len(self.registry().log.lines()) if operation == "push" else self.pushed
            case _:
                words = [reference, "-o", str(self.root / f"pulled-{token}")]
                words += ["--remote", self.url] if "remote" in operation else []
        made.arguments = ["registry", operation.split()[0], *words, *place]
        return made

    def _next_command(self) -> Command:
        operation, fault = (self.chance.choices([*table], [*table.values()])[0] for table in (OPERATIONS, FAULTS))
        command = self.command(operation, fault)
        at = str(int(self.chance.triangular(1, 60, 1)))
        variables = {"FAULT_ROOT": str(self.root), "FAULT_FIRED": str(command.folder / "fired")}
        match fault:
            case "kill at an operation":
                variables["FAULT_KILL_AT"] = at
            case "kill at a moment":
                command.kill_at = self.chance.uniform(0, 0.5)
                variables |= {"FAULT_SLOW_US": "5000"} if self.chance.random() < 0.5 else {}
            case "full disk":
                variables |= {"FAULT_FULL_AT": at, "FAULT_FULL_FOR": self.chance.choice(("1", "3", "1000"))}
            case "clock":
                variables["FAULT_CLOCK"] = str(self.chance.randint(-30 * YEARS, 30 * YEARS))
                variables["FAULT_CLOCK_EVERY"] = self.chance.choice(("1", "2", "5", "1000"))
            case "slow":
                variables["FAULT_SLOW_US"] = "50000"
        command.variables = variables
        return command

    def _take_run(self) -> Path:
        """Return the run of a registration that did not succeed, as a user who repeats it, or a new run."""
        if self.unfinished and self.chance.random() < 0.7:
            return self.unfinished.pop(self.chance.randrange(len(self.unfinished)))
        # Half of the runs lie on another disk than the registry, so that their files are copied and not linked.
        full = (self.root / "filler").exists()
        parent = (self.folder if full else self.chance.choice((self.folder, self.root))) / "runs"
        run = write_run(parent / str(self.commands), self.chance.randbytes(self.chance.randint(1, 40_000)))
        self.digests[str(run)] = digest_file(run / "model" / "onnx" / "model.onnx")
        return run

    def _versions(self, model: str) -> int:
        log = self.registry().log
        return len(self.registry().state().versions.get(model, {})) if log.path.is_file() else 0

    def _fill_disk(self) -> None:
        """Fill the real disk for a moment, or make room again."""
        filler = self.root / "filler"
        if not self.is_disk:
            return
        if filler.exists():
            if self.chance.random() < 0.02:
                filler.unlink()
        elif self.chance.random() < 0.0005:
            size = shutil.disk_usage(self.root).free - 4096 * self.chance.randint(0, 8)
            # Commands may take the room in the meantime.
            with filler.open("wb") as file, contextlib.suppress(OSError):
                os.posix_fallocate(file.fileno(), 0, max(1, size))

    def _reap(self) -> None:
        for command in list(self.active):
            age = time.monotonic() - command.began
            if age > command.kill_at and not command.killed:
                os.kill(command.pid, signal.SIGKILL)
                command.killed = True
            pid, status = os.waitpid(command.pid, os.WNOHANG)
            if pid:
                self.active.remove(command)
                self._ended(command, os.waitstatus_to_exitcode(status))
            elif age > LIMIT_SECONDS:
                os.kill(command.pid, signal.SIGKILL)
                self.problems.append(f"{command.operation} hangs: {command.folder}")

    def _ended(self, command: Command, code: int) -> None:
        """Count the fault, and record what was acknowledged."""
        self.codes[str(code)] += 1
        if command.fired and command.fault != "none":
            self.faults[command.fault] += 1
        elif code == DISK_FULL and "The disk is full" in (command.folder / "stderr").read_text():
            self.faults["real full disk"] += 1
        if code not in (*_DOCUMENTED, -signal.SIGKILL) or b"Traceback" in (command.folder / "stderr").read_bytes():
            self.problems.append(f"{command.operation} ends with {code}: {command.folder}")
        elif code == -signal.SIGKILL and not command.fired:
            self.problems.append(f"{command.operation} was killed by something else: {command.folder}")
        elif code == 0:
            self._acknowledge(command)
        elif code == 1 and command.operation != "promote":
            self.problems.append(f"{command.operation} ends with 1: {command.folder}")
        if command.operation == "register" and code:
            self.unfinished.append(command.run)  # type: ignore[arg-type]
        if not self.problems:
            shutil.rmtree(command.folder)

    def _acknowledge(self, command: Command) -> None:
        if command.operation == "push":
            self.pushed = max(self.pushed, command.lines)
        elif command.operation == "fetch":
            self.fetched = max(self.fetched, command.lines)
        elif command.operation.startswith("pull"):
            self._check_pulled(command)
        elif command.operation != "gc":
            content = command.printed
            # A version that exists already, or an alias that refers to it already, needs no entry.
            if content.get("new", True) and not content.get("already") and not content.get("refused"):
                content["operation"], content["digest"] = command.operation, self.digests.get(str(command.run))
                self.acknowledged[command.token] = content

    def _check_pulled(self, command: Command) -> None:
        content, folder = command.printed, Path(command.printed["folder"])
        version = self.registry().state().find(f"{content['name']}@{content['version']}")
        if digest_file(folder / "model" / "onnx" / "model.onnx") != self.digests[version.run]:
            self.problems.append(f"{folder} is not what was registered")
        shutil.rmtree(folder)

    def audit(self) -> None:
        """Let the commands end, and prove that every acknowledged write is there once and undamaged."""
        while self.active:
            self._reap()
            time.sleep(0.005)
        (self.root / "filler").unlink(missing_ok=True)
        for path in self.root.glob("*pulled-*"):
            shutil.rmtree(path)
        for operation in ("register", "gc", "push", "fetch"):
            self._without_fault(self.command(operation))
        self._without_fault(self._verification(["--registry", str(self.root / "registry")]))
        # Files of versions that `gc` removed from the registry stay in its copies.
        for place in (["--registry", str(self.root / "copy")], ["--remote", self.url]):
            self._without_fault(self._verification(place), surplus=True)
        self._audit_log()
        self._audit_files()

    def _verification(self, place: list[str]) -> Command:
        self.commands += 1
        folder = self.folder / "commands" / str(self.commands)
        return Command("verify", ["registry", "verify", *place, "--json"], "none", {}, "", folder)

    def _without_fault(self, command: Command, surplus: bool = False) -> None:
        """Run a command that must succeed. With ``surplus`` files that nothing needs are no fault."""
        command.start()
        code = os.waitstatus_to_exitcode(os.waitpid(command.pid, 0)[1])
        faults = command.printed.get("faults", []) if code == 1 else []
        if surplus and faults and all(fault["fault"] == "surplus" for fault in faults):
            code = 0
        if code:
            self.problems.append(f"{command.operation} ends with {code} without a fault: {command.folder}")
        else:
            self._acknowledge(command) if command.operation != "verify" else None
            shutil.rmtree(command.folder)

    def _audit_log(self) -> None:
        """Count the entries of every token, and compare the three logs."""
        entries = self.registry().state().entries
        counts = Counter(token for entry in entries if (token := _token(entry)))
        kinds = {"register": Registered, "promote": Promoted, "rollback": RolledBack, "retire": Retired}
        by_token = {_token(entry): entry for entry in entries}
        for token, content in self.acknowledged.items():
            entry = by_token.get(token)
            if entry is None:
                # A version that was retired before keeps the reason of its first retirement.
                if content["operation"] == "retire" and self._is_retired(content):
                    continue
                self.problems.append(f"lost: {content}")
            elif not isinstance(entry, kinds[content["operation"]]) or entry.version != content["version"]:
                self.problems.append(f"corrupted: {content}, {entry}")
        self.problems += [f"duplicated: {token}, {count} times" for token, count in counts.items() if count > 1]
        lines = self.registry().log.lines()
        for name, other, least in (
            ("remote", Remote(self.url).lines(), self.pushed), ("copy", self.registry("copy").log.lines(), self.fetched)
        ):  # fmt: skip
            if other != lines[: len(other)] or len(other) < least:
                self.problems.append(f"the log of the {name} has {len(other)} lines, acknowledged {least}")

    def _is_retired(self, content: dict[str, Any]) -> bool:
        return self.registry().state().versions[content["name"]][content["version"]].retired

    def _audit_files(self) -> None:
        """Compare the model of every version that is in use with what was registered."""
        registry = self.registry()
        state, records = registry.state(), Counter[tuple[str, str]]()
        for version in state.all():
            if version.retired:
                continue
            records[version.name, version.record] += 1
            digest = registry.contents(version).files["model/onnx/model.onnx"].sha256
            if digest != self.digests[version.run] or registry.objects.fault(digest):
                self.problems.append(f"corrupted: {version.reference}")
        self.problems += [f"duplicated: {record}" for record, count in records.items() if count > 1]
        for model in state.versions:
            for alias, number in state.aliases(model).items():
                if state.versions[model][number].retired:
                    self.problems.append(f"{model}@{alias} is retired")


def _token(entry: Entry) -> str:
    return getattr(entry, "note", "") or getattr(entry, "why", "")


def soak_registry(folder: Path, seed: int, seconds: float, most_faults: int) -> Soak:
    """Run a registry under faults in a folder."""
    (folder / "commands").mkdir(parents=True)
    with small_disk(folder / "disk") as is_disk:
        soak = Soak(folder, random.Random(seed), is_disk)
        soak._without_fault(soak.command("register"))
        soak._without_fault(soak.command("push"))
        soak.run(seconds, most_faults)
        if soak.problems and is_disk:
            shutil.copytree(folder / "disk", folder / "failed", symlinks=True)
    return soak


def faults(
    minutes: Annotated[float, typer.Option(help="Longest time.")] = 120.0,
    most: Annotated[int, typer.Option("--faults", help="Number of faults after which it ends.")] = 2000,
    seed: Annotated[int, typer.Option(help="Seed of commands and faults.")] = 1,
    keep: Annotated[Path, typer.Option(help="Folder that receives the state after a failure.")] = Path(
        "artifacts/soak"
    ),
    write: Write = False,
) -> None:
    """Run a registry under faults. Exit code 1: an acknowledged write is lost, corrupted or duplicated."""
    restart_with_library()
    # Import once what every forked command needs.
    importlib.import_module("compress.plugins.registry.cli")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-faults-") as temporary:
        soak = soak_registry(Path(temporary) / "soak", seed, minutes * 60, most)
        if soak.problems:
            target = keep / f"seed-{seed}-{os.getpid()}"
            shutil.copytree(Path(temporary) / "soak", target, symlinks=True)
            typer.echo(f"the state is kept in {target}", err=True)
    typer.echo(str(soak), err=True)
    for problem in soak.problems:
        typer.echo(problem)
    count = {word: sum(problem.startswith(word) for problem in soak.problems) for word in _WORDS}
    others = len(soak.problems) - sum(count.values())
    rows = [
        ["faults injected", f"{soak.faults.total():,}", "2,000"],
        *([name, f"{number:,}", ""] for name, number in soak.faults.most_common()),
        ["commands; acknowledged writes", f"{soak.commands:,}; {len(soak.acknowledged):,}", ""],
        ["acknowledged writes lost, corrupted, duplicated", ", ".join(map(str, count.values())), "0, 0, 0"],
        ["hangs, undocumented exit codes, commands that failed without a fault", f"{others}", "0"],
        ["minutes", f"{(time.monotonic() - began) / 60:.0f}", ""],
    ]
    show("A registry under faults", f"python benchmarks/soak.py faults --seed {seed} --write", rows, write)
    if soak.problems:
        raise typer.Exit(1)


_WORDS = ("lost", "corrupted", "duplicated")

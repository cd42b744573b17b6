"""A fake of the Ray API that workers use, in this process: tasks end in random order, machines die on request."""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from compress.plugins.ray.task import FOLDER_VARIABLE, MachineInfo


class RayError(Exception):
    """An error that the task did not cause."""


class RayTaskError(RayError):
    """An error that a task raised."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause

    def as_instanceof_cause(self) -> Exception:
        """Return the error that caused this one."""
        return self.cause


@dataclass(eq=False)
class Ref:
    """A reference to a task's result or to an object that was put."""

    node: Machine | None = None
    call: Callable[[], Any] | None = None
    value: Any = None
    done: bool = False


@dataclass
class Machine:
    """A node. ``deaths``: number of next tasks whose worker dies; ``told``: overrides of its MachineInfo."""

    folder: Path
    processors: int = 1
    host: str | None = None
    resources: dict[str, float] = field(default_factory=dict)
    deaths: int = 0
    told: dict[str, Any] = field(default_factory=dict)
    alive: bool = True
    ran: list[str] = field(default_factory=list)
    """The kinds of the stages that it ran, or `look` for evaluations."""
    datasets: dict[str, Any] = field(default_factory=dict)
    when_run: Callable[[], None] = lambda: None

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Run the body with this machine's folder, host name and datasets."""
        host = self.host or socket.gethostname()
        with (
            mock.patch.dict(os.environ, {FOLDER_VARIABLE: str(self.folder)}),
            mock.patch("socket.gethostname", lambda: host),
            mock.patch("compress.plugins.ray.task._datasets", self.datasets),
        ):
            yield


class FakeRay(ModuleType):
    """The fake module `ray`. ``machines`` maps node names to machines."""

    def __init__(self, machines: dict[str, Machine], seed: int = 0) -> None:
        super().__init__("ray")
        self.machines, self._chance = machines, random.Random(seed)
        self.pending: list[Ref] = []
        self.puts = 0
        self.exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Make `import ray` return this module."""
        strategies = ModuleType("ray.util.scheduling_strategies")
        strategies.NodeAffinitySchedulingStrategy = lambda node, soft: node  # type: ignore[attr-defined]
        for name, module in (("ray", self), ("ray.util", ModuleType("ray.util")), (strategies.__name__, strategies)):
            patch.setitem(sys.modules, name, module)

    def is_initialized(self) -> bool:
        return True

    def nodes(self) -> list[dict[str, Any]]:
        resources = {name: {"CPU": float(one.processors), **one.resources} for name, one in self.machines.items()}
        return [
            {"NodeID": name, "Alive": self.machines[name].alive, "Resources": used} for name, used in resources.items()
        ]

    def put(self, value: Any) -> Ref:
        self.puts += 1
        return Ref(value=value, done=True)

    def remote(self, function: Any) -> Any:
        def options(num_cpus: float, max_retries: int, scheduling_strategy: str) -> Any:
            assert max_retries == 0
            node = self.machines[scheduling_strategy]
            return SimpleNamespace(remote=lambda *given: self._submitted(node, function, given))

        return SimpleNamespace(options=options)

    def _submitted(self, node: Machine, function: Any, given: tuple[Any, ...]) -> Ref:
        first, *arguments = given
        travelled = pickle.dumps(first)
        ref = Ref(node, lambda: function(pickle.loads(travelled), *arguments))
        if function.__name__ == "execute":
            node.ran.append(first.label or "look")
            busy = sum(pending.node is node for pending in self.pending)
            assert busy < max(node.processors, 1), "more than it has room for"
            self.pending.append(ref)
        return ref

    def wait(self, refs: list[Ref], num_returns: int, timeout: float = 0.0) -> tuple[list[Ref], list[Ref]]:
        if num_returns > 1:
            assert not self.pending, "what is stopped ends"
            return refs, []
        ended = self._chance.choice(refs)
        self._run(ended)
        return [ended], [ref for ref in refs if ref is not ended]

    def get(self, ref: Ref, timeout: float = 0.0) -> Any:
        self._run(ref)
        if isinstance(ref.value, RayError):
            raise ref.value
        return ref.value

    def _run(self, ref: Ref) -> None:
        if ref.done or ref.node is None or ref.call is None:
            return
        ref.done, is_work = True, ref in self.pending
        if is_work:
            self.pending.remove(ref)
            ref.node.when_run()
        if is_work and (ref.node.deaths or not ref.node.alive):
            ref.node.deaths -= 1
            ref.value = RayError("the worker died")
            return
        with ref.node.entered():
            result = pickle.loads(pickle.dumps(ref.call()))
        ref.value = replace(result, **ref.node.told) if isinstance(result, MachineInfo) else result

    def cancel(self, ref: Ref, force: bool) -> None:
        ref.done, ref.value = True, RayError("cancelled")
        self.pending = [pending for pending in self.pending if pending is not ref]

    def shutdown(self) -> None:
        """Do nothing."""

"""A Ray cluster as a search sees it: which machines may work, which may take times, and why others may not."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from compress.plugins.ray.task import MachineInfo, machine_info
from compress.utils.environment import granted_cores
from compress.utils.errors import DeviceError, InputError, MissingExtraError, first_line
from compress.utils.progress import Progress

if TYPE_CHECKING:
    from types import ModuleType

_REACHED_WITHIN = 5.0
_ANSWERS_WITHIN = 120.0


@dataclass(eq=False)
class ClusterNode:
    """One machine of the cluster, or a part of one. ``busy`` is how many pieces of work it has now."""

    id: str
    machine: MachineInfo
    slots: int
    """Number of work items that it runs at once."""
    has_target: bool
    busy: int = 0
    holds: set[str] = field(default_factory=set)
    """Keys of cache entries that it has."""

    @property
    def name(self) -> str:
        """How a message calls it."""
        return f"{self.machine.host} ({self.id[:6]})"


class Cluster:
    """The machines behind an address, `HOST:PORT` or `auto`; with none, this one alone, as its own cluster.

    A piece of work has as many ``threads`` as it would have here. Raises `InputError` where the cluster cannot be
    reached or no machine of it may work, `MissingExtraError` without Ray.
    """

    def __init__(self, address: str, target: str, packages: Sequence[str], threads: int, progress: Progress) -> None:
        # Ray writes to standard output what becomes of its parts; what matters of it is said in a note.
        os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
        try:
            import ray
        except ImportError as error:
            raise MissingExtraError("ray", "ray", "--workers ray") from error
        self.ray: ModuleType = ray
        self.here, self.threads, self.progress = machine_info(packages), threads, progress
        self.resource, self._packages = f"target:{target}", packages
        self.nodes: dict[str, ClusterNode] = {}
        self._known: set[str] = set()
        self.began_here = not self.ray.is_initialized()
        if self.began_here:
            _connect(self.ray, address, threads)
        self.refresh()
        if not any(node.slots for node in self.nodes.values()):
            self.close()
            raise InputError(
                "No machine of the Ray cluster can work on this search.",
                where=address or "this machine",
                expected=f"{threads} free processors on a machine with the same packages",
                hint="OMP_NUM_THREADS=1 asks for one processor a piece of work; what speaks against each machine is "
                "said above",
            )

    def refresh(self) -> None:
        """Meet machines that have come, and forget those that have gone."""
        alive = {each["NodeID"]: each["Resources"] for each in self.ray.nodes() if each["Alive"]}
        for gone in [self.nodes.pop(name) for name in self.nodes.keys() - alive.keys()]:
            self.progress.note(f"worker {gone.name} has gone")
        new = {name: resources for name, resources in alive.items() if name not in self._known}
        self._known |= new.keys()
        asked = {
            name: self.remote(machine_info, name, 0).remote(tuple(self._packages))
            for name, resources in new.items()
            if (resources.get("CPU", 0) >= 1 or self.resource in resources)
        }
        for name, reference in asked.items():
            self._meet(name, new[name], reference)

    def remote(self, function: object, node: str, processors: float) -> Any:
        """A function as a task of that machine; whoever asks sees to it when a worker dies."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        place = NodeAffinitySchedulingStrategy(node, soft=False)
        return self.ray.remote(function).options(num_cpus=processors, max_retries=0, scheduling_strategy=place)

    def _meet(self, name: str, resources: dict[str, float], reference: object) -> None:
        try:
            told: MachineInfo = self.ray.get(reference, timeout=_ANSWERS_WITHIN)
        except self.ray.exceptions.RayError as error:
            why = first_line(error.cause if isinstance(error, self.ray.exceptions.RayTaskError) else error)
            self.progress.note(
                f"worker {name[:6]} gets nothing: it can't load compress ({why}); pip install 'compress[ray]' there"
            )
            return
        node = ClusterNode(name, told, int(resources.get("CPU", 0)) // self.threads, self.resource in resources)
        if (other := self.here.differs(told)) is not None:
            self.progress.note(f"worker {node.name} gets nothing: it has {other}")
            return
        said = f"worker {node.name}: {node.slots} at once, {self.threads} threads each"
        if not node.slots and not node.has_target:
            said += f"; it has too few processors for {self.threads} (OMP_NUM_THREADS)"
        if told.is_timed_as != self.here.is_timed_as:
            node.has_target = False
            said += f"; no times are taken there, its processor is another ({told.processor})"
            if told.processor_class != self.here.processor_class:
                said += f", and nothing is judged there ({told.processor_class}, here {self.here.processor_class})"
        self.progress.note(said)
        self.nodes[name] = node

    def can_evaluate(self, node: ClusterNode) -> bool:
        """Whether answers there are what they would be here: 8-bit products are a processor's own."""
        return node.machine.processor_class == self.here.processor_class

    def is_local(self, node: ClusterNode) -> bool:
        """Whether it is on this machine."""
        return node.machine.host == socket.gethostname()

    def drop(self, node: ClusterNode, why: str) -> None:
        """Give a machine nothing more. Raises `DeviceError` where it was the last."""
        self.nodes.pop(node.id, None)
        self.progress.note(f"worker {node.name} gets nothing more: {why}")

    def check_any(self) -> None:
        """Raise `DeviceError` where nobody is left to work."""
        if not any(node.slots for node in self.nodes.values()):
            raise DeviceError(
                "No worker is left.",
                hint="start others (ray start --address=...) and go on with --resume; finished stages are kept",
            )

    def close(self) -> None:
        """Leave the cluster, unless somebody else had entered it."""
        if self.began_here:
            self.ray.shutdown()


def _connect(ray: ModuleType, address: str, threads: int) -> None:
    address = address or os.environ.get("RAY_ADDRESS", "")
    options: dict[str, Any] = {"configure_logging": False, "log_to_driver": False, "include_dashboard": False}
    if address and address != "auto":
        _check_reached(address)
    try:
        if address:
            options.pop("include_dashboard")
            ray.init(address=address, **options)
        else:
            ray.init(address="local", num_cpus=max(len(granted_cores()), threads), **options)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise _unreached(address, first_line(error)) from error


def _check_reached(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in address:
        raise InputError(
            f"{address!r} is no address of a Ray cluster.", where="--workers", expected="ray:HOST:PORT, ray:auto or ray"
        )
    try:
        socket.create_connection((host, int(port)), _REACHED_WITHIN).close()
    except OSError as error:
        raise _unreached(address, error.strerror or str(error)) from error


def _unreached(address: str, why: str) -> InputError:
    return InputError(
        f"The Ray cluster cannot be reached: {why}",
        where=f"--workers ray:{address}" if address else "--workers ray",
        expected="a cluster that this machine is part of, with the same Python and Ray",
        hint="ray start --head on one machine, ray start --address=HOST:PORT on the others, this one too",
    )

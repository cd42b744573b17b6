"""View of a Ray cluster: the machines that may run stages or timings, and the reasons why others may not."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from compress.plugins.ray.task import MachineInfo, machine_info
from compress.utils.environment import granted_cores
from compress.utils.errors import DeviceError, InputError, MissingExtraError, first_line, install_command
from compress.utils.progress import Progress

if TYPE_CHECKING:
    from types import ModuleType

_REACHED_WITHIN = 5.0
_ANSWERS_WITHIN = 120.0


@dataclass(eq=False)
class ClusterNode:
    """One Ray node: a machine of the cluster, or a part of one. ``busy`` is the number of its running work items."""

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
        """Name in messages: the host and the beginning of the node's id."""
        return f"{self.machine.host} ({self.id[:6]})"


class Cluster:
    """The machines behind an address, `HOST:PORT` or `auto`. Without an address this machine is its own cluster.

    Each work item has as many ``threads`` as it would have on this machine.

    Raises:
        InputError: The cluster cannot be reached, or none of its machines can work.
        MissingExtraError: Ray is not installed.
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
                hint="OMP_NUM_THREADS=1 requests one processor per work item; the reason for each machine is "
                "printed above",
            )

    def refresh(self) -> None:
        """Add machines that have joined the cluster, and remove those that have left it."""
        alive = {node["NodeID"]: node["Resources"] for node in self.ray.nodes() if node["Alive"]}
        for lost in [self.nodes.pop(name) for name in self.nodes.keys() - alive.keys()]:
            self.progress.note(f"worker {lost.name} has disconnected")
        # A node that was dropped stays known, so that it does not come back.
        new = {name: resources for name, resources in alive.items() if name not in self._known}
        self._known |= new.keys()
        # All nodes are asked before the first answer is awaited, since each starts a process.
        references = {
            name: self.remote(machine_info, name, 0).remote(tuple(self._packages))
            for name, resources in new.items()
            if (resources.get("CPU", 0) >= 1 or self.resource in resources)
        }
        for name, reference in references.items():
            self._meet(name, new[name], reference)

    def remote(self, function: object, node: str, processors: float) -> Any:
        """Return a function as a Ray task of one node. The caller handles the death of its worker."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        strategy = NodeAffinitySchedulingStrategy(node, soft=False)
        return self.ray.remote(function).options(num_cpus=processors, max_retries=0, scheduling_strategy=strategy)

    def _meet(self, name: str, resources: dict[str, float], reference: object) -> None:
        """Add a node if it computes the same files as this machine, and note why not otherwise."""
        try:
            machine: MachineInfo = self.ray.get(reference, timeout=_ANSWERS_WITHIN)
        except self.ray.exceptions.RayError as error:
            why = first_line(error.cause if isinstance(error, self.ray.exceptions.RayTaskError) else error)
            self.progress.note(
                f"worker {name[:6]} is not used: it cannot import compress ({why}); {install_command('ray')} there"
            )
            return
        node = ClusterNode(name, machine, int(resources.get("CPU", 0)) // self.threads, self.resource in resources)
        if (other := self.here.differs(machine)) is not None:
            self.progress.note(f"worker {node.name} is not used: it has {other}")
            return
        note = f"worker {node.name}: {node.slots} at once, {self.threads} threads each"
        if not node.slots and not node.has_target:
            note += f"; it has too few processors for {self.threads} (OMP_NUM_THREADS)"
        if machine.is_timed_as != self.here.is_timed_as:
            node.has_target = False
            note += f"; no times are measured there, its processor differs ({machine.processor})"
            if machine.processor_class != self.here.processor_class:
                note += f", and no evaluations run there ({machine.processor_class}, here {self.here.processor_class})"
        self.progress.note(note)
        self.nodes[name] = node

    def can_evaluate(self, node: ClusterNode) -> bool:
        """Return True if predictions there equal those here. Rounding in 8-bit products depends on the processor."""
        return node.machine.processor_class == self.here.processor_class

    def is_local(self, node: ClusterNode) -> bool:
        """Return True if the node is on this machine."""
        return node.machine.host == socket.gethostname()

    def drop(self, node: ClusterNode, why: str) -> None:
        """Give a machine no more work."""
        self.nodes.pop(node.id, None)
        self.progress.note(f"worker {node.name} is no longer used: {why}")

    def check_any(self) -> None:
        """Raise `DeviceError` if no machine is left."""
        if not any(node.slots for node in self.nodes.values()):
            raise DeviceError(
                "No worker is left.",
                hint="start others (ray start --address=...) and continue with --resume; finished stages are kept",
            )

    def close(self) -> None:
        """Leave the cluster, unless Ray was initialized before."""
        if self.began_here:
            self.ray.shutdown()


def _connect(ray: ModuleType, address: str, threads: int) -> None:
    address = address or os.environ.get("RAY_ADDRESS", "")
    options: dict[str, Any] = {"configure_logging": False, "log_to_driver": False}
    host, _, port = address.rpartition(":")
    if address not in ("", "auto") and (not host or not port.isdecimal() or "/" in address):
        raise InputError(
            f"{address!r} is no address of a Ray cluster.", where="--workers", expected="ray:HOST:PORT, ray:auto or ray"
        )
    try:
        if not address:
            ray.init(address="local", num_cpus=max(len(granted_cores()), threads), include_dashboard=False, **options)
            return
        # Ray waits for minutes if nothing listens at the address, so try the port first.
        if address != "auto":
            socket.create_connection((host, int(port)), _REACHED_WITHIN).close()
        ray.init(address=address, **options)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise InputError(
            f"The Ray cluster cannot be reached: {getattr(error, 'strerror', None) or first_line(error)}",
            where=f"--workers ray:{address}" if address else "--workers ray",
            expected="a cluster that this machine is part of, with the same Python and Ray",
            hint="ray start --head on one machine, ray start --address=HOST:PORT on the others, this one too",
        ) from error

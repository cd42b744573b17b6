"""`compress bench ARTIFACT --device NAME`: the same bench on other machines, several at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

from compress.benchmark.host import LaunchHost
from compress.benchmark.session import BenchResult
from compress.cli.console_progress import ConsoleProgress
from compress.plugins.devices.inventory import Device, choose_devices, find_inventory, read_inventory
from compress.utils.errors import CompressError, InputError
from compress.utils.progress import Progress, Total, steps_of

Item = TypeVar("Item")
Measure = Callable[["LaunchHost", "Progress"], "BenchResult"]


@dataclass
class Outcome:
    """What came of it on each device: a result, or the error in its place."""

    results: dict[str, BenchResult] = field(default_factory=dict)
    failures: dict[str, CompressError] = field(default_factory=dict)


class Chosen(NamedTuple):
    """Devices by name, and the folder of their inventory."""

    devices: Mapping[str, Device]
    folder: Path


def chosen_devices(names: Sequence[str], inventory: Path | None, recipe: Path | None) -> Chosen | None:
    """The devices of these names, or none; `find_inventory` says where they are looked for: beside ``recipe``, here."""
    if not names:
        if inventory is not None:
            raise InputError("--inventory without --device.", expected="--device NAME, or --device all")
        return None

    file = find_inventory(inventory, [Path()] if recipe is None else [recipe.parent, Path()])
    return Chosen(choose_devices(read_inventory(file), names, file), file.absolute().parent)


def bench_on_devices(chosen: Chosen, measure: Measure) -> Outcome:
    """Measure on every device at once; one that fails keeps none of the others from its result."""
    from compress.plugins.devices.place import DevicePlace

    devices, folder = chosen
    console, stopped, found = ConsoleProgress(), threading.Event(), Outcome()
    if len(devices) == 1:
        ((name, device),) = devices.items()
        found.results[name] = measure(DevicePlace(name, device, folder), console)
        return found

    def one(name: str) -> BenchResult:
        return measure(DevicePlace(name, devices[name], folder), _Told(console, name, stopped))

    with ThreadPoolExecutor(len(devices)) as pool:
        running: dict[str, Future[BenchResult]] = {name: pool.submit(one, name) for name in devices}
        try:
            for name, future in running.items():
                try:
                    found.results[name] = future.result()
                except CompressError as error:
                    found.failures[name] = error
        finally:
            # After Ctrl-C each session is ended at its next step.
            stopped.set()
    return found


class _StoppedError(Exception):
    """The user doesn't want it any more."""


class _Told:
    """Progress of one device of several: lines, since two bars can't be drawn at once."""

    def __init__(self, console: Progress, name: str, stopped: threading.Event) -> None:
        self._console, self._name, self._stopped = console, name, stopped

    def track(self, items: Iterable[Item], description: str, total: Total) -> Iterator[Item]:
        """Yield ``items``, saying when half of them and all are done."""
        for done, item in enumerate(items, 1):
            yield item
            if self._stopped.is_set():
                raise _StoppedError(self._name)
            steps = steps_of(total)
            if done in (steps // 2, steps):
                self._console.note(f"{self._name}: {description}: {done} of {steps}")

    def note(self, message: str) -> None:
        """Say one line; devices name themselves."""
        self._console.note(message)

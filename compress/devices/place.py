"""A device as a place for launches: files there, the same harness there, the whole record back here."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from compress import __version__
from compress.bench.generation_launches import GenerationRecord, GenerationWork
from compress.bench.place import Found, Timed
from compress.bench.record import Conditions, Record, Workload
from compress.bench.service import raised_error
from compress.devices.archive import PACKAGES, TRANSCRIBING, requirements, write_archive
from compress.devices.blobs import Blob, send_blobs
from compress.devices.connection import Connection
from compress.devices.harness import IMPORTS
from compress.devices.inventory import Device
from compress.devices.session import begun, followed
from compress.errors import DeviceError
from compress.formats.onnx.model import find_graphs
from compress.progress import Progress
from compress.targets import Target

_CPU = ("onnxruntime", "CPUExecutionProvider")


@dataclass(frozen=True)
class DevicePlace:
    """A `compress.bench.place.Place`: the device of that name in an inventory that lies in ``folder``."""

    name: str
    device: Device
    folder: Path
    patience_seconds: float = 120.0

    def target(self, target: Target) -> Target:
        """See `Place.target`: `cpu@pi`."""
        return replace(target, name=f"{target.name}@{self.name}")

    def why_unavailable(self, target: Target) -> str | None:
        """See `Place.why_unavailable`; whether the device answers shows when it is asked."""
        if (target.runtime, target.provider) != _CPU:
            return f"devices are measured with ONNX Runtime on their processor, {self.name!r} too: `--target cpu`"
        return None

    def time(
        self,
        workload: Workload,
        conditions: Conditions,
        baseline: str,
        seconds_left: float | None,
        progress: Progress,
    ) -> Timed[Record]:
        """See `Place.time`. Raises `DeviceError` too."""
        artifacts, first, everything = (
            {name: f"{kind}/{at}{end}" for at, name in enumerate(workload.artifacts)}
            for kind, end in (("artifacts", ""), ("first", ".npz"), ("all", ".npz"))
        )
        files = dict(_files(workload.artifacts, artifacts))
        files |= {first[name]: file for name, file in workload.first.items()}
        files |= {everything[name]: file for name, file in workload.all.items()}
        work = {
            "artifacts": _entries(workload.artifacts, artifacts),
            "first": first,
            "all": everything,
            "singles": list(workload.singles),
            "batches": list(workload.batches),
            "single_shapes": list(workload.single_shapes),
        }
        bench = _bench("time", work, conditions, baseline, seconds_left)
        transcribes = any(len(find_graphs(path)) > 1 for path in workload.artifacts.values())
        packages = PACKAGES + TRANSCRIBING if transcribes else PACKAGES
        return self._timed(Record, self._measured(bench, files, packages, progress))

    def generate(
        self,
        work: GenerationWork,
        conditions: Conditions,
        baseline: str,
        seconds_left: float | None,
        progress: Progress,
    ) -> Timed[GenerationRecord]:
        """See `Place.generate`. Raises `DeviceError` too."""
        artifacts = {name: f"artifacts/{at}" for at, name in enumerate(work.artifacts)}
        told = {
            "artifacts": _entries(work.artifacts, artifacts),
            "contexts": list(work.contexts),
            "tokens": work.tokens,
            "texts": {name: list(ids) for name, ids in work.texts.items()},
            "no_batches": "nothing.npz",
        }
        files = {**dict(_files(work.artifacts, artifacts)), "nothing.npz": work.no_batches}
        bench = _bench("generate", told, conditions, baseline, seconds_left)
        return self._timed(GenerationRecord, self._measured(bench, files, PACKAGES, progress))

    def _measured(
        self, bench: dict[str, Any], files: Mapping[str, Path], packages: tuple[str, ...], progress: Progress
    ) -> dict[str, Any]:
        """The harness's result. The device is taken before anything is sent, since that would disturb a bench."""
        with (
            tempfile.TemporaryDirectory(prefix="compress-device-") as scratch,
            Connection(self.name, self.device, self.folder, self.patience_seconds) as connection,
            begun(connection) as session,
        ):
            write_archive(Path(scratch) / "code.zip")
            archive = Blob.of(Path(scratch) / "code.zip")
            blobs = {path: Blob.of(file) for path, file in files.items()}
            wanted = requirements(packages)
            order = {
                "code": archive.digest,
                "files": {path: blob.digest for path, blob in blobs.items()},
                "requirements": wanted,
                "imports": list(IMPORTS),
                "bench": bench,
            }
            send_blobs(connection, session, [archive, *blobs.values()], wanted, progress)
            connection.ask("order", session=session, order=order)
            return followed(connection, session, 2 * bench["conditions"]["launches"], progress)

    def _timed(self, kind: type[Found], result: dict[str, Any]) -> Timed[Found]:
        if "error" in result:
            raise raised_error(result["error"])
        told = result["timed"]
        try:
            record = TypeAdapter(kind).validate_python(told["record"])
        except ValidationError as error:
            raise DeviceError(f"What {self.name!r} measured cannot be read: {error.errors()[0]}") from None
        packages = {"compress": __version__, **told["environment"]["packages"]}
        environment = {**told["environment"], "packages": packages, "device": self.name}
        return Timed(record, told["precision"], tuple(told["cores"]), told["load"], environment)


def _bench(
    kind: str, work: dict[str, Any], conditions: Conditions, baseline: str, seconds_left: float | None
) -> dict[str, Any]:
    return {
        "kind": kind,
        "work": work,
        "conditions": asdict(conditions),
        "baseline": baseline,
        "seconds_left": seconds_left,
    }


def _files(artifacts: Mapping[str, Path], places: Mapping[str, str]) -> Iterator[tuple[str, Path]]:
    """The files of each artifact by the path that each gets; of a graph file, itself and its weights beside it."""
    for name, path in artifacts.items():
        folder = path if path.is_dir() else path.parent
        for file in sorted(folder.rglob("*") if path.is_dir() else folder.glob(f"{path.name}*")):
            if file.is_file():
                yield f"{places[name]}/{file.relative_to(folder).as_posix()}", file


def _entries(artifacts: Mapping[str, Path], places: Mapping[str, str]) -> dict[str, str]:
    """Where each artifact itself lies: a folder, or a file in one."""
    return {name: places[name] if path.is_dir() else f"{places[name]}/{path.name}" for name, path in artifacts.items()}

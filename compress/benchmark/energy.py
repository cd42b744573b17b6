"""Energy of the processor from the kernel's RAPL counters (Intel and AMD) in `powercap`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from compress.utils.errors import StageError

_ROOT = Path("/")
_ZONES = "sys/class/powercap"


@dataclass(frozen=True)
class EnergyMeter:
    """Counters of all processor packages. The energy is that of the whole package, for all processes."""

    zones: tuple[Path, ...]

    def read(self) -> tuple[int, ...]:
        """Return the microjoules counted by each package so far. Raises `StageError` if a counter has disappeared."""
        try:
            return tuple(int((zone / "energy_uj").read_text()) for zone in self.zones)
        except (OSError, ValueError) as error:
            raise StageError(f"The energy counter can no longer be read: {error}", where="benchmark") from error

    def between_mj(self, before: tuple[int, ...], after: tuple[int, ...]) -> float:
        """Return the millijoules between two readings. A counter starts again at 0 past its range."""
        total = 0
        for zone, first, last in zip(self.zones, before, after, strict=True):
            if last < first:
                last += int((zone / "max_energy_range_uj").read_text())
            total += last - first
        return total / 1000


def find_meter(root: Path = _ROOT) -> EnergyMeter | str:
    """Return the meter of this machine, or why there is none."""
    zones = sorted(path for path in (root / _ZONES).glob("*-rapl:*") if path.name.count(":") == 1)
    if not zones:
        return f"the kernel shows no RAPL counter in /{_ZONES}"
    meter = EnergyMeter(tuple(zones))
    try:
        meter.read()
    except StageError as error:
        return f"the RAPL counter cannot be read ({error.__cause__}); it needs root, or read permission on energy_uj"
    return meter

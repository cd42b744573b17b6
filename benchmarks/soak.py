"""Long runs and injected faults: nothing grows, and no acknowledged write is lost, changed or repeated.

python benchmarks/soak.py nightly    a nightly suite repeated in one folder: disk, memory, handles, threads, verdicts
python benchmarks/soak.py faults     a registry under kills, full disks, clock jumps and slow disks
"""

from __future__ import annotations

import sys

import soak_faults
import soak_nightly
import typer

app = typer.Typer(help=__doc__, add_completion=False, pretty_exceptions_enable=False)
for _command in (soak_nightly.nightly, soak_faults.faults):
    app.command()(_command)


if __name__ == "__main__":
    sys.exit(app())

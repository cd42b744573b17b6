"""Long runs and injected faults: nothing grows, and no acknowledged write is lost, changed or repeated.

python benchmarks/soak.py nightly    a nightly suite repeated in one folder: disk, memory, handles, threads, verdicts
python benchmarks/soak.py faults     a registry under kills, full disks, clock jumps and slow disks
python benchmarks/soak.py search     searches under the same faults, against the same search without
python benchmarks/soak.py ray        a search that loses one of two Ray nodes, against one that loses none
python benchmarks/soak.py device     benchmarks on a device over SSH, with lost connections and changed results
"""

from __future__ import annotations

import sys

import soak_device
import soak_faults
import soak_nightly
import soak_search
import typer

app = typer.Typer(help=__doc__, add_completion=False, pretty_exceptions_enable=False)
for _command in (soak_nightly.nightly, soak_faults.faults, soak_search.search, soak_search.ray, soak_device.device):
    app.command()(_command)


if __name__ == "__main__":
    sys.exit(app())

"""Benchmarks of `compress search`.

python benchmarks/search.py collect    runs every recipe of a small space to every rung (an hour; can be resumed)
python benchmarks/search.py replay     100 searches replayed on these recorded trials, against random search
python benchmarks/search.py samplers   the same replays with Optuna's samplers in place of the engine
python benchmarks/search.py ray        a search on one worker and on two, with one processor each
python benchmarks/search.py size       predicted bytes of unseen recipes, against the bytes of their files
python benchmarks/search.py emulate    searches of the quickstart's space with trials emulated by a fitted model
python benchmarks/search.py record     adds the trials of real searches to those that the emulation is fitted to
python benchmarks/search.py olive      Olive's joint search against ours on the same task
python benchmarks/search.py found      the recipe that a search found, against the recipe written by hand
"""

from __future__ import annotations

import sys

import search_emulated
import search_forecasts
import search_found
import search_olive
import search_replay
import search_samplers
import search_workers
import search_world
import typer

app = typer.Typer(help=__doc__, add_completion=False)
for _command in (
    search_replay.collect,
    search_replay.replay,
    search_samplers.samplers,
    search_workers.ray,
    search_olive.olive,
    search_found.found,
    search_world.record,
    search_emulated.emulate,
    *search_forecasts.commands(),
):
    app.command()(_command)

if __name__ == "__main__":
    sys.exit(app())

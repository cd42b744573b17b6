"""Count the distinct functions of `compress` that a run calls before its first stage.

    python benchmarks/calls_before_first_stage.py [RECIPE] [--artifacts FOLDER] [--list]

A stage counts as reached when its `run` is called or, with a filled cache, when its output is read from the cache.
Bodies of modules and classes, comprehensions and functions called while a module is imported are left out.
Set PYTHONPATH to measure another checkout.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

_BODIES = ("<module>", "<genexpr>", "<listcomp>", "<setcomp>", "<dictcomp>")


class FirstStageReached(BaseException):
    """Ends the run once the first stage is reached. Not an `Exception`, so that no handler catches it."""


class CallTrace:
    """Distinct functions of a package, in the order of their first call, until a stage is reached."""

    def __init__(self, package: Path) -> None:
        self.package = f"{package}/"
        self.functions: dict[CodeType, None] = {}
        self.reached = False

    def record(self, frame: FrameType, event: str, value: Any) -> None:
        """Record a call, and stop at a stage's `run` or when an output is read from the cache (`sys.setprofile`)."""
        code = frame.f_code
        if self.reached or event not in ("call", "return") or not code.co_filename.startswith(self.package):
            return
        if event == "return":
            if code.co_name == "obtain" and isinstance(value, tuple) and value[1] is True:
                self._stop()
            return
        if code.co_name == "run" and "kind" in getattr(type(frame.f_locals.get("self")), "model_fields", {}):
            self._stop()
        # Class bodies have `__qualname__` among their locals.
        if code.co_name not in _BODIES and "__qualname__" not in frame.f_locals and not _is_importing(frame):
            self.functions[code] = None

    def _stop(self) -> None:
        if not self.reached:
            self.reached = True
            raise FirstStageReached

    def files(self) -> Counter[str]:
        """Return the number of functions per file."""
        return Counter(code.co_filename.removeprefix(self.package) for code in self.functions)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_globals.get("__name__") != "__main__":
            return True
        frame = frame.f_back
    return False


def trace_run(recipe: str, artifacts: str) -> CallTrace:
    """Run a recipe by the command line until its first stage and return the calls."""
    import compress

    trace = CallTrace(Path(compress.__file__).parent)
    sys.setprofile(trace.record)
    sys.argv = ["compress", "run", recipe, "--artifacts", artifacts]
    try:
        from compress.cli import main

        main()
    except FirstStageReached:
        pass
    finally:
        sys.setprofile(None)
    if not trace.reached:
        raise SystemExit("The run ended before a stage was reached.")
    return trace


def main() -> None:
    """Print the number of functions and files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", nargs="?", default="recipes/tiny.yaml")
    parser.add_argument("--artifacts", help="folder with the cache to use; default: a new, empty one")
    parser.add_argument("--list", action="store_true", help="list the functions, file by file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as empty:
        trace = trace_run(options.recipe, options.artifacts or empty)
    if options.list:
        for code in trace.functions:
            sys.stdout.write(f"{code.co_filename.removeprefix(trace.package)}: {code.co_qualname}\n")
    sys.stdout.write(f"{len(trace.functions)} functions in {len(trace.files())} files\n")


if __name__ == "__main__":
    main()

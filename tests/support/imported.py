"""Packages that some code imports in a new Python process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def packages_imported_by(code: str, *arguments: str | Path) -> set[str]:
    """Return imported packages outside the standard library; the code finds ``arguments`` in ``sys.argv[1:]``."""
    ending = "import sys\nprint(*{name.split('.')[0] for name, module in sys.modules.items() if module})"
    command = [sys.executable, "-c", f"import sys\n{code}\n{ending}", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    names = {name for name in done.stdout.splitlines()[-1].split() if not name.startswith("_")}
    return names - sys.stdlib_module_names

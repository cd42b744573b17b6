#!/usr/bin/env python3
"""Install the newest versions that pyproject.toml permits into a copy of the tree, run the quick tests, report.

Usage: `upgrade.py [--output report.md] [PYTEST_ARGUMENT ...]`. Exit code 1: something broke. To accept the
versions, copy constraints.txt and .ci/requirements/ from the folder that the report names.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
QUICK = ("-m", "not slow and not browser and not alone", "-n", "2", "--dist", "loadfile")


def main() -> None:
    """Try the upgrade and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("upgrade.md"))
    arguments, pytest_arguments = parser.parse_known_args()
    copy = Path(tempfile.mkdtemp(prefix="compress-upgrade-"))
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(copy)], check=True)
    before = _versions(copy)
    steps = {
        "resolve": [sys.executable, ".ci/requirements.py", "--upgrade"],
        "install": ["make", "--jobs=2", "setup"],
        "test": [".venv/bin/python", "-m", "pytest", "-q", "--junitxml=upgrade.xml", *(pytest_arguments or QUICK)],
    }
    failed = next((step for step, command in steps.items() if not _ran(command, copy / f"{step}.log")), None)
    changed = {name: version for name, version in _versions(copy).items() if before.get(name) != version}
    lines = [
        f"# {f'Failed: {failed}' if failed else 'All tests pass'} with {len(changed)} newer packages, in {copy}",
        "",
    ]
    lines += ["| package | now | newest |", "|---|---|---|"]
    lines += [f"| {name} | {before.get(name, '')} | {version} |" for name, version in changed.items()]
    if failed:
        lines += ["", *(_failures(copy / "upgrade.xml") or (copy / f"{failed}.log").read_text().splitlines()[-20:])]
    arguments.output.write_text("\n".join(lines) + "\n")
    sys.stdout.write(f"{lines[0][2:]}; see {arguments.output}\n")
    sys.exit(failed is not None)


def _ran(command: list[str], log: Path) -> bool:
    with log.open("w") as output:
        return subprocess.run(command, cwd=log.parent, stdout=output, stderr=subprocess.STDOUT).returncode == 0


def _versions(tree: Path) -> dict[str, str]:
    lines = (tree / "constraints.txt").read_text().lower().replace("_", "-").split()
    return dict(line.split("==") for line in lines)


def _failures(results: Path) -> list[str]:
    """Return a line for each failed test, with the first line of its error."""
    if not results.exists():
        return []
    cases = ElementTree.parse(results).iter("testcase")
    failures = ((case, child) for case in cases for child in case if child.tag in ("failure", "error"))
    return [
        f"- {case.get('classname')}.{case.get('name')}: {(child.get('message') or '').splitlines()[0]}"
        for case, child in failures
    ]


if __name__ == "__main__":
    main()

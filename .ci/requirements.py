#!/usr/bin/env python3
"""Write .ci/requirements/*.txt, the packages that `make setup` installs, each with the SHA-256 of its files.

Usage: `requirements.py [--upgrade]`. The versions are those of constraints.txt. With --upgrade they are the newest that
pyproject.toml permits, and constraints.txt is written too.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".ci" / "requirements"
CONSTRAINTS = ROOT / "constraints.txt"
UV = "uv==0.13.9"
PYTHON = "3.11.7"
BUILD = "setuptools\nsetuptools-scm\n"
"""Packages that build others from source, which are installed first. The second one gives seqeval its version."""
APART = (
    "jaxlib", "litert-converter", "ray", "openvino", "xllamacpp", "executorch", "ai-edge-litert", "coremltools",
    "onnxruntime-genai", "pandas", "antlr4-python3-runtime", "rouge-score", "seqeval",
)  # fmt: skip
"""Packages that take pip longest to unpack or to build, on one core: they are installed beside the core."""
TORCH = ("torch", "torchvision")
"""Packages with a build for CPUs alone, whose version ends in +cpu, and one with CUDA, which needs further packages."""

Requirements = dict[str, tuple[str, list[str]]]
"""Name -> version and hashes."""


def main() -> None:
    """Write the requirements, and with --upgrade the constraints."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([f"{folder}/bin/pip", "install", "-q", UV], check=True)
        uv = f"{folder}/bin/uv"
        if "--upgrade" in sys.argv[1:]:
            newest = _compile(uv, "--extra", "dev", *_limits())
            names = newest.keys() - {"setuptools", "six"}
            lines = [f"{name}=={newest[name][0].removesuffix('+cpu')}\n" for name in sorted(names)]
            CONSTRAINTS.write_text("".join(lines))
        pinned = ("--constraint", str(CONSTRAINTS))
        everything = _compile(uv, "--extra", "dev", *pinned)
        if not all(everything[name][0].endswith("+cpu") for name in TORCH):
            sys.exit(
                "torch has no build for CPUs here: name its index in UV_EXTRA_INDEX_URL, or a folder in UV_FIND_LINKS"
            )
        core = _compile(uv, *pinned).keys()
        build = _compile(uv, *pinned, source="-", content=BUILD)
        with_cuda = _compile(uv, "--extra", "dev", *pinned, links=False)
    FOLDER.mkdir(exist_ok=True)
    parts = {"torch-cpu": {*TORCH}, "core": core - build.keys() - {*TORCH}, "apart": {*APART}}
    parts["rest"] = everything.keys() - build.keys() - set().union(*parts.values())
    _write(FOLDER / "build.txt", build)
    for part, names in parts.items():
        _write(FOLDER / f"{part}.txt", {name: everything[name] for name in sorted(names)})
    names = {*TORCH} | (with_cuda.keys() - everything.keys())
    _write(FOLDER / "torch-cuda.txt", {name: with_cuda[name] for name in sorted(names)})


def _compile(
    uv: str, *options: str, links: bool = True, source: str = "pyproject.toml", content: str | None = None
) -> Requirements:
    """Return what uv resolves.

    Args:
        uv: The program.
        options: Its further options.
        links: Whether further indexes and folders of wheels count, in which builds for CPUs lie.
        source: File with the requirements, or `-` for the content.
        content: Lines of requirements.
    """
    variables = {name: value for name, value in os.environ.items() if links or not name.startswith("UV_")}
    if links and "PIP_FIND_LINKS" in variables:
        variables.setdefault("UV_FIND_LINKS", variables["PIP_FIND_LINKS"])
    command = [
        uv, "pip", "compile", source, "--quiet", "--generate-hashes", "--no-header", "--no-annotate",
        "--python-version", PYTHON, *options,
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, env=variables, input=content, stdout=subprocess.PIPE, text=True, check=True
    )
    requirements: Requirements = {}
    for name, version, hashes in re.findall(r"^([\w.-]+)==(\S+)((?: \\\n    --hash=\S+)*)", done.stdout, re.MULTILINE):
        requirements[name] = version, re.findall(r"--hash=(\S+)", hashes)
    return requirements


def _limits() -> Sequence[str]:
    """Return the constraint that pip has on this machine, such as the newest version for which it has a wheel."""
    command = [sys.executable, "-m", "pip", "config", "get", "global.constraint"]
    file = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return ("--constraint", file) if file else ()


def _write(path: Path, requirements: Requirements) -> None:
    lines = ["# Written by `make requirements`.\n"]
    for name, (version, hashes) in requirements.items():
        lines.append(" \\\n".join([f"{name}=={version}", *(f"    --hash={digest}" for digest in hashes)]) + "\n")
    path.write_text("".join(lines))


if __name__ == "__main__":
    main()

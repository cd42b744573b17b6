"""This package as one archive, and the packages that its harness needs, for a device to run the same code."""

from __future__ import annotations

import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("numpy", "onnxruntime", "psutil", "scipy")
"""What the launches and ONNX Runtime import; neither torch nor transformers."""
TRANSCRIBING = ("tokenizers",)
"""And what turns a recording's tokens into text."""
PROGRAM = ("__init__.py", "devices/__init__.py", "devices/agent.py", "devices/bootstrap.py")
"""What a session begins with, before the archive is there."""
_ROOT = Path(__file__).parent.parent
_BUILDS = {"onnxruntime": "onnxruntime-gpu"}
_EPOCH = (1980, 1, 1, 0, 0, 0)


def write_archive(place: Path) -> None:
    """Write every module of the package, in an archive that has the same bytes for the same modules."""
    with zipfile.ZipFile(place, "w") as archive:
        for file in sorted(_ROOT.rglob("*.py")):
            entry = zipfile.ZipInfo(f"{_ROOT.name}/{file.relative_to(_ROOT).as_posix()}", _EPOCH)
            archive.writestr(entry, file.read_bytes(), zipfile.ZIP_DEFLATED)


def program() -> dict[str, str]:
    """The modules of `PROGRAM` by their paths."""
    return {f"{_ROOT.name}/{path}": (_ROOT / path).read_text(encoding="utf-8") for path in PROGRAM}


def requirements(packages: tuple[str, ...]) -> list[str]:
    """Each at the version that is installed here, so that both measure the same."""
    return [f"{name}=={_version(name)}" for name in packages]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return version(_BUILDS[name])

"""What a bundle costs over the wire: as a zip; for browsers, each file that the page asks for in brotli at its best."""

from __future__ import annotations

import json
import shutil
import subprocess
import zipfile
from collections.abc import Mapping
from pathlib import Path

from compress.inspection.size_advice import size_advice
from compress.plugins.apps.bundled_format import Contents
from compress.plugins.apps.manifest import CARD, SELFTEST
from compress.utils.errors import InputError, StageError

_UNASKED = ("examples/", "runtime/LICENSE", CARD, SELFTEST)
_SECONDS = 600
# Python has no brotli of its own; whoever bundles for browsers has Node.
_SIZES = """
const [zlib, fs] = [require("zlib"), require("fs")], c = zlib.constants;
const params = {[c.BROTLI_PARAM_QUALITY]: 11, [c.BROTLI_PARAM_LGWIN]: 24};
const size = (path) => zlib.brotliCompressSync(fs.readFileSync(path), {params}).length;
process.stdout.write(JSON.stringify(JSON.parse(fs.readFileSync(0, "utf8")).map(size)));
"""


def transferred(folder: Path) -> dict[str, int]:
    """Path -> bytes of each file of a browser's bundle that its page may ask for.

    Raises `InputError` without a Node, whose brotli it is, and `StageError` where that fails.
    """
    program = shutil.which("node")
    if program is None:
        raise InputError("A budget for browsers is counted in brotli, which takes Node.", hint="put node on PATH")
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    names = [name for name in names if not name.startswith(_UNASKED)]
    try:
        done = subprocess.run(
            [program, "-e", _SIZES], cwd=folder, input=json.dumps(names), capture_output=True, text=True,
            timeout=_SECONDS, check=True,
        )  # fmt: skip
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise StageError(f"Node could not compress the bundle: {error}") from error
    return dict(zip(names, json.loads(done.stdout), strict=True))


def zipped(archive: Path) -> dict[str, int]:
    """Path -> bytes of each file in a bundle's zip."""
    with zipfile.ZipFile(archive) as opened:
        return {entry.filename: entry.compress_size for entry in opened.infolist()}


_MANY = 5
_MEGABYTE = 1e6


def check_budget(sizes: Mapping[str, int], most: int, model: str, contents: Contents) -> None:
    """Raises `InputError` for more than ``most`` bytes, with the largest files and what makes them smaller.

    ``sizes`` are those of the files as they are transferred.
    """
    found = sum(sizes.values())
    if found <= most:
        return
    largest = sorted(sizes, key=lambda name: -sizes[name])[:_MANY]
    runtime = sum(size for name, size in sizes.items() if name.startswith("runtime/"))
    weighed = sum(size for name, size in sizes.items() if name == model or name.startswith(f"{model}/"))
    shown = ", ".join(f"{name} {sizes[name] / _MEGABYTE:.2f} MB" for name in largest)
    raise InputError(
        f"The bundle has {found / _MEGABYTE:.2f} MB compressed, {(found - most) / _MEGABYTE:.2f} MB too many.",
        where=f"biggest, compressed: {shown}",
        expected=f"at most {most} bytes",
        hint="; ".join(size_advice(contents.stored, weighed, runtime, most)),
    )

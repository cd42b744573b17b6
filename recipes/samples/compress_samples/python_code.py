"""Python source files, one row per file."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from compress.utils.errors import SampleError
from compress.utils.progress import Progress

TEST_BYTES = 200_000


def write_code(members: Path, files: Path, progress: Progress) -> None:
    """Write train and test.parquet (columns file, text), split by the SHA-256 of file names. Raises `SampleError`."""
    sources = {path.relative_to(members).as_posix(): path.read_text(encoding="utf-8") for path in members.rglob("*.py")}
    texts = {name: text for name, text in sources.items() if text.strip()}
    splits: dict[str, list[str]] = {"test": [], "train": []}
    size = 0
    for name in sorted(texts, key=lambda name: hashlib.sha256(name.encode()).digest()):
        splits["test" if size < TEST_BYTES else "train"].append(name)
        size += len(texts[name].encode())
    if not all(splits.values()):
        raise SampleError(f"The package holds {size:,} bytes of Python.", expected=f"more than {TEST_BYTES:,}")
    for split, names in splits.items():
        table = pa.table({"file": names, "text": [texts[name] for name in names]})
        pa.parquet.write_table(table, files / f"{split}.parquet")
    progress.note(f"python-code: {len(splits['train'])} files in train, {len(splits['test'])} in test")

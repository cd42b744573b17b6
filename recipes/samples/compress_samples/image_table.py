"""Parquet files with images, in the format of the feature `Image` of Hugging Face datasets."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from PIL import Image


def png(pixels: np.ndarray) -> bytes:
    """Encode an image [height, width] or [height, width, 3] uint8 as PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=2)
    return file.getvalue()


def write_images(
    path: Path, encoded: Sequence[bytes], labels: Sequence[str] | None, more: Mapping[str, Sequence[str]] | None = None
) -> None:
    """Write the columns `image` (`bytes` and an empty `path`), `label` if given, and ``more`` by name."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {"image": pa.array([{"bytes": content, "path": None} for content in encoded], image)}
    features = {"image": {"_type": "Image"}}
    for name, values in {**({} if labels is None else {"label": labels}), **(more or {})}.items():
        columns[name] = pa.array(list(values), pa.string())
        features[name] = {"dtype": "string", "_type": "Value"}
    table = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pa.parquet.write_table(table, path)

"""Values of a column in Arrow chunks. The chunks of a large column are in a temporary file, mapped into memory."""

from __future__ import annotations

import json
import mmap
import tempfile
import weakref
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import IO, TYPE_CHECKING, Any

from compress.utils.environment import user_cache
from compress.utils.errors import StorageError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

IN_MEMORY_BYTES = 64 << 20
"""Size of a column from which on its further chunks are written to a file."""
_PART_ROWS, _PART_CHARACTERS = 10_000, 4 << 20
_SHORT_RUN = 256
_maps: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()


@dataclass(frozen=True)
class Chunk:
    """Some values of a column: an Arrow array, whose strings are JSON documents if ``is_json``, or a list."""

    values: pa.Array | list[Any]
    is_json: bool = False

    def to_list(self) -> list[Any]:
        """Return the values as Python objects."""
        if isinstance(self.values, list):
            return self.values
        values: list[Any] = self.values.to_pylist()
        return [value and json.loads(value) for value in values] if self.is_json else values


class Values(Sequence[Any]):
    """Sequence of the values of a column, of which few are Python objects at a time."""

    def __init__(self, chunks: Iterable[Chunk]) -> None:
        self.chunks = [chunk for chunk in chunks if len(chunk.values)]
        self._starts = [0, *accumulate(len(chunk.values) for chunk in self.chunks)]

    def __len__(self) -> int:
        return self._starts[-1]

    def __iter__(self) -> Iterator[Any]:
        for chunk in self.chunks:
            yield from chunk.to_list()
            release_pages()

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        position = int(index) % len(self)
        number = bisect_right(self._starts, position) - 1
        chunk, start = self.chunks[number], position - self._starts[number]
        return Chunk(chunk.values[start : start + 1], chunk.is_json).to_list()[0]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Values | list):
            return NotImplemented
        return len(self) == len(other) and all(left == right for left, right in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def take(self, indices: np.ndarray) -> Values:
        """Return the values at rising ``indices``, [n] int."""
        chunks = []
        for chunk, (start, end) in zip(self.chunks, pairwise(self._starts), strict=True):
            first, last = indices.searchsorted((start, end))
            own = indices[first:last] - start
            if isinstance(chunk.values, list):
                chunks.append(Chunk([chunk.values[index] for index in own.tolist()]))
            else:
                chunks.append(chunk if len(own) == end - start else Chunk(chunk.values.take(own), chunk.is_json))
        return Values(chunks)


class ColumnWriter:
    """Collects the values of a column in chunks, by default of whatever types the values have.

    Strings, integers, floats and booleans become Arrow arrays, other values are kept as JSON if that is exact. Chunks
    after the first `IN_MEMORY_BYTES` are written to a temporary file without a name, which ends with the column.

    Args:
        data_type: The Arrow type of all chunks, if it is known.
    """

    def __init__(self, data_type: pa.DataType | None = None) -> None:
        self.data_type = data_type
        self.has_values = False
        self._pending: list[Any] = []
        self._characters = 0
        self._bytes = 0
        # None stands for the next chunk of the file.
        self._chunks: list[Chunk | None] = []
        self._file: IO[bytes] | None = None
        self._offsets: list[tuple[int, bool]] = []

    def append(self, value: Any) -> None:
        """Append a value. Raises `StorageError` if the temporary file cannot be written."""
        self._pending.append(value)
        if value is not None:
            self.has_values = True
            if isinstance(value, str):
                self._characters += len(value)
        if len(self._pending) >= _PART_ROWS or self._characters >= _PART_CHARACTERS:
            self._flush()

    def add(self, chunk: Chunk) -> None:
        """Append a chunk, which stays where it is."""
        self._flush()
        self._chunks.append(chunk)

    def finish(self) -> Values:
        """Return all values."""
        self._flush()
        stored = self._stored()
        return Values(next(stored) if chunk is None else chunk for chunk in self._chunks)

    def _flush(self) -> None:
        if not self._pending:
            return
        chunk = _chunk_of(self._pending, self.data_type)
        self._pending, self._characters = [], 0
        if not isinstance(chunk.values, list):
            self._bytes += chunk.values.nbytes
            if self._bytes > IN_MEMORY_BYTES:
                self._write(chunk)
                return
        self._chunks.append(chunk)

    def _write(self, chunk: Chunk) -> None:
        import pyarrow as pa

        folder = user_cache() / "rows"
        try:
            if self._file is None:
                # Not the system's folder of temporary files, which may be in memory.
                folder.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by `_stored`
            self._chunks.append(None)
            self._offsets.append((self._file.tell(), chunk.is_json))
            batch = pa.record_batch([chunk.values], names=["values"])
            with pa.ipc.new_stream(self._file, batch.schema) as stream:
                stream.write_batch(batch)
        except OSError as error:
            raise StorageError(
                f"The rows of a large data file cannot be stored: {error.strerror or error}.",
                where=str(folder),
                expected="as much free space as the columns that are read take",
                hint="free some space, or set XDG_CACHE_HOME to a folder that can be written",
            ) from error

    def _stored(self) -> Iterator[Chunk]:
        """Yield the chunks of the file, mapped into memory. Their buffers keep the file."""
        import pyarrow as pa

        if self._file is None:
            return
        with self._file as file:
            file.flush()
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        _maps.add(mapped)
        buffer = pa.py_buffer(mapped)
        for offset, is_json in self._offsets:
            with pa.ipc.open_stream(buffer.slice(offset)) as stream:
                yield Chunk(stream.read_next_batch().column(0), is_json)


def _chunk_of(values: list[Any], data_type: pa.DataType | None) -> Chunk:
    import pyarrow as pa

    if data_type is not None:
        return Chunk(pa.array(values, data_type))
    kinds = {type(value) for value in values if value is not None}
    types = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
    try:
        if not kinds or (len(kinds) == 1 and kinds <= types.keys()):
            return Chunk(pa.array(values, types[kinds.pop()] if kinds else pa.string()))
        if kinds <= {*types, list, dict}:
            documents = [None if value is None else json.dumps(value) for value in values]
            return Chunk(pa.array(documents, pa.string()), is_json=True)
    except (UnicodeEncodeError, OverflowError, TypeError, ValueError, RecursionError):
        # Unpaired surrogates, and integers of more than 64 bits.
        pass
    return Chunk(values)


def release_pages() -> None:
    """Let the system take back the memory of mapped values, which it reads again from the file when they are used."""
    if hasattr(mmap, "MADV_DONTNEED"):
        for mapped in list(_maps):
            mapped.madvise(mmap.MADV_DONTNEED)


def parts(values: Sequence[Any]) -> Iterator[Chunk]:
    """Yield the values of a column in chunks."""
    if isinstance(values, Values):
        yield from values.chunks
    else:
        for start in range(0, len(values), _PART_ROWS):
            yield Chunk(list(values[start : start + _PART_ROWS]))


def values_of(column: pa.ChunkedArray) -> Iterator[Any]:
    """Yield the values of a table's column. Python objects of a whole column may take more memory than the column."""
    for chunk in column.chunks:
        for start in range(0, len(chunk), _PART_ROWS):
            yield from chunk.slice(start, _PART_ROWS).to_pylist()
            release_pages()


def take_values(values: Sequence[Any], indices: np.ndarray) -> Sequence[Any]:
    """Return the values at rising ``indices``, [n] int."""
    return values.take(indices) if isinstance(values, Values) else [values[index] for index in indices.tolist()]


def take_rows(table: pa.Table, indices: np.ndarray) -> pa.Table:
    """Return the rows of a table at rising ``indices``, [n] int. If most follow each other, they are not copied."""
    import numpy as np
    import pyarrow as pa

    cuts = np.flatnonzero(np.diff(indices) != 1) + 1
    if _SHORT_RUN * len(cuts) >= len(indices):
        # Taking from all chunks at once would join them in memory.
        batches, start = [], 0
        for batch in table.to_batches():
            first, last = indices.searchsorted((start, start + len(batch)))
            batches += [batch.take(pa.array(indices[first:last] - start))] if last > first else []
            start += len(batch)
        return pa.Table.from_batches(batches, table.schema)
    bounds = [0, *cuts.tolist(), len(indices)]
    return pa.concat_tables([table.slice(int(indices[start]), end - start) for start, end in pairwise(bounds)])


def take_lines(lines: Sequence[int], indices: np.ndarray) -> array[int]:
    """Return the line of each row at ``indices``, [n] int."""
    import numpy as np

    return array("Q", np.asarray(lines, np.uint64)[indices].tobytes())

"""Keys and values that stay where they are: each token's are written behind those before it, and nothing is copied."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnxruntime

from compress.formats.onnx.model import SHARED_CACHE
from compress.runtimes.runtime import Batch, TensorType

_ROOM = 256
_LOGITS = "logits"


class SharedCache:
    """The cache of one text in buffers that are input and output of the graph at once, with room for what follows."""

    def __init__(
        self, session: onnxruntime.InferenceSession, names: Mapping[str, str], types: Mapping[str, TensorType]
    ) -> None:
        """``names`` has for each input of the cache its output, ``types`` what each input takes."""
        self._session, self._names, self._types = session, names, types
        self._binding = session.io_binding()
        self._buffers: dict[str, np.ndarray] = {}

    def predict(self, feed: Batch, seen: int, total: int) -> np.ndarray:
        """Logits of the tokens ``seen`` to ``total``; the cache then holds them too. Raises ONNX Runtime's errors."""
        if not self._buffers or next(iter(self._buffers.values())).shape[2] < total:
            self._make_room(seen, total)
        for name, array in feed.items():
            self._binding.bind_cpu_input(name, array)
        # Bound anew, for otherwise it would be written into the array of the call before.
        self._binding.bind_output(_LOGITS)
        self._session.run_with_iobinding(self._binding)
        logits: np.ndarray = self._binding.get_outputs()[-1].numpy()
        return logits

    def _make_room(self, seen: int, total: int) -> None:
        room = -(-total // _ROOM) * _ROOM
        self._binding.clear_binding_inputs()
        self._binding.clear_binding_outputs()
        for past, present in self._names.items():
            dtype, shape = self._types[past]
            buffer = np.zeros((1, int(shape[1] or 0), room, int(shape[3] or 0)), dtype)
            if seen:
                buffer[:, :, :seen] = self._buffers[past][:, :, :seen]
            self._buffers[past] = buffer
            value = onnxruntime.OrtValue.ortvalue_from_numpy(buffer)
            self._binding.bind_ortvalue_input(past, value)
            self._binding.bind_ortvalue_output(present, value)


def says_so(session: onnxruntime.InferenceSession) -> bool:
    """Whether the graph's metadata say that input and output of its cache may be one buffer."""
    return bool(session.get_modelmeta().custom_metadata_map.get(SHARED_CACHE) == "1")

"""Session of a complete transformers module, with numpy arrays as inputs and outputs, in float32."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.formats.generation.decoder import likeliest
from compress.formats.runtime import Batch, TensorType, check_inputs
from compress.utils.errors import InputError, StageError, first_line

if TYPE_CHECKING:
    import torch

_CACHES = ("cache", "past_key_values", "cache_params", "state")
"""What transformers' classes call keys and values, or states of recurrences, as argument and as output; the older
names are on their way out, and a class may have one for each."""
_IDS, _MASK, _LAST = "input_ids", "attention_mask", "logits_to_keep"
FAILURES = (RuntimeError, TypeError, ValueError, IndexError, AttributeError)


class TorchSession:
    """Session of a module that was loaded whole."""

    provider = "cpu"

    def __init__(self, module: Any, where: str, settings: Mapping[str, Any]) -> None:
        self.module, self.where, self.settings = module, where, dict(settings)
        self.takes = frozenset(inspect.signature(module.forward).parameters)
        self.cache_name = next((name for name in _CACHES if name in self.takes), None)
        self.inputs = (str(getattr(module, "main_input_name", "pixel_values")),)
        self.input_types: Mapping[str, TensorType] = {}
        self.output_types: Mapping[str, TensorType] = {}

    def predict(self, batch: Batch) -> dict[str, np.ndarray]:
        """See `Session.predict`; types and shapes are not known before."""
        check_inputs(self.inputs, batch, self.where)
        without_cache = {"use_cache": False} if "use_cache" in self.takes else {}
        outputs = self.run({name: array for name, array in batch.items() if name in self.takes}, **without_cache)
        return {name: as_array(value) for name, value in outputs.items() if hasattr(value, "detach")}

    def run(self, batch: Batch, **options: Any) -> Any:
        """Return the module's outputs for arrays and ``options``; raise `StageError` if the module fails."""
        import torch

        try:
            with torch.inference_mode():
                return self.module(**{name: as_tensor(array) for name, array in batch.items()}, **options)
        except FAILURES as error:
            raise StageError(f"The model failed on a batch: {first_line(error)}", where=self.where) from error

    def decoder(self) -> TorchDecoder:
        """Return a greedy decoder that uses transformers' own cache."""
        return TorchDecoder(self)


class TorchDecoder:
    """Greedy decoder that uses transformers' own cache."""

    def __init__(self, session: TorchSession) -> None:
        self._session = session
        self._name = session.cache_name
        self._cache: Any = None
        self._ids: list[int] = []
        self.vocabulary = int(session.module.config.get_text_config().vocab_size)

    @property
    def cached(self) -> bool:
        """Return whether the class has a cache; without one, every token runs the whole text again."""
        return self._name is not None

    def prefill(self, ids: Sequence[int]) -> int:
        """Start a new text with one or more ``ids`` and return the next token."""
        self._cache, self._ids = None, []
        return self._answer(ids)

    def step(self, token: int) -> int:
        """Append ``token`` and return the next token."""
        return self._answer([token])

    def _answer(self, ids: Sequence[int]) -> int:
        self._ids += ids
        fed = self._ids if self._name is None else ids
        batch, takes = {_IDS: np.array([fed])}, self._session.takes
        if _MASK in takes:
            batch[_MASK] = np.ones((1, len(self._ids)), np.int64)
        options: dict[str, Any] = {_LAST: 1} if _LAST in takes else {}
        if self._name is not None:
            options |= {"use_cache": True, self._name: self._cache}
        outputs = self._session.run(batch, **options)
        if self._name is not None:
            self._cache = cache_of(outputs)
        return likeliest(as_array(outputs.logits[0, -1]), self._session.where)


def cache_of(outputs: Any) -> Any:
    """Return the cache among a module's outputs."""
    return next(cache for name in _CACHES if (cache := outputs.get(name)) is not None)


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor as a numpy array, with floats of any width in float32."""
    whole = tensor.detach().float() if tensor.is_floating_point() else tensor.detach()
    return np.asarray(whole.cpu().numpy())


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """Return an array as a torch tensor that shares its memory."""
    import torch

    if array.dtype.kind not in "fiub":
        raise InputError(f"Arrays of {array.dtype} cannot be given to a model.", expected="numbers")
    return torch.from_numpy(np.ascontiguousarray(array))

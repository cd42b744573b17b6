"""Runtime that runs a checkpoint with transformers on the processor in float32, and its session."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.formats.generation.decoder import likeliest
from compress.formats.runtime import Batch, Session, TensorType, check_inputs, check_target
from compress.formats.target_profile import Target
from compress.tasks.capability import DESCRIBES_IMAGES, REWRITES, SINGLE_CALL, TRANSCRIBES
from compress.utils.errors import InputError, StageError, first_line

if TYPE_CHECKING:
    import torch
    from transformers.utils import ModelOutput

    from compress.models.model import TorchModel


_CACHES = ("cache", "past_key_values", "cache_params", "state")
"""Names of the cache as argument and output of transformers' classes.

A class may have a current and a deprecated name.
"""
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

    def run(self, batch: Batch, **options: Any) -> ModelOutput:
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
        inputs = self._ids if self._name is None else ids
        # Without a cache the whole text runs again for every token.
        batch, takes = {_IDS: np.array([inputs])}, self._session.takes
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


class TorchRuntime:
    """Runtime for folders of safetensors."""

    name = "torch"

    def open(self, artifact: Path, target: Target, threads: int) -> Session:
        """Load the model of ``artifact``, a folder or its one file; ``threads`` work within an operator."""
        check_target(self, target, threads)
        import torch

        from compress.formats.safetensors.folder import has_integers, load_folder

        task, model = load_folder(artifact)
        folder = artifact.parent if artifact.is_file() else artifact
        settings = {
            "runtime": f"torch {version('torch')}, transformers {version('transformers')}",
            "provider": target.provider,
            "intra_op_threads": threads,
            "computes_in": "float32",
            "integers_made_float": has_integers(folder),
        }
        session = _opened(model, folder, settings)
        previous_threads = torch.get_num_threads()
        torch.set_num_threads(threads)
        # The number is the process's: it ends with the session.
        weakref.finalize(session, torch.set_num_threads, previous_threads)
        if not isinstance(session, TorchSession):
            return session
        if TRANSCRIBES in task.capabilities and SINGLE_CALL not in task.capabilities:
            from compress.formats.safetensors.texts import open_transcriber

            return open_transcriber(session, folder)
        if REWRITES in task.capabilities:
            from compress.formats.safetensors.texts import GeneratedText

            return GeneratedText(session, model.processor)
        if DESCRIBES_IMAGES in task.capabilities:
            from compress.formats.safetensors.texts import answers_to_images

            return answers_to_images(session, model.processor, folder)
        return session

    def unavailable(self, target: Target) -> str | None:
        """Return a message that names the missing package if this machine lacks the target, or ``None``."""
        missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
        return f"{missing[0]} is not installed (pip install {missing[0]})" if missing else None

    def build(self) -> str:
        """Return the packages' versions."""
        return f"torch {version('torch')}, transformers {version('transformers')}"

    def remark(self, artifact: Path) -> str | None:
        """Return a note if integers were converted to floats; see `Remarks`."""
        from compress.formats.safetensors.folder import has_integers

        if not has_integers(artifact):
            return None
        return (
            "its integers were made float to be run: answers are theirs, time and memory are those of float32 "
            "arithmetic and not of kernels for few bits"
        )


def _opened(model: TorchModel, folder: Path, settings: Mapping[str, object]) -> Session:
    """Return a session for the module, or for the components that draw images."""
    from compress.models.pipeline_folder import image_generation_hook

    if model.generates_images:
        session: Session = image_generation_hook("open_torch")(model, settings, str(folder))
        return session
    return TorchSession(model.module, str(folder), settings)


RUNTIME = TorchRuntime()

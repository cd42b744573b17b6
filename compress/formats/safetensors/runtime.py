"""Runtime that runs a checkpoint with transformers on the processor, in float32."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.formats.runtime import Session, check_target
from compress.formats.target_profile import Target
from compress.tasks.capability import DESCRIBES_IMAGES, REWRITES, SINGLE_CALL, TRANSCRIBES

if TYPE_CHECKING:
    from compress.models.torch_model import TorchModel


class TorchRuntime:
    """Runtime for folders of safetensors."""

    name = "torch"

    def open(self, artifact: Path, target: Target, threads: int) -> Session:
        """Load the model of ``artifact``, a folder or its one file; ``threads`` work within an operator."""
        check_target(self, target, threads)
        import torch

        from compress.formats.safetensors.folder import has_integers, load_folder
        from compress.formats.safetensors.session import TorchSession

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
            from compress.formats.safetensors.speech import open_transcriber

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
        lacking = [name for name in ("torch", "transformers") if find_spec(name) is None]
        return f"{lacking[0]} is not installed (pip install {lacking[0]})" if lacking else None

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


def _opened(model: TorchModel, folder: Path, settings: Mapping[str, Any]) -> Session:
    """Return a session for the module, or for the components that draw images."""
    from compress.formats.safetensors.session import TorchSession
    from compress.models.image_generation import image_generation_hook

    if model.generates_images:
        session: Session = image_generation_hook("open_torch")(model, settings, str(folder))
        return session
    return TorchSession(model.module, str(folder), settings)


RUNTIME = TorchRuntime()

"""What a teacher says of windows, such as its last hidden states, kept for all who read the same ones.

Logits of a vocabulary would take a hundred times as many bytes; the teacher's head makes them again from the states.
Each window is a file by what the teacher reads, so that it doesn't matter in which order, or for which student, it was
asked: it is always read alone, and its states are rounded whether they are kept or not.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from compress.stages.base import Context
from compress.stages.recovery.trainer import Body
from compress.stages.training.sequences import TokenSequences
from compress.utils.environment import package_versions
from compress.utils.storage import cache_key

_SPARE_BYTES = 1 << 30
"""Left free on the disk."""
_VERSION = 1


Said = dict[str, torch.Tensor]


@dataclass
class TeacherStates:
    """Cached states of a teacher for sequences of one length, computed by ``ask`` for token ids [1, L].

    ``folder`` None: nothing is kept.
    """

    teacher: Body
    ask: Callable[[Body, torch.Tensor], Said]
    folder: Path | None
    answered: int = 0
    found: int = 0

    def of(self, ids: torch.Tensor) -> Said:
        """Tensors [B, L, ...] for token ids [B, L]."""
        files = [None if self.folder is None else self._file(self.folder, window) for window in ids]
        known = [None if file is None else _read(file, ids.shape[1]) for file in files]
        every: list[Said] = []
        for window, file, state in zip(ids, files, known, strict=True):
            if state is not None:
                self.found += 1
            else:
                self.answered += 1
                with torch.no_grad():
                    state = self.ask(self.teacher, window[None])
                if file is not None:
                    # Several processes may write the same file.
                    partial = file.with_suffix(f".{os.getpid()}")
                    file.parent.mkdir(parents=True, exist_ok=True)
                    save_file({name: tensor.cpu().contiguous() for name, tensor in state.items()}, partial)
                    partial.replace(file)
            every.append(state)
        return {name: torch.stack([state[name].to(ids.device) for state in every]) for name in every[0]}

    def _file(self, folder: Path, ids: torch.Tensor) -> Path:
        teacher_ids = ids if self.teacher.tokens is None else self.teacher.tokens[ids.cpu()]
        name = hashlib.sha256(teacher_ids.cpu().numpy().tobytes()).hexdigest()
        return folder / name[:2] / f"{name[2:34]}.safetensors"


def _read(file: Path, tokens: int) -> Said | None:
    try:
        states: Said = load_file(file)
    except (OSError, SafetensorError):
        return None
    return states if states and all(len(tensor) == tokens for tensor in states.values()) else None


def states_key(teacher: Body, dtype: torch.dtype) -> str:
    """Return a key of everything the states depend on: the teacher's weights and config, arithmetic and versions."""
    total = hashlib.sha256()
    for name, tensor in sorted(teacher.causal.base_model.state_dict().items()):
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    config = {name: value for name, value in teacher.causal.config.to_dict().items() if not name.startswith("_")}
    about = {
        "version": _VERSION,
        "weights": total.hexdigest(),
        "config": config,
        "dtype": str(dtype),
        "packages": package_versions(("torch", "transformers")),
    }
    return cache_key(json.loads(json.dumps(about, default=str)))


def with_room(folder: Path, windows: TokenSequences, token_bytes: int, stage: str, context: Context) -> Path | None:
    """``folder``, if the disk that it will be on can take what is said of all ``windows``; else nothing is kept."""
    existing = folder.absolute()
    while not existing.is_dir():
        existing = existing.parent
    tokens = len(windows.train) * len(windows.train.inputs[0]["input_ids"])
    if shutil.disk_usage(existing).free >= tokens * token_bytes + _SPARE_BYTES:
        return folder
    context.progress.note(f"{stage}: no disk space to cache the teacher's states; they are recomputed")
    return None

"""Making a model's experts what its checkpoint keeps: a matrix each, under the names that the files have.

Which tensor of the files is which part of a fused parameter is asked of transformers itself: its own conversion, the
one that `save_pretrained` applies, is given numbers in place of weights, and where they come out says it all.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compress.checkpoints.experts import DOWN, GATE, UP, SeparateExperts
from compress.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from compress.checkpoints.checkpoint import Checkpoint

_ROLES = {"gate_up_proj": (GATE, UP), "up_proj": (UP,), "down_proj": (DOWN,)}
_MATRIX = re.compile(r"(?P<prefix>.+)\.(?P<expert>\d+)\.(?P<name>\w+)\.weight")
_SHIFT = 40
"""A number's upper bits say which tensor of the module it is in, the lower ones where in it."""


def separate_experts(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Replace fused experts by `SeparateExperts`, in place, and call all modules as the tensors of ``checkpoint`` are.

    Leaves experts alone that `why_not_separable` finds fault with.
    Raises `ModelError` where the checkpoint has other tensors than transformers would write.
    """
    fused = {name: part for name, part in model.named_modules() if is_fused(part) and not why_not_separable(part)}
    places = _stored_places(model, fused, set(checkpoint.files))
    for name, part in fused.items():
        if name in places.names:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, _separated(part, places.names[name]))
    for path in sorted(places.moved, key=lambda path: -path.count(".")):
        owner, _, leaf = path.rpartition(".")
        _rename(model.get_submodule(owner), leaf, places.moved[path])
    _check_stored(model, checkpoint)


def is_fused(module: nn.Module) -> bool:
    """Whether a module holds the weights of several experts in parameters of three dimensions."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return False
    return any(parameter.ndim > 2 for parameter in module.parameters(recurse=False))


def why_not_separable(module: nn.Module) -> str:
    """What keeps fused experts from being linear layers; nothing where they can be."""
    shapes = {leaf: list(parameter.shape) for leaf, parameter in module.named_parameters(recurse=False)}
    shown = ", ".join(f"{leaf} {shape}" for leaf, shape in shapes.items())
    if not hasattr(module, "is_transposed"):
        return f"{type(module).__name__} ({shown}) is no mixture of experts as transformers' own are written"
    odd = {
        "with its matrices transposed": module.is_transposed,
        "with gate and up interleaved": not module.is_concatenated,
        "with biases": module.has_bias,
        "with a norm after each expert": module.has_post_expert_norm,
    }
    found = [what for what, so in odd.items() if so]
    if not found and set(shapes) - set(_ROLES):
        found = [f"with {shown}"]
    return f"{type(module).__name__} keeps its experts {', '.join(found)}" if found else ""


def experts_of(block: nn.Module, prefix: str) -> dict[str, SeparateExperts]:
    """The mixtures of experts of a block, by their full names."""
    return {name: part for name, part in block.named_modules(prefix=prefix) if isinstance(part, SeparateExperts)}


def routers(block: nn.Module, prefix: str) -> set[str]:
    """Linear layers that say which experts a token is sent to, or how much a shared expert counts."""
    found = set()
    for name, experts in experts_of(block, prefix).items():
        owner = name.rpartition(".")[0]
        for other, part in block.named_modules(prefix=prefix):
            beside = other.startswith(f"{owner}.") and not other.startswith(f"{name}.")
            if beside and isinstance(part, nn.Linear) and part.out_features in (1, experts.count):
                found.add(other)
    return found


@dataclass
class _Places:
    """``names``: for each fused module what the layers of an expert are called; ``moved``: modules by their full names
    whose own name differs in the files."""

    names: dict[str, dict[str, str]] = field(default_factory=dict)
    moved: dict[str, str] = field(default_factory=dict)

    def note(self, path: str, stored: str) -> None:
        """That the module ``path`` is called ``stored`` in the files. Raises `ModelError` for one at another depth."""
        own, other = path.split("."), stored.split(".")
        if len(own) != len(other):
            raise ModelError(
                f"The module {path!r} has its tensors in {stored!r}, which no renaming of modules gives.",
                expected="a mixture of experts such as Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE or DeepSeek-V3",
            )
        for depth, (one, new) in enumerate(zip(own, other, strict=True)):
            if one != new:
                self.moved[".".join(own[: depth + 1])] = new


def _stored_places(model: PreTrainedModel, fused: Mapping[str, nn.Module], files: Collection[str]) -> _Places:
    from transformers.core_model_loading import revert_weight_conversion

    names = list(model.state_dict())
    numbers = {}
    for index, name in enumerate(names):
        owner, _, leaf = name.rpartition(".")
        experts, rows = getattr(fused[owner], leaf).shape[:2] if owner in fused else (1, 1)
        numbers[name] = (torch.arange(experts * rows) + (index << _SHIFT)).reshape(experts, rows, 1)
    places = _Places()
    moved: list[tuple[str, str]] = []
    for stored, marks in revert_weight_conversion(model, numbers).items():
        name = names[int(marks.flatten()[0]) >> _SHIFT]
        owner, _, leaf = name.rpartition(".")
        if owner not in fused:
            # A head that the files call otherwise, such as GPT-NeoX's, is one too.
            moved += [(owner, stored.rpartition(".")[0])] if fused or (name not in files and stored in files) else []
        elif (found := _MATRIX.fullmatch(stored)) and marks.ndim == 2:
            role = _role(getattr(fused[owner], leaf), leaf, marks, int(found["expert"]))
            places.names.setdefault(owner, {})[role] = found["name"]
            moved.append((owner, found["prefix"]))
    for path, other in moved if places.names or not fused else ():
        places.note(path, other)
    return places


def _role(parameter: torch.Tensor, leaf: str, marks: torch.Tensor, expert: int) -> str:
    """Which matrix of an expert came out, by its numbers [rows, 1]. Raises `ModelError` for a piece that is none."""
    roles, (_, rows) = _ROLES[leaf], parameter.shape[:2]
    size, first = rows // len(roles), int(marks[0]) & ((1 << _SHIFT) - 1)
    whole = torch.equal(marks.flatten() - marks[0], torch.arange(size))
    if first // rows != expert or first % size or not whole:
        raise ModelError(
            f"The checkpoint keeps the {leaf} of its experts in another order than one matrix after the other.",
            expected="gate, up and down of each expert in a tensor of their own",
        )
    return roles[first % rows // size]


def _separated(fused: Any, names: Mapping[str, str]) -> SeparateExperts:
    experts, hidden, inner = fused.down_proj.shape
    activate = fused._apply_gate if fused.has_gate else fused.act_fn
    ordered = {role: names[role] for role in (GATE, UP, DOWN) if role in names}
    return SeparateExperts(ordered, (experts, hidden, inner), activate)


def _rename(owner: nn.Module, old: str, new: str) -> None:
    """Call a child otherwise, in place; the owner's forward pass still finds it under its old name."""
    owner._modules = {new if name == old else name: child for name, child in owner._modules.items()}
    kind = type(owner)
    owner.__class__ = type(kind.__name__, (kind,), {old: property(lambda self: self._modules[new])})


def _check_stored(model: nn.Module, checkpoint: Checkpoint) -> None:
    for name, experts in experts_of(model, "").items():
        for path in (f"{name}.{number}.{leaf}" for number in range(experts.count) for leaf in experts.names.values()):
            if f"{path}.weight" not in checkpoint.files and f"{path}.qweight" not in checkpoint.files:
                raise ModelError(
                    f"The checkpoint has no tensor '{path}.weight' for an expert of {type(model).__name__}.",
                    where=str(checkpoint.folder),
                    expected="a matrix for each expert, as save_pretrained writes them",
                    mend="load the model with transformers and save it again with save_pretrained",
                )

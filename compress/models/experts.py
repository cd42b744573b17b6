"""Mixtures of experts as linear layers, one for each matrix of each expert.

transformers keeps the experts of a block fused, in parameters of three dimensions. Quantization wants to see what each
matrix is given, and every file format has its integers one matrix at a time. Which tensor of the files is which part of
a fused parameter is asked of transformers itself: its own conversion, the one that `save_pretrained` applies, is given
numbers in place of weights, and where they come out says it all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compress.utils.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from compress.models.checkpoint import Checkpoint


GATE, UP, DOWN = "gate", "up", "down"


def owner_of(layer: str, experts: Iterable[str]) -> str:
    """The mixture among ``experts`` that a layer belongs to, all by their full names; nothing for any other layer."""
    return next((owner for owner in experts if layer.startswith(f"{owner}.")), "")


@dataclass
class Rehearsal:
    """What experts do while their inputs are looked at, so that none of them goes without.

    An expert that the router sends fewer than ``minimum`` tokens is given all tokens of the layer besides, which weigh
    as much together as the tokens that are missing. ``sent`` [experts] is how many of all ``tokens`` go to each; as
    long as it is None, the next call is taken for the whole text. ``weights`` are those of the rows that the expert at
    work is given, or None where all count alike.

    Measured on the Mixtral of `benchmarks/train_moe.py` after 160 steps: the error of gate at 4 bits on the
    tokens that an expert is sent in other text, in millionths. After 16 tokens of its own 37 from these alone, 15 from
    all tokens of the layer, 14 from both together; after 64 tokens 16, 15 and 12; after 128, 13 and 15. Rounded to
    nearest, 1,300.
    """

    minimum: int
    sent: torch.Tensor | None = None
    tokens: int = 0
    weights: torch.Tensor | None = None

    def rows(self, expert: int, own: torch.Tensor, every: torch.Tensor) -> torch.Tensor:
        """What an expert is given in one call: its ``own`` rows, and ``every`` row after them where they are few."""
        assert self.sent is not None
        missing = self.minimum - int(self.sent[expert])
        if missing <= 0:
            self.weights = None
            return own
        own_share, others = own.new_ones(len(own)), every.new_full((len(every),), missing / self.tokens)
        self.weights = torch.cat([own_share, others]).float()
        return torch.cat([own, every])


class SeparateExperts(nn.Module):
    """Experts "0", "1", ..., each of two or three linear layers on the meta device, in place of a fused module.

    ``names``: what the layers are called, by `GATE` (where there is one), `UP` and `DOWN`. ``sizes``: the number of
    experts, the width of the hidden states, and that between a layer and the next. ``activate`` makes of the outputs of
    gate and up, side by side, what enters down.
    """

    def __init__(
        self,
        names: Mapping[str, str],
        sizes: tuple[int, int, int],
        activate: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        super().__init__()
        self.count, hidden, inner = sizes
        self.names = dict(names)
        self.rehearsal: Rehearsal | None = None
        self.watch: Callable[[int, torch.Tensor], None] | None = None
        """Told the number of each expert at work and its part of the result, [its tokens, hidden]."""
        self._activate = activate
        for number in range(self.count):
            expert = nn.Module()
            for role, name in names.items():
                width = (inner, hidden) if role == DOWN else (hidden, inner)
                expert.add_module(name, nn.Linear(*width, bias=False, device="meta", dtype=torch.float32))
            self.add_module(str(number), expert)

    def linear(self, expert: int, role: str) -> nn.Module:
        """One layer of an expert."""
        return self.get_submodule(f"{expert}.{self.names[role]}")

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """[tokens, hidden] -> [tokens, hidden], with the router's choice [tokens, k] and its weights."""
        result = torch.zeros_like(hidden_states)
        rehearsal = self.rehearsal
        if rehearsal is not None and rehearsal.sent is None:
            rehearsal.sent, rehearsal.tokens = self.routed(top_k_index), len(hidden_states)
        for number in range(self.count):
            tokens, places = torch.where(top_k_index == number)
            rows = hidden_states[tokens]
            if rehearsal is not None:
                rows = rehearsal.rows(number, rows, hidden_states)
            if len(rows) == 0:
                continue
            part = self._expert(number, rows)[: len(tokens)] * top_k_weights[tokens, places, None]
            if self.watch is not None:
                self.watch(number, part)
            result.index_add_(0, tokens, part.to(result.dtype))
        return result

    def routed(self, top_k_index: torch.Tensor) -> torch.Tensor:
        """How many tokens each expert is sent, [experts]."""
        return torch.bincount(top_k_index.flatten(), minlength=self.count)[: self.count]

    def _expert(self, number: int, rows: torch.Tensor) -> torch.Tensor:
        beside = [self.linear(number, role)(rows) for role in (GATE, UP) if role in self.names]
        output: torch.Tensor = self.linear(number, DOWN)(self._activate(torch.cat(beside, dim=-1)))
        return output


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

    def note(self, pairs: Iterable[tuple[str, str]]) -> None:
        """That modules, by their full names, are called otherwise in the files; one at another depth keeps its name.

        So do those that it is in. `Checkpoint.aliases` has where its tensors are.
        """
        parted = [(path.split("."), stored.split(".")) for path, stored in pairs]
        kept = {tuple(own[:end]) for own, other in parted if len(own) != len(other) for end in range(1, len(own))}
        for own, other in parted:
            ends = [end for end in range(1, len(own) + 1) if own[end - 1 : end] != other[end - 1 : end]]
            if len(own) == len(other) and not kept & {tuple(own[:end]) for end in ends}:
                self.moved |= {".".join(own[:end]): other[end - 1] for end in ends}


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
    places.note(moved if places.names or not fused else ())
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
            if f"{path}.weight" not in checkpoint.files and not checkpoint.has_integers(path):
                raise ModelError(
                    f"The checkpoint has no tensor '{path}.weight' for an expert of {type(model).__name__}.",
                    where=str(checkpoint.folder),
                    expected="a matrix for each expert, as save_pretrained writes them",
                    hint="load the model with transformers and save it again with save_pretrained",
                )

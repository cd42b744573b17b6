"""Mixtures of experts as separate linear layers, one per matrix of each expert.

transformers stores the experts of a block fused, in parameters of three dimensions. Quantization needs the inputs
of each matrix, and every file format stores integers per matrix. The mapping from stored tensors to slices of a
fused parameter comes from transformers' own conversion, which `save_pretrained` applies: it is run on numbers in
place of weights, and the position of each number in its output tells the mapping.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from compress.utils.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from compress.models.checkpoint import Checkpoint


GATE, UP, DOWN = "gate", "up", "down"


def owning_experts(layer: str, experts: Iterable[str]) -> str:
    """Return the mixture among ``experts`` that contains a layer, by full names; empty for any other layer."""
    return next((owner for owner in experts if layer.startswith(f"{owner}.")), "")


@dataclass
class ExpertCalibration:
    """Minimum number of calibration tokens for each expert.

    An expert that the router sends fewer than ``minimum`` tokens also gets all tokens of the layer, whose total weight
    equals the number of missing tokens. ``sent`` [experts] is the number of all ``tokens`` that go to each expert;
    while it is None, the next call defines it. ``weights`` are the weights of the rows of the current expert, or None
    if all count equally.

    Measured on the Mixtral of `benchmarks/train_moe.py` after 160 steps: the error of gate at 4 bits on the tokens that
    an expert is sent in other text, in millionths. With 16 tokens of its own: 37 from these only, 15 from all tokens of
    the layer, 14 from both. With 64 tokens: 16, 15 and 12. With 128 tokens: 13 and 15. Round-to-nearest: 1,300.
    """

    minimum: int
    sent: torch.Tensor | None = None
    tokens: int = 0
    weights: torch.Tensor | None = None

    def rows(self, expert: int, own: torch.Tensor, every: torch.Tensor) -> torch.Tensor:
        """Return the inputs of an expert in one call: its ``own`` rows, followed by ``every`` row if they are few."""
        assert self.sent is not None
        # Enough own tokens need no help.
        missing = self.minimum - int(self.sent[expert])
        if missing <= 0:
            self.weights = None
            return own
        own_weights, other_weights = own.new_ones(len(own)), every.new_full((len(every),), missing / self.tokens)
        self.weights = torch.cat([own_weights, other_weights]).float()
        return torch.cat([own, every])


class SeparateExperts(nn.Module):
    """Experts "0", "1", ... of two or three linear layers on the meta device, in place of a fused module."""

    def __init__(
        self,
        names: Mapping[str, str],
        sizes: tuple[int, int, int],
        activate: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """Create the layers.

        Args:
            names: Names of the layers by role: `GATE` (optional), `UP` and `DOWN`.
            sizes: Number of experts, hidden size, and intermediate size.
            activate: Computes the input of down from the concatenated outputs of gate and up.
        """
        super().__init__()
        self.count, hidden, inner = sizes
        self.names = dict(names)
        self.calibration: ExpertCalibration | None = None
        self.on_output: Callable[[int, torch.Tensor], None] | None = None
        """Told the number of each expert at work and its part of the result, [its tokens, hidden]."""
        self._activate = activate
        # Submodules have the names that files use.
        for number in range(self.count):
            expert = nn.Module()
            for role, name in names.items():
                width = (inner, hidden) if role == DOWN else (hidden, inner)
                expert.add_module(name, nn.Linear(*width, bias=False, device="meta", dtype=torch.float32))
            self.add_module(str(number), expert)

    def linear(self, expert: int, role: str) -> nn.Module:
        """Return one layer of an expert."""
        return self.get_submodule(f"{expert}.{self.names[role]}")

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Apply the experts to hidden states [tokens, hidden].

        Args:
            hidden_states: Inputs [tokens, hidden].
            top_k_index: Experts chosen by the router [tokens, k].
            top_k_weights: Weights of these experts [tokens, k].

        Returns:
            Weighted sum of the experts' outputs [tokens, hidden].
        """
        result = torch.zeros_like(hidden_states)
        calibration = self.calibration
        # The first call defines how many tokens each expert gets.
        if calibration is not None and calibration.sent is None:
            calibration.sent, calibration.tokens = self.routed(top_k_index), len(hidden_states)
        for number in range(self.count):
            # Rows of this expert, and which of the router's choices it is.
            tokens, choices = torch.where(top_k_index == number)
            rows = hidden_states[tokens]
            if calibration is not None:
                rows = calibration.rows(number, rows, hidden_states)
            if len(rows) == 0:
                continue
            # Rows that were added for calibration do not contribute to the result.
            gate_and_up = [self.linear(number, role)(rows) for role in (GATE, UP) if role in self.names]
            output: torch.Tensor = self.linear(number, DOWN)(self._activate(torch.cat(gate_and_up, dim=-1)))
            part = output[: len(tokens)] * top_k_weights[tokens, choices, None]
            if self.on_output is not None:
                self.on_output(number, part)
            result.index_add_(0, tokens, part.to(result.dtype))
        return result

    def routed(self, top_k_index: torch.Tensor) -> torch.Tensor:
        """Return the number of tokens that each expert is sent, [experts]."""
        return torch.bincount(top_k_index.flatten(), minlength=self.count)[: self.count]


_ROLES = {"gate_up_proj": (GATE, UP), "up_proj": (UP,), "down_proj": (DOWN,)}
_MATRIX = re.compile(r"(?P<prefix>.+)\.(?P<expert>\d+)\.(?P<name>\w+)\.weight")
_SHIFT = 40
"""The bits of a marker above this shift are the index of its tensor, the bits below its position in the tensor."""


def separate_experts(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Replace fused experts by `SeparateExperts` in place, and rename modules to the names of the stored tensors.

    Experts with an `inseparable_reason` are left alone. Raises `ModelError` if the checkpoint has other tensors than
    transformers would write.
    """
    fused = {name: part for name, part in model.named_modules() if is_fused(part) and not inseparable_reason(part)}
    names, moved = _stored_names(model, fused, set(checkpoint.files))
    for name, part in fused.items():
        if name in names:
            experts, hidden, inner = part.down_proj.shape
            activate = part._apply_gate if part.has_gate else part.act_fn
            roles = {role: names[name][role] for role in (GATE, UP, DOWN) if role in names[name]}
            model.set_submodule(name, SeparateExperts(roles, (experts, hidden, inner), activate))
    # Rename the deepest modules first, so that paths of outer ones stay valid.
    for path in sorted(moved, key=lambda path: -path.count(".")):
        owner, _, leaf = path.rpartition(".")
        _rename(model.get_submodule(owner), leaf, moved[path])
    # Fail before a forward pass with missing weights.
    for name, mixture in find_separate_experts(model, "").items():
        for path in (f"{name}.{number}.{leaf}" for number in range(mixture.count) for leaf in mixture.names.values()):
            if f"{path}.weight" not in checkpoint.files and not checkpoint.has_integers(path):
                raise ModelError(
                    f"The checkpoint has no tensor '{path}.weight' for an expert of {type(model).__name__}.",
                    where=str(checkpoint.folder),
                    expected="a matrix for each expert, as save_pretrained writes them",
                    hint="load the model with transformers and save it again with save_pretrained",
                )


def is_fused(module: nn.Module) -> bool:
    """Return True if a module holds the weights of several experts in parameters of three dimensions."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return False
    return any(parameter.ndim > 2 for parameter in module.parameters(recurse=False))


def inseparable_reason(module: nn.Module) -> str:
    """Return the reason why fused experts cannot become linear layers; empty if they can."""
    shapes = {leaf: list(parameter.shape) for leaf, parameter in module.named_parameters(recurse=False)}
    shown = ", ".join(f"{leaf} {shape}" for leaf, shape in shapes.items())
    # transformers' own implementations declare their layout.
    if not hasattr(module, "is_transposed"):
        return f"{type(module).__name__} ({shown}) is not a mixture of experts in the form of transformers' own"
    properties = {
        "with its matrices transposed": module.is_transposed,
        "with gate and up interleaved": not module.is_concatenated,
        "with biases": module.has_bias,
        "with a norm after each expert": module.has_post_expert_norm,
    }
    obstacles = [what for what, so in properties.items() if so]
    if not obstacles and set(shapes) - set(_ROLES):
        obstacles = [f"with {shown}"]
    return f"{type(module).__name__} keeps its experts {', '.join(obstacles)}" if obstacles else ""


def find_separate_experts(block: nn.Module, prefix: str) -> dict[str, SeparateExperts]:
    """Return the mixtures of experts of a block, by full names."""
    return {name: part for name, part in block.named_modules(prefix=prefix) if isinstance(part, SeparateExperts)}


def router_layers(block: nn.Module, prefix: str) -> set[str]:
    """Return linear layers that choose the experts of a token or weight a shared expert."""
    names = set()
    for name, experts in find_separate_experts(block, prefix).items():
        owner = name.rpartition(".")[0]
        for other, part in block.named_modules(prefix=prefix):
            is_sibling = other.startswith(f"{owner}.") and not other.startswith(f"{name}.")
            if is_sibling and isinstance(part, nn.Linear) and part.out_features in (1, experts.count):
                names.add(other)
    return names


def _moved_modules(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return full names of modules with their own names in files, for pairs of full names that differ there.

    A module at another depth, and its ancestors, keep their names: `Checkpoint.aliases` finds their tensors.
    """
    split_pairs = [(path.split("."), stored.split(".")) for path, stored in pairs]
    fixed = {
        tuple(names[:end])
        for names, stored_path in split_pairs
        if len(names) != len(stored_path)
        for end in range(1, len(names))
    }
    moved: dict[str, str] = {}
    for names, stored_path in split_pairs:
        ends = [end for end in range(1, len(names) + 1) if names[end - 1 : end] != stored_path[end - 1 : end]]
        if len(names) == len(stored_path) and not fixed & {tuple(names[:end]) for end in ends}:
            moved |= {".".join(names[:end]): stored_path[end - 1] for end in ends}
    return moved


def _stored_names(
    model: PreTrainedModel, fused: Mapping[str, nn.Module], files: Collection[str]
) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Return the stored names of an expert's layers by role for each fused module, and renamed modules."""
    from transformers.core_model_loading import revert_weight_conversion

    names = list(model.state_dict())
    # Mark every row of every matrix with a unique number.
    markers = {}
    for index, name in enumerate(names):
        owner, _, leaf = name.rpartition(".")
        experts, rows = getattr(fused[owner], leaf).shape[:2] if owner in fused else (1, 1)
        markers[name] = (torch.arange(experts * rows) + (index << _SHIFT)).reshape(experts, rows, 1)
    layer_names: dict[str, dict[str, str]] = {}
    moved: list[tuple[str, str]] = []
    # Read the origin of each stored tensor from its first marker.
    for stored, marks in revert_weight_conversion(model, markers).items():
        name = names[int(marks.flatten()[0]) >> _SHIFT]
        owner, _, leaf = name.rpartition(".")
        # Not a fused parameter: it may still have another name in files.
        if owner not in fused:
            # A head that the files call otherwise, such as GPT-NeoX's, is one too.
            moved += [(owner, stored.rpartition(".")[0])] if fused or (name not in files and stored in files) else []
        elif (matrix := _MATRIX.fullmatch(stored)) and marks.ndim == 2:
            role = _role(getattr(fused[owner], leaf), leaf, marks, int(matrix["expert"]))
            layer_names.setdefault(owner, {})[role] = matrix["name"]
            moved.append((owner, matrix["prefix"]))
    return layer_names, _moved_modules(moved if layer_names or not fused else ())


def _role(parameter: torch.Tensor, leaf: str, marks: torch.Tensor, expert: int) -> str:
    """Return the role of a stored matrix from its markers [rows, 1]. Raises `ModelError` for a partial matrix."""
    roles, (_, rows) = _ROLES[leaf], parameter.shape[:2]
    # Gate and up may be concatenated in one parameter.
    size, first = rows // len(roles), int(marks[0]) & ((1 << _SHIFT) - 1)
    is_contiguous = torch.equal(marks.flatten() - marks[0], torch.arange(size))
    if first // rows != expert or first % size or not is_contiguous:
        raise ModelError(
            f"The checkpoint keeps the {leaf} of its experts in another order than one matrix per expert.",
            expected="gate, up and down of each expert in a tensor of their own",
        )
    return roles[first % rows // size]


def _rename(owner: nn.Module, old: str, new: str) -> None:
    """Rename a child in place; the owner's forward pass still finds it under its old name."""
    owner._modules = {new if name == old else name: child for name, child in owner._modules.items()}
    # A subclass with a property redirects the old attribute name.
    kind = type(owner)
    owner.__class__ = type(kind.__name__, (kind,), {old: property(lambda self: self._modules[new])})

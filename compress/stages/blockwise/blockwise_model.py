"""A causal decoder without its weights: its blocks one at a time, and what comes before and after them.

transformers' own forward pass does the rest. Called with blocks that only note their arguments, it embeds the tokens
and says what each block is given (masks, rotary positions); called with blocks that hand on finished hidden states, it
applies the last norm and the head. So nothing here knows an architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from compress.models.checkpoint import Checkpoint
from compress.models.folder_checks import weight_files
from compress.models.hooks import StopForward
from compress.models.safetensors_file import read_header
from compress.numerics.language_head import head_product
from compress.utils.errors import ModelError, StageError
from compress.utils.torch_device import CPU


@dataclass(frozen=True)
class Call:
    """Arguments that the model passes to a block besides the hidden states."""

    positional: tuple[Any, ...]
    named: dict[str, Any]


@dataclass
class BlockwiseModel:
    """``model`` has its parameters on the meta device; ``prefix`` is the name of the list of ``blocks``.

    Every tensor but the weights of the modules in ``exact`` is rounded to ``shipped`` as it is read, since that is
    how files will store it.
    """

    checkpoint: Checkpoint
    model: Any
    prefix: str
    blocks: nn.ModuleList
    shipped: torch.dtype = torch.float32
    exact: Collection[str] = ()
    transposed: Collection[str] = ()
    """Layers whose weights lie transposed in the checkpoint."""
    gives_tuple: bool | None = None
    table: torch.Tensor | None = None
    """Embeddings to use in place of the checkpoint's, once they are quantized."""
    device: str = CPU
    """Where blocks are loaded, with all that surrounds them but the tables, and states computed."""
    _calls: dict[torch.Size, list[Call]] = field(default_factory=dict)

    @property
    def embedding(self) -> nn.Embedding:
        """The table of input embeddings."""
        found: nn.Embedding = self.model.get_input_embeddings()
        return found

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding table."""
        return self.embedding.num_embeddings

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def tied_tensors(self) -> frozenset[str]:
        """Tensors that say again what another says: a tied head."""
        head = self.name(self.model.get_output_embeddings())
        return frozenset({f"{head}.weight"} if self.tied else ())

    def as_stored(self, name: str, part: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """Return copies of the parameters of the module ``name``, by full name, laid out as in the files."""
        for leaf, parameter in part.named_parameters(recurse=False):
            turned = leaf == "weight" and name in self.transposed
            yield f"{name}.{leaf}", (parameter.data.T if turned else parameter.data).clone()

    def rounded(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Return a new weight of the layer ``name`` with the values its file will hold, in float32."""
        return weight.to(self.checkpoint.stored(f"{name}.weight").dtype).float()

    def count_parameters(self) -> int:
        """Return the number of parameters in the model's files; a tied head is not counted twice."""
        files, skipped = weight_files(self.checkpoint.folder), self.tied_tensors
        return sum(tensor.elements for file in files for tensor in read_header(file) if tensor.name not in skipped)

    def name(self, module: nn.Module) -> str:
        """Return the full name of a module."""
        names: dict[nn.Module, str] = {other: name for name, other in self.model.named_modules()}
        return names[module]

    def tensor(self, module: str, leaf: str, shape: torch.Size) -> torch.Tensor:
        """Return one parameter in float32. Raises `ModelError` if the file's shape is not ``shape``."""
        if leaf == "weight":
            found = self.checkpoint.weight(module)
            turned = module in self.transposed and not self.checkpoint.has_integers(module)
            found = found.T.contiguous() if turned else found
        else:
            found = self.checkpoint.stored(f"{module}.{leaf}" if module else leaf).float()
        if found.shape != shape:
            raise ModelError(
                f"The tensor '{module}.{leaf}' is {list(found.shape)}; the config makes it {list(shape)}.",
                where=str(self.checkpoint.folder),
                expected="weights and config.json of the same model",
            )
        found = found.to(self.device)
        return found if leaf == "weight" and module in self.exact else found.to(self.shipped).float()

    def load(self, index: int) -> nn.Module:
        """Block ``index`` with its weights, in float32."""
        block = self.blocks[index]
        for name, part in block.named_modules(prefix=f"{self.prefix}.{index}"):
            self._fill(name, part)
            for leaf, buffer in part._buffers.items():
                if buffer is not None and f"{name}.{leaf}" in self.checkpoint.files:
                    part._buffers[leaf] = self.checkpoint.stored(f"{name}.{leaf}").to(self.device, buffer.dtype)
        return block

    def unload(self, index: int) -> None:
        """Let go of the weights of a block."""
        for module in self.blocks[index].modules():
            for leaf, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[leaf] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    def fill_surroundings(self) -> None:
        """Load everything outside the blocks but the embedding table and the head."""
        head = self.model.get_output_embeddings()
        inside = {id(part) for block in self.blocks for part in block.modules()}
        for name, part in self.model.named_modules():
            if id(part) not in inside and part is not self.embedding and part is not head:
                self._fill(name, part)
            for leaf, buffer in part._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    part._buffers[leaf] = buffer.to(self.device)

    def _fill(self, name: str, part: nn.Module) -> None:
        for leaf, parameter in part._parameters.items():
            if parameter is not None:
                filled = self.tensor(name, leaf, parameter.shape)
                part._parameters[leaf] = nn.Parameter(filled, requires_grad=False)

    def calls(self, ids: torch.Tensor) -> list[Call]:
        """Return the arguments that every block is called with for ``ids`` [n, length], cached for each shape.

        Raises `StageError` where it depends on the tokens, since then no block can be run by itself.
        """
        ids = ids.to(self.device)
        if ids.shape not in self._calls:
            if self.gives_tuple is None:
                self._learn_output(ids[:1])
            self._calls[ids.shape] = self._noted(ids)
            _check_alike(self._calls[ids.shape], self._noted((ids + 1) % self.vocabulary), self.model)
        return self._calls[ids.shape]

    def _learn_output(self, ids: torch.Tensor) -> None:
        """Determine, by running the first block, whether blocks return hidden states alone or first in a tuple."""
        positional, named = self._first_call(ids)
        loaded = not any(parameter.is_meta for parameter in self.blocks[0].parameters())
        block = self.load(0)
        self.gives_tuple = isinstance(block(*positional, **named), tuple)
        if not loaded:
            self.unload(0)

    def embedded(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the hidden states that enter the first block, [n, length, hidden], for ``ids`` [n, length]."""
        return _hidden(*self._first_call(ids.to(self.device)))

    def _first_call(self, ids: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def note(*positional: Any, **named: Any) -> None:
            seen.append((positional, named))
            raise StopForward

        with self._standing_in(note), suppress(StopForward):
            self._body(ids)
        return seen[0]

    def _noted(self, ids: torch.Tensor) -> list[Call]:
        noted: list[Call] = []

        def note(*positional: Any, **named: Any) -> Any:
            hidden = _hidden(positional, named)
            noted.append(Call(positional[1:], {name: named[name] for name in named if name != "hidden_states"}))
            return (hidden,) if self.gives_tuple else hidden

        with self._standing_in(note):
            self._body(ids)
        return noted

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """Apply what lies between the last block and the head to the block's output [n, length, hidden]."""
        with self._standing_in(self._giving(hidden)):
            output: torch.Tensor = self._body(_no_ids(hidden)).last_hidden_state
        return output

    def logits(self, hidden: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [n, length, vocabulary] of the last block's output [n, length, hidden].

        ``weight`` [vocabulary, hidden] stands in for the head's own.
        """
        head = self.model.get_output_embeddings()
        rows = (self.checkpoint.stored(self.head_weight) if weight is None else weight).to(self.device)
        head.forward = partial(self._head, rows)
        try:
            with self._standing_in(self._giving(hidden)):
                output: torch.Tensor = self.model(input_ids=_no_ids(hidden), use_cache=False).logits
        finally:
            del head.forward
        return output

    def _giving(self, hidden: torch.Tensor) -> Callable[..., Any]:
        return lambda *positional, **named: (hidden,) if self.gives_tuple else hidden

    def _head(self, weight: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        head = self.model.get_output_embeddings()
        logits = head_product(hidden, weight)
        if head.bias is None:
            return logits
        return logits + self.checkpoint.stored(f"{self.name(head)}.bias").float().to(self.device)

    @property
    def head_weight(self) -> str:
        """The name of the tensor that the head multiplies by: its own, or the embedding table that it is tied to."""
        module = self.embedding if self.tied else self.model.get_output_embeddings()
        return f"{self.name(module)}.weight"

    @property
    def tied(self) -> bool:
        """Return whether the head shares the embedding's weights."""
        return bool(self.checkpoint.config.get("tie_word_embeddings", self.model.config.tie_word_embeddings))

    def _body(self, ids: torch.Tensor) -> Any:
        return self.model.base_model(input_ids=ids, use_cache=False)

    @contextmanager
    def _standing_in(self, stand_in: Callable[..., Any]) -> Iterator[None]:
        """Let a function stand in for the forward pass of every block."""
        for block in self.blocks:
            block.forward = stand_in
        try:
            yield
        finally:
            for block in self.blocks:
                del block.forward

    def run(self, index: int, hidden: torch.Tensor, call: Call) -> torch.Tensor:
        """Return the output of a loaded block."""
        output = self.blocks[index](hidden, *call.positional, **call.named)
        found: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return found


def _hidden(positional: tuple[Any, ...], named: dict[str, Any]) -> torch.Tensor:
    found: torch.Tensor = positional[0] if positional else named["hidden_states"]
    return found


def _no_ids(hidden: torch.Tensor) -> torch.Tensor:
    return torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)


def _check_alike(calls: list[Call], others: list[Call], model: nn.Module) -> None:
    for index, (call, other) in enumerate(zip(calls, others, strict=True)):
        if not _same(call.positional, other.positional) or not _same(call.named, other.named):
            raise StageError(
                f"{type(model).__name__} cannot be quantized block by block: what block {index} is given "
                "depends on the tokens.",
                expected="blocks that take hidden states, a mask and positions only",
            )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return type(one) is type(other)

"""A causal decoder on the meta device whose blocks are loaded and run one at a time.

The forward pass is transformers' own. With blocks that only record their arguments, it embeds the tokens and yields
the other arguments of each block (masks, rotary positions). With blocks that return finished hidden states, it
applies the last norm and the head. So this module needs no knowledge of any architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from compress.models.checkpoint import Checkpoint
from compress.models.folder_checks import weight_files
from compress.models.hooks import StopForward
from compress.models.quantized_module import build_empty_module
from compress.models.safetensors_file import read_header
from compress.models.structure import TransposedLinear
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
    """Decoder with parameters on the meta device; ``prefix`` is the name of the list of ``blocks``.

    Tensors are rounded to ``shipped`` as they are read, since files will store them so, except weights of the modules
    in ``exact``.
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
        """Table of input embeddings."""
        embedding: nn.Embedding = self.model.get_input_embeddings()
        return embedding

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
        """Tensors that repeat another one: the weight of a tied head."""
        head = self.name(self.model.get_output_embeddings())
        return frozenset({f"{head}.weight"} if self.tied else ())

    def as_stored(self, name: str, part: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """Return copies of the parameters of the module ``name``, by full name, laid out as in the files."""
        for leaf, parameter in part.named_parameters(recurse=False):
            is_transposed = leaf == "weight" and name in self.transposed
            yield f"{name}.{leaf}", (parameter.data.T if is_transposed else parameter.data).clone()

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
            tensor = self.checkpoint.weight(module)
            is_transposed = module in self.transposed and not self.checkpoint.has_integers(module)
            tensor = tensor.T.contiguous() if is_transposed else tensor
        else:
            tensor = self.checkpoint.stored(f"{module}.{leaf}" if module else leaf).float()
        if tensor.shape != shape:
            raise ModelError(
                f"The tensor '{module}.{leaf}' is {list(tensor.shape)}; the config makes it {list(shape)}.",
                where=str(self.checkpoint.folder),
                expected="weights and config.json of the same model",
            )
        tensor = tensor.to(self.device)
        return tensor if leaf == "weight" and module in self.exact else tensor.to(self.shipped).float()

    def load(self, index: int) -> nn.Module:
        """Load block ``index`` with its weights, in float32."""
        block = self.blocks[index]
        for name, part in block.named_modules(prefix=f"{self.prefix}.{index}"):
            self._fill(name, part)
            for leaf, buffer in part._buffers.items():
                if buffer is not None and f"{name}.{leaf}" in self.checkpoint.files:
                    part._buffers[leaf] = self.checkpoint.stored(f"{name}.{leaf}").to(self.device, buffer.dtype)
        return block

    def unload(self, index: int) -> None:
        """Move the weights of a block back to the meta device."""
        for module in self.blocks[index].modules():
            for leaf, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[leaf] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    def _fill(self, name: str, part: nn.Module) -> None:
        for leaf, parameter in part._parameters.items():
            if parameter is not None:
                filled = self.tensor(name, leaf, parameter.shape)
                part._parameters[leaf] = nn.Parameter(filled, requires_grad=False)

    def calls(self, ids: torch.Tensor) -> list[Call]:
        """Return the arguments that every block is called with for ``ids`` [n, length], cached for each shape.

        Raises `StageError` if they depend on the tokens, since then no block can be run by itself.
        """
        ids = ids.to(self.device)
        if ids.shape not in self._calls:
            if self.gives_tuple is None:
                # Run the first block, which returns hidden states alone or first in a tuple.
                positional, named = self._first_call(ids[:1])
                is_loaded = not any(parameter.is_meta for parameter in self.blocks[0].parameters())
                self.gives_tuple = isinstance(self.load(0)(*positional, **named), tuple)
                if not is_loaded:
                    self.unload(0)
            self._calls[ids.shape] = self._noted(ids)
            calls = self._calls[ids.shape]
            # Run other tokens of the same shape: the arguments of blocks must not change.
            others = self._noted((ids + 1) % self.vocabulary)
            for index, (call, other) in enumerate(zip(calls, others, strict=True)):
                if not _same(call.positional, other.positional) or not _same(call.named, other.named):
                    raise StageError(
                        f"{type(self.model).__name__} cannot be quantized block by block: what block {index} is given "
                        "depends on the tokens.",
                        expected="blocks that take hidden states, a mask and positions only",
                    )
        return self._calls[ids.shape]

    def embedded(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the hidden states that enter the first block, [n, length, hidden], for ``ids`` [n, length]."""
        return _hidden(*self._first_call(ids.to(self.device)))

    def _first_call(self, ids: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def note(*positional: object, **named: object) -> None:
            seen.append((positional, named))
            raise StopForward

        with self._standing_in(note), suppress(StopForward):
            self._body(ids)
        return seen[0]

    def _noted(self, ids: torch.Tensor) -> list[Call]:
        noted: list[Call] = []

        def note(*positional: object, **named: object) -> Any:
            hidden = _hidden(positional, named)
            noted.append(Call(positional[1:], {name: named[name] for name in named if name != "hidden_states"}))
            return (hidden,) if self.gives_tuple else hidden

        with self._standing_in(note):
            self._body(ids)
        return noted

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """Apply the layers between the last block and the head to the block's output [n, length, hidden]."""
        with self._standing_in(self._giving(hidden)):
            output: torch.Tensor = self._body(_no_ids(hidden)).last_hidden_state
        return output

    def logits(self, hidden: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        """Return logits [n, length, vocabulary] of the last block's output [n, length, hidden].

        ``weight`` [vocabulary, hidden] replaces the head's own weight.
        """
        head = self.model.get_output_embeddings()
        rows = (self.checkpoint.stored(self.head_weight) if weight is None else weight).to(self.device)

        def head_logits(hidden: torch.Tensor) -> torch.Tensor:
            logits = head_product(hidden, rows)
            if head.bias is None:
                return logits
            return logits + self.checkpoint.stored(f"{self.name(head)}.bias").float().to(self.device)

        head.forward = head_logits
        try:
            with self._standing_in(self._giving(hidden)):
                output: torch.Tensor = self.model(input_ids=_no_ids(hidden), use_cache=False).logits
        finally:
            del head.forward
        return output

    def _giving(self, hidden: torch.Tensor) -> Callable[..., Any]:
        return lambda *positional, **named: (hidden,) if self.gives_tuple else hidden

    @property
    def head_weight(self) -> str:
        """Name of the head's weight tensor: its own, or the embedding table that it is tied to."""
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
        """Replace the forward pass of every block by a function while the context is open."""
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
        hidden_states: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return hidden_states


def _hidden(positional: tuple[Any, ...], named: dict[str, Any]) -> torch.Tensor:
    hidden: torch.Tensor = positional[0] if positional else named["hidden_states"]
    return hidden


def _no_ids(hidden: torch.Tensor) -> torch.Tensor:
    return torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and torch.equal(first, second)
    if isinstance(first, tuple | list):
        return len(first) == len(second) and all(map(_same, first, second))
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_same(first[key], second[key]) for key in first)
    return type(first) is type(second)


def fill_surroundings(decoder: BlockwiseModel) -> None:
    """Load everything outside the blocks except the embedding table and the head."""
    head = decoder.model.get_output_embeddings()
    inside = {id(part) for block in decoder.blocks for part in block.modules()}
    for name, part in decoder.model.named_modules():
        if id(part) not in inside and part is not decoder.embedding and part is not head:
            decoder._fill(name, part)
        for leaf, buffer in part._buffers.items():
            if buffer is not None and not buffer.is_meta:
                part._buffers[leaf] = buffer.to(decoder.device)


def build_blockwise_model(checkpoint: Checkpoint, device: str = CPU) -> BlockwiseModel:
    """Build the model of a folder without its weights, which are loaded block by block to ``device``.

    Raises `ModelError` for an architecture that transformers does not have, or experts in another layout than
    transformers writes, and `StageError` for a model without blocks.
    """
    model: Any = build_empty_module(checkpoint).eval()
    # Router logits serve an auxiliary loss in training only.
    model.config.output_router_logits = False
    transposed = frozenset(name for name, part in model.named_modules() if isinstance(part, TransposedLinear))
    prefix, blocks = find_blocks(model)
    decoder = BlockwiseModel(checkpoint, model, prefix, blocks, transposed=transposed, device=device)
    _read_rows_as_needed(decoder)
    # Verify that embedding and head match the config: their size, and whether they are one tensor or two.
    head, embedding = decoder.model.get_output_embeddings(), decoder.embedding
    if head is None:
        raise StageError(f"{type(decoder.model).__name__} has no head over the vocabulary.", expected="an lm_head")
    names = [f"{decoder.name(module)}.weight" for module in (head, embedding)]
    stored = [name for name in names if name in decoder.checkpoint.files]
    for name in stored:
        shape, expected = decoder.checkpoint.stored(name).shape, embedding.weight.shape
        if shape != expected:
            raise ModelError(
                f"The tensor {name!r} is {list(shape)}; the config makes it {list(expected)}.",
                where=str(decoder.checkpoint.folder),
                expected="weights and config.json of the same model",
            )
    if not decoder.tied and names[0] not in stored:
        raise ModelError(
            f"The checkpoint has no {names[0]!r}, and its config says that it is not tied to the embedding.",
            where=str(decoder.checkpoint.folder),
            expected=f"{names[0]!r}, or tie_word_embeddings: true in config.json",
        )
    if decoder.tied and len(stored) == 2 and not torch.equal(*(decoder.checkpoint.stored(name) for name in stored)):
        raise ModelError(
            f"The config ties {names[0]!r} to {names[1]!r}, but the checkpoint holds two different tensors.",
            where=str(decoder.checkpoint.folder),
            expected="one tensor for both, or tie_word_embeddings: false in config.json",
        )
    fill_surroundings(decoder)
    return decoder


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the name and list of a decoder's blocks: the one outermost `ModuleList` that contains linear layers.

    Raises `StageError` if there is none or more than one; the message names them.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    candidates = [
        (name, module)
        for name, module in lists.items()
        if not any(name.startswith(f"{outer}.") for outer in lists)
        and any(isinstance(part, nn.Linear) for part in module.modules())
    ]
    if len(candidates) != 1:
        listed = ", ".join(f"{name} ({len(module)} x {type(module[0]).__name__})" for name, module in candidates)
        raise StageError(
            f"{type(model).__name__} cannot be quantized block by block: its blocks were not found.",
            expected=f"one torch.nn.ModuleList of blocks with torch.nn.Linear layers; found {listed or 'none'}",
            hint="quantize a decoder such as Llama, Qwen, Mistral, Gemma or Phi",
        )
    return candidates[0]


def _read_rows_as_needed(decoder: BlockwiseModel) -> None:
    """Let the embedding load only the rows of the tokens in its input instead of a whole table."""
    embedding, name = decoder.embedding, decoder.name(decoder.embedding)
    rows = embedding.weight.shape[0]
    # Else torch would look for the padding row, which matters to gradients only.
    embedding.padding_idx = None

    def gather(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        ids = arguments[0]
        if int(ids.max()) >= rows:
            raise ModelError(
                f"The token id {int(ids.max())} is outside the model's vocabulary of {rows}.",
                where=str(decoder.checkpoint.folder),
                expected="the tokenizer that the model was trained with",
            )
        token_ids, positions = torch.unique(ids, return_inverse=True)
        table = decoder.checkpoint.stored(f"{name}.weight") if decoder.table is None else decoder.table
        weight = table[token_ids.cpu()].to(ids.device).to(decoder.shipped).float()
        # The table holds the distinct rows only, and ids are replaced by positions in it.
        module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        return (positions, *arguments[1:])

    embedding.register_forward_pre_hook(gather)


@torch.no_grad()
def logits(checkpoint: Checkpoint, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits of a checkpoint for token ``ids``, computed block by block.

    Quantized layers count with the weights that their integers stand for. Raises `ModelError` for ids outside the
    vocabulary and `StageError` for an architecture whose blocks cannot be run by themselves.
    """
    decoder = build_blockwise_model(checkpoint)
    return decoder.logits(last_hidden(decoder, ids))


@torch.no_grad()
def last_hidden(decoder: BlockwiseModel, ids: torch.Tensor) -> torch.Tensor:
    """Return the output of the last block, [n, length, hidden], before the last norm."""
    calls = decoder.calls(ids)
    hidden = decoder.embedded(ids)
    for index, call in enumerate(calls):
        decoder.load(index)
        hidden = decoder.run(index, hidden, call)
        decoder.unload(index)
    return hidden

"""Building the skeleton of a folder's model: on the meta device, its blocks found, its surroundings filled."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from compress.models.checkpoint import Checkpoint
from compress.models.quantized_module import build_empty_module
from compress.models.transposed_linear import TransposedLinear
from compress.stages.blockwise.blockwise_model import BlockwiseModel
from compress.utils.errors import ModelError, StageError
from compress.utils.torch_device import CPU


def build_blockwise_model(checkpoint: Checkpoint, device: str = CPU) -> BlockwiseModel:
    """Build the model of a folder without its weights, which ``device`` gets block by block.

    Raises `ModelError` for an architecture that transformers doesn't know, or whose experts the checkpoint keeps
    otherwise than transformers writes them, and `StageError` for one without blocks.
    """
    model: Any = build_empty_module(checkpoint).eval()
    # What routers answer is for their training alone.
    model.config.output_router_logits = False
    transposed = frozenset(name for name, part in model.named_modules() if isinstance(part, TransposedLinear))
    prefix, blocks = find_blocks(model)
    decoder = BlockwiseModel(checkpoint, model, prefix, blocks, transposed=transposed, device=device)
    _read_rows_as_needed(decoder)
    _check_tables(decoder)
    decoder.fill_surroundings()
    return decoder


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the name and list of a decoder's blocks: the one outermost `ModuleList` that holds linear layers.

    Raises `StageError` that names the lists found where there is none, or several.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outermost = {name: module for name, module in lists.items() if not any(name.startswith(f"{o}.") for o in lists)}
    useful = {
        name: module
        for name, module in outermost.items()
        if any(isinstance(part, nn.Linear) for part in module.modules())
    }
    if len(useful) != 1:
        found = ", ".join(f"{name} ({len(module)} x {type(module[0]).__name__})" for name, module in useful.items())
        raise StageError(
            f"{type(model).__name__} cannot be quantized block by block: its blocks were not found.",
            expected=f"one torch.nn.ModuleList of blocks with torch.nn.Linear layers; found {found or 'none'}",
            hint="quantize a decoder such as Llama, Qwen, Mistral, Gemma or Phi",
        )
    return next(iter(useful.items()))


def _read_rows_as_needed(decoder: BlockwiseModel) -> None:
    """Let the embedding read the rows of the tokens that it is asked for, rather than a whole table."""
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
        wanted, places = torch.unique(ids, return_inverse=True)
        table = decoder.checkpoint.stored(f"{name}.weight") if decoder.table is None else decoder.table
        weight = table[wanted.cpu()].to(ids.device).to(decoder.shipped).float()
        module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        return (places, *arguments[1:])

    embedding.register_forward_pre_hook(gather)


def _check_tables(decoder: BlockwiseModel) -> None:
    """Verify that embedding and head are as the config says: of its size, and one tensor or two."""
    head, embedding = decoder.model.get_output_embeddings(), decoder.embedding
    if head is None:
        raise StageError(f"{type(decoder.model).__name__} has no head over the vocabulary.", expected="an lm_head")
    names = [f"{decoder.name(module)}.weight" for module in (head, embedding)]
    stored = [name for name in names if name in decoder.checkpoint.files]
    for name in stored:
        found, wanted = decoder.checkpoint.stored(name).shape, embedding.weight.shape
        if found != wanted:
            raise ModelError(
                f"The tensor {name!r} is {list(found)}; the config makes it {list(wanted)}.",
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

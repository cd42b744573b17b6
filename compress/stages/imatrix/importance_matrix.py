"""The mean square of every column of what linear layers are given on text, one block in memory at a time."""

from __future__ import annotations

import torch

from compress.models.checkpoint import Checkpoint
from compress.models.folder_checks import refuse_quantized
from compress.models.safetensors_file import IMATRIX, write_whole
from compress.stages.base import Context
from compress.stages.blockwise.blockwise_model import BlockwiseModel, build_blockwise_model
from compress.stages.blockwise.calibration import CalibrationActivations, calibration_sequences
from compress.stages.blockwise.layers import linears
from compress.stages.blockwise.resume import BlockCache
from compress.stages.gptq.settings import Quantization
from compress.utils.errors import StageError
from compress.utils.storage import storage_errors
from compress.utils.torch_device import current_device, device_memory_errors


def add_imatrix(checkpoint: Checkpoint, text: Quantization, context: Context) -> Checkpoint:
    """Return the checkpoint with an importance matrix beside its weights; a killed run resumes at the next block.

    Raises `StageError` for inputs that are not finite, and `DataError` for text that is too short.
    """
    refuse_quantized(checkpoint.folder)
    ids = calibration_sequences(context, checkpoint, text.samples, text.sequence_length)
    decoder, finished = build_blockwise_model(checkpoint, current_device()), BlockCache(context.scratch)
    count = len(decoder.blocks)
    with storage_errors(context.scratch):
        context.scratch.mkdir(parents=True, exist_ok=True)
        stream = CalibrationActivations(decoder, text, ids, context.scratch)
        first = finished.first(count, stream)
        for index in context.progress.track(range(first, count), "imatrix: blocks", count - first):
            with device_memory_errors(f"imatrix: {decoder.prefix}.{index}", "samples or sequence_length"):
                finished.store(index, _block(decoder, stream, index), ())
            stream.forget(index)
        stream.forget(count)
        mean_squares = {name: finished.tensor(index, name) for index in range(count) for name in finished.names(index)}
        target_folder = context.scratch / "with-imatrix"
        checkpoint.save(target_folder)
        (target_folder / IMATRIX).unlink(missing_ok=True)
        write_whole(target_folder / IMATRIX, mean_squares, {"tokens": str(ids.numel())})
    unseen = sum(not bool(squares.any()) for squares in mean_squares.values())
    missing = f"; {unseen} of them, of experts, received none of these" if unseen else ""
    context.note(f"imatrix: inputs of {len(mean_squares)} layers on {ids.numel():,} tokens{missing}")
    return Checkpoint(target_folder)


@torch.no_grad()
def _block(decoder: BlockwiseModel, stream: CalibrationActivations, index: int) -> dict[str, torch.Tensor]:
    block, prefix = decoder.load(index), f"{decoder.prefix}.{index}"
    layers = linears(block, prefix)
    sums = {name: torch.zeros(layer.in_features, dtype=torch.float64) for name, layer in layers.items()}
    tokens = dict.fromkeys(layers, 0)

    def seen(name: str, inputs: torch.Tensor) -> None:
        rows = inputs.detach().flatten(0, -2).float()
        sums[name] += rows.square().sum(0, dtype=torch.float64).cpu()
        tokens[name] += len(rows)

    stream.pass_watched(index, layers, seen)
    decoder.unload(index)
    means = {name: (total / max(tokens[name], 1)).float() for name, total in sums.items()}
    broken = next((name for name, mean in means.items() if not bool(torch.isfinite(mean).all())), None)
    if broken is not None:
        raise StageError(
            f"The inputs of {broken} hold NaN or infinite values on the calibration text.",
            expected="finite activations",
            hint="set precision: fp32; if it stays, the model itself overflows on this text",
        )
    return means

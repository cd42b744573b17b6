"""One quantization-aware training: what can be integers, then learning through them, then the graph that has them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from compress.formats.onnx.export import export_onnx
from compress.formats.onnx.int8.from_qat import (
    FOUR_BITS_FROM,
    IntegerLayer,
    insert_integers,
    refuse_four_bits,
    store_in_four_bits,
)
from compress.formats.onnx.int8.fuse_integer_ops import (
    UnpackedAttention,
    fuse_products,
    pack_attention,
    unpack_attention,
)
from compress.formats.onnx.int8.layer_matching import Grids, LayerMatch, grids, match_layers
from compress.formats.onnx.int8.observers import open_session
from compress.formats.onnx.int8.select_nodes import name_nodes, refuse_unfit
from compress.models.hooks import capture_inputs, capture_outputs, removed_on_exit
from compress.models.model import TorchModel
from compress.numerics.calibration import softmax
from compress.numerics.embeddings import normalized
from compress.stages.base import Context
from compress.stages.qat.layers import Quantizable, put_in, quantizable, start, take_out
from compress.stages.qat.settings import QuantizationAwareTraining
from compress.stages.sparsify.magnitude import keep_zeros
from compress.stages.training.loop import Trainee, train
from compress.tasks.capability import EMBEDS, LOCALIZES, PREDICTS_TOKENS
from compress.tasks.inference import answers, forward, predict, with_targets
from compress.tasks.task import Examples
from compress.utils.errors import IntegrityError, StageError
from compress.utils.torch_device import uses_bf16

_PROVEN_ON = 64
_BATCH = 16


class QatTrainer:
    """The settings, the model, which is changed in place, and what teaches.

    That is what the float model answered before or, where images are varied, the float model itself.
    """

    def __init__(self, settings: QuantizationAwareTraining, model: TorchModel, context: Context) -> None:
        self.settings, self.model, self.context = settings, model, context
        self.examples = context.encode("train", model)
        self.answers: torch.Tensor | None = None
        self.teacher: nn.Module | None = None

    def train(self) -> onnx.ModelProto:
        """Return the trained graph with its integers. Raises `StageError` and `IntegrityError`."""
        settings, context, module = self.settings, self.context, self.model.module.eval()
        self._fold()
        chosen, shared = self._choose()
        if settings.augment is None and not {PREDICTS_TOKENS, LOCALIZES} & context.task.capabilities:
            bf16, text = uses_bf16(settings.precision), "qat: predictions of the float model"
            answers = predict(module, self.examples, bf16=bf16, progress=context.progress, description=text)
            self.answers = torch.from_numpy(answers)
        else:
            self.teacher = copy.deepcopy(module).requires_grad_(False)
        pruned = keep_zeros(module)
        layers = put_in(module, chosen, settings.bits, shared, settings.narrow)
        predict(module, self._some(settings.calibration_examples))
        for name in start(layers):
            context.note(f"qat: inputs of {name} were the same in every calibration example; are they too few?")
        trainee = Trainee(
            module,
            self.examples,
            loss=self._loss,
            after_step=pruned,
            validate=context.validator(self.model),
            freeze_embeddings=settings.freeze_embeddings,
            augment=settings.augment,
            keep_best=settings.keep_best,
        )
        train(trainee, settings, context.seed, context.progress, "qat")
        proof = self._some(_PROVEN_ON)
        expected = predict(module, proof)
        graph = self._written(take_out(module, layers))
        # Raise `IntegrityError` if the graph predicts otherwise than the trained model.
        embeds = EMBEDS in context.task.capabilities
        scale, what = (normalized, "embeddings at length 1") if embeds else (softmax, "probabilities")
        largest, mean = _differences(graph, proof, expected, scale)
        if not largest <= settings.tolerance:
            raise IntegrityError(
                f"The exported graph's {what} differ from training by {largest:.3f}.",
                expected=f"at most {settings.tolerance:g}",
                hint="try another opset, or raise tolerance if the difference is acceptable",
            )
        context.note(
            f"qat: {what} of the exported graph differ by at most {largest:.1e} from training, by {mean:.1e} on average"
        )
        return graph

    def _fold(self) -> None:
        sample = self._some(2)
        folded = fold_batch_norms(self.model.module, lambda: torch.from_numpy(predict(self.model.module, sample)))
        left = sum(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in self.model.module.modules())
        if folded:
            self.context.note(f"qat: {folded} batch normalisations folded into the layers before them")
        if left:
            self.context.note(f"qat: {left} batch normalisations stay in float, as they follow no single layer")

    def _choose(self) -> tuple[dict[str, Quantizable], Grids]:
        """Return the layers that become integers, and the grids they share. Raises `StageError` if there is none."""
        module = self.model.module
        layers, reasons = quantizable(module)
        graph = self._exported()
        places, _ = _unpacked(graph, {name: layer.weight.detach().numpy() for name, layer in layers.items()})
        placed_layers = {name for position in places for name in position.layers}
        missing = "does not stand in the exported graph as it is, or alone"
        reasons |= dict.fromkeys(layers.keys() - placed_layers, missing)
        for reason, count in sorted(Counter(reasons.values()).items()):
            named = next(name for name, why in reasons.items() if why == reason)
            others = f" and {count - 1} others" if count > 1 else ""
            self.context.note(f"qat: {named}{others} stays in float: it {reason}")
        if not placed_layers:
            raise StageError(
                "The model has no layer to quantize.",
                expected="linear layers of 1,024 weights or more, or convolutions, that stand in the exported graph",
                hint="remove the stage: a model without such layers does not benefit from integers",
            )
        return {name: layer for name, layer in layers.items() if name in placed_layers}, grids(places)

    def _exported(self) -> ir.Model:
        """Return the exported model; for `qdq`, which is for any runtime, with operators of ONNX alone."""
        fusions = self.settings.format == "qoperator"
        opset = self.settings.opset or (FOUR_BITS_FROM if self.settings.bits == 4 else None)
        graph = ir.from_proto(export_onnx(self.model, self._some(_PROVEN_ON), opset, fusions).graph)
        refuse_unfit(graph)
        if self.settings.bits == 4:
            refuse_four_bits(graph.opset_imports.get("", 0))
        return graph

    def _written(self, layers: dict[str, IntegerLayer]) -> onnx.ModelProto:
        graph = self._exported()
        places, attentions = _unpacked(graph, {name: layer.weight for name, layer in layers.items()})
        lost = layers.keys() - {name for position in places for name in position.layers}
        if lost:
            raise StageError(f"The weights of {sorted(lost)[0]} don't stand in the graph after training.")
        insert_integers(graph, places, layers)
        if self.settings.format == "qoperator":
            fuse_products(graph)
            pack_attention(graph, attentions)
        graph_proto: onnx.ModelProto = ir.to_proto(graph)
        # What was recorded of values in between is no longer so; the runtime infers it.
        del graph_proto.graph.value_info[:]
        store_in_four_bits(graph_proto)
        kinds = Counter("convolutions" if layer.output_grid else "linear layers" for layer in layers.values())
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        bits = 7 if self.settings.bits == 8 and self.settings.narrow else self.settings.bits
        self.context.note(f"qat: {counts} with {bits}-bit weights")
        return graph_proto

    def _loss(self, module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        outputs = with_targets(self.context.task, module, batch)
        mine = answers(self.examples, outputs, batch).float()
        if self.answers is not None:
            taught = self.answers[batch["index"].cpu()].to(mine.device)[tuple(map(slice, mine.shape))]
        else:
            assert self.teacher is not None, "either its answers or the float model itself"
            with torch.no_grad():
                taught = answers(self.examples, forward(self.teacher, batch), batch).float()
        learned = self.context.task.distance(mine, taught, self.settings.temperature)
        share = self.settings.labels_weight
        return (1 - share) * learned + share * self.context.task.loss(outputs, batch["labels"])

    def _some(self, count: int) -> Examples:
        """Up to ``count`` of the training examples, the same for the same seed."""
        drawn = np.random.default_rng(self.context.seed).permutation(len(self.examples))[:count]
        return self.examples.subset(drawn)


def _unpacked(graph: ir.Model, weights: dict[str, np.ndarray]) -> tuple[list[LayerMatch], list[UnpackedAttention]]:
    """Return the layers' places in ``graph``, whose nodes are named and whose attention is taken apart in place."""
    name_nodes(graph)
    attentions = unpack_attention(graph)
    return match_layers(graph, weights), attentions


def _differences(
    graph: onnx.ModelProto, examples: Examples, expected: np.ndarray, scale: Callable[[np.ndarray], np.ndarray]
) -> tuple[float, float]:
    """Return the largest and mean difference of scaled predictions, through ONNX Runtime's kernels."""
    session = open_session(graph)
    names = [entry.name for entry in session.get_inputs()]
    parts = []
    for first in range(0, len(examples), _BATCH):
        rows = range(first, min(first + _BATCH, len(examples)))
        batch = examples.batch(rows)
        given = session.run(list(examples.outputs), {name: batch[name] for name in names})
        float_answers = examples.answers(dict(zip(examples.outputs, given, strict=True)), batch)
        known = expected[rows.start : rows.stop][tuple(map(slice, float_answers.shape))]
        parts.append(np.abs(scale(float_answers) - scale(known)).ravel())
    differences = np.concatenate(parts)
    return float(differences.max()), float(differences.mean())


_Norm = nn.BatchNorm1d | nn.BatchNorm2d
_Layer = nn.Linear | nn.Conv1d | nn.Conv2d
Run = Callable[[], torch.Tensor]


@torch.no_grad()
def fold_batch_norms(module: nn.Module, run: Run) -> int:
    """Fold every normalisation whose input is the output of one layer, and is read by nothing else; how many.

    In place: such a normalisation becomes an `nn.Identity`. ``run`` gives the module's answers on some input; the
    module is in eval mode.
    """
    # Normalisations and the layers whose outputs they are given; each of both is called once.
    norms: dict[_Norm, list[torch.Tensor]] = {part: [] for part in module.modules() if isinstance(part, _Norm)}
    layers: dict[_Layer, list[torch.Tensor]] = {part: [] for part in module.modules() if isinstance(part, _Layer)}
    with (
        capture_inputs({part: part for part in norms}, lambda norm, values: norms[norm].append(values)),
        capture_outputs({part: part for part in layers}, lambda layer, values: layers[layer].append(values)),
    ):
        run()
    makers = {id(values): layer for layer, outputs in layers.items() for values in outputs}
    # Normalizations with their own statistics and factors.
    pairs = {
        norm: layer
        for norm, inputs in norms.items()
        if len(inputs) == 1 and (layer := makers.get(id(inputs[0]))) is not None and len(layers[layer]) == 1
        if norm.running_mean is not None and norm.running_var is not None and norm.affine
    }
    if not _read_by_nothing_else(pairs, run):
        pairs = {norm: layer for norm, layer in pairs.items() if _read_by_nothing_else({norm: layer}, run)}
    for norm, layer in pairs.items():
        fuse = fuse_linear_bn_weights if isinstance(layer, nn.Linear) else fuse_conv_bn_weights
        assert norm.running_mean is not None and norm.running_var is not None, "chosen so"
        learns = layer.weight.requires_grad
        statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
        layer.weight, layer.bias = fuse(layer.weight, layer.bias, *statistics)
        layer.bias.requires_grad_(learns)
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if child in pairs:
                setattr(parent, name, nn.Identity())
    return len(pairs)


def _read_by_nothing_else(pairs: Mapping[_Norm, _Layer], run: Run) -> bool:
    """Return whether predictions stay finite if all but the normalizations read NaN from the layers."""
    true: dict[nn.Module, torch.Tensor] = {}

    def hide(layer: nn.Module, arguments: object, output: torch.Tensor) -> torch.Tensor:
        true[layer] = output
        return torch.full_like(output, torch.nan)

    def show(norm: Any, arguments: object) -> torch.Tensor:
        return true[pairs[norm]]

    handles = [layer.register_forward_hook(hide) for layer in pairs.values()]
    handles += [norm.register_forward_pre_hook(show) for norm in pairs]
    with removed_on_exit(handles):
        return bool(torch.isfinite(run()).all())

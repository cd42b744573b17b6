"""Intermediate values of an ExecuTorch program: outputs of its kernels and values inside its XNNPACK delegates.

The program runs with its own kernels, constants and XNNPACK graphs. It gets more outputs, and a memory layout in
which no value overwrites another.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from compress.formats.executorch.model import calls_of, read_interface, read_pte
from compress.formats.executorch.runtime import METHOD, load_runtime
from compress.formats.executorch.xnnpack_graph import XnnGraph, read_graph
from compress.formats.intermediate_values import (
    MIN_WEIGHT_ELEMENTS,
    GraphStep,
    Run,
    ValueGraph,
    Values,
    longest_length,
    pad_batches,
)
from compress.formats.quiet_output import suppress_output
from compress.formats.target_profile import Target

_MOVED = (
    *("_to_copy", "_to_dim_order_copy", "cat", "clone", "et_view", "expand_copy", "permute_copy", "select_copy"),
    *("slice_copy", "split_copy", "split_with_sizes_copy", "squeeze_copy", "transpose_copy", "unsqueeze_copy"),
    *("view_copy", "StaticTranspose", "StaticReshape", "StaticSlice", "Copy"),
    *("Concatenate2", "Concatenate3", "Concatenate4", "Concatenate5"),
)
"""Kernels and nodes that only move or reshape values."""
_BITS = {"BYTE": 8, "CHAR": 8, "HALF": 16}
_TABLES = {"embedding_2bit": 2, "embedding_4bit": 4}
_ALIGNED = 64


def open_value_graph(file: Path, target: Target, length: int | None) -> ValueGraph:
    """Open the intermediate values of a program; see `compress.formats.spec.FormatSpec`."""
    program = _Program(file)
    return ValueGraph(program.steps(), program.outputs, program.whole, program.shaped)


class _Program:
    """Program with the config beside it. Raises `ModelError` for a truncated or invalid file."""

    def __init__(self, file: Path) -> None:
        content = file.read_bytes()
        read_pte(content, file)
        load_runtime()
        with suppress_output("process"):
            from executorch.exir._serialize._program import deserialize_pte_binary

            self._file = deserialize_pte_binary(content)
        self._inputs = tuple(read_interface(file.parent).inputs)
        self._plan = self._file.program.execution_plan[0]
        self._graphs = {
            index: read_graph(bytes(self._file.program.backend_delegate_data[delegate.processed.index].data))
            for index, delegate in enumerate(self._plan.delegates)
            if delegate.id == "XnnpackBackend"
        }
        self.outputs = [_outer(index) for index in self._plan.outputs]

    def shaped(self, batches: Sequence[Values]) -> list[Values]:
        taken: list[Values] = [{name: batch[name] for name in self._inputs} for batch in batches]
        length = longest_length(taken)
        return pad_batches(taken, length) if length is not None else taken

    def steps(self) -> Iterator[GraphStep]:
        """Yield the steps in execution order; a program writes each value before it reads it."""
        seen = set(self._plan.inputs)
        for step in calls_of(self._plan):
            tensors = [tensor for tensor in _tensors(self._plan, step.args) if not self._stored(tensor)]
            outputs = [tensor for tensor in tensors if tensor not in seen]
            seen.update(tensors)
            # A call of a delegate consists of the nodes of its XNNPACK graph.
            graph = self._graphs.get(getattr(step, "delegate_index", -1))
            if graph is None:
                yield from self._kernel_steps(
                    step, outputs, [_outer(tensor) for tensor in tensors if tensor not in outputs]
                )
            else:
                names = self._names(step, graph)
                for node in graph.nodes:
                    for value in node.outputs:
                        bits = min(graph.bits(operand) for operand in (value, *node.reads))
                        computes = node.kind not in _MOVED and graph.is_float(value)
                        reads = [names[operand] for operand in node.reads]
                        yield GraphStep(names[value], node.kind, names[value], reads, bits, computes)

    def _kernel_steps(self, step: Any, outputs: Sequence[int], reads: Sequence[str]) -> Iterator[GraphStep]:
        operator = self._plan.operators[step.op_index].name if hasattr(step, "op_index") else "delegate"
        kind = operator.rpartition("::")[2]
        constants = [
            self._plan.values[tensor].val for tensor in _tensors(self._plan, step.args) if self._stored(tensor)
        ]
        bits = [
            _BITS.get(constant.scalar_type.name, 32)
            for constant in constants
            if math.prod(constant.sizes) >= MIN_WEIGHT_ELEMENTS
        ]
        for tensor in outputs:
            computes = kind not in _MOVED and self._plan.values[tensor].val.scalar_type.name == "FLOAT"
            yield GraphStep(
                _outer(tensor), operator, _outer(tensor), reads, min([_TABLES.get(kind, 32), *bits]), computes
            )

    def _names(self, step: Any, graph: XnnGraph) -> dict[int, str]:
        """Return the names of a delegate's values; its inputs and outputs have the program's names."""
        inputs, outputs = graph.externals
        outer = dict(zip((*inputs, *outputs), map(_outer, step.args), strict=True))
        return {value: outer.get(value, f"part_{step.delegate_index}.{value}") for value in graph.values}

    def _stored(self, place: int) -> bool:
        return bool(self._plan.values[place].val.data_buffer_idx)

    def whole(self, values: Sequence[str]) -> Run:
        with suppress_output("process"):
            from executorch.exir._serialize._program import PTEFile, serialize_pte_binary

            program = copy.copy(self._file.program)
            program.backend_delegate_data = list(program.backend_delegate_data)
            program.execution_plan = [self._with_outputs(program, values)]
            pte_file = PTEFile(program, self._file.mutable_data, self._file.named_data)
            loaded = load_runtime().load_program(bytes(serialize_pte_binary(pte_file, extract_delegate_segments=True)))
            method = loaded.load_method(METHOD)

        def run(batch: Values) -> Values:
            import torch

            # The program has the bytes that the method reads its weights from.
            assert loaded
            with suppress_output("process"):
                outputs = method.execute([torch.from_numpy(np.ascontiguousarray(batch[name])) for name in self._inputs])
            return {name: outputs[index].numpy().copy() for index, name in enumerate(values)}

        return run

    def _with_outputs(self, program: Any, values: Sequence[str]) -> Any:
        """Return the plan with ``values`` as outputs, after changing the delegates of ``program`` to return them."""
        from executorch.exir.schema import BackendDelegateInlineData

        plan = copy.deepcopy(self._plan)
        positions = {name: self._position(plan, name) for name in values}
        for step in calls_of(plan):
            graph = self._graphs.get(getattr(step, "delegate_index", -1))
            names = {} if graph is None else self._names(step, graph)
            missing = [value for value, name in names.items() if name in positions and not name.startswith("value_")]
            if graph is None or not missing:
                continue
            # The runtime matches arguments to the delegate's external ids, which are assigned in this order.
            step.args = [*step.args, *(positions[names[value]] for value in missing)]
            index = plan.delegates[step.delegate_index].processed.index
            program.backend_delegate_data[index] = BackendDelegateInlineData(data=graph.with_outputs(missing))
        plan.outputs = list(positions.values())
        # Give each value memory of its own, in place.
        from executorch.exir.schema import AllocationDetails

        sizes = {"BYTE": 1, "CHAR": 1, "BOOL": 1, "SHORT": 2, "HALF": 2, "INT": 4, "FLOAT": 4, "LONG": 8, "DOUBLE": 8}
        end = 0
        for value in (entry.val for entry in plan.values if getattr(entry.val, "allocation_info", None) is not None):
            value.allocation_info = AllocationDetails(1, end & 0xFFFFFFFF, end >> 32)
            size = math.prod(value.sizes) * sizes[value.scalar_type.name]
            end += -(-max(size, 1) // _ALIGNED) * _ALIGNED
        plan.non_const_buffer_sizes = [0, end]
        return plan

    def _position(self, plan: Any, name: str) -> int:
        """Return the index of a value in ``plan``; a value inside a delegate is appended to the plan."""
        from executorch.exir.schema import EValue

        if name.startswith("value_"):
            return int(name.removeprefix("value_"))
        delegate, _, value = name.removeprefix("part_").partition(".")
        dims = [int(size) for size in self._graphs[int(delegate)].values[int(value)]["dims"]]
        # The value gets a tensor of its own shape in the program.
        tensor = copy.deepcopy(self._float_template)
        tensor.sizes, tensor.dim_order = dims, list(range(len(dims)))
        plan.values.append(EValue(val=tensor))
        return len(plan.values) - 1

    @cached_property
    def _float_template(self) -> Any:
        """Float tensor with a bounded dynamic shape, which new values are copied from."""
        tensors = (
            self._plan.values[index].val for step in calls_of(self._plan) for index in _tensors(self._plan, step.args)
        )
        return next(
            tensor
            for tensor in tensors
            if tensor.scalar_type.name == "FLOAT"
            and tensor.shape_dynamism.name == "DYNAMIC_BOUND"
            and tensor.allocation_info
        )


def _outer(place: int) -> str:
    """Return the name of a value of the program."""
    return f"value_{place}"


def _tensors(plan: Any, args: Sequence[int]) -> list[int]:
    """Return the tensors among the values ``args``, including those in lists."""
    tensors = []
    for index in args:
        value = plan.values[index].val
        if type(value).__name__ in ("TensorList", "OptionalTensorList"):
            tensors += [item for item in value.items if item >= 0]
        elif hasattr(value, "scalar_type"):
            tensors.append(index)
    return list(dict.fromkeys(tensors))

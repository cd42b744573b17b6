"""The values within an ExecuTorch program: what its kernels give each other, and those within XNNPACK's parts.

What runs are the program's own kernels, constants and XNNPACK graphs, with more outputs, and with memory in which no
value takes another's place.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from compress.formats.executorch.model import read_interface, read_pte
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

_MOVED = frozenset(
    {
        *("_to_copy", "_to_dim_order_copy", "cat", "clone", "et_view", "expand_copy", "permute_copy", "select_copy"),
        *("slice_copy", "split_copy", "split_with_sizes_copy", "squeeze_copy", "transpose_copy", "unsqueeze_copy"),
        *("view_copy", "StaticTranspose", "StaticReshape", "StaticSlice", "Copy"),
        *("Concatenate2", "Concatenate3", "Concatenate4", "Concatenate5"),
    }
)
"""Kernels and nodes that compute nothing."""
_BITS = {"BYTE": 8, "CHAR": 8, "HALF": 16}
_TABLES = {"embedding_2bit": 2, "embedding_4bit": 4}
_ALIGNED = 64


def open_value_graph(file: Path, target: Target, length: int | None) -> ValueGraph:
    """See `compress.formats.spec.FormatSpec`."""
    program = _Program(file)
    return ValueGraph(program.steps(), program.outputs, program.whole, program.shaped)


class _Program:
    """One program, with its config beside it. Raises `ModelError` for one that is cut or broken."""

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
            at: self._graph(one) for at, one in enumerate(self._plan.delegates) if one.id == "XnnpackBackend"
        }
        self.outputs = [_outer(place) for place in self._plan.outputs]

    def _graph(self, delegate: Any) -> XnnGraph:
        return read_graph(bytes(self._file.program.backend_delegate_data[delegate.processed.index].data))

    def shaped(self, batches: Sequence[Values]) -> list[Values]:
        taken: list[Values] = [{name: batch[name] for name in self._inputs} for batch in batches]
        length = longest_length(taken)
        return pad_batches(taken, length) if length is not None else taken

    def steps(self) -> Iterator[GraphStep]:
        """A program writes a value before it is read."""
        seen = set(self._plan.inputs)
        for step in _steps(self._plan):
            places = [place for place in _tensors(self._plan, step.args) if not self._stored(place)]
            makes = [place for place in places if place not in seen]
            seen.update(places)
            graph = self._graphs.get(getattr(step, "delegate_index", -1))
            if graph is None:
                yield from self._of_kernel(step, makes, [_outer(place) for place in places if place not in makes])
            else:
                yield from self._of_graph(step, graph)

    def _of_kernel(self, step: Any, makes: Sequence[int], reads: Sequence[str]) -> Iterator[GraphStep]:
        operator = self._plan.operators[step.op_index].name if hasattr(step, "op_index") else "delegate"
        kind = operator.rpartition("::")[2]
        stored = [self._plan.values[place].val for place in _tensors(self._plan, step.args) if self._stored(place)]
        bits = [_BITS.get(one.scalar_type.name, 32) for one in stored if math.prod(one.sizes) >= MIN_WEIGHT_ELEMENTS]
        for place in makes:
            computes = kind not in _MOVED and self._plan.values[place].val.scalar_type.name == "FLOAT"
            yield GraphStep(
                _outer(place), operator, _outer(place), reads, min([_TABLES.get(kind, 32), *bits]), computes
            )

    def _of_graph(self, step: Any, graph: XnnGraph) -> Iterator[GraphStep]:
        names = self._names(step, graph)
        for node in graph.nodes:
            for value in node.makes:
                bits = min(graph.bits(one) for one in (value, *node.reads))
                computes = node.kind not in _MOVED and graph.is_float(value)
                reads = [names[one] for one in node.reads]
                yield GraphStep(names[value], node.kind, names[value], reads, bits, computes)

    def _names(self, step: Any, graph: XnnGraph) -> dict[int, str]:
        """Of a part's values: those that the program gives it, or is given, are the program's own."""
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
            program.execution_plan = [self._changed(program, values)]
            made = PTEFile(program, self._file.mutable_data, self._file.named_data)
            content = bytes(serialize_pte_binary(made, extract_delegate_segments=True))
            loaded = load_runtime().load_program(content)
            method = loaded.load_method(METHOD)

        def run(batch: Values) -> Values:
            import torch

            # The program has the bytes that the method reads its weights from.
            assert loaded
            with suppress_output("process"):
                found = method.execute([torch.from_numpy(np.ascontiguousarray(batch[name])) for name in self._inputs])
            return {name: found[at].numpy().copy() for at, name in enumerate(values)}

        return run

    def _changed(self, program: Any, values: Sequence[str]) -> Any:
        """The plan with ``values`` for outputs, of ``program``, whose parts it changes so that they give them."""
        from executorch.exir.schema import BackendDelegateInlineData

        plan = copy.deepcopy(self._plan)
        places = {name: self._place(plan, name) for name in values}
        for step in _steps(plan):
            graph = self._graphs.get(getattr(step, "delegate_index", -1))
            names = {} if graph is None else self._names(step, graph)
            wanted = [value for value, name in names.items() if name in places and not name.startswith("value_")]
            if graph is None or not wanted:
                continue
            # The runtime takes them by their external ids, which are given in this order.
            step.args = [*step.args, *(places[names[value]] for value in wanted)]
            at = plan.delegates[step.delegate_index].processed.index
            program.backend_delegate_data[at] = BackendDelegateInlineData(data=graph.with_outputs(wanted))
        plan.outputs = list(places.values())
        _lay_out(plan)
        return plan

    def _place(self, plan: Any, name: str) -> int:
        """Where the value is in ``plan``; one from within a part gets a place there."""
        from executorch.exir.schema import EValue

        if name.startswith("value_"):
            return int(name.removeprefix("value_"))
        at, _, value = name.removeprefix("part_").partition(".")
        dims = [int(size) for size in self._graphs[int(at)].values[int(value)]["dims"]]
        made = copy.deepcopy(self._like)
        made.sizes, made.dim_order = dims, list(range(len(dims)))
        plan.values.append(EValue(val=made))
        return len(plan.values) - 1

    @cached_property
    def _like(self) -> Any:
        """Floats whose shape is free within bounds."""
        tensors = (
            self._plan.values[place].val for step in _steps(self._plan) for place in _tensors(self._plan, step.args)
        )
        return next(
            one
            for one in tensors
            if one.scalar_type.name == "FLOAT" and one.shape_dynamism.name == "DYNAMIC_BOUND" and one.allocation_info
        )


def _outer(place: int) -> str:
    return f"value_{place}"


def _steps(plan: Any) -> Iterator[Any]:
    """The calls of kernels and of parts."""
    for chain in plan.chains:
        for instruction in chain.instructions:
            if hasattr(instruction.instr_args, "args"):
                yield instruction.instr_args


def _tensors(plan: Any, args: Sequence[int]) -> list[int]:
    """The tensors among the values ``args``, those in lists too."""
    found = []
    for place in args:
        value = plan.values[place].val
        if type(value).__name__ in ("TensorList", "OptionalTensorList"):
            found += [one for one in value.items if one >= 0]
        elif hasattr(value, "scalar_type"):
            found.append(place)
    return list(dict.fromkeys(found))


def _lay_out(plan: Any) -> None:
    """Memory of its own for each value, in place."""
    from executorch.exir.schema import AllocationDetails

    sizes = {"BYTE": 1, "CHAR": 1, "BOOL": 1, "SHORT": 2, "HALF": 2, "INT": 4, "FLOAT": 4, "LONG": 8, "DOUBLE": 8}
    end = 0
    for value in (one.val for one in plan.values if getattr(one.val, "allocation_info", None) is not None):
        value.allocation_info = AllocationDetails(1, end & 0xFFFFFFFF, end >> 32)
        bytes_ = math.prod(value.sizes) * sizes[value.scalar_type.name]
        end += -(-max(bytes_, 1) // _ALIGNED) * _ALIGNED
    plan.non_const_buffer_sizes = [0, end]

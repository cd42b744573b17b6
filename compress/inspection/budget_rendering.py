"""Rendering of a size budget for a terminal: a summary, a tree with bars, the largest tensors."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from compress.formats.graph_value import GraphValue
from compress.inspection.budget import Budget, Module, PartCall
from compress.results.formatting import format_bytes, format_count
from compress.utils.responsive_table import ResponsiveTable, TableColumn, bar

SMALL_SHARE = 0.001
"""Modules with a smaller share of the bytes are shown without their children."""
_MOST_VALUES = 8
"""Inputs or outputs that are shown; a decoder has two of each kind for each layer."""
_LEFT_OUT = "hidden at this width; see --json"


def write_budget(budget: Budget, depth: int, top: int, console: Console) -> None:
    """Write the output of `compress inspect`: ``depth`` levels of modules and the ``top`` largest tensors.

    Args:
        budget: Budget to write.
        depth: Number of levels of modules.
        top: Number of tensors.
        console: Console to write to.
    """
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("model", budget.model)
    table.add_row("format", budget.format)
    table.add_row("on disk", f"{format_bytes(budget.total_bytes)} ({budget.total_bytes:,} bytes)")
    table.add_row("tensors", f"{format_bytes(budget.tensor_bytes)} in {len(budget.tensors)} tensors")
    table.add_row("parameters", f"{format_count(budget.parameters)} ({budget.parameters:,})")
    if budget.parameters:
        table.add_row("bits a weight", f"{budget.tensor_bytes * 8 / budget.parameters:.2f}")
    types = (f"{dtype} {format_bytes(share.bytes)}" for dtype, share in budget.dtypes.items() if share.bytes)
    table.add_row("types", ", ".join(types))
    overhead = (f"{kind} {format_bytes(size)}" for kind, size in budget.overhead.items() if size)
    table.add_row("not tensors", ", ".join(overhead) or "nothing")
    for kind, values in (("inputs", budget.inputs), ("outputs", budget.outputs)):
        if values:
            table.add_row(kind, _values(values))
    if budget.statistics is not None:
        sizes = {item.name: item.parameters for item in budget.tensors if item.name in budget.statistics}
        zeros = sum(budget.statistics[name].sparsity * size for name, size in sizes.items())
        table.add_row("zeros", f"{zeros / (sum(sizes.values()) or 1):.1%} of the weights that could be read")
    columns = [TableColumn("module"), TableColumn("", rank=2), TableColumn("share", right=True)]
    columns += [TableColumn("bytes", right=True), TableColumn("weights", right=True, rank=1)]
    tree = ResponsiveTable("", [*columns, TableColumn("types", rank=3)], _LEFT_OUT)
    _branch(tree, budget.modules, "all tensors", 0, depth)
    parts: list[RenderableType] = [table, Text(), tree]
    if top:
        parts += [Text(), _largest(budget, top)]
    if budget.calls is not None:
        parts += [Text(), _calls(budget.calls)]
    parts += [Text(f"note: {note}", style="dim") for note in budget.notes]
    console.print(Group(*parts), soft_wrap=True)


def _values(values: Sequence[GraphValue]) -> Text:
    """Return a line for each value, of many only the first; the file is named if there are several."""
    several = len({value.file for value in values}) > 1
    lines = [f"{value.file}: {value}" if several else str(value) for value in values[:_MOST_VALUES]]
    if len(values) > _MOST_VALUES:
        lines.append(f"and {len(values) - _MOST_VALUES} more, see --json")
    return Text("\n".join(lines))


def _branch(table: ResponsiveTable, module: Module, name: str, level: int, depth: int) -> None:
    """Add the row of a module and, down to ``depth``, those of its children.

    Args:
        table: Table to extend in place.
        module: Module to add.
        name: Displayed name.
        level: Depth of the module.
        depth: Largest depth.
    """
    # Join chains of single children into one row.
    while level and len(module.children) == 1:
        module = module.children[0]
        name = f"{name}.{module.name}"
    numbers = (f"{module.share:.1%}", format_bytes(module.bytes), format_count(module.parameters))
    label = (f"{'  ' * level}{name}", "bold" if level <= 1 else "")
    dtypes = [dtype for dtype, size in module.dtypes.items() if size] or list(module.dtypes)
    types = ", ".join([*dtypes[:2], *(["..."] if len(dtypes) > 2 else [])])
    table.add(label, (bar(module.share, 16), "cyan"), *numbers, (types, "dim"))
    for child in module.children if level < depth and (module.share >= SMALL_SHARE or not level) else ():
        _branch(table, child, child.name, level + 1, depth)


def _largest(budget: Budget, top: int) -> ResponsiveTable:
    columns = [TableColumn("tensor"), TableColumn("shape", rank=1), TableColumn("type", rank=2)]
    columns += [TableColumn("bytes", right=True), TableColumn("share", right=True)]
    # Statistics are optional columns.
    if budget.statistics is not None:
        names = ("zeros", "min", "max", "mean", "std", "> 6 std")
        columns += [TableColumn(name, right=True, rank=rank) for rank, name in enumerate(names, start=3)]
    table = ResponsiveTable(f"largest {min(top, len(budget.tensors))} tensors", columns, _LEFT_OUT)
    for tensor in sorted(budget.tensors, key=lambda tensor: -tensor.bytes)[:top]:
        shape = "x".join(str(size) for size in tensor.shape) or "scalar"
        share = tensor.bytes / (budget.tensor_bytes or 1)
        cells = [tensor.name, shape, tensor.dtype, format_bytes(tensor.bytes), f"{share:.1%}"]
        statistics = None if budget.statistics is None else budget.statistics.get(tensor.name)
        if statistics is not None:
            values = (statistics.minimum, statistics.maximum, statistics.mean, statistics.std)
            cells += [f"{statistics.sparsity:.1%}", *(f"{value:.3g}" for value in values), f"{statistics.outliers:.3%}"]
        table.add(*cells, *["-"] * (len(columns) - len(cells)))
    return table


def _calls(calls: Sequence[PartCall]) -> ResponsiveTable:
    names = ("weights", "multiplications", "memory, fp32", "fp16")
    columns = [TableColumn("one call of"), *(TableColumn(name, right=True) for name in names)]
    columns.append(TableColumn("fp32, attention stored", right=True, rank=1))
    table = ResponsiveTable("predicted for one image of the model's default size", columns, _LEFT_OUT)
    for call in calls:
        sizes = (call.fp32_bytes, call.fp16_bytes, call.fp32_stored_attention_bytes)
        counts = (call.parameters, call.multiplications)
        table.add(call.part, *map(format_count, counts), *map(format_bytes, sizes))
    return table

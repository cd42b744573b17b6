"""The budget for a terminal: a summary, a tree with bars, the largest tensors."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from compress.inspect.budget import Budget, Module
from compress.inspect.statistics import TensorStatistics

BAR_CELLS = 16
SMALL_SHARE = 0.001
"""Modules with a smaller share of the bytes are shown, but not what is below them."""
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_NAME_CELLS = 44
_GUIDE_CELLS = 4


def render_budget(budget: Budget, depth: int, top: int) -> RenderableType:
    """All that `compress inspect` shows: ``depth`` levels of modules, the ``top`` largest tensors."""
    parts: list[RenderableType] = [_summary(budget), Text(), _tree(budget, depth)]
    if top:
        parts += [Text(), _largest(budget, top)]
    parts += [Text(f"note: {note}", style="dim") for note in budget.notes]
    return Group(*parts)


def write_budget(budget: Budget, depth: int, top: int, console: Console) -> None:
    """Write the budget to ``console``."""
    console.print(render_budget(budget, depth, top), soft_wrap=True)


def format_bytes(count: int) -> str:
    """`91.2 MB`, in powers of 1000."""
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def format_count(count: int) -> str:
    """`22.7M`."""
    size = float(count)
    for unit in ("", "K", "M"):
        if size < 1000:
            return f"{size:.0f}" if not unit else f"{size:.1f}{unit}"
        size /= 1000
    return f"{size:.1f}B"


def bar(share: float) -> str:
    """A bar of `BAR_CELLS` cells, in eighths of a cell."""
    eighths = round(max(0.0, min(1.0, share)) * BAR_CELLS * 8)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (_EIGHTHS[rest] if rest else "")).ljust(BAR_CELLS)


def _summary(budget: Budget) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_row("model", budget.model)
    table.add_row("format", budget.format)
    table.add_row("on disk", f"{format_bytes(budget.total_bytes)} ({budget.total_bytes:,} bytes)")
    table.add_row("tensors", f"{format_bytes(budget.tensor_bytes)} in {len(budget.tensors)} tensors")
    table.add_row("parameters", f"{format_count(budget.parameters)} ({budget.parameters:,})")
    if budget.parameters:
        table.add_row("bits a weight", f"{budget.tensor_bytes * 8 / budget.parameters:.2f}")
    types = (f"{dtype} {format_bytes(share.bytes)}" for dtype, share in budget.dtypes.items() if share.bytes)
    table.add_row("types", ", ".join(types))
    beside = (f"{kind} {format_bytes(size)}" for kind, size in budget.overhead.items() if size)
    table.add_row("not tensors", ", ".join(beside) or "nothing")
    if budget.statistics is not None:
        table.add_row("zeros", f"{_overall_sparsity(budget):.1%} of the weights that could be read")
    return table


def _overall_sparsity(budget: Budget) -> float:
    statistics = budget.statistics or {}
    sizes = {tensor.name: tensor.parameters for tensor in budget.tensors if tensor.name in statistics}
    total = sum(sizes.values())
    return sum(statistics[name].sparsity * size for name, size in sizes.items()) / total if total else 0.0


def _tree(budget: Budget, depth: int) -> Tree:
    tree = Tree(_line("all tensors", budget.modules, 0), guide_style="dim")
    for child in budget.modules.children:
        _branch(tree, child, 1, depth)
    return tree


def _branch(tree: Tree, module: Module, level: int, depth: int) -> None:
    if level > depth:
        return
    name = module.name
    while len(module.children) == 1:
        module = module.children[0]
        name = f"{name}.{module.name}"
    node = tree.add(_line(name, module, level))
    if module.share < SMALL_SHARE:
        return
    for child in module.children:
        _branch(node, child, level + 1, depth)


def _line(name: str, module: Module, level: int) -> Text:
    width = max(12, _NAME_CELLS - _GUIDE_CELLS * level)
    text = Text(no_wrap=True)
    text.append(_shortened(name, width).ljust(width), style="bold" if level <= 1 else "")
    text.append(f" {bar(module.share)}", style="cyan")
    text.append(f" {module.share:6.1%} {format_bytes(module.bytes):>9} {format_count(module.parameters):>7}")
    text.append(f"  {_types(module)}", style="dim")
    return text


def _types(module: Module) -> str:
    dtypes = [dtype for dtype, size in module.dtypes.items() if size] or list(module.dtypes)
    return ", ".join(dtypes[:2]) + (", ..." if len(dtypes) > 2 else "")


def _shortened(name: str, width: int) -> str:
    return name if len(name) <= width else f"…{name[-width + 1 :]}"


def _largest(budget: Budget, top: int) -> Table:
    table = Table(title=f"largest {min(top, len(budget.tensors))} tensors", title_justify="left", box=None)
    for heading in ("tensor", "shape", "type"):
        table.add_column(heading, overflow="fold")
    for heading in ("bytes", "share"):
        table.add_column(heading, justify="right")
    statistics = budget.statistics
    if statistics is not None:
        for heading in ("zeros", "min", "max", "mean", "std", "> 6 std"):
            table.add_column(heading, justify="right")
    for tensor in sorted(budget.tensors, key=lambda tensor: -tensor.bytes)[:top]:
        shape = "x".join(str(size) for size in tensor.shape) or "scalar"
        share = tensor.bytes / (budget.tensor_bytes or 1)
        cells = [tensor.name, shape, tensor.dtype, format_bytes(tensor.bytes), f"{share:.1%}"]
        table.add_row(*cells, *(_statistics(statistics.get(tensor.name)) if statistics is not None else ()))
    return table


def _statistics(found: TensorStatistics | None) -> tuple[str, ...]:
    if found is None:
        return ("-",) * 6
    numbers = tuple(f"{value:.3g}" for value in (found.minimum, found.maximum, found.mean, found.std))
    return (f"{found.sparsity:.1%}", *numbers, f"{found.outliers:.3%}")

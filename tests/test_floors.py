"""No circle of imports is left, those of functions and of type hints counted; the floors are in pyproject.toml."""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter

import grimp
import pytest


@pytest.fixture(scope="module")
def imports() -> grimp.ImportGraph:
    return grimp.build_graph("compress", include_external_packages=False, exclude_type_checking_imports=False)


def circle(graph: grimp.ImportGraph) -> list[str]:
    """The modules of a circle, the first one once more at its end; none where there is no circle."""
    sorter = TopologicalSorter({name: graph.find_modules_directly_imported_by(name) for name in graph.modules})
    try:
        sorter.prepare()
    except CycleError as error:
        found: list[str] = error.args[1]
        return found
    return []


def test_no_module_imports_itself_by_way_of_others(imports: grimp.ImportGraph) -> None:
    assert circle(imports) == []


def test_an_import_within_a_function_and_one_for_type_hints_are_counted(imports: grimp.ImportGraph) -> None:
    # `Stage.run` imports its worker within, and the worker its `Context` for type hints alone.
    assert "compress.stages.recovery.quantized_recovery" in imports.find_modules_directly_imported_by("compress.stages.recovery.lora_recovery")
    assert "compress.stages.base" in imports.find_modules_directly_imported_by("compress.stages.recovery.quantized_recovery")


def test_a_circle_is_seen() -> None:
    graph = grimp.ImportGraph()
    for importer, imported in (("a", "b"), ("b", "c"), ("c", "a")):
        graph.add_import(importer=importer, imported=imported)
    assert set(circle(graph)) == {"a", "b", "c"}

"""Tests of imports: no cycles between modules, and none from the core to a plug-in (layers: pyproject.toml)."""

from __future__ import annotations

import re
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest

from compress.plugins import read_specs

ROOT = Path(__file__).parents[1]
PLUGINS = ROOT / "compress" / "plugins"


@pytest.fixture(scope="module")
def imports() -> grimp.ImportGraph:
    graph = grimp.build_graph("compress", include_external_packages=False, exclude_type_checking_imports=False)
    # For type checkers alone: `import compress` loads the Python API at the first use of one of its names.
    graph.remove_import(importer="compress", imported="compress.api")
    return graph


@pytest.fixture(scope="module")
def contracts() -> dict[str, dict[str, list[str]]]:
    """Return the import contracts of pyproject.toml by type."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return {contract["type"]: contract for contract in settings["tool"]["importlinter"]["contracts"]}


def find_cycle(graph: grimp.ImportGraph) -> list[str]:
    """Return the modules of a cycle, whose first module is repeated at the end, or an empty list."""
    sorter = TopologicalSorter({name: graph.find_modules_directly_imported_by(name) for name in graph.modules})
    try:
        sorter.prepare()
    except CycleError as error:
        cycle: list[str] = error.args[1]
        return cycle
    return []


def test_no_module_imports_itself_through_others(imports: grimp.ImportGraph) -> None:
    assert find_cycle(imports) == []


def test_imports_in_functions_and_for_type_hints_are_counted(imports: grimp.ImportGraph) -> None:
    # `compress.cli.run` imports the pipeline in a function; `compress.cli.output` imports rich for type hints.
    assert "compress.pipeline.run" in imports.find_modules_directly_imported_by("compress.cli.run")
    assert "compress.benchmark.session" in imports.find_modules_directly_imported_by("compress.cli.bench")


def test_a_cycle_is_found() -> None:
    graph = grimp.ImportGraph()
    for importer, imported in (("a", "b"), ("b", "c"), ("c", "a")):
        graph.add_import(importer=importer, imported=imported)
    assert set(find_cycle(graph)) == {"a", "b", "c"}


def test_there_are_few_layers(contracts: dict[str, dict[str, list[str]]]) -> None:
    assert len(contracts["layers"]["layers"]) <= 9


def test_the_import_contract_allows_what_the_specs_of_plugins_declare(
    contracts: dict[str, dict[str, list[str]]],
) -> None:
    pattern = r"compress\.plugins\.(\w+)\.\*\* -> compress\.plugins\.(\w+)\.\*\*"
    exceptions = {re.fullmatch(pattern, line) for line in contracts["independence"]["ignore_imports"]}
    assert None not in exceptions, "expected lines such as `compress.plugins.a.** -> compress.plugins.b.**`"
    specs = read_specs()
    allowed = {(match[1], match[2]) for match in exceptions if match is not None and match[1] in specs}
    assert allowed == {(name, required) for name, spec in specs.items() for required in spec.requires}


def test_the_core_names_no_plugin_in_a_string_either() -> None:
    files = [file for file in (ROOT / "compress").rglob("*.py") if not file.is_relative_to(PLUGINS)]
    assert len(files) > 100
    named = {
        f"{file.relative_to(ROOT)}: {match[0]}"
        for file in [*files, PLUGINS / "__init__.py"]
        for match in re.finditer(r"compress[./]plugins[./](?!__init__)[a-z_]+", file.read_text())
    }
    assert named == set()


def test_every_reference_of_a_spec_lies_in_its_own_plugin() -> None:
    for name, spec in read_specs().items():
        references = [command.reference for command in spec.commands.values()]
        references += [reference for point in (spec.hosts, spec.run_finished) for reference in point.values()]
        assert all(reference.startswith(f"compress.plugins.{name}.") for reference in references), name
        assert spec.name == name

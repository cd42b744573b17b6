"""Tests of the documentation: generated pages are current, recipes are valid and links exist."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from packaging.requirements import Requirement

from compress.cli import CORE_COMMANDS, app
from compress.plugins import find_commands
from compress.recipe.loading import read_recipe
from compress.recipe.shipped import SHIPPED

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md")))
GENERATED = (DOCS / "reference", DOCS / "results", DOCS / "architectures.md")
WRITTEN = [page for page in PAGES if not any(page.is_relative_to(generated) for generated in GENERATED)]
RECIPES = [
    pytest.param(block, id=f"{page.relative_to(ROOT)}:{number}")
    for page in PAGES
    if page.name != "extending.md"  # its plugin is needed: tests/third_party
    for number, block in enumerate(re.findall(r"```yaml(?: title=\"[^\"]+\")?\n(.*?)```", page.read_text(), re.DOTALL))
    if re.search(r"^name:", block, re.MULTILINE) and re.search(r"^stages:", block, re.MULTILINE)
]


def test_generated_pages_are_current() -> None:
    generated = runpy.run_path(str(DOCS / "generate.py"))
    for name, page in generated["PAGES"].items():
        assert (DOCS / name).read_text() == page(), f"{name}: run `make docs`"
    for name, schema in generated["SCHEMAS"].items():
        assert json.loads((DOCS / name).read_text()) == schema(), f"{name}: run `make docs`"


def test_reference_names_every_command() -> None:
    text = (DOCS / "reference" / "commands.md").read_text()
    commands = {**CORE_COMMANDS, **find_commands(reserved=CORE_COMMANDS)}
    assert {"run", "check", "compare"} <= {*commands}
    assert not [name for name, command in commands.items() if not command.hidden and f"compress {name}" not in text]


@pytest.mark.parametrize("block", RECIPES)
def test_recipes_in_the_documentation_are_valid(block: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(block)
    assert {"onnx", "onnx_int8"} & set(read_recipe(path).labels())


def test_documentation_has_recipes_to_check() -> None:
    assert {parameter.id.split(":")[0] for parameter in RECIPES} >= {"README.md", "docs/tutorials/classifier.md"}


def test_links_between_pages_exist() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: {target}"


def written_commands(page: Path) -> Iterator[list[str]]:
    """Yield the words of every `compress` command of a page: in code blocks, indented blocks and inline code."""
    text = page.read_text()
    blocks = re.findall(r"^```(?:console|sh|bash|text)?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", "").splitlines()]
    lines += [line.strip() for line in text.splitlines() if line.startswith("    ")]
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    for line in lines:
        if re.match(r"compress [a-z]", line):
            yield shlex.split(re.split(r" (?:\||>|&&|;|<) ?", line)[0], comments=True)[1:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_the_documentation_exist_with_their_options(page: Path) -> None:
    for words in written_commands(page):
        command, rest = typer.main.get_command(app), words
        while rest and isinstance(command, typer.core.TyperGroup):
            context = typer.Context(command)
            # Groups such as `compress recipes` may have arguments of their own.
            if rest[0] not in command.list_commands(context):
                assert rest != words, f"compress {rest[0]}: no such command"
                break
            command, rest = command.resolve_command(context, rest)[1], rest[1:]
        options = {"--help", "-h", *(name for parameter in command.params for name in parameter.opts)}
        unknown = [word for word in rest if re.match(r"--?[a-z]", word) and word.split("=")[0] not in options]
        assert not unknown, f"compress {shlex.join(words)}: no option {', '.join(unknown)}"


def test_recipes_that_the_documentation_runs_by_name_are_shipped() -> None:
    names = {
        words[1]
        for page in WRITTEN
        for words in written_commands(page)
        if len(words) > 1 and words[0] in ("run", "check") and re.fullmatch("[a-z0-9-]+", words[1])
    }
    assert {"quickstart", "smollm2-int4"} <= names
    assert names <= {path.stem for path in SHIPPED.glob("*.yaml")}


def test_commands_are_found_in_every_kind_of_code(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("Run `compress check a.yaml`.\n\n    compress nightly s\n\n```console\ncompress run b  # c\n```\n")
    assert list(written_commands(page)) == [["run", "b"], ["nightly", "s"], ["check", "a.yaml"]]


def test_install_page_lists_every_extra_with_its_packages() -> None:
    """The extra `dev` is for contributors, and `all` consists of others."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    expected = {extra: {Requirement(package).name for package in extras[extra]} for extra in {*extras} - {"dev", "all"}}
    page = (DOCS / "install.md").read_text()
    rows = re.findall(r"^\| `([a-z-]+)` \| [^|]+ \| ([^|]+) \| [^|]+ \|$", page, re.MULTILINE)
    assert {extra: set(packages.split(", ")) for extra, packages in rows} == expected | {"all": {"most of the others"}}


def test_troubleshooting_quotes_messages_of_the_code() -> None:
    # Literals that are continued on the next line are one message.
    code = "\n".join(
        path.read_text() for path in (ROOT / "compress").rglob("*.py") if "shipped_recipes" not in path.parts
    )
    code = re.sub(r"""["']\s*\n\s*f?["']""", "", code)
    headings = re.findall(r"^## `(.+)`$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(headings) >= 10
    for heading in headings:
        for piece in filter(None, map(str.strip, re.split("[…,;.]", heading))):
            assert piece in code, f"{heading}: {piece}"


def sentences(text: str) -> Iterator[str]:
    """Yield the sentences of a page's prose, without code blocks, tables and headings; inline code is one word."""
    text = re.sub(r"^```.*?^```$", "\n", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^(?:    (?! *[-*0-9]).*|\|.*|#.*)$", "\n", text, flags=re.MULTILINE)
    text = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", re.sub(r"`[^`]+`", "code", text))
    for paragraph in re.split(r"\n\s*\n|^\s*(?:[-*]|\d+\.) ", text, flags=re.MULTILINE):
        yield from re.split(r"(?<=[.!?])\s+", " ".join(paragraph.split()))


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))
def test_sentences_have_at_most_thirty_words(page: Path) -> None:
    long = [sentence for sentence in sentences(page.read_text()) if len(sentence.split()) > 30]
    assert not long


def test_sentences_are_separated() -> None:
    page = "# Title\n\nOne `a b c`\ntwo. [Three](x.md)!\n\n- four\n- five\n\n| six |\n\n    seven\n\n```\neight\n```\n"
    assert list(filter(None, sentences(page))) == ["One code two.", "Three!", "four", "five"]


def test_readme_and_architecture_page_are_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120, "README: a stranger with one minute"
    assert len((DOCS / "architecture.md").read_text().split()) <= 1300, "architecture: 1,300 words"


def test_no_placeholders_are_left() -> None:
    for page in (ROOT / "README.md", *sorted((ROOT / "recipes").rglob("*.yaml"))):
        assert "@@" not in page.read_text(), page.name

"""Crafted files from strangers end with an error about the file, within bounded memory and time."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from crafted import gguf, key, message

from compress.formats.onnx.stored_tensors import read_tensors
from compress.models.config_checks import check_config
from compress.recipe.loading import read_recipe
from compress.report.run_folder import shipped_files
from compress.utils.errors import InputError, ModelError, RecipeError

MAX_BYTES = 1 << 30  # of address space that a command may gain, most of which are mapped libraries
INSPECT = """
import resource, sys
from pathlib import Path
{imports}
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + {limit}, used + {limit}))
from compress.utils.errors import CompressError
try:
    {call}
except CompressError as error:
    print(str(error).splitlines()[0])
"""


def read_in_child(imports: str, call: str, path: Path, limit: int = MAX_BYTES) -> str:
    """Return what a reader prints about a file in a child process of bounded memory and 20 seconds."""
    code = INSPECT.format(imports=imports, call=call, limit=limit)
    child = subprocess.run([sys.executable, "-P", "-c", code, path], capture_output=True, text=True, timeout=20)
    assert child.returncode == 0, child.stderr
    return child.stdout.strip()


def integers_for_names() -> bytes:
    return message(7, message(1, b"\x08\x14" * 500_000))  # field 1 of a node is a text


def deep_subgraphs() -> bytes:
    graph = b""
    for _ in range(2000):
        graph = message(1, message(5, message(6, graph)))
    return message(7, graph)


def empty_nodes() -> bytes:
    return message(7, message(1, b"") * 500_000)


@pytest.mark.parametrize(
    ("content", "expected"),
    [(integers_for_names, ""), (deep_subgraphs, "Not a whole ONNX file: its contents are invalid"), (empty_nodes, "")],
)
def test_onnx_file_of_one_megabyte_needs_bounded_memory(
    tmp_path: Path, content: Callable[[], bytes], expected: str
) -> None:
    (tmp_path / "model.onnx").write_bytes(content())
    imports = "from compress.formats.onnx.graph_reader import read_graph"
    printed = read_in_child(imports, "read_graph(Path(sys.argv[1]))", tmp_path / "model.onnx")
    assert printed.startswith(expected) and bool(printed) == bool(expected)


NESTED = gguf(0, 1, key(b"a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 80_000 + struct.pack("<IQ", 4, 0))
DIMENSIONS = gguf(1, 0, key(b"t") + struct.pack("<I", 120_000) + struct.pack("<Q", 2**64 - 1) * 120_000)
HUGE = gguf(1, 0, key(b"t") + struct.pack("<IQQQQIQ", 4, *[2**64 - 1] * 4, 0, 0))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (NESTED, "Not a valid GGUF file: its header cannot be read (arrays nested more than 8 deep)"),
        (DIMENSIONS, "Not a valid GGUF file: its header cannot be read (the tensor 't' has 120000 dimensions"),
        (HUGE, "The GGUF file is truncated: it has"),
        (gguf(2**64 - 1, 2**64 - 1, b""), "model.gguf has 18,446,744,073,709,551,615 tensors."),
        (gguf(0, 2**64 - 1, b""), "The header has 18,446,744,073,709,551,615 metadata entries."),
        (gguf(1000, 1000, b""), "The GGUF file is truncated"),
    ],
)
def test_gguf_header_that_asks_for_too_much_is_refused(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    imports = "from compress.formats.gguf.model import read_gguf\nimport gguf"
    assert read_in_child(imports, "read_gguf(Path(sys.argv[1]))", tmp_path / "model.gguf").startswith(expected)


@pytest.mark.parametrize(
    "content", ['{"a": ' + "1" * 5000 + "}", '{"a": ' + "[" * 200_000 + "]" * 200_000 + "}", "[" * 200_000]
)
def test_json_that_python_cannot_read_is_not_valid(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    imports = "from compress.models.json_file import read_json"
    printed = read_in_child(imports, "read_json(Path(sys.argv[1]))", tmp_path / "config.json")
    assert printed.startswith("config.json is not valid JSON: ")


@pytest.mark.parametrize(
    "content",
    ["[" * 200_000, '{"a": ' + "1" * 5000 + "}", '{"a":' * 900 + "1" + "}" * 900],
    ids=["brackets", "digits", "objects"],
)
@pytest.mark.parametrize(
    ("name", "imports", "call"),
    [
        ("report.json", "from compress.report.compare.baseline import load_baseline as read", "read(file)"),
        ("report.json", "from compress.pipeline.artifact import outputs_of as read", "read(file.parent)"),
        ("modules.json", "from compress.models.sentence_modules import read_modules as read", "read(file.parent)"),
        ("config.json", "from compress.formats.executorch.model import read_interface as read", "read(file.parent)"),
        ("config.json", "from compress.models.model import minified_content as read", "read(file)"),
        ("rows.json", "from compress.data.files import read_file as read", "read(file, ['text'])"),
        ("rows.jsonl", "from compress.data.files import read_file as read", "read(file, ['text'])"),
        ("answers", "from compress.tasks.spans import read_answers as read", "read('{' + file.read_text())"),
    ],
)
def test_every_reader_of_json_refuses_what_python_cannot_read(
    tmp_path: Path, name: str, imports: str, call: str, content: str
) -> None:
    (tmp_path / name).write_text(content)
    printed = read_in_child(f"{imports}\nfile = Path(sys.argv[1])", call, tmp_path / name)
    assert printed, "an error that names the file"


def test_front_matter_of_a_card_takes_bounded_memory(tmp_path: Path) -> None:
    deep = "[" * 15_000
    laughs = "\n".join(["a0: &a0 [x, x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 300))])
    merges = "\n".join(["a0: &a0 {x: y}", *(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}" for n in range(1, 300))])
    imports = "from compress.pipeline.licence_detection import find_licence"
    for number, (front, expected) in enumerate(
        [
            (f"license: {deep}", "The card's front matter is no YAML"),
            (f"{laughs}\nlicense: *a299", "not stated"),
            (f"{merges}\nlicense: mit", "MIT"),
            ("license: null", "not stated"),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "README.md").write_text(f"---\n{front}\n---\n")
        printed = read_in_child(imports, "print(find_licence(Path(sys.argv[1])).licence)", folder)
        assert expected in printed, printed


@pytest.mark.parametrize("lines", ["k{}: 1\n", "name: {}\n", "- {{nosuch{}: 1}}\n"])
def test_recipe_with_thousands_of_mistakes_lists_the_first_hundred(tmp_path: Path, lines: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    start = "stages:\n" if lines.startswith("-") else "name: a\n"
    recipe.write_text(start + "".join(lines.format(number) for number in range(9500)))
    imports = "from compress.recipe.loading import read_recipe"
    printed = read_in_child(imports, "read_recipe(Path(sys.argv[1]))", recipe)
    assert "101 problems" in printed


@pytest.mark.parametrize("seed", [99999999999999999999, 2**32])
def test_seed_that_random_generators_refuse_is_a_problem(tmp_path: Path, seed: int) -> None:
    (tmp_path / "recipe.yaml").write_text(f"name: a\nseed: {seed}\n")
    with pytest.raises(RecipeError, match="seed"):
        read_recipe(tmp_path / "recipe.yaml")


def external_onnx(folder: Path, shape: list[int], **external: str) -> Path:
    """Write a graph with one float tensor in another file, and return its path."""
    from onnx import TensorProto, helper

    tensor = TensorProto(name="w", data_type=1, dims=shape, data_location=TensorProto.EXTERNAL)
    for name, value in external.items():
        tensor.external_data.add(key=name, value=value)
    values = [helper.make_tensor_value_info(name, 1, shape) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", values[:1], values[1:], [tensor])
    (folder / "model.onnx").write_bytes(helper.make_model(graph).SerializeToString())
    return folder / "model.onnx"


@pytest.mark.parametrize(
    ("external", "expected"),
    [
        ({"location": "w\0.bin"}, "The file 'w\\x00.bin' with the weights is missing"),
        ({"location": "w.bin", "length": "15"}, "has 15 bytes of external data, too many or too few"),
        ({"location": "w.bin", "length": "64"}, "has 64 bytes of external data, too many or too few"),
        ({"location": "w.bin", "offset": "9" * 5000}, "The place of 'w' in its file"),
        ({"location": "w.bin"}, None),
        ({"location": "w.bin", "offset": "32", "length": "16"}, None),
    ],
)
def test_external_data_must_have_the_bytes_of_its_shape(
    tmp_path: Path, external: dict[str, str], expected: str | None
) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(64))
    file = external_onnx(tmp_path, [4], **external)
    if expected is None:
        assert read_tensors(file, tmp_path)[0].bytes == 16
    else:
        with pytest.raises(ModelError, match=re.escape(expected)):
            read_tensors(file, tmp_path)


@pytest.mark.parametrize("part", [{}, {"text_config": {}}])
def test_config_whose_attention_is_a_repository_is_refused(tmp_path: Path, part: dict[str, dict[str, str]]) -> None:
    config: dict[str, Any] = {"model_type": "bert", **part}
    config.get("text_config", config)["_attn_implementation"] = "evil/kernels"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="names the repository 'evil/kernels'"):
        check_config(tmp_path, trust_remote_code=False)


def test_link_out_of_a_run_is_neither_registered_nor_sent(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "run/model").mkdir(parents=True)
    (tmp_path / "run/model/config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match=r"model/config\.json is a link to a file outside the folder"):
        shipped_files(tmp_path / "run")


def test_config_that_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    for name, make in {"fifo": os.mkfifo, "zero": lambda path: path.symlink_to("/dev/zero")}.items():
        folder = tmp_path / name
        folder.mkdir()
        make(folder / "config.json")
        with pytest.raises(ModelError, match=r"config\.json is no regular file"):
            check_config(folder, trust_remote_code=False)
    (tmp_path / "config.json").touch()
    os.truncate(tmp_path / "config.json", 10**12)
    with pytest.raises(ModelError, match=r"config\.json has 1,000,000,000,000 bytes"):
        check_config(tmp_path, trust_remote_code=False)


@pytest.mark.parametrize("name", ["num_hidden_layers", "encoder_layers", "n_layer"])
def test_config_of_millions_of_layers_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "text_config": {name: 10**7}}))
    with pytest.raises(ModelError, match=f"The config's {name} is 10,000,000"):
        check_config(tmp_path, trust_remote_code=False)

from __future__ import annotations

from pathlib import Path

import pytest

from compress.plugins.devices.inventory import choose_devices, find_inventory, read_inventory
from compress.utils.errors import InputError

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFw8Wo1fcPJ2YaQh39pku1En4bRAAAtI4N1kUcftxxsl"
GOOD = f"""
devices:
  pi:
    host: 192.168.1.20
    user: pi
    key: ~/.ssh/id_ed25519
    host_key: {KEY}
  bench-2:
    host: "fe80::1%eth0"
    port: 2222
    user: someone
    key: keys/device
    host_key: {KEY} of the bench
    python: /opt/python 3.12/bin/python3
    cache: /var/tmp/compress
"""


def written(folder: Path, text: str) -> Path:
    (folder / "devices.yaml").write_text(text)
    return folder / "devices.yaml"


def refusal(folder: Path, text: str) -> str:
    with pytest.raises(InputError) as caught:
        read_inventory(written(folder, text))
    return str(caught.value)


def test_devices_are_read_with_their_defaults(tmp_path: Path) -> None:
    inventory = read_inventory(written(tmp_path, GOOD))
    assert list(inventory) == ["pi", "bench-2"]
    assert (inventory["pi"].port, inventory["pi"].python, inventory["pi"].cache) == (
        22,
        "python3",
        ".cache/compress-device",
    )
    assert (inventory["bench-2"].port, inventory["bench-2"].cache) == (2222, "/var/tmp/compress")


def test_every_problem_is_told_with_its_line_and_the_nearest_name(tmp_path: Path) -> None:
    text = GOOD.replace("    host: 192", "    hots: 192").replace("port: 2222", "port: 99999") + "password: x\n"
    problems = refusal(tmp_path, text)
    assert "devices.yaml:4: devices.pi.hots: found an unknown field" in problems
    assert "Did you mean 'host'?" in problems
    assert "devices.pi.host: found nothing" in problems
    assert "devices.yaml:10: devices.bench-2.port: found 99999; expected a number of at most 65535" in problems
    assert "password: found an unknown field; expected only devices" in problems


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("host", "-oProxyCommand=touch x"),
        ("host", "a b"),
        ("host", "pi;reboot"),
        ("user", "-l"),
        ("user", "pi$(id)"),
        ("python", "-c"),
        ("python", "python3\\nreboot"),
        ("cache", "../other"),
        ("cache", "/"),
        ("cache", "~/x"),
        ("host_key", "AAAAC3NzaC1lZDI1NTE5"),
        ("host_key", KEY[:-3]),
        ("host_key", KEY.replace("ssh-ed25519 ", "ssh-rsa ")),
    ],
)
def test_values_that_could_be_taken_for_something_else_are_refused(tmp_path: Path, field: str, value: str) -> None:
    fields = {"host": "h", "user": "u", "key": "k", "host_key": KEY, field: value}
    lines = "\n".join(f'    {name}: "{field_text}"' for name, field_text in fields.items())
    assert f"devices.pi.{field}: found" in refusal(tmp_path, f"devices:\n  pi:\n{lines}\n")


@pytest.mark.parametrize("name", ["all", "Pi", "a b", "../x"])
def test_names_are_plain(tmp_path: Path, name: str) -> None:
    text = GOOD.replace("  pi:", f'  "{name}":')
    assert "expected a name of up to 40 small letters" in refusal(tmp_path, text)


@pytest.mark.parametrize("text", ["", "devices:", "devices: {}", "- pi", "devices: [pi", "devices: 3"])
def test_a_file_without_devices_is_refused(tmp_path: Path, text: str) -> None:
    problems = refusal(tmp_path, text)
    assert "inventory" in problems
    assert "recipe" not in problems


def test_devices_are_chosen_by_name_or_all(tmp_path: Path) -> None:
    file = written(tmp_path, GOOD)
    known = read_inventory(file)
    assert list(choose_devices(known, ["bench-2"], file)) == ["bench-2"]
    assert list(choose_devices(known, ["bench-2", "all"], file)) == ["bench-2", "pi"]
    with pytest.raises(InputError, match="There is no device 'bench2'") as caught:
        choose_devices(known, ["bench2"], file)
    assert "pi, bench-2, all; did you mean 'bench-2'?" in str(caught.value)


def test_the_inventory_lies_beside_the_recipe_or_here(tmp_path: Path) -> None:
    recipes, current_folder = tmp_path / "recipes", tmp_path / "here"
    recipes.mkdir()
    current_folder.mkdir()
    with pytest.raises(InputError, match="There is no inventory") as caught:
        find_inventory(None, [recipes, current_folder])
    assert str(recipes / "devices.yaml") in str(caught.value)
    later = written(current_folder, GOOD)
    assert find_inventory(None, [recipes, current_folder]) == later
    first = written(recipes, GOOD)
    assert find_inventory(None, [recipes, current_folder]) == first
    assert find_inventory(later, [recipes]) == later

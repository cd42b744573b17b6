"""Inventory of devices: a YAML file that is validated as strictly as a recipe and contains no secret."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import Field, field_validator

from compress.recipe.document import FileKind, describe, read_document
from compress.recipe.validation_errors import validate
from compress.utils.errors import InputError, did_you_mean, nearest_name
from compress.utils.pydantic_models import Frozen

FILE_NAME = "devices.yaml"
ALL_DEVICES = "all"
_SECTION = "devices"
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}\Z")
_EXAMPLE = (
    "devices: {pi: {host: 192.168.1.20, user: pi, key: ~/.ssh/id_ed25519, host_key: ssh-ed25519 AAAA...}}; "
    "docs/guides/devices.md says how to get each"
)

_INVENTORY = FileKind(
    "inventory", "The inventory of devices", "a YAML inventory", f"a mapping such as {_EXAMPLE}",
    "docs/guides/devices.md describes every field",
)  # fmt: skip


class Device(Frozen):
    """Address and access of one machine. ``host_key`` is the only key that it may answer with."""

    host: str = Field(pattern=r"^[A-Za-z0-9_:][A-Za-z0-9._:%-]*$", description="Name or address.")
    port: int = Field(22, ge=1, le=65535, description="Port of its SSH server.")
    user: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._@-]*$", description="User name for the login.")
    key: str = Field(min_length=1, description="Path of the private key file, without a passphrase.")
    host_key: str = Field(
        pattern=r"^(ssh-|ecdsa-|sk-)[A-Za-z0-9@.-]+ [A-Za-z0-9+/]+=*( .*)?$",
        description="The device's public host key, as `ssh-keyscan HOST` shows it after the host's name.",
    )
    python: str = Field("python3", min_length=1, description="Python 3.11 or newer on the device: a name or a path.")
    cache: str = Field(
        ".cache/compress-device",
        min_length=1,
        description="Working folder on the device, absolute or relative to the home folder.",
    )

    @field_validator("key", "python", "cache")
    @classmethod
    def _is_one_line(cls, value: str) -> str:
        if any(ord(letter) < ord(" ") for letter in value) or value.startswith("-"):
            raise ValueError("one line of text that doesn't begin with a dash")
        return value

    @field_validator("host_key")
    @classmethod
    def _is_whole(cls, value: str) -> str:
        kind, text = value.split()[:2]
        try:
            key = base64.b64decode(text, validate=True)
        except binascii.Error:
            key = b""
        # A public key begins with the name of its kind: RFC 4253, section 6.6.
        if key[4 : 4 + len(kind)] != kind.encode():
            raise ValueError("a public key as `ssh-keyscan` writes it, whole and on one line")
        return value

    @field_validator("cache")
    @classmethod
    def _is_a_folder_of_its_own(cls, value: str) -> str:
        if value.startswith("~"):
            raise ValueError("a folder below the home, written without ~, or an absolute one")
        # The home folder and the root have no name, also if they are written as `./` or `//`.
        if ".." in Path(value).parts or not Path(value).name:
            raise ValueError("a folder of its own, without `..`")
        return value


def find_inventory(given: Path | None, folders: Sequence[Path]) -> Path:
    """Return ``path``, or the first `devices.yaml` in ``folders``. Raises `InputError` if there is no such file."""
    candidates = [given] if given is not None else [folder / FILE_NAME for folder in folders]
    inventory = next((candidate for candidate in candidates if candidate.is_file()), None)
    if inventory is None:
        where = ", ".join(dict.fromkeys(str(candidate) for candidate in candidates))
        raise InputError("There is no inventory of devices.", where=where, expected=f"a file such as {_EXAMPLE}")
    return inventory


def read_inventory(path: Path) -> dict[str, Device]:
    """Return the devices of an inventory by name. Raises `InputError` with file, line and field of every problem."""
    document = read_document(path, _INVENTORY)
    for key in document.values:
        if key != _SECTION:
            document.problem((key,), "an unknown field", f"only {_SECTION}", nearest_name(str(key), [_SECTION]))
    section = document.values.get(_SECTION)
    if not isinstance(section, dict) or not section:
        document.problem((_SECTION,), describe(section), f"devices by their names, such as {_EXAMPLE}")
        section = {}
    # Note a problem for every name that is not allowed.
    for name in section:
        if not isinstance(name, str) or not _NAME.match(name) or name == ALL_DEVICES:
            expected = f"a name of up to 40 small letters, digits, - and _, other than `{ALL_DEVICES}`"
            document.problem((_SECTION, name), repr(name), expected)
    validated = {name: validate(Device, fields, document, (_SECTION, name)) for name, fields in section.items()}
    if document.problems:
        raise document.error()
    return {name: device for name, device in validated.items() if device is not None}


def choose_devices(known: Mapping[str, Device], names: Sequence[str], file: Path) -> dict[str, Device]:
    """Return the named devices in that order, and every device for `all`. Raises `InputError` for an unknown name."""
    chosen: dict[str, Device] = {}
    for name in names:
        if name == ALL_DEVICES:
            chosen.update(known)
        elif name in known:
            chosen[name] = known[name]
        else:
            raise InputError(
                f"There is no device {name!r}.{did_you_mean(name, known)}",
                where=str(file),
                expected=f"one of {', '.join([*known, ALL_DEVICES])}",
            )
    return chosen

"""A fixture with one SSH server on the loopback address for all device tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from loopback_sshd import Server, find_binary, running


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Start the SSH server, which must be available in CI."""
    binary = find_binary()
    if binary is None and os.environ.get("CI"):
        pytest.fail("no sshd here, and CI must have one (Debian: openssh-server)")
    if binary is None:
        pytest.skip("no sshd here (Debian: openssh-server)")
    with running(binary, tmp_path_factory.mktemp("sshd")) as made:
        yield made

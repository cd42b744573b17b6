"""Push a registry to a real S3 server (moto) and fetch it; needs s3fs and moto. Prints the findings as JSON."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

ENDPOINT = "http://127.0.0.1"
os.environ |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}


def main(folder: Path) -> dict[str, Any]:
    """Push, lose the server half-way, push again, fetch into a new folder, and return the findings."""
    from fsspec.config import conf
    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem

    from compress.plugins.registry import remote as module
    from compress.plugins.registry.registry import Registry
    from compress.plugins.registry.remote import Remote, fetch, push, verify_remote
    from compress.plugins.registry.upkeep import verify
    from compress.utils.errors import StorageError

    module.PIECE_BYTES = 10_000
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    conf["s3"] = {
        "client_kwargs": {"endpoint_url": f"{ENDPOINT}:{port}"},
        "config_kwargs": {"retries": {"max_attempts": 1}, "connect_timeout": 2},
    }
    S3FileSystem().mkdir("models")
    registry = Registry(folder / "registry")
    far = Remote("s3://models/reviews")
    put, count = far._put, 0

    def vanishing(path: str, content: bytes) -> None:
        nonlocal count
        count += 1
        if count == 8:
            # No server listens on this port.
            settings = {**conf["s3"], "client_kwargs": {"endpoint_url": f"{ENDPOINT}:1"}}
            far._system = S3FileSystem(**settings, skip_instance_cache=True)
        put(path, content)

    far._put = vanishing  # type: ignore[method-assign]
    vanished = ""
    try:
        push(registry, far)
    except StorageError as error:
        vanished = error.what
    again, new = Remote("s3://models/reviews"), Registry(folder / "new")
    findings: dict[str, Any] = {"vanished": vanished, "lines after": len(again.lines())}
    findings["sent entries"] = push(registry, again).entries
    fetch(new, again)
    findings["faults there"] = [fault.path for fault in verify_remote(again)]
    findings["faults here"] = [fault.path for fault in verify(new)]
    findings["same log"] = new.log.path.read_bytes() == registry.log.path.read_bytes()
    server.stop()
    return findings


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]))))

"""Other machines, reached over SSH, on which artifacts are timed by the same harness as on this machine.

The program that a session starts on a device contains this module, so it imports the standard library alone.
"""

from __future__ import annotations

from compress.plugins import Command, PluginSpec

SPEC = PluginSpec(
    name="devices",
    summary="Time artifacts on other machines over SSH.",
    commands={
        "devices": Command(
            "compress.plugins.devices.cli:devices",
            "List the devices of an inventory, and whether each answers, is free and has a Python for the harness.",
            "compress devices --inventory devices.yaml",
            "Operate",
        ),
    },
    hosts={"ssh": "compress.plugins.devices.device_host:find_devices"},
)

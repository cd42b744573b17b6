"""Search for the recipe that meets all limits and is smallest or fastest."""

from __future__ import annotations

from compress.plugins import Command, PluginSpec

SPEC = PluginSpec(
    name="search",
    summary="Search for the recipe that meets all limits and is smallest or fastest.",
    requires=("ray",),
    commands={
        "search": Command(
            "compress.plugins.search.cli:search",
            "Find the recipe that meets the limits and is smallest or fastest; Ctrl-C and --resume continue it.",
            "compress search --model sample:minilm --data reviews.csv --budget 30m",
            "Start",
        ),
    },
    functions={"search": "compress.plugins.search.function:search"},
)

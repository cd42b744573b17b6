"""Monitoring of a model in use: drift of its inputs and answers, and comparison of two models on real requests."""

from __future__ import annotations

from compress.plugins import Command, PluginSpec

SPEC = PluginSpec(
    name="monitoring",
    summary="Watch a model in use: drift of its inputs and answers, and A/B comparison on requests.",
    commands={
        "drift": Command(
            "compress.plugins.monitoring.commands:drift",
            "Look for drift in words, lengths, activations and answers of a model in use. Exit code 1: there is drift.",
            "compress drift quickstart --recent today.csv",
            "Operate",
        ),
        "ab": Command(
            "compress.plugins.monitoring.commands:ab",
            "Replay requests through two models: better, same, worse, or inconclusive. Exit code 1: B is worse.",
            "compress ab quickstart candidate --traffic requests.jsonl",
            "Operate",
        ),
    },
)

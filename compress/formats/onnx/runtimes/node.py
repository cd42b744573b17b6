"""ONNX Runtime's WebAssembly in Node: the browser's engine and the browser's graph, without a browser."""

from __future__ import annotations

from compress.formats.onnx.runtimes.web import IN_NODE

RUNTIME = IN_NODE

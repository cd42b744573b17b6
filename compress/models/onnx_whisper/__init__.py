"""Whisper as two ONNX graphs, encoder and decoder, written from a checkpoint for ONNX Runtime's own kernels."""

from __future__ import annotations

from compress.models.onnx_whisper.architecture import SUPPORTED, Architecture, read_architecture
from compress.models.onnx_whisper.export import export_whisper
from compress.models.onnx_whisper.parity import prove_whisper

__all__ = ["SUPPORTED", "Architecture", "export_whisper", "prove_whisper", "read_architecture"]

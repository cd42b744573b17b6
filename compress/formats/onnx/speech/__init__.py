"""Whisper as two ONNX graphs, encoder and decoder, written from a checkpoint for ONNX Runtime's own kernels."""

from __future__ import annotations

from compress.formats.onnx.speech.architecture import SUPPORTED, WhisperArchitecture, read_architecture
from compress.formats.onnx.speech.export import export_whisper
from compress.formats.onnx.speech.parity import prove_whisper

__all__ = ["SUPPORTED", "WhisperArchitecture", "export_whisper", "prove_whisper", "read_architecture"]

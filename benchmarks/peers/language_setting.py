"""Common setting of all language-model quantizers: model, calibration windows, bits, threads and evaluation.

Perplexity is measured on the same windows of held-out text, in the runtime of each format.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from compress.data.config import DataConfig
from compress.data.dataset import Dataset, load_dataset
from compress.evaluation.evaluate import predict
from compress.formats.target_profile import Target
from compress.models.checkpoint import Checkpoint, QuantizedCheckpoint
from compress.sources.resolve import resolve_model
from compress.stages.base import Context
from compress.stages.blockwise.calibration import calibration_sequences
from compress.tasks.evaluation import Evaluation
from compress.tasks.registry import TASKS
from compress.tasks.task import Examples
from compress.utils.progress import Progress, SilentProgress


@dataclass(frozen=True)
class LanguageSetting:
    """Inputs of every quantizer. ``folder`` is for outputs; there are ``samples`` calibration windows of ``length``."""

    model: str
    data: str
    folder: Path
    threads: int
    bits: int
    group_size: int
    progress: Progress
    samples: int = 16
    windows: int = 20
    length: int = 512
    authors: Path | None = None
    """A checkout of OpenGVLab/EfficientQAT."""

    @cached_property
    def source(self) -> Path:
        """Folder of the starting model in Hugging Face layout."""
        return resolve_model(self.model, progress=self.progress)

    @cached_property
    def task(self) -> Any:
        return TASKS["text-generation"]

    @cached_property
    def dataset(self) -> Dataset:
        return load_dataset(DataConfig(source=self.data), self.task.columns, Path(), self.progress)

    def context(self, scratch: Path) -> Context:
        """Return the context of a stage, with seed 0."""

        def resolve(_: str) -> Any:
            raise AssertionError("quantization reads no other model")

        def start(_: str) -> Any:
            return self.task.load(self.source, None, False)

        return Context(
            task=self.task,
            data=self.dataset,
            max_length=self.length,
            seed=0,
            progress=SilentProgress(),
            earlier=start,
            resolve=resolve,
            scratch=scratch,
        )

    @cached_property
    def calibration(self) -> Path:
        """File with token ids [samples, length]: the windows that the stage `gptq` samples with seed 0."""
        path, context = self.folder / "calibration.npy", self.context(self.folder)
        np.save(path, calibration_sequences(context, Checkpoint(self.source), self.samples, self.length).numpy())
        return path

    @cached_property
    def held_out(self) -> Examples:
        """Windows of the test split for perplexity."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.source)
        rows = self.dataset.split("test")
        examples: Examples = self.task.eval_examples(
            rows, tokenizer, None, self.length, Evaluation(windows=self.windows)
        )
        return examples

    def prompt(self, tokens: int) -> list[int]:
        """Return the first tokens of the held-out text."""
        return [int(token) for token in self.held_out.inputs[0]["input_ids"][:tokens]]

    def order(self, output: Path, **more: Any) -> dict[str, Any]:
        """Return the order for a quantizer's script."""
        return {
            "model": str(self.source.absolute()),
            "calibration": str(self.calibration.absolute()),
            "output": str(output.absolute()),
            "bits": self.bits,
            "group_size": self.group_size,
            "threads": self.threads,
            **more,
        }

    def perplexity(self, artifact: Path, target: Target) -> float:
        """Return the perplexity of an ONNX folder or a GGUF file in the runtime of ``target``."""
        predictions = predict(
            artifact, self.task, self.held_out, target, self.threads, self.progress, f"{artifact.name}"
        )
        return self._perplexity(predictions.kept)

    def perplexity_of_checkpoint(self, folder: Path) -> float:
        """Return the perplexity of a plain or GPTQ checkpoint: transformers in fp32 with dequantized weights."""
        import torch

        torch.set_num_threads(self.threads)
        checkpoint = QuantizedCheckpoint(folder)
        model_folder = folder if checkpoint.quantization is None else self.source
        model = self.task.load(model_folder, None, False).module
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                module, _, part = name.rpartition(".")
                weight = checkpoint.weight(module) if part == "weight" else checkpoint.stored(name).float()
                parameter.copy_(weight)
        losses = []
        for index in self.progress.track(range(len(self.held_out)), folder.name, len(self.held_out)):
            ids = torch.from_numpy(self.held_out.inputs[index]["input_ids"])[None]
            with torch.no_grad():
                logits = model(ids).logits.numpy()
            losses.append(self.task.collect({"logits": logits}, self.held_out, [index]))
        return self._perplexity({name: np.concatenate([part[name] for part in losses]) for name in losses[0]})

    def _perplexity(self, outputs: Mapping[str, np.ndarray]) -> float:
        rows = self.task.measure(outputs, None, "model", "target")
        return float(next(row.value for row in rows if row.metric == "perplexity"))

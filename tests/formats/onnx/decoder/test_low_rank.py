"""An adapter in a decoder's graph, against peft's own model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from adapters import save_adapter
from peft import PeftModel
from quantized import quantize_tiny_llama, save_tiny_llama

from compress.formats.gguf.export import plan_gguf
from compress.formats.onnx.decoder import GraphSettings, export_decoder, verify_decoder
from compress.formats.onnx.model import OnnxModel
from compress.models.checkpoint import Checkpoint
from compress.models.lora_adapter import low_rank
from compress.models.model import TorchModel
from compress.models.quantized_module import load_quantized_module
from compress.tasks.registry import get_task
from compress.utils.errors import ModelError

IDS = (np.arange(48).reshape(2, 24) * 3) % 150
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
"""peft calls what transformers will remove."""


def adapted(tmp_path: Path, *targets: str, quantized: bool = True, **fields: object) -> Checkpoint:
    """A checkpoint with an adapter beside its files; peft makes none for a head that is tied."""
    source = save_tiny_llama(tmp_path / "source", tie_word_embeddings="lm_head" not in targets)
    checkpoint = quantize_tiny_llama(source, tmp_path / "quantized") if quantized else source
    module = TorchModel.load(source.folder, get_task("text-generation")).module
    save_adapter(module, checkpoint.folder / "adapter", *targets, **fields)
    return checkpoint


def run(model: OnnxModel, folder: Path) -> np.ndarray:
    folder.mkdir()
    model.save(folder)
    session = onnxruntime.InferenceSession(next(folder.rglob("*.onnx")), providers=["CPUExecutionProvider"])
    past = {
        entry.name: np.zeros((len(IDS), entry.shape[1], 0, entry.shape[3]), np.float32)
        for entry in session.get_inputs()
        if entry.name.startswith("past")
    }
    logits: np.ndarray = session.run(["logits"], {"input_ids": IDS, "attention_mask": np.ones_like(IDS), **past})[0]
    return logits


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("targets", [("q_proj", "v_proj", "down_proj"), ("k_proj", "gate_proj"), ("lm_head",)])
def test_the_graph_answers_as_peft_does(tmp_path: Path, targets: tuple[str, ...], quantized: bool) -> None:
    checkpoint = adapted(tmp_path, *targets, quantized=quantized)
    model = export_decoder(checkpoint, GraphSettings(accuracy_level=1))
    base = load_quantized_module(checkpoint)
    with torch.no_grad():
        without = base(input_ids=torch.from_numpy(IDS)).logits.numpy()
        opened = PeftModel.from_pretrained(base, str(checkpoint.folder / "adapter"))
        expected = opened(input_ids=torch.from_numpy(IDS)).logits.numpy()
    assert np.abs(expected - without).max() > 0.1
    np.testing.assert_allclose(run(model, tmp_path / "onnx"), expected, rtol=1e-3, atol=1e-3)
    assert verify_decoder(model, checkpoint, IDS, 1e-2, 0.1).difference < 1e-2


def test_a_checkpoint_without_an_adapter_has_no_factors(tmp_path: Path) -> None:
    assert low_rank(save_tiny_llama(tmp_path / "source")) == {}


def test_adapters_that_are_more_than_products_are_refused(tmp_path: Path) -> None:
    checkpoint = adapted(tmp_path, "q_proj", quantized=False, use_dora=True)
    with pytest.raises(ModelError, match="more than a product"):
        low_rank(checkpoint)


def test_gguf_does_not_drop_an_adapter_in_silence(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has an adapter, which GGUF keeps in a file of its own"):
        plan_gguf(adapted(tmp_path, "q_proj"))

"""Tests of a quantized SmolLM2 in GGUF with llama.cpp: weights, tokens and losses are compared with transformers."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from quantized import quantize_tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress.data.samples.fetch import sample_directory
from compress.formats.gguf.export import compare_gguf, write_gguf
from compress.formats.gguf.llama_cpp_library import LlamaModel
from compress.formats.runtime import get_runtime
from compress.formats.targets import TARGETS
from compress.models.checkpoint import Checkpoint, QuantizedCheckpoint

LENGTH = 256


@pytest.fixture(scope="module")
def quantized(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> QuantizedCheckpoint:
    """Return SmolLM2 rounded to 4 bits in groups of 64, including its embeddings."""
    folder = tmp_path_factory.mktemp("smollm2")
    source = Checkpoint(smollm2)
    checkpoint = quantize_tiny_llama(source, folder / "quantized", bits=4, group_size=64)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(source.folder / name, checkpoint.folder / name)
    write_gguf(checkpoint, folder / "quantized" / "model.gguf")
    return checkpoint


@pytest.fixture(scope="module")
def texts() -> list[str]:
    rows: list[str] = pq.read_table(Path(sample_directory("wiki")) / "test.parquet")["text"].to_pylist()
    return [row[:20_000] for row in rows[:5]]


@pytest.mark.slow
def test_4_5_bit_file_keeps_every_quantized_weight(quantized: QuantizedCheckpoint) -> None:
    file = quantized.folder / "model.gguf"
    differences = compare_gguf(file, quantized)
    assert len(differences) == 272 and all(difference.largest == 0 for difference in differences)
    assert {difference.kind for difference in differences} == {"Q4_0", "F32"}
    assert file.stat().st_size < 78_000_000


@pytest.mark.slow
def test_articles_are_tokenized_identically(quantized: QuantizedCheckpoint, texts: list[str]) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(quantized.folder), LlamaModel(quantized.folder / "model.gguf")
    assert tokenizer.chat_template
    for text in texts:
        assert model.tokenize(text) == tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


@pytest.mark.slow
def test_losses_match_the_dequantized_weights(quantized: QuantizedCheckpoint, texts: list[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(quantized.folder)
    ids = np.stack([tokenizer(text, verbose=False)["input_ids"][:LENGTH] for text in texts[:2]])
    session = get_runtime("llama-cpp").open(quantized.folder, TARGETS["llama-cpp"], 2)
    config = Checkpoint(quantized.folder).config
    plain = AutoModelForCausalLM.from_config(_config(config)).eval()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(quantized.weight(name.removesuffix(".weight")))
        expected = plain(torch.from_numpy(ids)).logits
    predicted = torch.from_numpy(session.predict({"input_ids": ids})["logits"])
    losses = [
        float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), torch.from_numpy(ids)[:, 1:].flatten()))
        for logits in (predicted, expected)
    ]
    # llama.cpp rounds activations to 8 bits.
    assert losses[0] == pytest.approx(losses[1], abs=0.03)
    assert (predicted.argmax(-1) == expected.argmax(-1)).float().mean() > 0.9


def _config(fields: dict[str, object]) -> object:
    from transformers import LlamaConfig

    return LlamaConfig(**{name: value for name, value in fields.items() if name != "quantization_config"})

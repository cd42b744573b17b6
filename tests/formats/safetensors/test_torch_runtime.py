"""Tests of transformers as a runtime: outputs of a folder are compared with its own model class."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import channel_nets
import numpy as np
import pytest
import tiny_images
import tiny_pairs
import tiny_run
import tiny_sounds
import tiny_tasks
import torch
import transformers
from adapters import save_adapter
from quantized import quantize_tiny_llama, save_tiny_llama
from tiny_whisper import FRAMES, write_tiny_whisper
from written_decoders import greedy_tokens, tokens_of_transformers

from compress.formats.generation.decoder import open_decoder
from compress.formats.model_file import format_of, model_files
from compress.formats.runtime import Session, get_runtime
from compress.formats.safetensors.folder import task_of_folder
from compress.formats.targets import REFERENCE
from compress.models.checkpoint import Checkpoint
from compress.tasks import automatic_speech_recognition
from compress.utils.errors import InputError, ModelError, StageError

TARGET = REFERENCE.target
IDS = {
    "input_ids": np.array([[5, 9, 40, 41, 7], [6, 30, 31, 0, 0]]),
    "attention_mask": np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
}
PIXELS = {"pixel_values": np.random.default_rng(0).normal(size=(3, 3, 16, 16)).astype(np.float32)}


def opened(folder: Path) -> Session:
    return get_runtime(TARGET.runtime).open(folder, TARGET, threads=1)


def of_task(task: str, **config: Any) -> Callable[[Path], Any]:
    return lambda folder: tiny_tasks.write_model(folder, task, **config)


def bare_images(folder: Path) -> None:
    model = tiny_images.vit()
    transformers.ViTModel(model.module.config).save_pretrained(folder)
    model.processor.save_pretrained(folder)


TASKS: dict[str, tuple[Callable[[Path], Any], str, tuple[str, ...]]] = {
    "text-classification": (
        lambda folder: tiny_run.write_model(folder, tiny_run.LABELS), "AutoModelForSequenceClassification", ("logits",)
    ),
    "token-classification": (
        of_task("token-classification", num_labels=5), "AutoModelForTokenClassification", ("logits",)
    ),
    "text-ranking": (of_task("text-ranking", num_labels=1), "AutoModelForSequenceClassification", ("logits",)),
    "fill-mask": (of_task("fill-mask", num_labels=2), "AutoModelForMaskedLM", ("logits",)),
    "question-answering": (
        of_task("question-answering", num_labels=2), "AutoModelForQuestionAnswering", ("start_logits", "end_logits")
    ),
    "feature-extraction": (lambda folder: tiny_pairs.encoder().save(folder), "AutoModel", ("last_hidden_state",)),
    "image-classification": (
        lambda folder: tiny_images.vit().save(folder), "AutoModelForImageClassification", ("logits",)
    ),
    "image-feature-extraction": (bare_images, "AutoModel", ("pooler_output",)),
    "text-generation": (save_tiny_llama, "AutoModelForCausalLM", ("logits",)),
}  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_outputs_match_transformers_row_by_row(tmp_path: Path, task: str) -> None:
    write, auto, names = TASKS[task]
    tmp_path.mkdir(exist_ok=True)
    write(tmp_path)
    assert format_of(tmp_path) == TARGET.format and model_files(tmp_path)[0].name == "model.safetensors"
    batch = PIXELS if "image" in task else IDS
    outputs = opened(tmp_path).predict({**batch, "not_an_input": np.zeros(1)})
    module = getattr(transformers, auto).from_pretrained(tmp_path).eval()
    for row in range(len(next(iter(batch.values())))):
        length = int(IDS["attention_mask"][row].sum()) if batch is IDS else None
        alone = {name: torch.tensor(array[row : row + 1, :length]) for name, array in batch.items()}
        with torch.no_grad():
            expected = module(**alone)
        for name in names:
            own_output = outputs[name][row : row + 1, : expected[name].shape[1]]
            np.testing.assert_allclose(own_output, expected[name].numpy(), atol=2e-5)


def test_module_with_trusted_code_is_run(tmp_path: Path) -> None:
    model = channel_nets.plain()
    model.save(tmp_path)
    with torch.no_grad():
        expected = model.module.network(torch.tensor(PIXELS["pixel_values"]))  # type: ignore[operator]
    np.testing.assert_allclose(opened(tmp_path).predict(PIXELS)["logits"], expected, atol=1e-5)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Return a checkpoint with 4-bit layers and table, and the float model with its dequantized weights."""
    folder = tmp_path_factory.mktemp("llama")
    source = save_tiny_llama(folder / "float")
    checkpoint = quantize_tiny_llama(source, folder / "integers")
    module = transformers.AutoModelForCausalLM.from_pretrained(folder / "float").eval()
    state = {name: source.stored(name).half().float() for name in source.files}
    for name in state:
        layer = checkpoint.quantized(name.removesuffix(".weight"))
        state[name] = state[name] if layer is None else layer.dequantize()
    module.load_state_dict(state, strict=False)
    module.tie_weights()
    return folder / "integers", module


def test_quantized_weights_are_dequantized_once_and_reported(quantized: tuple[Path, Any]) -> None:
    folder, module = quantized
    session = opened(folder)
    with torch.no_grad():
        expected = module(torch.tensor(IDS["input_ids"][:1])).logits.numpy()
    np.testing.assert_allclose(session.predict({"input_ids": IDS["input_ids"][:1]})["logits"], expected, atol=2e-5)
    assert session.settings["integers_made_float"] is True
    runtime = get_runtime("torch")
    assert "low-bit" in runtime.remark(folder) and runtime.remark(folder.parent / "float") is None  # type: ignore[attr-defined]


def test_adapter_of_a_quantized_checkpoint_is_applied(quantized: tuple[Path, Any], tmp_path: Path) -> None:
    folder, module = quantized
    Checkpoint(folder).save(tmp_path)
    adapted = transformers.AutoModelForCausalLM.from_config(module.config)
    adapted.load_state_dict(module.state_dict())
    save_adapter(adapted, tmp_path / "adapter", "q_proj", "down_proj")
    with torch.no_grad():  # peft's own forward: the product beside the layer
        expected = adapted.eval()(torch.tensor(IDS["input_ids"][:1])).logits.numpy()
    logits = opened(tmp_path).predict({"input_ids": IDS["input_ids"][:1]})["logits"]
    np.testing.assert_allclose(logits, expected, atol=5e-5)
    assert np.abs(logits - opened(folder).predict({"input_ids": IDS["input_ids"][:1]})["logits"]).max() > 1e-2


MAMBA = {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "vocab_size": 160}


@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_cached_greedy_tokens_match_generate(tmp_path: Path, family: str) -> None:
    if family == "mamba":
        torch.manual_seed(0)
        transformers.MambaForCausalLM(transformers.MambaConfig(**MAMBA)).save_pretrained(tmp_path)
        tiny_run.tokenizer().save_pretrained(tmp_path)
    else:
        save_tiny_llama(tmp_path)
    decoder = open_decoder(opened(tmp_path), str(tmp_path))
    module = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for prompt in ([5, 9, 40], [7]):
        assert greedy_tokens(decoder, prompt, 6) == tokens_of_transformers(module, prompt, 6)
    assert decoder.cached and decoder.vocabulary == 160


def test_transcription_matches_generate(tmp_path: Path) -> None:
    write_tiny_whisper(tmp_path)
    features = np.random.default_rng(3).normal(size=(2, 8, 2 * FRAMES)).astype(np.float32)
    transcribed = opened(tmp_path).predict({"input_features": features})
    module = transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path).eval()
    for row, tokens in zip(features, transcribed["sequences"], strict=True):
        windows = [torch.tensor(row[None, :, at : at + FRAMES]) for at in (0, FRAMES)]
        heard = [module.generate(window, max_length=24).flatten().tolist() for window in windows]
        expected = [token for window in heard for token in window if token < 256]
        assert [token for token in tokens.tolist() if token >= 0] == expected


def test_invalid_input_and_unknown_architectures_are_named(tmp_path: Path) -> None:
    tiny_run.write_model(tmp_path, tiny_run.LABELS)
    with pytest.raises(InputError, match="lacks the model's input input_ids"):
        opened(tmp_path).predict({})
    with pytest.raises(StageError, match=r"failed on a batch: .*out of range"):
        opened(tmp_path).predict({"input_ids": np.array([[100_000]])})
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertForPonies"]}')
    with pytest.raises(ModelError, match=r"No task is known for a model of the class BertForPonies\."):
        opened(tmp_path)


def test_thread_count_is_restored_after_the_session(tmp_path: Path) -> None:
    tiny_run.write_model(tmp_path, tiny_run.LABELS)
    threads_before = torch.get_num_threads()
    session = get_runtime(TARGET.runtime).open(tmp_path, TARGET, threads=threads_before + 1)
    assert torch.get_num_threads() == threads_before + 1
    del session
    assert torch.get_num_threads() == threads_before


def test_ctc_model_has_the_ctc_task(tmp_path: Path) -> None:
    make = functools.partial(tiny_sounds.waves, "Wav2Vec2", masked=False, ending="CTC")
    folder = tiny_sounds.write_model(tmp_path, make, letters=True)
    assert task_of_folder(folder) is automatic_speech_recognition.CTC_TASK

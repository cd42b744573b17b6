"""Tests of block-by-block execution: logits and layer inputs against transformers, and resuming after interruptions."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from decoders import ARCHITECTURES, Notes, context, inputs_of_layers, module_of, save_decoder, some_ids
from quantized import quantize_tiny_llama, save_tiny_llama, tiny_tokenizer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from compress.models.checkpoint import Checkpoint
from compress.stages.blockwise.block_pass import BlockPass, gram
from compress.stages.blockwise.blockwise_model import build_blockwise_model, last_hidden, logits
from compress.stages.blockwise.layers import linears
from compress.stages.blockwise.resume import BlockCache
from compress.stages.gptq.stage import Gptq
from compress.utils.errors import ModelError, StageError, StorageError
from compress.utils.storage import digest_directory


@pytest.mark.parametrize("config", ARCHITECTURES)
def test_logits_equal_those_of_transformers(config: str, tmp_path: Path) -> None:
    checkpoint = save_decoder(tmp_path, config)
    ids = some_ids(3, 20)
    with torch.no_grad():
        expected = module_of(checkpoint)(input_ids=ids).logits
    actual = logits(checkpoint, ids)
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=1e-4)
    assert float(expected.std()) > 0.1


def test_bfloat16_weights_are_computed_in_float32(tmp_path: Path) -> None:
    checkpoint = save_decoder(tmp_path, "Gemma3TextConfig", dtype=torch.bfloat16)
    assert checkpoint.stored("model.norm.weight").dtype == torch.bfloat16
    ids = some_ids(2, 12)
    with torch.no_grad():
        expected = module_of(checkpoint)(input_ids=ids).logits
    torch.testing.assert_close(logits(checkpoint, ids), expected, atol=2e-4, rtol=1e-4)


def test_quantized_weights_are_dequantized(tmp_path: Path) -> None:
    quantized = quantize_tiny_llama(save_tiny_llama(tmp_path / "source"), tmp_path / "quantized")
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(tmp_path / "source"), dtype=torch.float32
    ).eval()
    state = {}
    for name in model.state_dict():
        module = name.removesuffix(".weight")
        if module == "lm_head":
            module = "model.embed_tokens"
        table = module == "model.embed_tokens"
        state[name] = quantized.stored(f"{module}.weight").float() if table else quantized.weight(module)
    model.load_state_dict(state)
    ids = some_ids(2, 24)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    torch.testing.assert_close(logits(quantized, ids), expected, atol=1e-4, rtol=1e-4)


def test_only_one_block_is_in_memory(tmp_path: Path) -> None:
    decoder = build_blockwise_model(save_decoder(tmp_path))
    decoder.load(1)
    assert all(parameter.device.type == "cpu" for parameter in decoder.blocks[1].parameters())
    assert all(parameter.is_meta for parameter in decoder.blocks[0].parameters())
    decoder.unload(1)
    held = [name for name, parameter in decoder.model.named_parameters() if not parameter.is_meta]
    assert held == ["model.norm.weight"]


def test_rotary_buffers_exist_although_no_file_stores_them(tmp_path: Path) -> None:
    decoder = build_blockwise_model(save_decoder(tmp_path))
    call = decoder.calls(some_ids(1, 8))[0]
    cosines, _ = call.named["position_embeddings"]
    assert float(cosines[0, 3, 0]) == pytest.approx(float(torch.cos(torch.tensor(3.0))))


def test_architecture_without_linear_blocks_is_refused(tmp_path: Path) -> None:
    model = transformers.XLMWithLMHeadModel(transformers.XLMConfig(vocab_size=160, emb_dim=32, n_layers=2, n_heads=2))
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(StageError, match="XLMWithLMHeadModel cannot be quantized block by block") as caught:
        build_blockwise_model(Checkpoint(tmp_path))
    assert "torch.nn.Linear" in str(caught.value.expected)


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    config = transformers.T5Config(vocab_size=160, d_model=32, num_layers=1, d_ff=32, num_heads=2)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="causal language model"):
        build_blockwise_model(Checkpoint(tmp_path))


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"model_type": "squid"}, {}, "squid"),
        ({"intermediate_size": 64}, {}, r"is \[96, 64\]; the config makes it \[64, 64\]"),
        ({"tie_word_embeddings": False}, {}, r"no 'lm_head\.weight'"),
        ({}, {"lm_head.weight": torch.ones(160, 64)}, r"ties 'lm_head\.weight' to 'model\.embed_tokens\.weight'"),
        ({}, {"model.layers.1.mlp.up_proj.weight": None}, r"model\.layers\.1\.mlp\.up_proj\.weight"),
    ],
)
def test_config_that_contradicts_tensors_is_refused(
    config: dict[str, Any], tensors: dict[str, torch.Tensor | None], message: str, tmp_path: Path
) -> None:
    checkpoint = save_decoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(checkpoint.config | config))
    changed = load_file(tmp_path / "model.safetensors") | tensors
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=message):
        decoder = build_blockwise_model(Checkpoint(tmp_path))
        decoder.load(0)
        decoder.load(1)


def test_token_id_beyond_the_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="token id 160 is outside the model's vocabulary of 160"):
        logits(save_decoder(tmp_path), torch.tensor([[3, 160]]))


def test_block_arguments_that_depend_on_tokens_are_refused(tmp_path: Path) -> None:
    decoder = build_blockwise_model(save_decoder(tmp_path))
    body = decoder.model.base_model
    rotary = body.rotary_emb.forward

    def of_tokens(hidden: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cosines, sines = rotary(hidden, position_ids)
        return cosines + hidden.mean(), sines

    body.rotary_emb.forward = of_tokens
    with pytest.raises(StageError, match="what block 0 is given depends on the tokens"):
        decoder.calls(some_ids(1, 8))


def test_gram_is_the_mean_outer_product() -> None:
    # Two whole panels and a partial one.
    inputs = torch.randn(3, 7, 400, generator=torch.Generator().manual_seed(0))
    rows = inputs.reshape(21, 400).double()
    expected = sum(torch.outer(row, row) for row in rows) / 21
    torch.testing.assert_close(gram(inputs).double(), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(gram(inputs), gram(inputs).T, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("batches", [1, 3])
def test_hessians_are_gram_matrices_of_layer_inputs(batches: int, tmp_path: Path) -> None:
    checkpoint, ids = save_decoder(tmp_path), some_ids(6, 10)
    expected = inputs_of_layers(module_of(checkpoint), ids)
    decoder = build_blockwise_model(checkpoint)
    hidden = decoder.embedded(ids)
    seen: dict[str, torch.Tensor] = {}
    rows = len(ids) // batches
    for index in range(2):
        modules = linears(decoder.load(index), f"model.layers.{index}")
        calls = {count: decoder.calls(ids[:count])[index] for count in (1, rows)}

        def run(given: torch.Tensor, index: int = index, calls: Any = calls) -> torch.Tensor:
            return decoder.run(index, given, calls[len(given)])

        parts = [lambda at=at, hidden=hidden: hidden[at : at + rows] for at in range(0, len(ids), rows)]
        work = BlockPass(f"block {index}", modules, run, parts)
        with torch.no_grad():
            hidden = torch.cat(list(work.solve(lambda names, hessian: seen.update(dict.fromkeys(names, hessian)))))
    assert len(seen) == 14
    for name, hessian in seen.items():
        inputs = expected[name].double()
        torch.testing.assert_close(hessian.double(), inputs.T @ inputs / len(inputs), atol=1e-4, rtol=1e-3)
    q, k, o = (seen[f"model.layers.0.self_attn.{name}_proj"] for name in "qko")
    assert q is k and q is not o
    torch.testing.assert_close(hidden, last_hidden(build_blockwise_model(checkpoint), ids), atol=1e-4, rtol=1e-4)


def test_layers_with_a_shared_input_need_one_pass_despite_token_weights(tmp_path: Path) -> None:
    checkpoint, ids = save_decoder(tmp_path), some_ids(6, 10)
    expected = inputs_of_layers(module_of(checkpoint), ids)
    decoder = build_blockwise_model(checkpoint)
    hidden, modules = decoder.embedded(ids), linears(decoder.load(0), "model.layers.0")
    generator = torch.Generator().manual_seed(1)
    counts = {name: torch.rand(60, generator=generator) + 0.1 for name in modules}
    calls = {count: decoder.calls(ids[:count])[0] for count in (1, 2)}
    runs: list[int] = []
    seen: dict[str, torch.Tensor] = {}

    def run(given: torch.Tensor) -> torch.Tensor:
        runs.append(len(given))
        return decoder.run(0, given, calls[len(given)])

    parts = [lambda at=at: hidden[at : at + 2] for at in range(0, 6, 2)]
    work = BlockPass("block", modules, run, parts, counts=counts)
    with torch.no_grad():
        list(work.solve(lambda names, hessian: seen.update(dict.fromkeys(names, hessian))))
    # One pass that traces inputs; then q, k and v; o; gate and up; down; and the block's output.
    assert runs == [1] + 5 * [2, 2, 2]
    for name, weights in counts.items():
        inputs = expected[name].double()
        hessian = (inputs * weights[:, None]).T @ inputs / weights.sum()
        torch.testing.assert_close(seen[name].double(), hessian, atol=1e-4, rtol=1e-3)


class Chain(nn.Module):
    """Two linear layers in sequence, and a third that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.idle = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(hidden))


@pytest.mark.parametrize("batches", [1, 2])
def test_layer_inputs_come_from_quantized_earlier_layers(batches: int) -> None:
    chain = Chain()
    given = torch.randn(2, 5, 4)
    seen: dict[str, torch.Tensor] = {}

    def zero(names: Sequence[str], hessian: torch.Tensor) -> None:
        (name,) = names
        seen[name] = hessian
        part = chain.get_submodule(name)
        part.weight = nn.Parameter(torch.zeros_like(part.weight), requires_grad=False)

    modules = {name: part for name, part in linears(chain, "").items() if name != "idle"}
    parts = [lambda rows=rows: rows for rows in given.split(2 // batches)]
    with torch.no_grad():
        output = torch.cat(list(BlockPass("chain", modules, chain, parts).solve(zero)))
    bias = chain.first.bias.detach()
    torch.testing.assert_close(seen["second"], torch.outer(bias, bias))
    torch.testing.assert_close(output, chain.second.bias.detach().expand(2, 5, 4))


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize(
    ("layers", "first", "message"),
    [
        (("first", "second", "idle"), 0.0, "never called: idle"),
        (("first", "second"), torch.inf, "inputs of second in chain hold NaN or infinite"),
    ],
)
def test_layers_that_cannot_be_solved_are_named(
    layers: tuple[str, ...], first: float, message: str, batches: int
) -> None:
    chain = Chain()
    with torch.no_grad():
        chain.first.weight[0, 0] = first
    modules = {name: part for name, part in linears(chain, "").items() if name in layers}
    parts = [lambda: torch.randn(1, 5, 4)] * batches
    with torch.no_grad(), pytest.raises(StageError, match=message):
        list(BlockPass("chain", modules, chain, parts).solve(lambda name, hessian: None))


BLOCKS = 4
STAGE = Gptq(group_size=32, samples=8, sequence_length=32, embedding_bits=4)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return save_decoder(tmp_path_factory.mktemp("source"), num_hidden_layers=BLOCKS)


@pytest.fixture(scope="module")
def undisturbed(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> str:
    return digest_directory(STAGE.run(source, context(tmp_path_factory.mktemp("undisturbed"))).folder)


def finish(source: Checkpoint, scratch: Path) -> tuple[str, list[str]]:
    """Return the final digest and the blocks that were processed in this run."""
    notes = Notes()
    result = STAGE.run(source, context(scratch, progress=notes))
    return digest_directory(result.folder), [line.split(":")[0] for line in notes.said if line.startswith("model.")]


class Stop(Exception):  # noqa: N818
    """Exception that interrupts a run, as a kill would."""


@pytest.mark.parametrize("done", [1, 3, 4])
def test_interrupted_run_resumes_with_the_next_block(
    done: int, source: Checkpoint, undisturbed: str, tmp_path: Path
) -> None:
    def stop(message: str) -> None:
        if message.startswith(f"model.layers.{done - 1}:"):
            raise Stop

    with pytest.raises(Stop):
        STAGE.run(source, context(tmp_path, progress=Notes(stop)))
    digest, blocks = finish(source, tmp_path)
    assert digest == undisturbed
    assert blocks == [f"model.layers.{index}" for index in range(done, BLOCKS)]


CHILD = """
import os, sys
from pathlib import Path
sys.path[:0] = sys.argv[3:]
from decoders import Notes, context
from test_blockwise import STAGE
from compress.models.checkpoint import Checkpoint
import compress.stages.gptq.quantizer as walk

solve, count = walk.solve_layers, 0

def and_die(*arguments):
    global count
    count += 1
    if count == 7 * 2 + 4:
        os.kill(os.getpid(), 9)
    return solve(*arguments)

walk.solve_layers = and_die
STAGE.run(Checkpoint(Path(sys.argv[1])), context(Path(sys.argv[2])))
"""


@pytest.mark.slow
def test_run_killed_within_a_block_repeats_that_block(source: Checkpoint, undisturbed: str, tmp_path: Path) -> None:
    here = Path(__file__).parent
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(source.folder), str(tmp_path), str(here), str(here.parents[1] / "support")],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(here.parents[2])},
        check=False,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert BlockCache(tmp_path).count(BLOCKS) == 2
    digest, blocks = finish(source, tmp_path)
    assert digest == undisturbed
    assert blocks == ["model.layers.2", "model.layers.3"]


def test_truncated_block_file_is_ignored(source: Checkpoint, undisturbed: str, tmp_path: Path) -> None:
    STAGE.run(source, context(tmp_path))
    path = BlockCache(tmp_path).file(2)
    path.write_bytes(path.read_bytes()[:-100])
    digest, blocks = finish(source, tmp_path)
    assert digest == undisturbed
    # The input states of block 2 are gone, so the run restarts at the first block.
    assert blocks == [f"model.layers.{index}" for index in range(BLOCKS)]


def test_full_disk_is_reported_and_finished_blocks_are_kept(
    source: Checkpoint, undisturbed: str, tmp_path: Path
) -> None:
    (tmp_path / "states-00002.partial").symlink_to("/dev/full")
    with pytest.raises(StorageError, match="The disk is full") as caught:
        STAGE.run(source, context(tmp_path))
    assert "run again" in str(caught.value)
    (tmp_path / "states-00002.partial").unlink()
    digest, blocks = finish(source, tmp_path)
    assert digest == undisturbed
    assert blocks == ["model.layers.1", "model.layers.2", "model.layers.3"]


def test_full_disk_error_of_safetensors_is_reported(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(StorageError, match="The disk is full"):
        STAGE.run(source, context(tmp_path))


def test_only_current_hidden_states_are_kept(source: Checkpoint, tmp_path: Path) -> None:
    STAGE.run(source, context(tmp_path))
    assert [path.name for path in tmp_path.glob("states-*")] == [f"states-{BLOCKS:05}.bin"]
    assert not list(tmp_path.rglob("*.partial"))

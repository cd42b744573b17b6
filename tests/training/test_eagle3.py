"""A draft head: what it foretells is what it would write, and it learns to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from causal import LENGTH, context
from mergeable import save_mergeable_llama
from safetensors import safe_open
from torch import nn

from compress.checkpoints.checkpoint import Checkpoint
from compress.checkpoints.eagle3 import DraftHead, new_head, read_head
from compress.checkpoints.head_checkpoint import HeadCheckpoint, heard_blocks
from compress.checkpoints.quantized_module import load_module
from compress.errors import StageError
from compress.stages.eagle3 import Eagle3
from compress.training.eagle3 import HeadLesson, frequent_tokens
from compress.training.lesson_windows import Windows
from compress.training.recovery import Body
from compress.training.teacher_text import Examples

DEEP: dict[str, Any] = {"num_hidden_layers": 10, "max_position_embeddings": 512}


def drawn_head(seed: int = 0, tokens: int = 40) -> tuple[DraftHead, nn.Module]:
    """A head of random weights, and a table for its tokens."""
    from quantized import tiny_llama_config
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(tiny_llama_config(**DEEP)).eval()
    head = new_head(model, torch.arange(0, 4 * tokens, 4)).eval()
    for parameter in head.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return head, model.get_input_embeddings()


@torch.no_grad()
def test_what_is_learned_is_what_the_head_writes_one_token_behind_the_other() -> None:
    head, table = drawn_head()
    ids, heard = torch.randint(3, 160, (1, 9)), torch.randn(1, 9, 3 * 64)
    together = head(table(ids), heard, 3)
    # At a place the head has read what the model has up to there, and goes on: one row more each time, of its own.
    for place in range(5):
        states, tokens = head.fc(heard[:, : place + 1]), ids[:, 1 : place + 2]
        for step in range(3):
            own = alone(head, table(tokens), states, place + 1)
            torch.testing.assert_close(head.lm_head(head.norm(own[:, -1])), together[step][:, place])
            states = torch.cat((states, own[:, -1:]), 1)
            tokens = torch.cat((tokens, ids[:, place + 2 + step, None]), 1)


def alone(head: DraftHead, embedded: torch.Tensor, states: torch.Tensor, heard: int) -> torch.Tensor:
    """The block's states for rows of which those beyond ``heard`` are its own, by plain causal attention."""
    assert states.shape[1] >= heard
    found, _ = head.block(embedded, states, torch.arange(states.shape[1])[None], [])
    return found


def test_the_loss_is_the_cross_entropy_to_the_model_where_it_writes_what_the_head_knows(tmp_path: Path) -> None:
    source = save_mergeable_llama(tmp_path / "source", **DEEP)
    module = load_module(source)
    ids = torch.randint(3, 340, (2, 12))
    windows = Windows(
        Examples([{"input_ids": row.numpy()} for row in ids], {"input_ids": 0}),
        Examples([{"input_ids": ids[0].numpy()}], {"input_ids": 0}),
    )
    known = torch.arange(0, 340, 2)
    lesson = HeadLesson(new_head(module, known), Body(module), windows, Eagle3(ahead=2))
    with torch.no_grad():
        outputs = module(ids, output_hidden_states=True)
        heard = torch.cat([outputs.hidden_states[block + 1] for block in (2, 5, 7)], -1)
        found = lesson.head(module.get_input_embeddings().weight[ids], heard, 2)
        expected = 0.0
        for step, weight in ((1, 1.0), (2, 0.8)):
            losses = []
            for row in range(2):
                for place in range(12 - step):
                    logits = outputs.logits[row, place + step]
                    if int(logits.argmax()) in known:
                        shares, told = logits[known].softmax(-1), found[step - 1][row, place].log_softmax(-1)
                        losses.append(-float((shares * told).sum()))
            expected += weight * float(np.mean(losses))
        assert float(lesson.loss(lesson.head, {"input_ids": ids})) == pytest.approx(expected, rel=1e-4)


def test_the_tokens_that_it_knows_are_the_most_frequent_in_their_own_order() -> None:
    rows = Examples([{"input_ids": np.array([5, 5, 5, 2, 2, 9, 2])}, {"input_ids": np.array([9, 9, 5, 3, 1, 1])}], {})
    assert frequent_tokens(Windows(rows, rows), 3, 12).tolist() == [2, 5, 9]
    assert frequent_tokens(Windows(rows, rows), 99, 12).tolist() == list(range(12))


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, HeadCheckpoint, list[str]]:
    """A model, a head that was trained for it, and what was said."""
    folder = tmp_path_factory.mktemp("taught")
    source = save_mergeable_llama(folder / "source", **DEEP)
    made = context(source, folder / "scratch")
    stage = Eagle3(steps=400, batch_size=2, sequence_length=LENGTH, draft_vocab_size=300, learning_rate=3e-3)
    return source, stage.run(source, made), made.remarks


def test_it_learns_and_lies_there_under_the_names_of_its_authors(
    taught: tuple[Checkpoint, HeadCheckpoint, list[str]],
) -> None:
    _, head, remarks = taught
    (said,) = (line for line in remarks if line.startswith("eagle3"))
    before, after = (float(part) for part in said.split("ahead ")[1].split(" are")[0].split(" -> "))
    assert after > before
    with safe_open(head.folder / "model.safetensors", framework="pt") as file:
        names, offsets, known = set(file.keys()), file.get_tensor("d2t"), file.get_tensor("t2d")
    assert names == {
        *("fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d"),
        *(f"midlayer.self_attn.{part}_proj.weight" for part in "qkvo"),
        *(f"midlayer.mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
        *(f"midlayer.{norm}.weight" for norm in ("hidden_norm", "input_layernorm", "post_attention_layernorm")),
    }
    assert torch.equal((offsets + torch.arange(300)), known.nonzero()[:, 0])
    assert head.config["architectures"] == ["LlamaForCausalLMEagle3"] and head.config["draft_vocab_size"] == 300
    # Of ten blocks those with the numbers 2, 5 and 7: vLLM says before which, SGLang behind which.
    assert head.config["eagle_aux_hidden_state_layer_ids"] == [3, 6, 8]
    assert head.config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [2, 5, 7]
    read = read_head(head)
    assert torch.equal(read.tokens, known.nonzero()[:, 0]) and read.config.head_dim == 16


def test_a_model_of_few_blocks_has_no_head(tmp_path: Path) -> None:
    source = save_mergeable_llama(tmp_path / "source")
    with pytest.raises(StageError, match="A model of 2 blocks"):
        Eagle3().check_model(source.folder)
    assert heard_blocks(30) == (2, 15, 27)

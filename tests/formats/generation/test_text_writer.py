"""Text written with two graphs, against transformers' own `generate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_text_to_text import save_tiny_t5

from compress.formats.generation.seq2seq import TextWriter, read_rules
from compress.formats.runtime import Batch, TensorType
from compress.utils.errors import ModelError

RULES: dict[str, dict[str, Any]] = {
    "greedy": {"max_length": 14},
    "repeating nothing": {"max_new_tokens": 12, "no_repeat_ngram_size": 2},
    "four beams": {"max_length": 16, "num_beams": 4},
    "short ones first": {"max_length": 16, "num_beams": 3, "length_penalty": -1.0, "early_stopping": True},
    "long ones": {"max_new_tokens": 10, "num_beams": 2, "length_penalty": 2.0, "early_stopping": "never"},
    "with ends that are forced": {
        "max_length": 9,
        "num_beams": 2,
        "min_length": 4,
        "forced_bos_token_id": 7,
        "forced_eos_token_id": 1,
        "bad_words_ids": [[5], [9]],
    },
}


class _Graph:
    """A graph's names in front of a torch module."""

    def __init__(self, module: Any, decodes: bool) -> None:
        self._module, self._decodes = module, decodes
        config = module.config
        axes = (None, config.num_heads, None, config.d_kv)
        names = [
            f"{layer}.{side}.{kind}"
            for layer in range(config.num_decoder_layers)
            for side in ("decoder", "encoder")
            for kind in ("key", "value")
        ]
        pasts = {f"past_key_values.{name}": TensorType("float32", axes) for name in names} if decodes else {}
        plain = ["input_ids", "attention_mask"]
        if decodes:
            plain = ["input_ids", "encoder_hidden_states", "encoder_attention_mask", "use_cache_branch"]
        self.input_types = {name: TensorType("int64", (None, None)) for name in plain} | pasts
        self.output_types = {"logits": TensorType("float32", (None, None, None))}
        self.output_types |= {name.replace("past_key_values", "present"): kind for name, kind in pasts.items()}
        self.inputs, self.provider, self.settings = tuple(self.input_types), "torch", {}
        self._pasts = tuple(pasts)

    def predict(self, batch: Batch) -> dict[str, np.ndarray]:
        given = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in batch.items()}
        with torch.inference_mode():
            if not self._decodes:
                return {"last_hidden_state": self._module.get_encoder()(**given).last_hidden_state.numpy()}
            # The tokens so far, kept where keys would be.
            past = given[self._pasts[0]][:, 0, :, 0].long()
            ids = torch.cat([past, given["input_ids"]], dim=1)
            answer = self._module(
                encoder_outputs=(given["encoder_hidden_states"],),
                attention_mask=given["encoder_attention_mask"],
                decoder_input_ids=ids,
            )
        config = self._module.config
        shape = (len(ids), config.num_heads, ids.shape[1], config.d_kv)
        cached_ids = ids[:, None, :, None].expand(shape).float().numpy()
        return {"logits": answer.logits.numpy()} | {
            name.replace("past_key_values", "present"): cached_ids for name in self._pasts
        }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_t5(tmp_path_factory.mktemp("t5"))


@pytest.mark.parametrize("kind", RULES)
def test_texts_are_those_of_transformers(kind: str, folder: Path) -> None:
    from transformers import AutoModelForSeq2SeqLM, GenerationConfig

    generation_fields = {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, **RULES[kind]}
    (folder / "generation_config.json").write_text(json.dumps(generation_fields))
    module = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    writer = TextWriter(_Graph(module, False), _Graph(module, True), folder)
    ids = np.random.default_rng(0).integers(3, 60, (6, 9))
    mask = np.ones_like(ids)
    mask[1::2, 5:] = 0
    written = writer.predict({"input_ids": ids, "attention_mask": mask})
    lengths = set()
    for row, (text, length) in enumerate(zip(ids, mask.sum(1), strict=True)):
        with torch.inference_mode():
            expected = module.generate(
                torch.from_numpy(text[None, :length]), generation_config=GenerationConfig(**generation_fields)
            )[0, 1:].tolist()
        own_tokens = [token for token in written["sequences"][row].tolist() if token != -1]
        assert own_tokens == expected[: len(own_tokens)] and set(expected[len(own_tokens) :]) <= {0}
        lengths.add(len(own_tokens))
    assert len({tuple(row) for row in written["sequences"].tolist()}) > 3, "texts differ"
    assert written["texts"].shape == (6,)


def test_rules_that_are_not_followed_are_named(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.3, "eos_token_id": 1}))
    with pytest.raises(ModelError, match="repetition_penalty"):
        read_rules(folder)

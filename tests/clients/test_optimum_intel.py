"""Tests of decoders as OpenVINO IR in optimum-intel: generated tokens are compared with torch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from foreign_environments import OPTIMUM_INTEL
from quantized import quantize_tiny_llama, save_tiny_llama, tiny_tokenizer
from rotation import is_todays
from written_decoders import by_transformers, random_ids

pytestmark = pytest.mark.slow
TOKENS = 12


@pytest.mark.skipif(not is_todays("optimum-intel"), reason="optimum-intel is begun every fourth day")
def test_greedy_and_beam_search_match_torch(tmp_path: Path) -> None:
    pytest.importorskip("openvino_tokenizers")
    from compress.formats.openvino.decoder import write_decoder

    source = save_tiny_llama(tmp_path / "source")
    weights = quantize_tiny_llama(source, tmp_path / "quantized", table_bits=8)
    folder = tmp_path / "written"
    folder.mkdir()
    write_decoder(weights, "fp32", 8, random_ids(2, 16), 1e-4).model.save(folder)
    ids = random_ids(1, 9, seed=3)[0].tolist()
    script = Path(__file__).with_name("optimum_intel_says.py")
    printed = OPTIMUM_INTEL.run(script, str(folder), json.dumps(ids), str(TOKENS))
    printed_answers = json.loads(printed.splitlines()[-1])
    module = by_transformers(source, weights)
    for name, beams in (("greedy", 1), ("beams", 3)):
        expected = module.generate(
            torch.tensor([ids]),
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            do_sample=False,
            num_beams=beams,
            eos_token_id=None,
            pad_token_id=2,
        )
        assert printed_answers[name] == expected[0, len(ids) :].tolist()
    assert printed_answers["stateful"] and printed_answers["text"] == tiny_tokenizer().decode(ids)

"""Print the tokens that a decoder generates in optimum-intel: optimum_intel_says.py FOLDER IDS TOKENS, ids in JSON."""

import json
import sys

import torch
from optimum.intel import OVModelForCausalLM
from transformers import AutoTokenizer

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
folder, ids, tokens = sys.argv[1], torch.tensor([json.loads(sys.argv[2])]), int(sys.argv[3])
model = OVModelForCausalLM.from_pretrained(folder, ov_config=EXACT, local_files_only=True)
wanted = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "eos_token_id": None}
said = {
    "stateful": model.stateful,
    "greedy": model.generate(ids, **wanted, pad_token_id=2)[0, ids.shape[1] :].tolist(),
    "beams": model.generate(ids, **wanted, pad_token_id=2, num_beams=3)[0, ids.shape[1] :].tolist(),
    "text": AutoTokenizer.from_pretrained(folder).decode(ids[0]),
}
sys.stdout.write(json.dumps(said))

"""Save a model with model2vec and embed texts with it: model2vec_saves.py TEXTS TOKENIZER FOLDER; writes JSON."""

import json
import sys

import numpy as np
from model2vec import StaticModel
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file(sys.argv[2])
vectors = np.random.default_rng(0).standard_normal((tokenizer.get_vocab_size(), 6)).astype(np.float32)
# The fields that `model2vec.distill` writes.
config = {"model_type": "model2vec", "hidden_dim": 6, "seq_length": 1_000_000, "normalize": True}
model = StaticModel(vectors, tokenizer, config)
model.save_pretrained(sys.argv[3])
sys.stdout.write(json.dumps([vector.tolist() for vector in model.encode(json.loads(sys.argv[1]))]))

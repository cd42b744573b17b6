"""Save a model with model2vec and embed texts: model2vec_saves.py TEXTS TOKENIZER FOLDER KIND; writes JSON."""

import json
import sys

import numpy as np
from model2vec import StaticModel
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file(sys.argv[2])
size, generator = tokenizer.get_vocab_size(), np.random.default_rng(0)
quantized = sys.argv[4] == "quantized"
# With a quantized vocabulary, several tokens share a vector, and each has a factor.
vectors = generator.standard_normal((size // 2 if quantized else size, 6)).astype(np.float32)
mapping = generator.integers(len(vectors), size=size) if quantized else None
weights = generator.uniform(0.1, 1, size).astype(np.float32) if quantized else None
# The fields that `model2vec.distill` writes.
config = {"model_type": "model2vec", "hidden_dim": 6, "seq_length": 1_000_000, "normalize": True}
model = StaticModel(vectors, tokenizer, config, weights=weights, token_mapping=mapping)
model.save_pretrained(sys.argv[3])
sys.stdout.write(json.dumps([vector.tolist() for vector in model.encode(json.loads(sys.argv[1]))]))

"""Distil an encoder with model2vec and embed texts: model2vec_run.py ENCODER DIMENSIONS TEXTS.json OUTPUT.npy.

It writes the seconds of the distillation to standard output, as JSON.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
from model2vec.distill import distill

encoder, dimensions, texts, output = sys.argv[1:]
start = time.perf_counter()
model = distill(model_name=encoder, pca_dims=int(dimensions), quantize_to="float32")
seconds = time.perf_counter() - start
np.save(output, model.encode(json.loads(Path(texts).read_text())))
sys.stdout.write(json.dumps({"seconds": seconds}) + "\n")

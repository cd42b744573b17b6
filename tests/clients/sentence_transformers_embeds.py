"""Embed texts with sentence-transformers: TEXTS JOBS, both JSON; prints JSON with one entry per job.

A job is [FOLDER, BACKEND, FILE]. The output also has the embeddings quantized with `quantize_embeddings`.
"""

import json
import sys

from sentence_transformers import SentenceTransformer
from sentence_transformers.quantization import quantize_embeddings

texts, jobs = map(json.loads, sys.argv[1:])
answers = []
for folder, backend, file in jobs:
    options = {"file_name": file, "provider": "CPUExecutionProvider"} if backend == "onnx" else {}
    model = SentenceTransformer(folder, backend=backend, device="cpu", model_kwargs=options)
    # One at a time, since INT8 activations share a scale within a batch.
    embeddings = model.encode(texts, batch_size=1)
    found = {name: quantize_embeddings(embeddings, name).tolist() for name in ("int8", "ubinary")}
    answers.append({"embeddings": embeddings.tolist(), "length": model.max_seq_length, **found})
sys.stdout.write(json.dumps(answers))

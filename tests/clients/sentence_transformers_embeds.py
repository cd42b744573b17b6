"""Embed texts with sentence-transformers: FOLDER BACKEND FILE TEXTS, the last as JSON; writes JSON.

Beside the embeddings it writes what its `quantize_embeddings` makes of them.
"""

import json
import sys

from sentence_transformers import SentenceTransformer
from sentence_transformers.quantization import quantize_embeddings

folder, backend, file, texts = sys.argv[1:]
options = {"file_name": file, "provider": "CPUExecutionProvider"} if backend == "onnx" else {}
model = SentenceTransformer(folder, backend=backend, device="cpu", model_kwargs=options)
# One by one: INT8 activations share their scale with the whole batch.
embeddings = model.encode(json.loads(texts), batch_size=1)
found = {name: quantize_embeddings(embeddings, name).tolist() for name in ("int8", "ubinary")}
sys.stdout.write(json.dumps({"embeddings": embeddings.tolist(), "length": model.max_seq_length, **found}))

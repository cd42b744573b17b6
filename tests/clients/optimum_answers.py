"""Open graphs in optimum's classes: optimum_answers.py JOBS, in JSON.

A job is [KIND, FOLDER, FILE, INPUTS, ANSWERS], the last two .npz files. KIND is text, image or speech; of texts and
images the raw inputs are prepared by the folder's own processor. Of speech optimum finds the files itself, and FILE is
not read.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from optimum.onnxruntime import (
    ORTModelForImageClassification,
    ORTModelForSequenceClassification,
    ORTModelForSpeechSeq2Seq,
)
from transformers import AutoImageProcessor, AutoTokenizer

OPTIONS = {"provider": "CPUExecutionProvider", "subfolder": "onnx", "local_files_only": True}


def answers_of(kind: str, folder: str, file: str, inputs: np.ndarray) -> list[np.ndarray]:
    """Logits of texts and images, ids of what was said."""
    if kind == "text":
        model, prepare = ORTModelForSequenceClassification, AutoTokenizer.from_pretrained(folder)
        model = model.from_pretrained(folder, file_name=file, **OPTIONS)
        return [model(**prepare(str(text), return_tensors="pt")).logits[0].numpy() for text in inputs]
    if kind == "image":
        model = ORTModelForImageClassification.from_pretrained(folder, file_name=file, **OPTIONS)
        prepare = AutoImageProcessor.from_pretrained(folder)
        return [model(**prepare(image, return_tensors="pt")).logits[0].numpy() for image in inputs]
    model = ORTModelForSpeechSeq2Seq.from_pretrained(folder, **OPTIONS)
    return [model.generate(torch.from_numpy(features[None]))[0].numpy() for features in inputs]


for kind, folder, file, given, answers in json.loads(sys.argv[1]):
    np.savez(Path(answers), *answers_of(kind, folder, file, np.load(given)["inputs"]))

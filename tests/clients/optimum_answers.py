"""Run graphs with optimum's classes: optimum_answers.py JOBS, in JSON.

A job is [KIND, FOLDER, FILE, INPUTS, OUTPUTS]; the last two are .npz files. KIND is text, image or speech. Raw text and
image inputs are processed by the folder's own processor. For speech, optimum finds the files and FILE is ignored.
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
    """Return logits of texts and images, or generated token ids of speech."""
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

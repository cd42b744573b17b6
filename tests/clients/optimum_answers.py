"""Open graphs in optimum's classes: optimum_answers.py KIND FOLDER FILE INPUTS ANSWERS, the last two .npz files.

KIND is text, image or speech; of texts and images the raw inputs are prepared by the folder's own processor. Of speech
optimum finds the files itself, and FILE is not read.
"""

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

kind, folder, file, given, answers = sys.argv[1:]
inputs = np.load(given)["inputs"]
options = {"provider": "CPUExecutionProvider", "subfolder": "onnx", "local_files_only": True}
if kind == "text":
    model, prepare = ORTModelForSequenceClassification, AutoTokenizer.from_pretrained(folder)
    model = model.from_pretrained(folder, file_name=file, **options)
    found = [model(**prepare(str(text), return_tensors="pt")).logits[0].numpy() for text in inputs]
elif kind == "image":
    model = ORTModelForImageClassification.from_pretrained(folder, file_name=file, **options)
    prepare = AutoImageProcessor.from_pretrained(folder)
    found = [model(**prepare(image, return_tensors="pt")).logits[0].numpy() for image in inputs]
else:
    model = ORTModelForSpeechSeq2Seq.from_pretrained(folder, **options)
    found = [model.generate(torch.from_numpy(features[None]))[0].numpy() for features in inputs]
np.savez(Path(answers), *found)

"""Draw pictures with optimum's ORT pipeline: FOLDER PROMPTS.json NOISE.npy STEPS GUIDANCE OUT.npy."""

import json
import sys

import numpy as np
import torch
from optimum.onnxruntime import ORTDiffusionPipeline

folder, prompts, noise, steps, guidance, out = sys.argv[1:]
pipeline = ORTDiffusionPipeline.from_pretrained(folder)
pipeline.set_progress_bar_config(disable=True)
found = pipeline(
    json.loads(prompts),
    num_inference_steps=int(steps),
    guidance_scale=float(guidance),
    latents=torch.from_numpy(np.load(noise)),
    output_type="np",
)
np.save(out, found.images)
sys.stdout.write(type(pipeline).__name__)

"""Generate images with optimum's pipeline: RUNTIME FOLDER PROMPTS.json NOISE.npy STEPS GUIDANCE OUT.npy."""

import json
import sys

import numpy as np
import torch

runtime, folder, prompts, noise, steps, guidance, out = sys.argv[1:]
if runtime == "openvino":
    from optimum.intel import OVDiffusionPipeline

    # Without this hint OpenVINO computes in bfloat16 on processors that support it.
    pipeline = OVDiffusionPipeline.from_pretrained(folder, ov_config={"INFERENCE_PRECISION_HINT": "f32"})
else:
    from optimum.onnxruntime import ORTDiffusionPipeline

    pipeline = ORTDiffusionPipeline.from_pretrained(folder)
pipeline.set_progress_bar_config(disable=True)
pictures = pipeline(
    json.loads(prompts),
    num_inference_steps=int(steps),
    guidance_scale=float(guidance),
    latents=torch.from_numpy(np.load(noise)),
    output_type="np",
)
np.save(out, pictures.images)
sys.stdout.write(type(pipeline).__name__)

"""Recovery of a quantized model: tuning of scales and LoRA adapters on frozen integers."""

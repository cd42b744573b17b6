"""Block-wise quantization-aware training, the first phase of EfficientQAT."""

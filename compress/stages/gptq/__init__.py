"""Weight-only quantization of language models with GPTQ, with uniform or mixed bit widths."""

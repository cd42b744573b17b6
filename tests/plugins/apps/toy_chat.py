"""A run folder of a tiny causal language model, and the replies of transformers as the reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quantized import save_tiny_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from toy_bundles import RECIPE
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from compress.formats.onnx.decoder import GraphSettings, export_decoder

TASK = "text-generation"
VOCABULARY, POSITIONS, LONGEST = 264, 256, 200
TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
BEFORE, AFTER = "<s>user\n", "</s>\n<s>assistant\n"


def chat_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with one token per byte, one for two spaces, and `<s>` at the start of a text."""
    words = {word: place for place, word in enumerate(("<unk>", "<s>", "</s>"))}
    words |= {letter: len(words) + at for at, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    words["ĠĠ"] = len(words)
    made = Tokenizer(models.BPE(vocab=words, merges=[("Ġ", "Ġ")], unk_token="<unk>"))
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=made, **special)
    fast.chat_template = template
    return fast


def write_chat_run(folder: Path, template: str | None = TEMPLATE) -> Path:
    """Write `source/`, `model/` and `recipe.yaml`, with a generation config that asks for sampling."""
    source = save_tiny_llama(folder / "source", vocab_size=VOCABULARY, max_position_embeddings=POSITIONS)
    (source.folder / "chat_template.jinja").unlink()
    chat_tokenizer(template).save_pretrained(source.folder)
    config = {"eos_token_id": 2, "bos_token_id": 1, "do_sample": True, "repetition_penalty": 5.0, "max_new_tokens": 20}
    (source.folder / "generation_config.json").write_text(json.dumps(config))
    (folder / "model").mkdir()
    export_decoder(source, GraphSettings(accuracy_level=1)).save(folder / "model")
    text = RECIPE.replace("text-classification", TASK).replace("max_length: 16", f"max_length: {LONGEST}")
    (folder / "recipe.yaml").write_text(text)
    return folder


class Right:
    """Prompts and greedy replies of transformers for the checkpoint from which the graph was exported."""

    def __init__(self, run: Path) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(run / "source")
        self.module: Any = AutoModelForCausalLM.from_pretrained(run / "source").eval()
        self.module.generation_config.repetition_penalty = 1.0

    def prompt(self, message: str) -> list[int]:
        """Return the prompt's token ids."""
        if not self.tokenizer.chat_template:
            return list(self.tokenizer(message)["input_ids"])
        talk = [{"role": "user", "content": message}]
        return list(self.tokenizer.apply_chat_template(talk, add_generation_prompt=True)["input_ids"])

    def reply(self, message: str, tokens: int) -> list[int]:
        """Return the token ids of greedy decoding."""
        import torch

        ids = torch.tensor([self.prompt(message)])
        mask = torch.ones_like(ids)
        whole = self.module.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=tokens)
        return list(whole[0, ids.shape[1] :].tolist())

    def text(self, ids: list[int]) -> str:
        """Decode token ids without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

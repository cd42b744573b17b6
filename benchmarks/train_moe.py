"""Train a tiny mixture-of-experts language model on Wikipedia: the model that `recipes/moe-tiny.yaml` quantizes.

    python benchmarks/train_moe.py moe-tiny

A Mixtral with 4 layers, 8 experts in each, 2 active experts per token, and a byte-level BPE tokenizer of 4,096 tokens,
trained on the train split of `sample:wiki`. Its perplexity on the validation split is printed next to that of a unigram
model. The load is only balanced by Mixtral's auxiliary loss, so experts see different amounts of text. The same seed
and number of threads give the same model.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from compress.data.config import DataConfig
from compress.data.dataset import Dataset, load_dataset
from compress.formats.quiet_output import quiet_libraries
from compress.report.progress import ConsoleProgress
from compress.tasks.registry import TASKS
from compress.utils.environment import has_bf16
from compress.utils.errors import CompressError, InputError
from compress.utils.progress import Progress

TASK, SOURCE = "text-generation", "sample:wiki"
VOCABULARY, LENGTH, BATCH = 4096, 256, 8
SPECIAL = ("<unk>", "<s>", "</s>")
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 1024,
    "rope_theta": 10_000.0,
    "router_aux_loss_coef": 0.01,
    "output_router_logits": True,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
_WARM_UP = 0.05
_LOG_EVERY = 50


def main(
    output: Annotated[Path, typer.Argument(help="New folder for the model.")],
    steps: Annotated[int, typer.Option(min=1, help=f"Steps of {BATCH} x {LENGTH} tokens.")] = 500,
    learning_rate: Annotated[float, typer.Option(min=1e-6, max=1.0, help="Peak learning rate.")] = 2e-3,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
) -> None:
    """Train the model and write it as safetensors, with its tokenizer."""
    quiet_libraries()
    progress = ConsoleProgress()
    try:
        train(output, steps, learning_rate, seed, progress)
    except CompressError as error:
        progress.note(str(error))
        raise typer.Exit(error.exit_code) from None


def train(output: Path, steps: int, learning_rate: float, seed: int, progress: Progress) -> None:
    """Train tokenizer and model and write the folder. Raises `InputError` if the folder is not empty."""
    if output.exists() and any(output.iterdir()):
        raise InputError(f"The folder {str(output)!r} is not empty.", expected="a new folder, or an empty one")
    data = load_dataset(DataConfig(source=SOURCE, max_length=LENGTH), TASKS[TASK].columns, Path(), progress)
    tokenizer = train_tokenizer(texts(data, "train"))
    ids, held_out = (encode(tokenizer, texts(data, split)) for split in ("train", "validation"))
    progress.note(f"{len(ids):,} tokens of text; {len(held_out):,} held out")
    module = build(seed)
    progress.note(f"{sum(parameter.numel() for parameter in module.parameters()):,} parameters")
    train_module(module, windows(ids), steps, learning_rate, seed, progress)
    unigram = unigram_perplexity(ids, held_out)
    progress.note(f"perplexity {perplexity(module, windows(held_out)):.1f}; unigram model {unigram:.1f}")
    output.mkdir(parents=True, exist_ok=True)
    module.config.output_router_logits = False
    module.save_pretrained(output)
    tokenizer.save_pretrained(output)


def texts(data: Dataset, split: str) -> list[str]:
    """Return the articles of a split."""
    rows: list[str] = data.split(split)["text"].to_pylist()
    return rows


def train_tokenizer(articles: list[str]) -> Any:
    """Train a byte-level BPE tokenizer with GPT-2's pre-tokenization, which llama.cpp supports."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(articles, trainer)
    unknown, start, end = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=unknown, bos_token=start, eos_token=end, pad_token=end
    )


def encode(tokenizer: Any, articles: list[str]) -> np.ndarray:
    """Return the token ids of all articles, concatenated, each followed by the end token."""
    rows = tokenizer(articles, add_special_tokens=False, verbose=False)["input_ids"]
    return np.concatenate([[*row, tokenizer.eos_token_id] for row in rows]).astype(np.int64)


def windows(ids: np.ndarray) -> torch.Tensor:
    """Split token ids into complete windows [count, LENGTH]."""
    count = len(ids) // LENGTH
    return torch.from_numpy(ids[: count * LENGTH].reshape(count, LENGTH))


def build(seed: int) -> Any:
    """Return the model with random weights."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(seed)
    return MixtralForCausalLM(MixtralConfig(**SHAPE)).float()


def train_module(
    module: Any, text: torch.Tensor, steps: int, learning_rate: float, seed: int, progress: Progress
) -> None:
    """Train with AdamW, warm-up and cosine decay; each epoch has a new order."""
    optimizer = torch.optim.AdamW(module.parameters(), learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    warm = max(int(_WARM_UP * steps), 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate_factor(step, warm, steps))
    generator = torch.Generator().manual_seed(seed)
    epochs = math.ceil(steps * BATCH / len(text))
    order = torch.cat([torch.randperm(len(text), generator=generator) for _ in range(epochs)])
    module.train()
    for step in progress.track(range(steps), "training", steps):
        rows = text[order[step * BATCH : (step + 1) * BATCH]]
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bf16()):
            loss = module(input_ids=rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % _LOG_EVERY == 0:
            progress.note(f"step {step + 1} of {steps}: loss {float(loss.detach()):.3f}")
    module.eval()


def _learning_rate_factor(step: int, warm: int, steps: int) -> float:
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))


@torch.no_grad()
def perplexity(module: Any, text: torch.Tensor) -> float:
    """Return the perplexity over all tokens except the first of each window."""
    total = 0.0
    for rows in torch.split(text, BATCH):
        logits = module(input_ids=rows, output_router_logits=False).logits[:, :-1]
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"))
    return math.exp(total / text[:, 1:].numel())


def unigram_perplexity(train: np.ndarray, test: np.ndarray) -> float:
    """Return the perplexity of a unigram model of the training text, with add-one smoothing."""
    counts = np.bincount(train, minlength=VOCABULARY) + 1
    return float(np.exp(-np.log(counts / counts.sum())[test].mean()))


if __name__ == "__main__":
    typer.run(main)

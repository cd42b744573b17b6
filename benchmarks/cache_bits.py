"""Measure the perplexity that an 8-bit key-value cache costs a language model in OpenVINO, after a long context.

    compress run recipes/smollm2-openvino.yaml
    python benchmarks/cache_bits.py artifacts/runs/smollm2-openvino/latest/model --context 2000

The context is processed in one prefill. Each token after it is then predicted from the cache, as in decoding. The
lines differ only in the precision of the cache, except the last, which has OpenVINO's defaults. Perplexities are those
of the test split of `sample:wiki`. The interval is that of the difference, over windows.

Runs on any processor, but the first line takes more than three minutes on two cores with AVX2 (reduce `--windows` and
`--context`). Requires `pip install 'compress-models[openvino]'` and the sample `wiki`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from compress.data.config import DataConfig
from compress.data.dataset import load_dataset
from compress.formats.openvino.runtime import KV_CACHE_PRECISION, StatefulSession, core, read_model
from compress.formats.quiet_output import quiet_libraries
from compress.models.processor import load_tokenizer
from compress.numerics.statistics import bootstrap_interval
from compress.tasks.registry import TASKS
from compress.tasks.token_sequences import token_ids
from compress.utils.progress import SilentProgress

_INPUTS = "DYNAMIC_QUANTIZATION_GROUP_SIZE"
VARIANTS: dict[str, dict[str, object]] = {
    "cache in 32 bits": {KV_CACHE_PRECISION: "f32", _INPUTS: 0},
    "cache in 16 bits": {KV_CACHE_PRECISION: "f16", _INPUTS: 0},
    "cache in 8 bits": {KV_CACHE_PRECISION: "u8", _INPUTS: 0},
    "defaults": {},
}


def main() -> None:
    """Print cache type, perplexity, its difference from the first line, and the share of equal top-1 tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with openvino_model.xml and its tokenizer")
    parser.add_argument("--context", type=int, default=2000, help="tokens before the first evaluated one")
    parser.add_argument("--judged", type=int, default=40, help="evaluated tokens per window")
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    quiet_libraries()
    windows = _windows(options.folder, options.windows, options.context + options.judged)
    sys.stdout.write(
        f"{len(windows)} windows, {options.context} tokens of context, {options.judged} evaluated in each\n"
    )
    losses: dict[str, np.ndarray] = {}
    top1: dict[str, np.ndarray] = {}
    for name, settings in VARIANTS.items():
        session = _open(options.folder, settings, options.threads)
        predictions = [_predict(session, window, options.context) for window in windows]
        losses[name], top1[name] = (np.stack(arrays) for arrays in zip(*predictions, strict=True))
        first = next(iter(losses))
        gap = (losses[name] - losses[first]).mean(axis=1)
        low, high = bootstrap_interval(gap, lambda values: float(values.mean()), seed=0)
        same = (top1[name] == top1[first]).mean()
        sys.stdout.write(
            f"{name:<18}{session.settings['cache']:>5}{np.exp(losses[name].mean()):9.3f}  "
            f"{np.expm1(gap.mean()):+.2%} ({np.expm1(low):+.2%} to {np.expm1(high):+.2%})  {same:.1%} same top-1\n"
        )
        sys.stdout.flush()


def _windows(folder: Path, count: int, length: int) -> list[np.ndarray]:
    task = TASKS["text-generation"]
    data = load_dataset(DataConfig(source="sample:wiki", max_length=512), task.columns, Path(), SilentProgress())
    ids = np.array(token_ids(data.split("test"), load_tokenizer(folder)))
    starts = np.linspace(0, len(ids) - length, count).astype(int)
    return [ids[start : start + length] for start in starts]


def _open(folder: Path, settings: dict[str, object], threads: int) -> StatefulSession:
    properties = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, **settings}
    return StatefulSession(core().compile_model(read_model(folder), "CPU", properties), str(folder), threads)


def _predict(session: StatefulSession, ids: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the loss in nats of each token after the context, and the predicted token."""
    logits = session.logits(ids[None, :context])[0, -1]
    losses, predicted_ids = [], []
    for token in ids[context:]:
        logits = logits.astype(np.float64)
        losses.append(np.logaddexp.reduce(logits) - logits[token])
        predicted_ids.append(int(logits.argmax()))
        logits = session.more(np.array([[token]]))[0, -1]
    return np.array(losses), np.array(predicted_ids)


if __name__ == "__main__":
    main()

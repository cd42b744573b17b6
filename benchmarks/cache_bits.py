"""What keys and values in 8 bits cost a language model in OpenVINO, behind so many tokens of context.

    compress run recipes/smollm2-openvino.yaml
    python benchmarks/cache_bits.py artifacts/runs/smollm2-openvino/latest/model --context 2000

The context is read in one go; of the tokens behind it each is foretold from the cache alone, as in decoding. Between
the lines only the cache differs, but for the last, which is how OpenVINO runs the file if nothing is said. Perplexities
are of the wiki sample's test split; the interval is of the difference, over windows.

Hardware: any; on two cores with AVX2 alone the first line was not there after three minutes (`--windows` and
`--context` make it shorter).
`pip install 'compress[openvino]'`; the wiki sample must be fetched.
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
from compress.tasks.registry import get_task
from compress.tasks.token_sequences import token_ids
from compress.utils.progress import SilentProgress

_INPUTS = "DYNAMIC_QUANTIZATION_GROUP_SIZE"
VARIANTS: dict[str, dict[str, object]] = {
    "cache in 32 bits": {KV_CACHE_PRECISION: "f32", _INPUTS: 0},
    "cache in 16 bits": {KV_CACHE_PRECISION: "f16", _INPUTS: 0},
    "cache in 8 bits": {KV_CACHE_PRECISION: "u8", _INPUTS: 0},
    "as it runs": {},
}


def main() -> None:
    """Print a table: the cache's type, perplexity, its difference from the first, tokens that stay likeliest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a folder with openvino_model.xml and its tokenizer")
    parser.add_argument("--context", type=int, default=2000, help="tokens before the first that is judged")
    parser.add_argument("--judged", type=int, default=40, help="tokens of each window that are foretold")
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    quiet_libraries()
    windows = _windows(options.folder, options.windows, options.context + options.judged)
    sys.stdout.write(f"{len(windows)} windows, {options.context} tokens of context, {options.judged} judged in each\n")
    losses: dict[str, np.ndarray] = {}
    likeliest: dict[str, np.ndarray] = {}
    for name, settings in VARIANTS.items():
        session = _open(options.folder, settings, options.threads)
        predictions = [_foretold(session, window, options.context) for window in windows]
        losses[name], likeliest[name] = (np.stack(arrays) for arrays in zip(*predictions, strict=True))
        first = next(iter(losses))
        gap = (losses[name] - losses[first]).mean(axis=1)
        low, high = bootstrap_interval(gap, lambda values: float(values.mean()), seed=0)
        alike = (likeliest[name] == likeliest[first]).mean()
        sys.stdout.write(
            f"{name:<18}{session.settings['cache']:>5}{np.exp(losses[name].mean()):9.3f}  "
            f"{np.expm1(gap.mean()):+.2%} ({np.expm1(low):+.2%} to {np.expm1(high):+.2%})  {alike:.1%} alike\n"
        )
        sys.stdout.flush()


def _windows(folder: Path, count: int, length: int) -> list[np.ndarray]:
    task = get_task("text-generation")
    data = load_dataset(DataConfig(source="sample:wiki", max_length=512), task.columns, Path(), SilentProgress())
    ids = np.array(token_ids(data.split("test"), load_tokenizer(folder)))
    places = np.linspace(0, len(ids) - length, count).astype(int)
    return [ids[start : start + length] for start in places]


def _open(folder: Path, settings: dict[str, object], threads: int) -> StatefulSession:
    exact = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, **settings}
    return StatefulSession(core().compile_model(read_model(folder), "CPU", exact), str(folder), threads)


def _foretold(session: StatefulSession, ids: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
    """The loss of each token behind the context, in nats, and the likeliest token in its place."""
    logits = session.logits(ids[None, :context])[0, -1]
    losses, predicted_ids = [], []
    for token in ids[context:]:
        wide = logits.astype(np.float64)
        losses.append(np.logaddexp.reduce(wide) - wide[token])
        predicted_ids.append(int(wide.argmax()))
        logits = session.more(np.array([[token]]))[0, -1]
    return np.array(losses), np.array(predicted_ids)


if __name__ == "__main__":
    main()

"""Reliability of verdicts: false alarms, detection of slowdowns and accuracy losses, harness overhead, time budget.

    python benchmarks/trust.py                        # everything: two hours on two cores
    python benchmarks/trust.py slowdown-2 overhead    # some parts

Models are the sample encoder with pruned layers, exported and quantized to INT8; the slower candidate has one more
layer. Both models of a comparison are timed by `measure_side_by_side`, in separate processes, on real sentences with
one thread, within ten seconds (for the slowdown of 2%: 20 seconds, 16 launches). The verdict is that of
`compress compare` with a 99% interval and a margin of 1%. The true ratio of each pair is measured first, in a session
of two minutes. The background load multiplies matrices on one or two threads for two seconds on average, then pauses
for three seconds on average.

The estimate and interval of every comparison are written to a JSON file.
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from compress.benchmark.session import measure_side_by_side
from compress.data.config import DataConfig
from compress.data.dataset import load_dataset
from compress.data.samples.fetch import sample_directory
from compress.formats.onnx.export import export_onnx
from compress.formats.onnx.int8.dynamic import quantize_embeddings, quantize_products, quantize_rows_in_order
from compress.formats.onnx.model import FLOAT_GRAPH, OnnxModel
from compress.formats.quiet_output import quiet_libraries
from compress.formats.runtime import get_runtime
from compress.formats.targets import TARGETS
from compress.models.model import TorchModel
from compress.models.structure import blocks
from compress.models.transformer_pruning import keep_heads, keep_neurons
from compress.models.vocabulary import trim
from compress.numerics.differences import decide, difference_of_shares, discordant
from compress.numerics.statistics import IntervalEstimate, geometric_interval, wilson_interval
from compress.recipe.recipe import Benchmark
from compress.tasks.registry import TASKS
from compress.tasks.task import Examples
from compress.utils.environment import environment
from compress.utils.progress import SilentProgress

CONFIDENCE, MARGIN = 0.99, 0.01
BUDGET_SECONDS = 10.0
SETTINGS = Benchmark(threads=1, batched=False, seconds=2.0, examples=128, budget_seconds=BUDGET_SECONDS)
LONG_SETTINGS = SETTINGS.model_copy(update={"budget_seconds": 20.0, "launches": 16})
LAYERS_5, LAYERS_2 = 19, 50
"""Layers of models for which one more layer is a slowdown of 5% and of 2%."""
ON_SECONDS, OFF_SECONDS = 2.0, 3.0
REMOVED_WORDS = (("no",), ("too",), ("no", "too"), ("no", "too", "bad"), ("no", "too", "bad", "not"))
NOISE = (0.15, 0.17, 0.19, 0.22)

Result = dict[str, Any]


def deep_model(layers: int, folder: Path) -> tuple[Path, Examples]:
    """Write an encoder that repeats the sample encoder's layers, each with 2 of 12 heads and 1/16 of its neurons."""
    task = TASKS["text-classification"]
    data = load_dataset(DataConfig(source="sample:movie-reviews"), task.columns, Path(), SilentProgress())
    torch.manual_seed(0)
    model = task.load(sample_directory("minilm"), data.labels, trust_remote_code=False)
    keep_heads(model.module, [range(2) for _ in blocks(model.module)])
    keep_neurons(model.module, [torch.arange(96) for _ in blocks(model.module)])
    _repeat_layers(model, layers)
    examples = task.encode(data.split("test"), model.processor, data.labels, 32)
    graph = quantize_products(
        export_onnx(model, examples, None, fusions=True).graph, per_channel=True, reduce_range=False
    )
    quantize_rows_in_order(graph)
    quantize_embeddings(graph, 8)
    folder.mkdir()
    OnnxModel(graph, FLOAT_GRAPH, model.companions()).save(folder)
    return folder, examples


def _repeat_layers(model: TorchModel, layers: int) -> None:
    encoder: Any = model.module.base_model.encoder
    originals = list(encoder.layer)
    encoder.layer = torch.nn.ModuleList(copy.deepcopy(originals[i % len(originals)]) for i in range(layers))
    model.module.config.num_hidden_layers = layers


def compare(folders: dict[str, Path], examples: Examples, seed: int, settings: Benchmark = SETTINGS) -> Result:
    """Compare the latency of candidate and baseline; return verdict, interval, launches and seconds."""
    start_time = time.perf_counter()
    comparison = measure_side_by_side(
        folders,
        dict.fromkeys(folders, examples),
        TARGETS["cpu"],
        settings,
        "baseline",
        SilentProgress(),
        seed,
        precision=MARGIN / 2,
        confidence=CONFIDENCE,
    )
    seconds = time.perf_counter() - start_time
    (speedup,) = (row for row in comparison.measurements if (row.model, row.metric) == ("candidate", "speedup"))
    assert speedup.raw is not None
    change = IntervalEstimate(1 / speedup.value - 1, -1.0, float("inf"))
    if len(speedup.raw) > 1:
        change = IntervalEstimate(*(value - 1 for value in geometric_interval(1 / np.array(speedup.raw), CONFIDENCE)))
    return {
        "verdict": decide(change, MARGIN),
        "effect": change.value,
        "low": change.low,
        "high": change.high,
        "launches": len(speedup.raw),
        "seconds": seconds,
        "noise": comparison.environment["noise"]["verdict"],
    }


def _keep_busy(seconds: float) -> None:
    """Keep a processor busy with arrays larger than its caches."""
    a = np.random.default_rng(0).random((1024, 1024), dtype=np.float32)
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        a = np.tanh(a @ a)


def _run_load(seed: int) -> None:
    generator = random.Random(seed)
    while True:
        time.sleep(generator.expovariate(1 / OFF_SECONDS))
        seconds = generator.expovariate(1 / ON_SECONDS)
        helpers = [multiprocessing.Process(target=_keep_busy, args=(seconds,)) for _ in range(generator.choice((0, 1)))]
        for helper in helpers:
            helper.start()
        _keep_busy(seconds)
        for helper in helpers:
            helper.join()


@contextmanager
def background_load(seed: int) -> Iterator[None]:
    """Run an intermittent load during the block."""
    process = multiprocessing.Process(target=_run_load, args=(seed,))
    process.start()
    try:
        yield
    finally:
        process.terminate()
        process.join()


def repeat(
    name: str, folders: dict[str, Path], examples: Examples, times: int, settings: Benchmark = SETTINGS
) -> list[Result]:
    """Repeat a comparison and print a progress line for each."""
    outcomes = []
    for number in range(times):
        outcomes.append(compare(folders, examples, number, settings))
        last = outcomes[-1]
        counts = {
            verdict: sum(outcome["verdict"] == verdict for outcome in outcomes)
            for verdict in ("worse", "better", "same")
        }
        interval = f"{last['effect']:+.2%} ({last['low']:+.2%} to {last['high']:+.2%})"
        sys.stderr.write(
            f"{name} {number + 1}/{times}: {interval} {last['verdict']}, "
            f"{last['launches']} launches, {last['seconds']:.1f} s, {last['noise']}; so far {counts}\n"
        )
    return outcomes


def slowdown(name: str, layers: int, times: int, settings: Benchmark, loaded: bool) -> Result:
    """Compare a model with one that has one more layer, after measuring the true ratio on the idle machine."""
    with tempfile.TemporaryDirectory() as scratch:
        baseline, examples = deep_model(layers, Path(scratch) / "baseline")
        candidate, _ = deep_model(layers + 1, Path(scratch) / "candidate")
        folders = {"baseline": baseline, "candidate": candidate}
        long = SETTINGS.model_copy(update={"budget_seconds": 120.0})
        truth = compare(folders, examples, seed=1000, settings=long)
        if loaded:
            with background_load(seed=7):
                outcomes = repeat(name, folders, examples, times, settings)
        else:
            outcomes = repeat(name, folders, examples, times, settings)
    return {
        "true_slowdown": truth,
        "layers": layers,
        "found": _count(outcomes, "worse"),
        "of": times,
        "comparisons": outcomes,
    }


def false_alarms(times: int) -> Result:
    """Compare a model with itself, in two folders, under an intermittent load."""
    with tempfile.TemporaryDirectory() as scratch:
        baseline, examples = deep_model(LAYERS_5, Path(scratch) / "baseline")
        candidate, _ = deep_model(LAYERS_5, Path(scratch) / "candidate")
        # Another name in the config makes it a different model, so that both are timed.
        config = candidate / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "name_or_path": "candidate"}))
        with background_load(seed=11):
            outcomes = repeat("false alarms", {"baseline": baseline, "candidate": candidate}, examples, times)
    alarms = _count(outcomes, "worse") + _count(outcomes, "better")
    return {"alarms": alarms, "of": times, "same": _count(outcomes, "same"), "comparisons": outcomes}


def _count(outcomes: list[Result], verdict: str) -> int:
    return sum(outcome["verdict"] == verdict for outcome in outcomes)


def overhead(times: int = 24) -> Result:
    """Measure the overhead of the harness per call, against a plain loop over `session.run` on the same inputs.

    Both loops alternate in one process, so that only the harness's code around the call differs.
    """
    import onnxruntime

    with tempfile.TemporaryDirectory() as scratch:
        folder, examples = deep_model(10, Path(scratch) / "model")
        session = get_runtime("onnxruntime").open(folder, TARGETS["cpu"], 1)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = 1, 1
        (graph,) = folder.rglob("*.onnx")
        bare = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        batches = [examples.batch([i]) for i in range(64)]
        feeds = [{name: batch[name] for name in session.inputs} for batch in batches]
        from compress.benchmark.worker import time_calls

        def harness() -> list[float]:
            return time_calls(session, batches, range(64))[0]

        def loop() -> list[float]:
            taken = []
            for feed in feeds:
                start = time.perf_counter_ns()
                bare.run(None, feed)
                taken.append((time.perf_counter_ns() - start) / 1e6)
            return taken

        for _ in range(2):
            harness()
            loop()
        ratios, medians = [], []
        for number in range(times):
            pairs = []
            for turn in range(10):
                first, second = (harness, loop) if (number + turn) % 2 == 0 else (loop, harness)
                times_by_loop = {run: run() for run in (first, second)}
                with_harness, without = times_by_loop[harness], times_by_loop[loop]
                medians.append(float(np.median(without)))
                pairs.append(float(np.median(np.array(with_harness) / np.array(without))))
            ratios.append(float(np.median(pairs)))
    estimate = geometric_interval(np.array(ratios), 0.95)
    return {
        "bare_median_ms": float(np.median(medians)),
        "overhead": estimate.value - 1,
        "low": estimate.low - 1,
        "high": estimate.high - 1,
        "raw": ratios,
    }


def budget(seconds: float = 60.0) -> Result:
    """Measure the total time of a session with a budget of a minute."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, examples = deep_model(6, Path(scratch) / "model")
        settings = Benchmark(threads=1, budget_seconds=seconds)
        start_time = time.perf_counter()
        measure_side_by_side(
            {"baseline": folder},
            {"baseline": examples},
            TARGETS["cpu"],
            settings,
            "baseline",
            SilentProgress(),
            0,
            600,
            0,
        )
        return {"told_seconds": seconds, "took_seconds": time.perf_counter() - start_time}


def accuracy(times: int = 100) -> Result:
    """Measure detection and false alarms for an accuracy loss of one point on 2,000 rows, by resampling real outcomes.

    The baseline is the sample encoder, fine-tuned for one epoch. The candidates are damaged like compressed models: by
    a smaller vocabulary or by noise on the weights. Of each kind, the candidate with the loss nearest to one point is
    used; the power of the test depends on the number of rows on which the two models disagree. Rows are resampled in
    pairs with replacement, so the expected loss is that of the 2,000 rows. For false alarms, each disagreement is
    assigned to either model at random, so that the true difference is zero.
    """
    baseline, candidates_by_kind = _outcomes()
    outcomes: Result = {}
    for kind, candidates in candidates_by_kind.items():
        drop = {name: float(baseline.mean() - candidate.mean()) for name, candidate in candidates.items()}
        nearest = min(drop, key=lambda name, drop=drop: abs(drop[name] - 0.01))
        outcomes[kind] = {"candidate": nearest, "true_drop": drop[nearest], "drops_tried": drop}
        outcomes[kind] |= _resample(baseline, candidates[nearest], times)
    return outcomes


def _resample(baseline: np.ndarray, candidate: np.ndarray, times: int) -> Result:
    generator = np.random.default_rng(0)
    detected, alarms = 0, 0
    for _ in range(times):
        rows = generator.integers(0, len(baseline), len(baseline))
        detected += _is_worse(*discordant(baseline[rows], candidate[rows]), len(baseline))
    for _ in range(20 * times):
        rows = generator.integers(0, len(baseline), len(baseline))
        disagreements = sum(discordant(baseline[rows], candidate[rows]))
        lost = int(generator.binomial(disagreements, 0.5))
        alarms += _is_worse(lost, disagreements - lost, len(baseline))
    return {
        "disagreements": sum(discordant(baseline, candidate)),
        "found": detected,
        "of": times,
        "false_alarm_rate": alarms / (20 * times),
        "false_alarm_interval": wilson_interval(alarms, 20 * times),
    }


def _is_worse(lost: int, won: int, n: int) -> bool:
    change = difference_of_shares(lost, won, n, 0.9)
    return decide(IntervalEstimate(-change.value, -change.high, -change.low), 0.005) == "worse"


def _outcomes() -> tuple[np.ndarray, dict[str, dict[str, np.ndarray]]]:
    """Return whether each test row is classified correctly: by the baseline, and by each candidate of each kind."""
    from compress.evaluation.evaluate import predict
    from compress.pipeline.run import run
    from compress.recipe.loading import read_recipe

    recipe_file = Path(__file__).parent.parent / "recipes" / "tiny.yaml"
    with tempfile.TemporaryDirectory() as scratch:
        done = run(read_recipe(recipe_file, ()), recipe_file.parent, Path(scratch) / "artifacts", SilentProgress())
        row = done.report.find("baseline", "accuracy", "cpu")
        assert row is not None
        assert row.raw is not None
        task = TASKS["text-classification"]
        data = load_dataset(DataConfig(source="sample:movie-reviews"), task.columns, Path(), SilentProgress())

        def outcomes(damage: Callable[[TorchModel], object]) -> np.ndarray:
            model = task.load(_finetuned(Path(scratch)), data.labels, trust_remote_code=False)
            damage(model)
            examples = task.encode(data.split("test"), model.processor, data.labels, 64)
            folder = Path(tempfile.mkdtemp(dir=scratch))
            graph = export_onnx(model, examples, None, fusions=True).graph
            OnnxModel(graph, FLOAT_GRAPH, model.companions()).save(folder)
            predictions = predict(folder, task, examples, TARGETS["cpu"], 2, SilentProgress(), "")
            return (predictions.kept["logits"].argmax(-1) == predictions.labels).astype(float)

        words = {
            " ".join(lost): outcomes(lambda model, lost=lost: _remove_words(model, lost)) for lost in REMOVED_WORDS
        }
        noise = {f"{level:g}": outcomes(lambda model, level=level: _add_noise(model, level)) for level in NOISE}
    return np.array(row.raw), {"vocabulary": words, "noise": noise}


def _remove_words(model: TorchModel, words: Sequence[str]) -> None:
    """Remove ``words`` from the vocabulary, so that they are split into word pieces."""
    vocabulary = model.processor.get_vocab()
    trim(model, set(vocabulary.values()) - {vocabulary[word] for word in words})


def _add_noise(model: TorchModel, level: float) -> None:
    """Add normal noise to each matrix, with ``level`` times the standard deviation of its weights."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.module.parameters():
            if parameter.ndim == 2:
                parameter += level * parameter.std() * torch.randn_like(parameter)


def _finetuned(scratch: Path) -> Path:
    for manifest in (scratch / "artifacts" / "cache").glob("*/manifest.json"):
        if json.loads(manifest.read_text()).get("name") == "finetune":
            return manifest.parent / "content"
    raise AssertionError("the recipe has no stage finetune")


PARTS = {
    "overhead": overhead,
    "budget": budget,
    "accuracy": accuracy,
    "slowdown-2": lambda: slowdown("2% idle", LAYERS_2, 100, LONG_SETTINGS, loaded=False),
    "slowdown-5": lambda: slowdown("5% under load", LAYERS_5, 100, SETTINGS, loaded=True),
    "false-alarms": lambda: false_alarms(200),
}


def main(
    parts: Annotated[list[str] | None, typer.Argument(help=f"Some of: {', '.join(PARTS)}.")] = None,
    output: Annotated[Path, typer.Option(help="File for the results, which it updates.")] = Path(
        "artifacts/trust.json"
    ),
) -> None:
    """Measure the parts and print a line for each."""
    quiet_libraries()
    output.parent.mkdir(parents=True, exist_ok=True)
    recorded: Result = json.loads(output.read_text()) if output.exists() else {}
    for name in parts or PARTS:
        outcome = PARTS[name]()
        recorded[name] = {**outcome, "environment": environment()}
        output.write_text(json.dumps(recorded, indent=1))
        shown = {key: value for key, value in outcome.items() if key not in ("comparisons", "raw")}
        sys.stdout.write(f"{name}: {json.dumps(shown)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    typer.run(main)

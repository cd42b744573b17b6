"""Tests of decoder pruning and sparsification: removed parts against brute force, logits of the pruned model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import Notes, context, inputs_of_layers, module_of, save_decoder, some_ids
from torch import nn
from torch.nn.functional import cosine_similarity

from compress.models.checkpoint import Checkpoint
from compress.models.model import TorchModel
from compress.numerics.pruning import remove_parts, sparsegpt, wanda
from compress.numerics.sparsity_pattern import Pattern
from compress.pipeline.integrity import IntegrityCheck, PredictionProbe, inspector_of, measure_size
from compress.stages.blockwise.block_pass import gram
from compress.stages.blockwise.blockwise_model import build_blockwise_model
from compress.stages.blockwise.calibration import calibration_sequences
from compress.stages.cost_model import PlanContext, Shape
from compress.stages.gptq.settings import Quantization
from compress.stages.gptq.stage import Gptq
from compress.stages.prune.stage import Prune
from compress.stages.prune_decoder.depth import distances
from compress.stages.prune_decoder.settings import pruning_flops
from compress.stages.prune_decoder.stage import PruneDecoder
from compress.stages.prune_decoder.width_sizes import Sizes
from compress.stages.sparsify.stages import SparsifyDecoder
from compress.tasks.registry import TASKS
from compress.utils.errors import StageError

SMALL = {"samples": 6, "sequence_length": 24, "precision": "fp32"}
TEXT = Quantization(guided=False, samples=6, sequence_length=24, precision="fp32")


def pruned(source: Checkpoint, scratch: Path, notes: Notes | None = None, **fields: Any) -> Checkpoint:
    return stage_of(**fields).run(source, context(scratch, progress=notes))


def stage_of(**fields: Any) -> PruneDecoder:
    narrow = {"multiple": 32} if fields.keys() & {"heads", "feed_forward"} else {}
    return PruneDecoder(**{**SMALL, **narrow, **fields})


def sparse(source: Checkpoint, scratch: Path, **fields: Any) -> Checkpoint:
    few = {} if fields.get("method", "magnitude") == "magnitude" else SMALL
    return SparsifyDecoder(**{**few, **fields}).run(source, context(scratch))


def ids_of(source: Checkpoint, scratch: Path) -> torch.Tensor:
    return calibration_sequences(context(scratch), source, 6, 24)


def without(module: Any, gone: list[int]) -> Any:
    """Skip the given blocks in transformers' own model, in place."""
    left = [block for index, block in enumerate(module.model.layers) if index not in gone]
    module.model.layers = nn.ModuleList(left)
    module.config.num_hidden_layers = len(left)
    return module


@torch.no_grad()
def answers(module: Any, ids: torch.Tensor) -> torch.Tensor:
    return module(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("span", [1, 2, 3])
def test_block_distances_match_a_plain_loop(span: int, tmp_path: Path) -> None:
    source, ids = save_decoder(tmp_path / "source", "Gemma3TextConfig", num_hidden_layers=3), some_ids(3, 12)
    module, states = module_of(source), list[torch.Tensor]()
    for index, block in enumerate(module.model.layers):
        if not index:
            block.register_forward_pre_hook(lambda _, given: states.append(given[0].view(-1, 64)))
        block.register_forward_hook(lambda _, given, left: states.append(left.view(-1, 64)))
    answers(module, ids)
    expected = [
        1
        - sum(float(cosine_similarity(*pair, dim=0)) for pair in zip(states[at], states[at + span], strict=True))
        / ids.numel()
        for at in range(4 - span)
    ]
    measured = distances(build_blockwise_model(source), TEXT, ids, span, tmp_path, Notes())
    assert measured == pytest.approx(expected, abs=1e-5)
    assert not list(tmp_path.glob("states*"))


@pytest.mark.parametrize("config", ["LlamaConfig", "Gemma3TextConfig", "MixtralConfig"])
def test_removed_blocks_equal_skipped_blocks_in_transformers(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.stages.prune_decoder.depth.compensate_removed_blocks", lambda *_: {})
    source = save_decoder(tmp_path / "source", config, num_hidden_layers=4, dtype=torch.bfloat16)
    ids = some_ids(2, 20)
    result = pruned(source, tmp_path / "scratch", layers=2)
    measured = distances(build_blockwise_model(source), TEXT, ids_of(source, tmp_path), 2, tmp_path, Notes())
    nearest = min(range(len(measured)), key=measured.__getitem__)
    gone = [nearest, nearest + 1]
    expected = answers(without(module_of(source), gone), ids)
    torch.testing.assert_close(answers(module_of(result), ids), expected, atol=1e-4, rtol=1e-4)
    assert result.config["num_hidden_layers"] == 2
    assert all(result.stored(name).dtype == torch.bfloat16 for name in result.files)
    kinds = source.config.get("layer_types")
    if kinds:
        assert result.config["layer_types"] == [kind for index, kind in enumerate(kinds) if index not in gone]
    assert {path.name for path in source.folder.iterdir()} == {path.name for path in result.folder.iterdir()}


@pytest.mark.parametrize("config", ["LlamaConfig", "Phi3Config", "GPT2Config"])
def test_each_layer_compensates_on_inputs_of_pruned_earlier_layers(config: str, tmp_path: Path, gpt2: None) -> None:
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    llama = config != "GPT2Config"
    source = save_decoder(tmp_path / "source", config, **(sizes if llama else {}))
    ids, module, seen, notes = ids_of(source, tmp_path), module_of(source), some_ids(2, 20), Notes()
    cut = {"heads": 0.5, "feed_forward": 0.3} if llama else {"feed_forward": 0.3}
    result = pruned(source, tmp_path / "scratch", notes, **cut)
    blocks = "model.layers" if llama else "transformer.h"
    names = {"self_attn.o_proj": (2, 1), "mlp.down_proj": (96, 64)} if llama else {"mlp.c_proj": (256, 192)}
    for index in range(len(module.get_submodule(blocks))):
        for name, (parts, kept_parts) in names.items():
            layer, path = module.get_submodule(f"{blocks}.{index}.{name}"), f"{blocks}.{index}.{name}"
            # The layer's inputs after everything before it has been pruned.
            hessian = gram(inputs_of_layers(module, ids)[path])
            weight = layer.weight.data if llama else layer.weight.data.T
            stays, fitted = remove_parts(weight, hessian, weight.shape[1] // parts, kept_parts)
            layer.weight.data = fitted if llama else fitted.T.contiguous()
            columns = fitted.view(len(fitted), parts, -1)[:, stays].flatten(1)
            stored = result.stored(f"{path}.weight")
            torch.testing.assert_close(stored if llama else stored.T, columns, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(answers(module_of(result), seen), answers(module, seen), atol=5e-4, rtol=1e-3)
    assert any("their outputs differ from those of all by" in line for line in notes.said)


def test_killed_pruning_resumes_with_identical_result(tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    source = save_decoder(tmp_path / "source", "MixtralConfig", num_hidden_layers=4, **sizes)
    cut = stage_of(heads=0.5, experts=0.25)
    whole = cut.run(source, context(tmp_path / "whole"))
    counted: list[int] = []

    class Killed(Notes):
        def track(self, items: Any, *told: Any, **more: Any) -> Any:
            for index in items:
                if index == 2 and not counted:
                    raise KeyboardInterrupt
                yield index

    with pytest.raises(KeyboardInterrupt):
        cut.run(source, context(tmp_path / "killed", progress=Killed()))
    counted.append(2)

    class Counted(Notes):
        def track(self, items: Any, *told: Any, **more: Any) -> Any:
            for index in items:
                counted.append(index)
                yield index

    again = cut.run(source, context(tmp_path / "killed", progress=Counted()))
    assert counted == [2, 2, 3]
    assert all(torch.equal(again.stored(name), whole.stored(name)) for name in whole.files)
    assert whole.files.keys() == again.files.keys()
    assert not list((tmp_path / "killed" / "states").iterdir())


def test_transposed_weights_become_sparse_too(tmp_path: Path, gpt2: None) -> None:
    source = save_decoder(tmp_path / "source", "GPT2Config")
    zeroed = sparse(source, tmp_path / "sparse", sparsity=0.5, method="wanda")
    weight = zeroed.stored("transformer.h.0.mlp.c_fc.weight")
    assert bool(((weight == 0).sum(0) == 32).all())


def test_kept_heads_satisfy_the_config(tmp_path: Path) -> None:
    # Five of six groups are nearest to 4.8, but Llama's hidden size has to be a multiple of its heads.
    source = save_decoder(
        tmp_path / "source", hidden_size=192, num_attention_heads=12, num_key_value_heads=6, head_dim=32
    )
    sizes = Sizes.of(build_blockwise_model(source).model, PruneDecoder(heads=0.2))
    assert (sizes.places, sizes.found[0]) == (4, 6)


@pytest.mark.parametrize(
    ("config", "field"), [("MixtralConfig", "num_local_experts"), ("DeepseekV3Config", "n_routed_experts")]
)
def test_rarely_routed_experts_are_removed(config: str, field: str, tmp_path: Path) -> None:
    source, seen = save_decoder(tmp_path / "source", config), some_ids(2, 20)
    result = pruned(source, tmp_path / "scratch", experts=0.25)
    assert result.config[field] == 3
    # Reference: the whole model with the removed experts masked in the router.
    module, ids = module_of(source), ids_of(source, tmp_path)
    for block in module.model.layers:
        if not hasattr(block.mlp, "experts"):
            continue
        counts = torch.zeros(4)
        hook = block.mlp.experts.register_forward_pre_hook(
            lambda _, given, counts=counts: (counts.add_(torch.bincount(given[1].flatten(), minlength=4)), None)[1]
        )
        answers(module, ids)
        hook.remove()
        least = int(counts.argmin())
        shut = torch.zeros(4).index_fill(0, torch.tensor(least), -1e9)
        if config == "MixtralConfig":

            def gate(hidden: torch.Tensor, shut: torch.Tensor = shut, gate: Any = block.mlp.gate) -> Any:
                logits = nn.functional.linear(hidden.view(-1, 64), gate.weight) + shut
                chances, chosen = logits.softmax(-1).topk(2)
                return logits, chances / chances.sum(-1, keepdim=True), chosen

            block.mlp.gate.forward = gate
        else:
            block.mlp.gate.e_score_correction_bias.add_(shut)
    torch.testing.assert_close(answers(module_of(result), seen), answers(module, seen), atol=2e-4, rtol=1e-3)


def test_wanda_and_sparsegpt_use_layer_inputs(tmp_path: Path) -> None:
    source = save_decoder(tmp_path / "source", num_hidden_layers=1)
    inputs = inputs_of_layers(module_of(source), ids_of(source, tmp_path))
    for method, pattern in (("wanda", "2:4"), ("sparsegpt", None)):
        share = {"pattern": pattern} if pattern else {"sparsity": 0.5}
        result = sparse(source, tmp_path / method, method=method, **share)
        for name in ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"):
            weight, hessian = source.weight(name), gram(inputs[name])
            if pattern:
                expected = wanda(weight, hessian, 0.5, Pattern.read(pattern))
            else:
                expected = sparsegpt(weight, hessian, 0.5)
            torch.testing.assert_close(result.weight(name), expected, atol=1e-4, rtol=1e-3)
        for name in source.files:
            same = torch.equal(result.stored(name), source.stored(name))
            zeros = float((result.stored(name) == 0).float().mean())
            assert zeros == 0.5 if name.endswith("_proj.weight") else same, name


def test_magnitude_needs_no_text_and_resumes_with_identical_result(tmp_path: Path) -> None:
    source = save_decoder(tmp_path / "source")
    plain = sparse(source, tmp_path / "plain", sparsity=0.5)
    weight = source.weight("model.layers.1.mlp.up_proj")
    threshold = weight.abs().flatten().sort()[0][weight.numel() // 2]
    assert torch.equal(plain.weight("model.layers.1.mlp.up_proj"), weight * (weight.abs() >= threshold))
    assert SparsifyDecoder(sparsity=0.5).needs().splits == ()
    assert SparsifyDecoder(sparsity=0.5, method="wanda").needs().splits == ("train",)

    whole = sparse(source, tmp_path / "whole", sparsity=0.5, method="sparsegpt")
    half = SparsifyDecoder(**SMALL, sparsity=0.5, method="sparsegpt")
    scratch = tmp_path / "killed"

    class Killed(Notes):
        def track(self, items: Any, description: str, total: int) -> Any:
            yield next(iter(items))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half.run(source, context(scratch, progress=Killed()))
    result = half.run(source, context(scratch))
    assert all(torch.equal(result.stored(name), whole.stored(name)) for name in source.files)


def test_pruned_decoder_keeps_the_contract_and_is_quantized(tmp_path: Path) -> None:
    source = save_decoder(tmp_path / "source", num_hidden_layers=3, head_dim=32)
    stage = stage_of(layers=1, heads=0.5, feed_forward=0.4)
    stage_context = context(tmp_path / "scratch")
    result = stage.run(source, stage_context)
    saved = tmp_path / "saved"
    saved.mkdir()
    result.save(saved)
    task, rows = TASKS["text-generation"], stage_context.data.split("train")
    probe = PredictionProbe(
        lambda folder: Checkpoint.load(folder, task), lambda tokenizer: task.encode(rows, tokenizer, None, 16)
    )
    integrity = IntegrityCheck("prune_decoder", stage.output_spec())
    integrity.check(result, inspector_of(source).digests(), measure_size(source.folder), saved, probe)
    assert "predictions" in dict(integrity.findings)
    blind = stage.infer_shapes(source, context(tmp_path / "blind"))
    assert {name: blind.stored(name).shape for name in blind.files} == {
        name: result.stored(name).shape for name in result.files
    }
    quantized = Gptq(method="rtn", group_size=32).run(result, context(tmp_path / "gptq"))
    assert quantized.config["num_hidden_layers"] == 2 and quantized.config["intermediate_size"] == 64


@pytest.mark.parametrize(
    ("config", "changes", "fields", "expected"),
    [
        ("LlamaConfig", {}, {"layers": 2}, "removes 2 of 2 blocks"),
        ("LlamaConfig", {}, {"heads": 0.8}, "Removing 80% of 2 heads leaves none"),
        ("LlamaConfig", {"num_key_value_heads": 1, "head_dim": 8}, {"heads": 0.5}, "leaves a multiple of 32"),
        ("LlamaConfig", {}, {"experts": 0.5}, "has no experts"),
        ("LlamaConfig", {}, {"pattern": "2:5"}, "cannot hold the pattern 2:5"),
        ("MixtralConfig", {}, {"experts": 0.75}, "Each token passes 2 experts, and 1 would be left"),
        ("MixtralConfig", {}, {"feed_forward": 0.5}, "no feed-forward layer that can be cut"),
        ("BloomConfig", {}, {"heads": 0.5}, "ALiBi"),
        ("DeepseekV3Config", {}, {"feed_forward": 0.5}, "no feed-forward layer that can be cut"),
        ("GPT2Config", {"hidden_size": 128}, {"heads": 0.5}, "cannot say that heads were cut"),
    ],
)
def test_impossible_pruning_is_refused_before_any_work(
    config: str, changes: dict[str, Any], fields: dict[str, Any], expected: str, tmp_path: Path, gpt2: None
) -> None:
    source = save_decoder(tmp_path, config, **changes)
    with pytest.raises(StageError, match=expected):
        stage = SparsifyDecoder(**fields) if "pattern" in fields else stage_of(**fields)
        stage.check_model(source.folder)


LANGUAGE, CLASSES, SPEECH = (
    TASKS[name].capabilities for name in ("text-generation", "text-classification", "automatic-speech-recognition")
)
SHAPE = Shape(embeddings=1000, attention=80, feed_forward=160, other=10, layers=4, hidden=10, intermediate=32, heads=4)
PLAN = PlanContext(64, True, {}, {}, lambda name, random: None, lambda: 1e9, generates=True)


def test_each_stage_is_for_its_kind_of_model() -> None:
    assert [stage.supports(LANGUAGE) for stage in (Prune, PruneDecoder, SparsifyDecoder)] == [False, True, True]
    assert [stage.supports(CLASSES) for stage in (Prune, PruneDecoder, SparsifyDecoder)] == [True, False, False]
    assert not Prune.supports(SPEECH) and not PruneDecoder.supports(SPEECH)
    assert (PruneDecoder.input_type, Prune.input_type) == (Checkpoint, TorchModel)


def test_fields_without_an_effect_are_refused() -> None:
    with pytest.raises(ValueError, match="heads or feed_forward, which multiple concerns"):
        PruneDecoder(layers=1, multiple=32)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"method": "wanda"}, "sparsity or a pattern"),
        ({"sparsity": 0.5, "samples": 4}, "method: wanda or sparsegpt"),
        ({"sparsity": 0.5, "method": "wanda", "damp_percent": 0.1}, "method: sparsegpt"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        SparsifyDecoder(**fields)


def test_predicted_cost_counts_every_pass() -> None:
    plain = PruneDecoder(layers=2, samples=2, sequence_length=50)
    # Two passes, and the Hessian of the solved layer's inputs.
    flops = 2 * (2 * 100 * 240 + 100 * SHAPE.intermediate**2)
    assert pruning_flops(plain, SHAPE) == flops
    prediction = plain.predict(SHAPE, PLAN)
    assert (
        prediction.shape is not None
        and prediction.shape.layers == 2
        and prediction.disk_bytes.value == 4 * (1000 + 10 + 120)
    )
    assert prediction.seconds.value == pytest.approx(flops / 1e9) and prediction.peak_memory_bytes.value
    sized = SparsifyDecoder(sparsity=0.5).predict(SHAPE, PLAN)
    assert sized.seconds.flops is None and (sized.seconds.value or 0) < 1
    assert plain.search_values(SHAPE)["layers"] == (1, 2, 3)

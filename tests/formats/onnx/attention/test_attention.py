"""Tests of attention fusion: fused graphs compute the same as unfused ones, and other nodes stay unchanged."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import tiny
import torch
from exports import run
from onnx import TensorProto
from onnx_graphs import onnx_model
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForSequenceClassification
from transformers.models.modernbert import modeling_modernbert

from compress.formats.onnx.attention.find import count_unfused, find_attention
from compress.formats.onnx.attention.lower import lower_attention
from compress.formats.onnx.attention.tracing import (
    AttentionHooks,
    AttentionInputs,
    check_attention,
    reference_attention,
    use_attention_functions,
)
from compress.formats.onnx.export import export_onnx
from compress.models.model import TorchModel
from compress.tasks.task import Examples

HEADS, SIZE, LENGTH, BATCH = 3, 8, 5, 2
WIDTH = HEADS * SIZE
LOWEST = float(np.finfo(np.float32).min)
FOUR = [
    *(f"{name}_split = Reshape({name}, split)" for name in "qkv"),
    *(f"{name}_heads = Transpose<perm=[0, 2, 1, 3]>({name}_split)" for name in "qv"),
    "k_heads = Transpose<perm=[0, 2, 3, 1]>(k_split)",
    "scores = MatMul(q_heads, k_heads)",
]
AFTER = ["back = Transpose<perm=[0, 2, 1, 3]>(context)", "y = Reshape(back, merge)"]
END = ["weights = Softmax<axis=-1>(total)", "context = MatMul(weights, v_heads)", *AFTER]
PADDING = ["row = Unsqueeze(attention_mask, axes_1_2)", f"float_row = Cast<to={TensorProto.FLOAT}>(row)"]
PADDING += ["hidden = Sub(one, float_row)", "mask = Mul(hidden, lowest)"]
FORMS: dict[str, list[str]] = {
    # BERT: scores / sqrt(size) + mask
    "padding": [*PADDING, *FOUR, "scaled = Div(scores, root)", "total = Add(scaled, mask)"],
    # MPNet: a bias that all rows of the batch share, and the mask
    "relative": [*PADDING, *FOUR, "scaled = Div(scores, root)", "both = Add(bias, scaled)", "total = Add(both, mask)"],
    # All is scaled together.
    "scaled together": [
        *(*PADDING, *FOUR, "biased = Add(scores, bias)", "scaled = Mul(biased, half)", "total = Add(scaled, mask)"),
    ],
    # DeBERTa: queries are scaled, scores filled where a square mask says so
    "filled": [
        *(*FOUR[:-1], "q_scaled = Mul(q_heads, half)", "scores = MatMul(q_scaled, k_heads)"),
        f"mask_bool = Cast<to={TensorProto.BOOL}>(attention_mask)",
        *("keys = Unsqueeze(mask_bool, axes_1_2)", "queries = Unsqueeze(mask_bool, axes_1_3)"),
        *("seen = And(keys, queries)", "unseen = Not(seen)", "total = Where(unseen, lowest, scores)"),
    ],
    # DeBERTa v2: batch and heads are one axis
    "three axes": [
        *(*PADDING, *FOUR[:-1], "q_three = Reshape(q_heads, three)", "k_plain = Transpose<perm=[0, 1, 3, 2]>(k_heads)"),
        *("k_three = Reshape(k_plain, three)", "k_turned = Transpose<perm=[0, 2, 1]>(k_three)"),
        *(
            "k_scaled = Div(k_turned, root)",
            "scores = MatMul(q_three, k_scaled)",
            "scores_four = Reshape(scores, four)",
        ),
        *("biased = Add(scores_four, bias)", "total = Add(biased, mask)"),
    ],
}
THREE_END = [
    *("weights = Softmax<axis=-1>(total)", "weights_three = Reshape(weights, scores_three)"),
    *("v_three = Reshape(v_heads, three)", "context_three = MatMul(weights_three, v_three)"),
    *("context = Reshape(context_three, values_four)", *AFTER),
]


def model_of(steps: list[str], outputs: tuple[str, ...] = ("y",)) -> ir.Model:
    """Return a graph built from nodes in ONNX's textual form."""
    generator = np.random.default_rng(0)
    integers = {
        "split": [0, 0, HEADS, SIZE], "merge": [0, 0, WIDTH], "three": [BATCH * HEADS, LENGTH, SIZE],
        "four": [BATCH, HEADS, LENGTH, LENGTH], "scores_three": [BATCH * HEADS, LENGTH, LENGTH],
        "values_four": [BATCH, HEADS, LENGTH, SIZE], "axes_1_2": [1, 2], "axes_1_3": [1, 3],
    }  # fmt: skip
    floats: dict[str, Any] = {
        "one": 1, "half": 0.5, "root": SIZE**0.5, "lowest": LOWEST,
        "bias": generator.normal(size=(1, HEADS, LENGTH, LENGTH)),
    }  # fmt: skip
    constants = {name: np.array(sizes) for name, sizes in integers.items()}
    constants |= {name: np.float32(values) for name, values in floats.items()}
    nodes = [onnx.parser.parse_node(step) for step in steps]
    used = {name for node in nodes for name in node.input}
    inputs: dict[str, Any] = {name: [BATCH, LENGTH, WIDTH] for name in "qkv"}
    inputs |= {"attention_mask": (TensorProto.INT64, [BATCH, LENGTH])}
    stored = {name: array for name, array in constants.items() if name in used}
    model = onnx_model(nodes, inputs, dict.fromkeys(outputs), stored, domains=["com.microsoft"])
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


def whole(form: str) -> list[str]:
    return [*FORMS[form], *(THREE_END if form == "three axes" else END)]


def feed() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(1)
    mask = np.ones((BATCH, LENGTH), np.int64)
    mask[1, 3:] = 0
    arrays = {name: generator.normal(size=(BATCH, LENGTH, WIDTH)).astype(np.float32) for name in "qkv"}
    return {**arrays, "attention_mask": mask}


def fused(model: ir.Model) -> tuple[int, Counter[str]]:
    count = find_attention(model)
    assert lower_attention(model) == count
    return count, Counter(node.op_type for node in model.graph)


@pytest.mark.parametrize("form", FORMS)
def test_each_attention_form_is_fused_into_one_equal_operator(form: str):
    model = model_of(whole(form))
    expected = run(model_of(whole(form)), **feed())
    assert count_unfused(model) == 1
    count, operators = fused(model)
    assert count == operators["MultiHeadAttention"] == 1 and operators["Softmax"] == 0 and count_unfused(model) == 0
    # The transposes of the heads are removed.
    assert operators["Transpose"] == 0
    # The padding mask stays [batch, keys], separate from the bias.
    if form in ("padding", "relative", "three axes"):
        node = next(node for node in model.graph if node.op_type == "MultiHeadAttention")
        assert node.inputs[4] is not None and node.inputs[4].name == "attention_mask_int32"
        assert (len(node.inputs) > 5) == (form != "padding")
    actual = run(model, **feed())
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    assert np.abs(actual - run(model, **feed() | {"q": -feed()["q"]})).max() > 0.1


OTHER_SOFTMAXES = {
    "read elsewhere": (whole("padding"), ("y", "weights")),
    "along queries": ([*FORMS["padding"], "weights = Softmax<axis=2>(total)", *END[1:]], ("y",)),
}


@pytest.mark.parametrize("form", OTHER_SOFTMAXES)
def test_softmax_without_attention_is_unchanged(form: str):
    model = model_of(*OTHER_SOFTMAXES[form])
    original = ir.to_proto(model).SerializeToString()
    assert find_attention(model) == 0
    assert ir.to_proto(model).SerializeToString() == original


def test_scaled_values_stay_scaled_after_fusion():
    steps = [*FORMS["padding"], "v_scaled = Mul(v_heads, half)", END[0], "context = MatMul(weights, v_scaled)", *AFTER]
    model, expected = model_of(steps), run(model_of(steps), **feed())
    fused(model)
    np.testing.assert_allclose(run(model, **feed()), expected, atol=1e-5)


def test_added_row_that_is_no_mask_prevents_fusion():
    # A row that is shared by all queries but computed from scores.
    steps = [*FOUR, "others = MatMul(v_heads, k_heads)", "row = ReduceMean<keepdims=1>(others, axes_1_2)"]
    steps += ["total = Add(scores, row)", *END]
    model = model_of(steps)
    assert find_attention(model) == 0 and count_unfused(model) == 1


def heads(count: int = 2, length: int = 5, keys: int = 5, size: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, count, length if seed == 0 else keys, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_reference_attention_matches_torch(causal: bool, padded: bool, biased: bool):
    query, key, value = (heads(seed=seed) for seed in range(3))
    padding = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]) if padded else None
    bias = torch.randn(1, 2, 5, 5, generator=torch.Generator().manual_seed(9)) if biased else None
    mask = torch.zeros(2, 2, 5, 5) if bias is None else bias.expand(2, 2, 5, 5)
    if causal:
        mask = mask.masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf"))
    if padding is not None:
        mask = mask.masked_fill(padding[:, None, None, :] == 0, float("-inf"))
    expected = nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=0.3)
    actual = reference_attention(AttentionInputs(query, key, value, padding, bias, causal, 0.3))
    torch.testing.assert_close(actual.transpose(1, 2), expected)


def recording_hooks() -> tuple[AttentionHooks, list[AttentionInputs]]:
    """Return attention hooks and a list that collects the inputs of each attention call."""
    calls: list[AttentionInputs] = []

    def keep(inputs: AttentionInputs) -> torch.Tensor:
        calls.append(inputs)
        return reference_attention(inputs)

    return AttentionHooks(keep), calls


def calls_of(module: Any, given: Examples) -> list[AttentionInputs]:
    """Return the arguments of each attention call on a padded batch."""
    hooks, calls = recording_hooks()
    batch = {name: torch.from_numpy(array) for name, array in given.batch([0, 1, 2]).items() if name in given.padding}
    with use_attention_functions(module, hooks.attend, hooks.mask), torch.no_grad():
        module(**batch)
    return calls


LAYERS, VOCABULARY, POSITIONS = 2, 60, 64
TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": POSITIONS, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
DECODER = TEXT | {"num_key_value_heads": 2, "head_dim": 8}
WINDOWED = {"local_attention": 4, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2}
DISENTANGLED = {
    "relative_attention": True,
    "position_buckets": 8,
    "pos_att_type": ["c2p", "p2c"],
    "share_att_key": True,
}
RELATIVE = {
    "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "vocab_size": VOCABULARY,
    "decoder_start_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
WINDOWS = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2], "num_heads": [2], "window_size": 4}


def model_of_kind(kind: str, changes: dict[str, Any], noise: float = 0.2) -> Any:
    """Return a random classifier whose norm weights are not 1 and whose biases are not 0."""
    config = AutoConfig.for_model(kind, **changes, num_labels=3)
    auto = AutoModelForImageClassification if "image_size" in changes else AutoModelForSequenceClassification
    torch.manual_seed(0)
    module = auto.from_config(config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * noise)
    return module


def texts(lengths: list[int], seed: int = 0) -> Examples:
    generator = np.random.default_rng(seed)
    rows = []
    for length in lengths:
        ids = generator.integers(5, VOCABULARY, length)
        ids[-1] = 2
        rows.append({"input_ids": ids, "attention_mask": np.ones(length, np.int64)})
    return Examples(rows, {"input_ids": 0.0, "attention_mask": 0.0})


def images(count: int, seed: int = 0) -> Examples:
    pixels = np.random.default_rng(seed).normal(size=(count, 3, 32, 32)).astype(np.float32)
    return Examples([{"pixel_values": image} for image in pixels], {"pixel_values": None})


SOME_TEXTS = texts([3, 17, 9, 12])


def test_windowed_causal_and_grouped_attention_are_distinguished():
    local = model_of_kind("modernbert", TEXT | WINDOWED)
    assert [(call.padding is None, call.bias is None) for call in calls_of(local, SOME_TEXTS)] == [
        (False, True),
        (True, False),
    ]
    causal = model_of_kind("qwen3", DECODER)
    for call in calls_of(causal, SOME_TEXTS):
        assert call.causal and call.key.shape == call.query.shape == (3, 4, call.key.shape[2], 8)
        for tensor in (call.key, call.value):  # two heads of keys serve two of queries each
            torch.testing.assert_close(tensor[:, 0::2], tensor[:, 1::2], rtol=0, atol=0)
    assert check_attention(causal, SOME_TEXTS) == ""


def test_attention_with_soft_cap_is_not_fused():
    module = model_of_kind("gemma2", DECODER | {"attn_logit_softcapping": 5.0, "sliding_window": 64})
    assert check_attention(module, SOME_TEXTS) == "" and calls_of(module, SOME_TEXTS) == []


def test_model_with_different_attention_is_reported(monkeypatch: pytest.MonkeyPatch):
    from transformers.models.bert import modeling_bert

    model = tiny.encoder("bert")
    encoded = tiny.context().encode("train", model)
    assert check_attention(model.module, encoded) == ""

    def twice(module: nn.Module, query: torch.Tensor, key: torch.Tensor, *more: Any, **options: Any) -> Any:
        return nn.functional.scaled_dot_product_attention(query, key, 2 * more[0]).transpose(1, 2), None

    mapping = modeling_bert.ALL_ATTENTION_FUNCTIONS
    monkeypatch.setitem(mapping, model.module.config._attn_implementation, twice)
    assert "its outputs differ" in check_attention(model.module, encoded)


def test_attention_implementation_is_restored_after_an_error():
    module = tiny.encoder("bert").module
    implementations = [part.config._attn_implementation for part in module.modules() if hasattr(part, "config")]
    hooks = AttentionHooks(reference_attention)
    with pytest.raises(ZeroDivisionError), use_attention_functions(module, hooks.attend, hooks.mask):
        assert module.config._attn_implementation not in implementations
        raise ZeroDivisionError
    assert implementations == [part.config._attn_implementation for part in module.modules() if hasattr(part, "config")]


FAMILIES: dict[str, tuple[dict[str, Any], str, int]] = {
    "mpnet": (TEXT, "MultiHeadAttention", LAYERS),
    "modernbert": (TEXT | WINDOWED, "MultiHeadAttention", LAYERS),
    "eurobert": (TEXT | {"num_key_value_heads": 2}, "MultiHeadAttention", LAYERS),
    "rembert": (TEXT | {"input_embedding_size": 16, "output_embedding_size": 32}, "Attention", LAYERS),
    "deberta-v2": (TEXT | DISENTANGLED, "MultiHeadAttention", LAYERS),
    # An encoder layer, and a decoder layer that attends to itself and to the encoder.
    "t5": (RELATIVE, "MultiHeadAttention", 3),
    "swin": (WINDOWS, "MultiHeadAttention", LAYERS),
}
SLOW = ("deberta-v2", "t5", "rembert")


def family_model(name: str) -> TorchModel:
    return TorchModel(model_of_kind(name, FAMILIES[name][0], noise=0.1), None)


@pytest.mark.slow
def test_output_bytes_do_not_depend_on_hash_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """ModernBERT iterates over a set of its layer types, whose order differs from process to process."""

    class Reversed(set):
        def __iter__(self):
            return iter(sorted(super().__iter__(), reverse=True))

    def made() -> bytes:
        graph = export_onnx(family_model("modernbert"), texts([4, 9]), None, fusions=True).graph.graph
        return graph.SerializeToString(deterministic=True)

    first = made()
    monkeypatch.setattr(modeling_modernbert, "set", Reversed, raising=False)
    assert made() == first


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in FAMILIES])
def test_every_attention_is_fused_and_matches_torch(name: str):
    model, (_, operator, count) = family_model(name), FAMILIES[name]
    pictures = name == "swin"
    exported = export_onnx(model, images(3) if pictures else texts([4, 9, 17]), None, fusions=True)
    operators = Counter(node.op_type for node in exported.graph.graph.node)
    assert operators[operator] == count == exported.rewrites["attention"] and operators["Softmax"] == 0
    assert exported.unfused == "" and {entry.domain for entry in exported.graph.opset_import} <= {"", "com.microsoft"}
    cases = [images(1, 1), images(5, 2)] if pictures else [texts([7], 1), texts([3, 30, 12, 5], 2), texts([50, 21], 3)]
    for examples in cases:
        batch = examples.batch(range(len(examples)))
        with torch.no_grad():
            expected = model.module(**{key: torch.from_numpy(array) for key, array in batch.items()}).logits.numpy()
        np.testing.assert_allclose(run(exported.graph, **batch), expected, atol=3e-5)
    assert np.ptp(expected, axis=0).max() > 0.01

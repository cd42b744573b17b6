"""A draft head (EAGLE-3) as IR, and what openvino-genai looks for in the model beside it.

The head's graph takes what the model has at three of its blocks (`hidden_states`) and gives the logits of the tokens
that it knows, whose distances from the model's own ids are its output `d2t`. As it loads the pair openvino-genai joins
those outputs of the model's graph, which it finds by the blocks' numbers in names, moves the head's first product
there, and gives the head the model's table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from compress.errors import IntegrityError, StageError
from compress.formats.openvino.conversion import in_eight_bits, written
from compress.formats.openvino.model import IR_FILE
from compress.formats.openvino.runtime import BEAMS, HEARD, IDS, LOGITS, MASK, PLACES, compile_model
from compress.formats.openvino.stateful import attention, keep_states

if TYPE_CHECKING:
    import torch

    from compress.checkpoints.eagle3 import DraftHead

_OFFSETS = "d2t"
_ROWS, _LENGTH, _TOKENS = 2, 24, 64
"""Of the proof's states, and the table that it draws."""


def name_blocks(model: Any, blocks: int) -> None:
    """Name the sum at the end of each block of a language model's graph after it, in place.

    Raises `StageError` where there are not as many as ``blocks``.
    """
    ends = [operator for operator in model.get_ordered_ops() if _ends_block(operator)]
    if len(ends) != blocks:
        raise StageError(
            f"The model has {blocks} blocks, and {len(ends)} of them end as a draft head's runtime expects.",
            where="draft_of",
            expected="blocks that add a gated feed-forward part to what passes it, as Llama's do",
            mend="make a draft of another kind: a model with fewer bits",
        )
    for place, operator in enumerate(ends):
        operator.set_friendly_name(f"model.layers.{place}/add")


def _ends_block(operator: Any) -> bool:
    """Whether it adds a product with what was multiplied entry by entry."""
    if operator.get_type_name() != "Add":
        return False
    product = operator.input_value(1).get_node()
    return bool(product.get_type_name() == "MatMul" and product.input_value(0).get_node().get_type_name() == "Multiply")


def write_head(head: DraftHead, tolerance: float) -> tuple[dict[str, bytes], float]:
    """The IR of ``head`` in 8 bits, and its largest difference from torch in fp32, for drawn tokens and states.

    Raises `IntegrityError`.
    """
    difference = _difference(head)
    if not difference <= tolerance:
        raise IntegrityError(
            f"The draft head's logits differ from torch by {difference:.2e}, all arithmetic in fp32.",
            expected=f"at most {tolerance:g}",
            mend="raise tolerance if the difference is acceptable; else please report it with the model's config",
        )
    made = in_eight_bits(_graph(head, None), 8)
    made.set_rt_info("True", ["eagle3_mode"])
    return written(made, IR_FILE), difference


def _difference(head: DraftHead) -> float:
    import torch

    generator, width = torch.Generator().manual_seed(0), head.config.hidden_size
    table = torch.randn(_TOKENS, width, generator=generator)
    ids = torch.randint(_TOKENS, (_ROWS, _LENGTH), generator=generator)
    heard = torch.randn(_ROWS, _LENGTH, 3 * width, generator=generator)
    with torch.no_grad():
        # The first token ahead is read behind the one that the state is of.
        (expected,) = head(table[ids].roll(1, 1), heard, 1)
    request = compile_model(_graph(head, table.numpy())).create_infer_request()
    places = np.broadcast_to(np.arange(_LENGTH), ids.shape)
    feed = {IDS: ids.numpy(), HEARD: heard.numpy(), MASK: np.ones_like(ids), PLACES: np.ascontiguousarray(places)}
    found = request.infer({**feed, BEAMS: np.arange(_ROWS, dtype=np.int32)})[LOGITS]
    return float(np.abs(found - expected.numpy()).max())


def _graph(head: DraftHead, table: np.ndarray | None) -> Any:
    """The head's graph; without a ``table`` one of zeros stands for the model's, which takes no room."""
    import openvino
    from openvino import PartialShape, Type
    from openvino import opset13 as ops

    config, layer = head.config, head.midlayer
    width, size, shared = config.hidden_size, config.head_dim, config.num_key_value_heads

    def taken(name: str, shape: list[int], kind: Any) -> Any:
        made = ops.parameter(PartialShape(shape), kind)
        # By which what turns its attention into the paged one finds it.
        made.set_friendly_name(name)
        made.output(0).get_tensor().set_names({name})
        return made

    def number(value: float) -> Any:
        return ops.constant(value, Type.f32)

    def product(value: Any, weight: torch.Tensor) -> Any:
        return ops.matmul(value, ops.constant(weight.detach().numpy()), False, True)

    def normed(value: Any, norm: torch.nn.RMSNorm) -> Any:
        mean = ops.reduce_mean(ops.multiply(value, value), ops.constant([-1]), True)
        scaled = ops.multiply(value, ops.power(ops.add(mean, number(config.rms_norm_eps)), number(-0.5)))
        return ops.multiply(scaled, ops.constant(norm.weight.detach().numpy()))

    def turned(value: Any) -> Any:
        halves = ops.split(value, ops.constant(3), 2)
        back = ops.concat([ops.negative(halves.output(1)), halves.output(0)], -1)
        return ops.add(ops.multiply(value, cosine), ops.multiply(back, sine))

    def apart(value: Any, heads: int) -> Any:
        flat = ops.reshape(value, ops.constant([0, 0, heads, -1]), special_zero=True)
        return ops.transpose(flat, ops.constant([0, 2, 1, 3]))

    ids, places = (taken(name, [-1, -1], Type.i64) for name in (IDS, PLACES))
    mask, heard = taken(MASK, [-1, -1], Type.i64), taken(HEARD, [-1, -1, -1], Type.f32)
    pasts = [taken(f"past_key_values.0.{part}", [-1, shared, -1, size], Type.f32) for part in ("key", "value")]
    zeros = ops.broadcast(number(0), ops.constant([config.vocab_size, width]))
    rows = zeros if table is None else ops.constant(table)
    rows.set_friendly_name("embed_tokens")
    states = product(heard, head.fc.weight)
    tokens = normed(ops.gather(rows, ids, ops.constant(0)), layer.input_layernorm)
    given = ops.concat([tokens, normed(states, layer.hidden_norm)], -1)
    angles = ops.multiply(
        ops.convert(ops.unsqueeze(places, ops.constant(-1)), "f32"), ops.constant(head.rotary.inv_freq.numpy())
    )
    doubled = ops.unsqueeze(ops.concat([angles, angles], -1), ops.constant(1))
    factor = number(head.rotary.attention_scaling)
    cosine, sine = (ops.multiply(wave(doubled), factor) for wave in (ops.cos, ops.sin))
    query = turned(apart(product(given, layer.self_attn.q_proj.weight), config.num_attention_heads))
    key = turned(apart(product(given, layer.self_attn.k_proj.weight), shared))
    value = apart(product(given, layer.self_attn.v_proj.weight), shared)
    mixed, keys, values = attention((query, key, value), pasts, mask, config.num_attention_heads // shared)
    states = ops.add(states, product(mixed, layer.self_attn.o_proj.weight))
    inner = normed(states, layer.post_attention_layernorm)
    gate = product(inner, layer.mlp.gate_proj.weight)
    wide = ops.multiply(ops.swish(gate), product(inner, layer.mlp.up_proj.weight))
    states = ops.add(states, product(wide, layer.mlp.down_proj.weight))
    states.set_friendly_name("midlayer/add")
    logits = product(normed(states, head.norm), head.lm_head.weight)
    offsets = ops.constant(head.tokens.numpy() - np.arange(len(head.tokens)))
    offsets.set_friendly_name(_OFFSETS)
    outputs = {LOGITS: logits, "present.0.key": keys, "present.0.value": values, _OFFSETS: offsets}
    for name, node in outputs.items():
        node.output(0).get_tensor().add_names({name})
    results = [ops.result(node) for node in outputs.values()]
    model = openvino.Model(results, [ids, heard, mask, places, *pasts], "draft_head")
    keep_states(model)
    return model

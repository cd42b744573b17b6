"""Grouping of tensor names into readable layers such as `encoder.layer.0.attention`."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from compress.formats.onnx.stored_tensors import COMPANION_NAME
from compress.models.stored_tensor import StoredTensor

_BLOCK = re.compile(r"^(?P<stack>(?:[^.\d][^.]*\.)+)(?P<number>\d+)\.(?P<rest>.+)$")
_NORM = re.compile(r"norm|^ln_?\d|(\.|^)ln", re.IGNORECASE)
_PARTS = (
    ("cross-attention", re.compile(r"cross_?att|encoder_attn|EncDecAttention", re.IGNORECASE)),
    ("attention", re.compile(r"attn|attention", re.IGNORECASE)),
    (
        "feed-forward",
        re.compile(
            r"^(intermediate|output|fc_?\d|lin\d|wi|wo)\b|mlp|ffn|feed_?forward|DenseReluDense|expert|moe",
            re.IGNORECASE,
        ),
    ),
    ("norms", _NORM),
)
_PART_ORDER = {"attention": 0, "cross-attention": 1, "feed-forward": 2, "norms": 3}

Groups = dict[str, list[StoredTensor]]


def group_layers(tensors: Sequence[StoredTensor], at_most: int = 40) -> Groups:
    """Group tensors by layer in reading order, with coarser groups until there are at most ``at_most``."""
    layers = layers_of([tensor.name for tensor in tensors], at_most)
    groups: Groups = defaultdict(list)
    for tensor in tensors:
        groups[layers[tensor.name]].append(tensor)
    largest = _largest(groups, at_most)
    return {name: largest[name] for name in sorted(largest, key=reading_order)}


def layers_of(names: Iterable[str], at_most: int = 40) -> dict[str, str]:
    """Map tensor names to layers, by the finest naming with at most ``at_most`` layers, else the coarsest."""
    names = list(names)
    prefix = model_prefix(names)
    # Try the finest naming first.
    for form in ("{stack}{number}.{part}", "{stack}{number}", "{stack}*.{part}"):
        layers = {name: _layer(name.removeprefix(prefix), form) for name in names}
        if len(set(layers.values())) <= at_most:
            break
    return layers


def model_prefix(names: Iterable[str]) -> str:
    """Return the wrapper of the model, such as `bert.` around `embeddings` and `encoder`; empty if there is none."""
    names = [name for name in names if "." in name]
    blocks = [name for name in names if _BLOCK.match(name)]
    # A wrapper exists if all blocks are below one module.
    firsts = Counter(name.split(".")[0] for name in blocks)
    if len(firsts) != 1:
        return ""
    first = next(iter(firsts))
    inside = {name.split(".")[1] for name in names if name.startswith(f"{first}.")}
    outside = {name.split(".")[0] for name in names} - {first}
    # Removing the prefix must not make names ambiguous.
    if len(inside) < 2 or inside & outside or any(part.isdigit() for part in inside):
        return ""
    return f"{first}."


def _layer(name: str, form: str) -> str:
    match = _BLOCK.match(name)
    return form.format(**match.groupdict(), part=_part(match["rest"])) if match else _outside_blocks(name)


def _outside_blocks(name: str) -> str:
    parts = name.split(".")
    # Names without a module stay as they are.
    if len(parts) == 1 or parts[0] == "constants":
        return parts[0]
    return ".".join(parts[:-1][:2]) if parts[0] != "unnamed" else COMPANION_NAME.sub(r"\g<weight>", name)


def _part(path: str) -> str:
    first = path.split(".")[0]
    if _NORM.search(first):
        return "norms"
    return next((part for part, pattern in _PARTS if pattern.search(path)), first)


def _largest(groups: Groups, at_most: int) -> Groups:
    if len(groups) <= at_most:
        return groups
    # Small groups are joined into "other".
    ranked = sorted(groups, key=lambda name: -sum(tensor.bytes for tensor in groups[name]))
    largest = {name: groups[name] for name in ranked[: at_most - 1]}
    largest["other"] = [tensor for name in ranked[at_most - 1 :] for tensor in groups[name]]
    return largest


def reading_order(name: str) -> tuple[int, str, int, int, str]:
    """Return the sort key of a layer: embeddings, blocks by number and part, heads, everything else."""
    if name in ("constants", "other"):
        return (3, name, 0, 0, name)
    match = re.match(r"^(?P<stack>.*?\.)(?P<number>\d+)(\.(?P<part>.+))?$", name)
    if match:
        return (1, match["stack"], int(match["number"]), _PART_ORDER.get(match["part"] or "", 9), name)
    return (0 if re.search("emb|wte|wpe|shared|stem", name) else 2, "", 0, 0, name)

"""An ONNX graph of one LSTM in the style of other exporters, and the same LSTM in torch."""

from __future__ import annotations

import foreign_graphs
import numpy as np
import onnx
import torch
from onnx import helper

WIDTH, HIDDEN = 24, 32


def recurrent(in_pieces: bool) -> tuple[onnx.ModelProto, torch.nn.LSTM]:
    """Return a graph from `x` [time, 1, 24] to `y` [time, 1, 1, 32], and the torch module with the same weights.

    With ``in_pieces``, the graph concatenates the weights of the gates at run time, in ONNX's order.
    """
    torch.manual_seed(0)
    module = torch.nn.LSTM(WIDTH, HIDDEN)
    gates = {  # torch has input, forget, cell, output; ONNX has input, output, forget, cell
        name: [part.detach().numpy()[None] for part in getattr(module, f"{name}_l0").chunk(4)]
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    }
    nodes = []
    for name, (entry, forget, cell, out) in gates.items():
        pieces = [entry, out, forget, cell]
        if in_pieces:
            nodes += [foreign_graphs.constant(f"{name}_{index}", piece) for index, piece in enumerate(pieces)]
            names = [f"{name}_{index}" for index in range(4)]
            nodes.append(helper.make_node("Concat", names, [name], axis=1))
        else:
            nodes.append(foreign_graphs.constant(name, np.concatenate(pieces, axis=1)))
    nodes.append(helper.make_node("Concat", ["bias_ih", "bias_hh"], ["bias"], axis=1))
    nodes.append(helper.make_node("LSTM", ["x", "weight_ih", "weight_hh", "bias"], ["y"], hidden_size=HIDDEN))
    graph = foreign_graphs.model(
        nodes, [foreign_graphs.value("x", ["time", 1, WIDTH])], [foreign_graphs.value("y", ["time", 1, 1, HIDDEN])]
    )
    return graph, module

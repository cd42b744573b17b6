"""Static INT8 of ONNX graphs: what is quantized, with which ranges, and as which of ONNX Runtime's integer kernels.

The road: `kernels` (attention becomes a product and a rest) -> `observe` (ranges of real activations) -> `smooth` ->
`static` (ONNX Runtime's quantizer, or NNCF's) -> `correction` -> `kernels` (what ONNX Runtime would leave in float is
written as the integer operator). Nothing here knows a task: a graph and feeds, arrays by name, come in.
"""

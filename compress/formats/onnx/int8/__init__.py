"""INT8 quantization of ONNX graphs: selection of nodes, calibration of ranges, and ONNX Runtime's integer kernels.

Static quantization runs these steps: `fuse_integer_ops` unpacks attention into a product and a rest, `observers`
collects the ranges of real activations, `static` calls ONNX Runtime's quantizer or NNCF's, `bias_correction` corrects
biases, and `fuse_integer_ops` writes integer operators where ONNX Runtime would leave floats. The package knows no
task: it gets a graph and feeds, arrays by input name.
"""

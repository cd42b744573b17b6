"""A onnx model as a directory."""


class OnnxModel:
    """Placeholder of the foundation commit."""

    kind = "onnx"

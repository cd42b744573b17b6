"""A torch model as a directory."""


class TorchModel:
    """Placeholder of the foundation commit."""

    kind = "torch"

"""Description of a format by its own package; importing this module imports no format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from compress.formats.target_profile import App, TargetProfile

Reference = str
"""Object as `module:attribute`, which is imported when it is needed."""


@dataclass(frozen=True, kw_only=True)
class RuntimeSpec:
    """Runtime that opens files of a format.

    Attributes:
        runtime: Reference to its `Runtime`.
        provider: The runtime's own name for the processor.
        package: Distribution that contains the runtime.
        generates_only: Whether it only generates text.
        one_batch_at_a_time: Whether a key-value cache would have to be sent to it for each token.
        on_devices: Whether devices can be timed with it.
        gives_values: Whether intermediate values of its files can be computed on the processor.
        many_texts: Reference that opens a language model as `ManyTexts` for synthetic data. Its arguments are the
            checkpoint, an empty folder, windows of ids for the comparison, threads, whether to use bfloat16, and the
            tokens that end a text.
        writing_packages: Distributions that ``many_texts`` calls.
    """

    runtime: Reference
    provider: str
    package: str | None = None
    generates_only: bool = False
    one_batch_at_a_time: bool = False
    on_devices: bool = False
    gives_values: bool = False
    many_texts: Reference | None = None
    writing_packages: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class FormatSpec:
    """Format of models, which a package of its own exports as `FORMAT`.

    Attributes:
        name: Name in recipes and reports.
        suffix: Suffix of the file or folder that its runtimes open.
        beside: Names of files with that suffix that are no models, such as a tokenizer's, or of folders of such files.
        stage: Stage class that writes the format and returns a model of kind ``name``; None for transformers' weights.
        written_by: Kind of that stage.
        searched: Stages, as recipes write them, with which a search for its targets starts instead of the task's.
        runtimes: Runtimes by name; the first is the default.
        rank: Position in lists; the format with the lowest rank is the default.
        written_from: Format that it is converted from; None for transformers' weights.
        own_bits: Whether it is quantized from the weights instead of taking over the integers of an ONNX graph.
        targets: Targets of the format itself.
        taken_by: Other targets and platforms that accept its files, with the app's runtime; None if no app is bundled.
        inspector: Reference to the `ModelInspector` of the model, if it is no `FileModel`.
        find_all: Reference to a function that returns an artifact's files in execution order, if there may be several.
        tensors: Reference to the reader of stored tensors: (file, folder of the model) -> list of `StoredTensor`.
        tensors_suffix: Suffix of the files that contain the tensors, if it is not ``suffix``.
        signature: Reference to the reader of a file's ``inputs`` and ``outputs``: (file) -> lists of `GraphValue`.
        has_graph: Whether a file contains operators beside its tensors.
        value_graph: Reference to a function that opens intermediate values: (file, target) -> `OnnxParts`.
        library: Name of the library that opens it, as model cards on the Hugging Face Hub write it.
        check_writable: Reference to a function that raises `ModelError` for language models that it cannot store.
    """

    name: str
    suffix: str
    beside: tuple[str, ...] = ()
    stage: Reference | None = None
    written_by: str | None = None
    searched: tuple[Mapping[str, Any], ...] = ()
    runtimes: Mapping[str, RuntimeSpec]
    rank: int = 100
    written_from: str | None = None
    own_bits: bool = False
    targets: tuple[TargetProfile, ...] = ()
    taken_by: Mapping[str, App | None] = field(default_factory=dict)
    inspector: Reference | None = None
    find_all: Reference | None = None
    tensors: Reference | None = None
    tensors_suffix: str | None = None
    signature: Reference | None = None
    has_graph: bool = True
    value_graph: Reference | None = None
    library: str | None = None
    check_writable: Reference | None = None

    def references(self) -> dict[str, Reference]:
        """Return every reference of the format by a description of the object."""
        names = ("stage", "inspector", "find_all", "tensors", "signature", "value_graph", "check_writable")
        references: dict[str, Reference | None] = {name: getattr(self, name) for name in names}
        references |= {f"runtime {name}": runtime_spec.runtime for name, runtime_spec in self.runtimes.items()}
        references |= {f"many texts of {name}": runtime_spec.many_texts for name, runtime_spec in self.runtimes.items()}
        return {name: reference for name, reference in references.items() if reference is not None}


def load(reference: Reference) -> Any:
    """Import and return the object that a reference names; raise `ImportError` if that fails."""
    module, _, name = reference.partition(":")
    target = import_module(module)
    if not hasattr(target, name):
        raise ImportError(f"{module} has no {name}")
    return getattr(target, name)

"""Description of a format by its own package; importing this module imports no format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from compress.formats.target_profile import App, TargetProfile

Reference = str
"""`module:attribute`, imported when it is needed."""


@dataclass(frozen=True, kw_only=True)
class RuntimeSpec:
    """A runtime that opens files of a format: ``runtime`` refers to its `Runtime`.

    ``provider`` is its own name for the processor, ``package`` the distribution whose files it is.
    """

    runtime: Reference
    provider: str
    package: str | None = None
    generates_only: bool = False
    one_batch_at_a_time: bool = False
    """A cache of keys and values would have to be sent to it at each token."""
    on_devices: bool = False
    """Devices can be timed with it."""
    gives_values: bool = False
    """Those within a file too, on its processor."""
    about_values: str = ""
    """Why it gives none, where more is to be said of that."""
    many_texts: Reference | None = None
    """Opens a language model as `ManyTexts`, for a teacher that writes: (checkpoint, an empty folder, windows of ids to
    prove the file on, threads, whether in bfloat16, tokens that end a text)."""
    writing_packages: tuple[str, ...] = ()
    """Distributions that this calls."""


@dataclass(frozen=True, kw_only=True)
class FormatSpec:
    """A format of models, in a package of its own that has this as `FORMAT`.

    - ``suffix``: of the file, or the folder, that its runtimes open
    - ``beside``: names of files with that suffix that are no models, such as a tokenizer's, or of folders of them
    - ``stage``: the class that writes it, whose kind is ``written_by``; the model that it gives has ``name`` as `kind`.
      Both are None for what no stage has to write: weights as transformers has them
    - ``searched``: the stages, as recipes write them, that a search for its targets begins with in place of the task's
    - ``runtimes``: by name; the first where nothing else is said
    - ``inspector``: the `ModelInspector` that looks into that model, where it is no `FileModel`
    - ``rank``: its place in lists; the first of all is meant where nothing is said
    - ``written_from``: the format that it is made of, or None for weights as transformers has them
    - ``own_bits``: it doesn't take over ONNX's integers: what is quantized there is quantized for it from the weights
    - ``targets``: those of its own; ``taken_by``: other targets, and platforms, that take its files too, with what
      runs them in an app, or None where no app is bundled with them
    - ``find_all``: the files of an artifact in the order in which they run, where there may be several
    - ``tensors``: reads its stored tensors: (file, folder of the model) -> list of `StoredTensor`
    - ``tensors_suffix``: of the files that hold them, where it is not ``suffix``
    - ``has_graph``: such a file holds operators beside its tensors
    - ``parts``: takes a file apart: (file, target, most tokens or None) -> `Parts`
    - ``library``: name of the library that opens it, as model cards on the Hugging Face Hub have it
    - ``check_writable``: (folder of weights) -> None, raises `ModelError` for a language model that it has no place for
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
    has_graph: bool = True
    parts: Reference | None = None
    library: str | None = None
    check_writable: Reference | None = None

    def references(self) -> dict[str, Reference]:
        """Return every reference of the format by a description of the object."""
        names = ("stage", "inspector", "find_all", "tensors", "parts", "check_writable")
        references = {name: value for name in names if (value := getattr(self, name)) is not None}
        many = {f"many texts of {name}": one.many_texts for name, one in self.runtimes.items() if one.many_texts}
        return references | {f"runtime {name}": one.runtime for name, one in self.runtimes.items()} | many


def load(reference: Reference) -> Any:
    """Import and return the object that a reference names; raise `ImportError` if that fails."""
    module, _, name = reference.partition(":")
    target = import_module(module)
    if not hasattr(target, name):
        raise ImportError(f"{module} has no {name}")
    return getattr(target, name)

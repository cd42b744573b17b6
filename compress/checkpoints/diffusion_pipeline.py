"""A model of several parts that draws pictures, as a folder in diffusers' layout. Importing this imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoints.json_file import read_json
from compress.checkpoints.sampling import SAMPLING, PromptProcessor, Sampling
from compress.checkpoints.torch_model import TorchModel, forget_where_from
from compress.errors import ModelError, first_line

if TYPE_CHECKING:
    from torch import nn

MODEL_INDEX = "model_index.json"
TEXT_ENCODER, DENOISERS, VAE = "text_encoder", ("unet", "transformer"), "vae"
TOKENIZER, SCHEDULER = "tokenizer", "scheduler"
CHECKER = "safety_checker"
"""diffusers' names of the parts."""
_LIBRARIES = ("diffusers", "transformers")
_WHERE_FROM = "_name_or_path"


@dataclass
class GeneratorModel(TorchModel):
    """Parts by diffusers' names, what prepares prompts, and how pictures are drawn.

    ``module`` holds the parts as its children, so that tensors are named `unet.conv_in.weight`. ``index`` is what
    model_index.json says; ``kept`` are components that nothing here runs, a safety checker say, by name.
    """

    module: Any
    processor: PromptProcessor
    scheduler: Any
    index: Mapping[str, Any]
    sampling: Sampling = field(default_factory=Sampling)
    kept: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The modules by name, in the order in which they run."""
        return dict(self.module.named_children())

    @property
    def denoiser(self) -> str:
        """The name of the part that is called once a step."""
        return next(name for name in DENOISERS if name in self.parts)

    def replace_part(self, name: str, part: nn.Module) -> None:
        """Put another module in the place of one, in place."""
        setattr(self.module, name, part)

    def labels(self) -> tuple[str, ...]:
        """None: there are no classes."""
        return ()

    def pipeline(self) -> Any:
        """diffusers' own pipeline of the very parts, of the class that ``index`` names."""
        import diffusers

        made = getattr(diffusers, self.index["_class_name"])
        components = {**self.kept, **self.parts, TOKENIZER: self.tokenizer, SCHEDULER: self.scheduler}
        absent = {name: None for name, value in self.index.items() if value == [None, None]}
        options = {} if CHECKER in components else {"requires_safety_checker": False}
        return made(**absent, **components, **options)

    def save(self, directory: Path) -> None:
        """Write every part into its own folder, as diffusers does, and model_index.json."""
        for name, part in {**self.kept, **self.parts}.items():
            part.save_pretrained(directory / name)
            _forget(directory / name / "config.json")
        for name, content in self.companions().items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(content)

    def companions(self) -> dict[str, bytes]:
        """All but the parts' weights and configs: tokenizer, scheduler, index, and how pictures are drawn."""
        import tempfile

        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            self.tokenizer.save_pretrained(folder / TOKENIZER)
            forget_where_from(folder / TOKENIZER)
            self.scheduler.save_pretrained(folder / SCHEDULER)
            (folder / MODEL_INDEX).write_text(json.dumps(self._index(), indent=2, sort_keys=True) + "\n")
            (folder / SAMPLING).write_bytes(self.sampling.as_json())
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}

    def _index(self) -> dict[str, Any]:
        """model_index.json with the classes of the components as they are now."""
        named = {**self.kept, **self.parts, TOKENIZER: self.tokenizer, SCHEDULER: self.scheduler}
        classes = {name: [type(one).__module__.partition(".")[0], type(one).__name__] for name, one in named.items()}
        return {**{name: value for name, value in self.index.items() if name != _WHERE_FROM}, **classes}


def load_pipeline(directory: Path) -> GeneratorModel:
    """Open a directory in diffusers' layout, every part in float32. Raises `ModelError`."""
    from compress.checkpoints.pipeline_checks import check_pipeline_folder, component_classes, noise_shape
    from compress.checkpoints.pipeline_module import PipelineModule

    check_pipeline_folder(directory)
    index, named = read_json(directory / MODEL_INDEX), component_classes(directory)
    found = {name: _component(directory / name, library, kind) for name, (library, kind) in named.items()}
    order = [name for name in (TEXT_ENCODER, *DENOISERS, VAE) if name in found]
    module = PipelineModule({name: found.pop(name) for name in order})
    processor = PromptProcessor(found.pop(TOKENIZER), noise_shape(directory))
    scheduler = found.pop(SCHEDULER)
    return GeneratorModel(module, processor, scheduler, index, Sampling.read(directory), found)


def _component(folder: Path, library: str, kind: str) -> Any:
    """One component, by the class that model_index.json names."""
    import importlib

    import torch

    from compress.checkpoints.config_check import loading_failures

    made = getattr(importlib.import_module(library), kind, None)
    if library not in _LIBRARIES or made is None:
        raise ModelError(
            f"The part {folder.name!r} is a {kind} of {library}, which is not known here.",
            where=str(folder.parent / MODEL_INDEX),
            expected="classes of the installed diffusers and transformers",
            mend="take a version of diffusers that has it; code of the model's own repository is not run",
        )
    weights = hasattr(made, "named_parameters")
    options: dict[str, Any] = {"use_safetensors": True, "torch_dtype": torch.float32} if weights else {}
    if weights and library == "transformers":
        options["dtype"] = options.pop("torch_dtype")
    try:
        part = made.from_pretrained(folder, local_files_only=True, **options)
    except loading_failures() as error:
        raise ModelError(
            f"The part {folder.name!r} cannot be loaded: {first_line(error)}",
            where=str(folder),
            expected=f"a {kind} with weights in safetensors and a config.json that fit each other",
        ) from error
    return part.eval() if weights else part


def _forget(path: Path) -> None:
    """Take out of a config where it was read from, so that the same model is the same bytes."""
    if path.is_file():
        said = json.loads(path.read_text())
        path.write_text(
            json.dumps({k: v for k, v in said.items() if k != _WHERE_FROM}, indent=2, sort_keys=True) + "\n"
        )

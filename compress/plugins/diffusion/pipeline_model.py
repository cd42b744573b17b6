"""A model of several parts that draws pictures, as a folder in diffusers' layout. Importing this imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from compress.models.folder_checks import check_model_folder
from compress.models.json_file import read_json
from compress.models.model import TorchModel, link_or_copy, remove_load_options
from compress.models.pipeline_folder import (
    CONFIG,
    MODEL_INDEX,
    UNET,
    component_classes,
    pipeline_config,
)
from compress.plugins.diffusion.sampling_settings import (
    SAMPLING,
    SCHEDULER,
    TOKENIZER,
    PromptProcessor,
    Sampling,
    import_diffusers,
    load_prompt_processor,
    load_scheduler,
)
from compress.utils.errors import ModelError, first_line

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin
    from torch import nn

TEXT_ENCODER, VAE = "text_encoder", "vae"
"""diffusers' names of the parts."""
_LIBRARIES = ("diffusers", "transformers")
_WHERE_FROM = "_name_or_path"


@dataclass
class GeneratorModel(TorchModel):
    """Parts by diffusers' names, what prepares prompts, and how pictures are drawn.

    ``module`` holds the parts as its children, so that tensors are named `unet.conv_in.weight`. ``index`` is what
    model_index.json says; ``kept`` are the folders of components that nothing here runs, a safety checker say, by name.
    """

    generates_images: ClassVar[bool] = True
    module: Any
    processor: PromptProcessor
    scheduler: SchedulerMixin
    index: Mapping[str, Any]
    sampling: Sampling = field(default_factory=Sampling)
    kept: Mapping[str, Path] = field(default_factory=dict)

    @property
    def parts(self) -> dict[str, Any]:
        """The modules by name, each with a config, in the order in which they run."""
        return dict(self.module.named_children())

    def replace_part(self, name: str, part: nn.Module) -> None:
        """Put another module in the place of one, in place."""
        setattr(self.module, name, part)

    def labels(self) -> tuple[str, ...]:
        """None: there are no classes."""
        return ()

    def pipeline(self) -> DiffusionPipeline:
        """diffusers' own pipeline of the very parts, of the class that ``index`` names, without what is ``kept``."""
        made = getattr(import_diffusers(), self.index["_class_name"])
        components = {**self.parts, TOKENIZER: self.tokenizer, SCHEDULER: self.scheduler}
        others = [name for name, value in self.index.items() if isinstance(value, list) and name not in components]
        return made(**dict.fromkeys(others), **components, requires_safety_checker=False)

    def save(self, directory: Path) -> None:
        """Write every part into its own folder, as diffusers does, and model_index.json."""
        for name, part in self.parts.items():
            part.save_pretrained(directory / name)
            _forget(directory / name / CONFIG)
        for name, folder in self.kept.items():
            (directory / name).mkdir()
            for file in folder.iterdir():
                link_or_copy(file, directory / name / file.name)
        for name, content in self.companions().items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(content)

    def companions(self) -> dict[str, bytes]:
        """All but the parts: tokenizer, scheduler, index, how pictures are drawn, and which pipeline it is."""
        import tempfile

        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            self.tokenizer.save_pretrained(folder / TOKENIZER)
            remove_load_options(folder / TOKENIZER)
            self.scheduler.save_pretrained(folder / SCHEDULER)
            (folder / MODEL_INDEX).write_text(json.dumps(self._index(), indent=2, sort_keys=True) + "\n")
            (folder / SAMPLING).write_bytes(self.sampling.as_json())
            (folder / CONFIG).write_text(json.dumps(pipeline_config(self.index), indent=2) + "\n")
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}

    def _index(self) -> dict[str, Any]:
        """model_index.json with the classes of the components as they are now."""
        named = {**self.parts, TOKENIZER: self.tokenizer, SCHEDULER: self.scheduler}
        classes = {name: [type(one).__module__.partition(".")[0], _class_name(one)] for name, one in named.items()}
        return {**{name: value for name, value in self.index.items() if name != _WHERE_FROM}, **classes}


def _class_name(component: object) -> str:
    """Of a tokenizer in tokenizer.json the name that older versions of transformers, and optimum's, read it by."""
    name = type(component).__name__
    return f"{name}Fast" if getattr(component, "is_fast", False) and not name.endswith("Fast") else name


def load_pipeline(directory: Path) -> GeneratorModel:
    """Open a directory in diffusers' layout, every part in float32. Raises `ModelError`."""
    check_model_folder(directory)
    import_diffusers()
    from compress.plugins.diffusion.pipeline_module import PipelineModule

    prepared = load_prompt_processor(directory), load_scheduler(directory)
    named = component_classes(directory)
    order = (TEXT_ENCODER, UNET, VAE)
    module = PipelineModule({name: _part(directory / name, *named[name]) for name in order})
    kept = {name: directory / name for name in named if name not in (*order, TOKENIZER, SCHEDULER)}
    index = read_json(directory / MODEL_INDEX)
    return GeneratorModel(module, *prepared, index, Sampling.read(directory), kept)


def _part(folder: Path, library: str, kind: str) -> nn.Module:
    """One part, by the class that model_index.json names."""
    import importlib

    import torch

    from compress.models.config_checks import load_error_types

    made = getattr(importlib.import_module(library), kind, None) if library in _LIBRARIES else None
    if not (isinstance(made, type) and issubclass(made, torch.nn.Module)):
        raise ModelError(
            f"The part {folder.name!r} is a {kind} of {library}, which is not known here.",
            where=str(folder.parent / MODEL_INDEX),
            expected="classes of the installed diffusers and transformers",
            hint="take a version of diffusers that has it; code of the model's own repository is not run",
        )
    float32 = {"dtype" if library == "transformers" else "torch_dtype": torch.float32}
    loader: Any = made
    try:
        part: nn.Module = loader.from_pretrained(folder, local_files_only=True, use_safetensors=True, **float32)
    except load_error_types() as error:
        raise ModelError(
            f"The part {folder.name!r} cannot be loaded: {first_line(error)}",
            where=str(folder),
            expected=f"a {kind} with weights in safetensors and a config.json that fit each other",
        ) from error
    return part.eval()


def _forget(path: Path) -> None:
    """Take out of a config where it was read from, so that the same model is the same bytes."""
    if path.is_file():
        said = json.loads(path.read_text())
        path.write_text(
            json.dumps({k: v for k, v in said.items() if k != _WHERE_FROM}, indent=2, sort_keys=True) + "\n"
        )

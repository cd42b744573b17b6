"""A diffusion pipeline of several torch components, in diffusers' layout. Importing this imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from compress.models.folder_checks import check_model_folder
from compress.models.json_file import read_json
from compress.models.model import TorchModel, link_or_copy, remove_load_options
from compress.models.pipeline_folder import CONFIG, MODEL_INDEX, UNET, component_classes, pipeline_config
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
"""Names of the components in diffusers' layout."""
_LIBRARIES = ("diffusers", "transformers")
_SOURCE_PATH = "_name_or_path"


@dataclass
class GeneratorModel(TorchModel):
    """Components by diffusers' names, the processor of prompts, and the sampling settings.

    ``module`` has the components as children, so that tensors are named like `unet.conv_in.weight`. ``index`` is the
    content of model_index.json. ``other_components`` are the folders of components that only diffusers runs, such as a
    safety checker, by name.
    """

    generates_images: ClassVar[bool] = True
    module: Any
    processor: PromptProcessor
    scheduler: SchedulerMixin
    index: Mapping[str, Any]
    sampling: Sampling = field(default_factory=Sampling)
    other_components: Mapping[str, Path] = field(default_factory=dict)

    @property
    def parts(self) -> dict[str, Any]:
        """Modules by name, each with a config, in the order in which they run."""
        return dict(self.module.named_children())

    def replace_part(self, name: str, part: nn.Module) -> None:
        """Replace a component, in place."""
        setattr(self.module, name, part)

    def labels(self) -> tuple[str, ...]:
        """Return no labels, because there are no classes."""
        return ()

    def pipeline(self) -> DiffusionPipeline:
        """Return diffusers' pipeline of the same components, without ``other_components``."""
        pipeline_class = getattr(import_diffusers(), self.index["_class_name"])
        components = {**self.parts, TOKENIZER: self.tokenizer, SCHEDULER: self.scheduler}
        others = [name for name, value in self.index.items() if isinstance(value, list) and name not in components]
        return pipeline_class(**dict.fromkeys(others), **components, requires_safety_checker=False)

    def save(self, directory: Path) -> None:
        """Write every component into its own folder, as diffusers does, and model_index.json."""
        for name, part in self.parts.items():
            part.save_pretrained(directory / name)
            _remove_source_path(directory / name / CONFIG)
        for name, folder in self.other_components.items():
            (directory / name).mkdir()
            for file in folder.iterdir():
                link_or_copy(file, directory / name / file.name)
        for name, content in self.companions().items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(content)

    def companions(self) -> dict[str, bytes]:
        """Return all files but the modules': tokenizer, scheduler, index, sampling settings and config."""
        import tempfile

        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            self.tokenizer.save_pretrained(folder / TOKENIZER)
            remove_load_options(folder / TOKENIZER)
            self.scheduler.save_pretrained(folder / SCHEDULER)
            # Stages may have replaced components, so the index gets their classes of now.
            named = {**self.parts, TOKENIZER: self.tokenizer, SCHEDULER: self.scheduler}
            index = {name: value for name, value in self.index.items() if name != _SOURCE_PATH}
            for name, component in named.items():
                index[name] = [type(component).__module__.partition(".")[0], _class_name(component)]
            (folder / MODEL_INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
            (folder / SAMPLING).write_bytes(self.sampling.as_json())
            (folder / CONFIG).write_text(json.dumps(pipeline_config(self.index), indent=2) + "\n")
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def _class_name(component: object) -> str:
    """Return the class name for model_index.json.

    Older versions of transformers, and optimum, read a tokenizer in tokenizer.json by the name with `Fast`.
    """
    name = type(component).__name__
    return f"{name}Fast" if getattr(component, "is_fast", False) and not name.endswith("Fast") else name


def load_pipeline(directory: Path) -> GeneratorModel:
    """Load a directory in diffusers' layout, every component in float32. Raises `ModelError`."""
    check_model_folder(directory)
    import_diffusers()
    from torch import nn

    processor, scheduler = load_prompt_processor(directory), load_scheduler(directory)
    classes = component_classes(directory)
    order = (TEXT_ENCODER, UNET, VAE)
    module = nn.Module()
    for name in order:
        module.add_module(name, _load_component(directory / name, *classes[name]))
    others = {name: directory / name for name in classes if name not in (*order, TOKENIZER, SCHEDULER)}
    index = read_json(directory / MODEL_INDEX)
    return GeneratorModel(module, processor, scheduler, index, Sampling.read(directory), others)


def _load_component(folder: Path, library: str, class_name: str) -> nn.Module:
    """Load one component with the class that model_index.json names."""
    import importlib

    import torch

    from compress.models.config_checks import load_error_types

    component_class: Any = (
        getattr(importlib.import_module(library), class_name, None) if library in _LIBRARIES else None
    )
    if not (isinstance(component_class, type) and issubclass(component_class, torch.nn.Module)):
        raise ModelError(
            f"The part {folder.name!r} is a {class_name} of {library}, which is not known here.",
            where=str(folder.parent / MODEL_INDEX),
            expected="classes of the installed diffusers and transformers",
            hint="take a version of diffusers that has it; code of the model's own repository is not run",
        )
    # The two libraries name the argument differently.
    float32 = {"dtype" if library == "transformers" else "torch_dtype": torch.float32}
    loader: Any = component_class
    try:
        component: nn.Module = loader.from_pretrained(folder, local_files_only=True, use_safetensors=True, **float32)
    except load_error_types() as error:
        raise ModelError(
            f"The part {folder.name!r} cannot be loaded: {first_line(error)}",
            where=str(folder),
            expected=f"a {class_name} with weights in safetensors and a config.json that fit each other",
        ) from error
    return component.eval()


def _remove_source_path(path: Path) -> None:
    """Remove the path that a config was read from, so that equal models have equal bytes."""
    if path.is_file():
        config = {name: value for name, value in json.loads(path.read_text()).items() if name != _SOURCE_PATH}
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

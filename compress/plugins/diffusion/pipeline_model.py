"""A diffusion pipeline in diffusers' layout: its torch components, tokenizer, scheduler and sampling settings.

Importing this imports no torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from compress.models.folder_checks import check_model_folder
from compress.models.json_file import read_json
from compress.models.model import TorchModel, link_or_copy, remove_load_options
from compress.models.pipeline_folder import CONFIG, MODEL_INDEX, UNET, component_classes, part_config, pipeline_config
from compress.utils.errors import MissingExtraError, ModelError, first_line

if TYPE_CHECKING:
    import numpy as np
    from diffusers import DiffusionPipeline, SchedulerMixin
    from torch import nn
    from transformers import PreTrainedTokenizerBase


TOKENIZER, SCHEDULER = "tokenizer", "scheduler"
"""Names of their folders in diffusers' layout."""
SAMPLING = "sampling_config.json"
"""File beside model_index.json with the arguments of a diffusers call that the model was made for."""
_TORCHAO = "torchao"
_STEPS, _GUIDANCE = "num_inference_steps", "guidance_scale"


@dataclass(frozen=True)
class Sampling:
    """Number of scheduler ``steps``, and ``guidance``: diffusers' guidance_scale, with 1 or less for none.

    The defaults are those of diffusers' StableDiffusionPipeline.
    """

    steps: int = 50
    guidance: float = 7.5

    @classmethod
    def read(cls, folder: Path) -> Sampling:
        """Read the settings in ``folder``, or return diffusers' defaults. Raises `ModelError`."""
        if not (folder / SAMPLING).is_file():
            return cls()
        config = read_json(folder / SAMPLING)
        steps, guidance = config.get(_STEPS, cls.steps), config.get(_GUIDANCE, cls.guidance)
        if type(steps) is not int or steps < 1 or not isinstance(guidance, int | float):
            raise ModelError(
                f"{SAMPLING} gives {steps!r} steps and the guidance {guidance!r}.",
                where=str(folder / SAMPLING),
                expected=f"{_STEPS} of 1 or more, and a number as {_GUIDANCE}",
            )
        return cls(steps, float(guidance))

    def as_json(self) -> bytes:
        """Return the content of the file that `read` reads."""
        return json.dumps({_STEPS: self.steps, _GUIDANCE: self.guidance}).encode()


@dataclass(frozen=True)
class PromptProcessor:
    """Tokenizer of prompts, and the shapes [channels, height, width] of the initial noise and of the image."""

    tokenizer: PreTrainedTokenizerBase
    noise_shape: tuple[int, int, int]
    image_shape: tuple[int, int, int]

    @property
    def length(self) -> int:
        """Number of tokens that every prompt is padded to."""
        return int(self.tokenizer.model_max_length)

    def ids(self, prompts: Sequence[str]) -> np.ndarray:
        """Return token ids [prompts, length] int64, padded and truncated as diffusers does."""
        import numpy as np

        encoded = self.tokenizer(list(prompts), padding="max_length", max_length=self.length, truncation=True)
        return np.array(encoded["input_ids"], dtype=np.int64)

    def sizes(self, prompts: Sequence[str]) -> np.ndarray:
        """Return the number of tokens of each prompt, without padding and truncation."""
        import numpy as np

        encoded = self.tokenizer(list(prompts), padding=False, truncation=False, verbose=False)["input_ids"]
        return np.array([len(ids) for ids in encoded], dtype=np.int64)

    def truncated(self, prompts: Sequence[str]) -> list[int]:
        """Return the indices of the prompts that `ids` truncates."""
        return [index for index, size in enumerate(self.sizes(prompts)) if size > self.length]

    def noise(self, seed: int) -> np.ndarray:
        """Return the initial noise of a seed, float32 from torch's generator, as diffusers samples it."""
        import numpy as np
        import torch

        return np.asarray(torch.randn(self.noise_shape, generator=torch.Generator().manual_seed(seed)).numpy())


def vae_config(folder: Path) -> Mapping[str, Any]:
    """Return the config of the VAE, which is that of its decoder in a folder of ONNX graphs."""
    return part_config(folder, "vae_decoder" if (folder / "vae_decoder").is_dir() else "vae")


def load_prompt_processor(folder: Path) -> PromptProcessor:
    """Load the tokenizer in ``folder`` and the sizes of its images. Raises `ModelError`."""
    from transformers import AutoTokenizer

    from compress.models.config_checks import load_error_types, max_positions

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder / TOKENIZER, trust_remote_code=False)
    except load_error_types() as error:
        raise ModelError(
            f"The tokenizer cannot be loaded: {first_line(error)}",
            where=str(folder / TOKENIZER),
            expected="the tokenizer's files in Hugging Face layout",
        ) from error
    positions = max_positions(dict(part_config(folder, "text_encoder")))
    if positions is not None and tokenizer.model_max_length > positions:
        raise ModelError(
            f"Prompts are padded to {tokenizer.model_max_length} tokens, and the text encoder has {positions} places.",
            where=str(folder / TOKENIZER / "tokenizer_config.json"),
            expected=f"a model_max_length of at most {positions}",
            hint="write the length that the model was trained with",
        )
    unet, vae = part_config(folder, UNET), vae_config(folder)
    size = unet.get("sample_size")
    height, width = (int(side or 0) for side in (size if isinstance(size, list) else (size, size)))
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    image_shape = (int(vae["out_channels"]), factor * height, factor * width)
    return PromptProcessor(tokenizer, (int(unet["in_channels"]), height, width), image_shape)


def load_scheduler(folder: Path) -> SchedulerMixin:
    """Load diffusers' scheduler of the class and config in ``folder``. Raises `ModelError`, `MissingExtraError`."""
    from compress.models.config_checks import load_error_types

    config = read_json(folder / SCHEDULER / "scheduler_config.json")
    scheduler_class = getattr(import_diffusers(), str(config.get("_class_name")), None)
    if scheduler_class is None or not hasattr(scheduler_class, "step"):
        raise ModelError(
            f"diffusers has no scheduler {config.get('_class_name')!r}.",
            where=str(folder / SCHEDULER),
            expected="the class of one of its schedulers as _class_name",
        )
    try:
        return scheduler_class.from_config(config)
    except load_error_types() as error:
        raise ModelError(f"The scheduler cannot be made: {first_line(error)}", where=str(folder / SCHEDULER)) from error


def import_diffusers() -> Any:
    """Return diffusers, imported without torchao and with errors as its only log messages.

    Raises:
        MissingExtraError: diffusers is not installed.
    """
    # Importing torchao takes seconds and is not needed. None in sys.modules makes diffusers take it for not installed.
    hidden = _TORCHAO not in sys.modules
    if hidden:
        sys.modules[_TORCHAO] = None  # type: ignore[assignment]
    try:
        import diffusers.utils.import_utils
    except ModuleNotFoundError as error:
        raise MissingExtraError("diffusers", "diffusion", "A model that generates images") from error
    finally:
        if hidden:
            del sys.modules[_TORCHAO]
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    return diffusers


TEXT_ENCODER, VAE = "text_encoder", "vae"
"""Names of the components in diffusers' layout."""
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
            path = directory / name / CONFIG
            if path.is_file():
                # Without the path that a config was read from, equal models have equal bytes.
                config = json.loads(path.read_text())
                config.pop(_SOURCE_PATH, None)
                path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
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
                library, class_name = type(component).__module__.partition(".")[0], type(component).__name__
                # Older versions of transformers, and optimum, read a tokenizer.json by the class name with `Fast`.
                if getattr(component, "is_fast", False) and not class_name.endswith("Fast"):
                    class_name += "Fast"
                index[name] = [library, class_name]
            (folder / MODEL_INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
            (folder / SAMPLING).write_bytes(self.sampling.as_json())
            (folder / CONFIG).write_text(json.dumps(pipeline_config(self.index), indent=2) + "\n")
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


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

    is_known = library in ("diffusers", "transformers")
    component_class: Any = getattr(importlib.import_module(library), class_name, None) if is_known else None
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

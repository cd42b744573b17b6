"""Text to image: a prompt, and the picture that a model draws for it. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from compress.data.columns import Column
from compress.plugins.diffusion.pipeline_model import PromptProcessor
from compress.tasks.capability import GENERATES_IMAGES, READS_ROWS
from compress.tasks.image_feature_extraction import class_name
from compress.tasks.lazy_modules import np, pa, torch
from compress.tasks.task import CollectedOutputs, Examples, Task, starter_recipe
from compress.utils.errors import ModelError

if TYPE_CHECKING:
    from compress.models.model import Processor, TorchModel
    from compress.results.report import Measurement

_IDS, _NOISE, _SEED, _PICTURES, _CLASS = "input_ids", "noise", "seed", "pictures", "class"


class GeneratedImages:
    """Model head whose answer is the generated images themselves."""

    outputs: ClassVar[tuple[str, ...]] = (_PICTURES,)
    answer: ClassVar[str] = _PICTURES
    answer_label: ClassVar[str] = "pictures"

    def read(self, outputs: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the images, [batch, height, width, channels], with values from 0 to 1."""
        return outputs[_PICTURES]


class TextToImage(Task):
    """Hugging Face `text-to-image`: in each row, `text` is a prompt and `image`, if present, is an image that fits it.

    The image of row i is generated from noise with seed i, so that models and stages are compared image by image.
    """

    name = "text-to-image"
    columns = (
        Column("image", kind="image", optional=True),
        Column("text"),
        Column("label", given=False, read=class_name, expected="a name or a number", optional=True),
    )
    capabilities = frozenset({READS_ROWS, GENERATES_IMAGES})
    app_steps = ("tokenize-prompt", "draw")
    architectures = ("StableDiffusionPipeline", "LatentConsistencyModelPipeline")
    starter = starter_recipe(
        "my-pictures",
        "a smaller, faster text-to-image model, evaluated on my own prompts",
        "my-pipeline",
        {
            "splits": {"train": "train.jsonl", "test": "test.jsonl"},
            "columns": {"image": "image", "text": "caption"},
        },
        {"onnx": {}, "onnx_weight_only": {"part": "text_encoder", "bits": 8}},
        {"metric": "psnr_to_baseline", "at_least": 20},
    )
    packages = ("diffusers",)
    batch_size = 16

    def load(self, directory: Path, labels: Sequence[str] | None, trust_remote_code: bool) -> TorchModel:
        """Load a folder in diffusers' layout, every part in fp32. Raises `ModelError`."""
        from compress.plugins.diffusion.pipeline_model import load_pipeline

        return load_pipeline(directory)

    def encode(self, rows: pa.Table, processor: Processor, labels: Sequence[str] | None, max_length: int) -> Examples:
        """Return token ids, noise and its seed for every prompt, with images [n, height, width, channels] as labels.

        ``max_length`` has no effect, because the model limits the length of prompts. The note states how many prompts
        are
        truncated. If the rows have a `class`, the examples contain it. Raises `DataError` for a broken image.
        """
        if not isinstance(processor, PromptProcessor):
            raise ModelError(
                f"A {type(processor).__name__} does not prepare prompts for pictures.",
                expected="a folder in diffusers' layout, with model_index.json",
            )
        prompts: list[str] = rows["text"].to_pylist()
        ids, cut = processor.ids(prompts), processor.truncated(prompts)
        names = rows["label"].to_pylist() if "label" in rows.column_names else None
        inputs = [
            {_IDS: row, _NOISE: processor.noise(seed), _SEED: np.array(seed, np.int64)}
            | ({} if names is None else {_CLASS: np.array(names[seed])})
            for seed, row in enumerate(ids)
        ]
        pictures = None
        if "image" in rows.column_names and len(rows):
            from compress.plugins.diffusion.image_metrics import decode_images

            pictures = decode_images(rows["image"].to_pylist(), processor.image_shape)
        note = f"{len(cut)} of {len(prompts)} prompts are cut at {processor.length} tokens" if cut else ""
        padding = dict.fromkeys((_IDS, _NOISE, _SEED))
        return Examples(inputs, padding, pictures, note=note, sizes=processor.sizes(prompts), head=GeneratedImages())

    def loss(self, outputs: Any, labels: torch.Tensor) -> torch.Tensor:
        """Raise `ModelError`, because a denoiser is trained on noise and has no loss of a whole image."""
        raise ModelError(f"Models for {self.name} have no loss of a whole picture.", expected="a stage for its parts")

    def collect(
        self, outputs: Mapping[str, np.ndarray], examples: Examples, indices: Sequence[int]
    ) -> CollectedOutputs:
        """Return the images as levels, [batch, height, width, channels] uint8, and the names of their classes."""
        from compress.plugins.diffusion.image_metrics import to_uint8

        kept = {_PICTURES: to_uint8(outputs[_PICTURES])}
        if indices and _CLASS in examples.inputs[indices[0]]:
            kept[_CLASS] = np.array([str(examples.inputs[place][_CLASS]) for place in indices])
        return kept

    def measure(self, kept: CollectedOutputs, labels: np.ndarray | None, model: str, target: str) -> list[Measurement]:
        """Return the contrast within the images, which is 0 for a uniform gray.

        Args:
            kept: Collected outputs of all rows.
            labels: Images of the rows, if any.
            model: Label of the model.
            target: Name of the target.
        """
        from compress.plugins.diffusion.image_metrics import contrast_row

        return [contrast_row(kept[_PICTURES], model, target)]

    def compare(
        self, kept: CollectedOutputs, reference: CollectedOutputs, model: str, target: str
    ) -> list[Measurement]:
        """Return the similarity of each image to the baseline's image of the same prompt and noise.

        Args:
            kept: Collected outputs of all rows.
            reference: Collected outputs of the baseline.
            model: Label of the model.
            target: Name of the target.
        """
        from compress.plugins.diffusion.image_metrics import similarity_rows

        return similarity_rows(kept[_PICTURES], reference[_PICTURES], model, target)


TASK = TextToImage()

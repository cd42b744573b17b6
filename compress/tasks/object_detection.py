"""Object detection: boxes with classes. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

from compress.data.annotations import EXPECTED, Categories, check_inside, objects_in, read_objects
from compress.data.columns import Column
from compress.models.config_checks import MODULE_KEY
from compress.tasks.capability import HAS_CLASSES, LOCALIZES, READS_ROWS, SINGLE_CALL, TAKES_IMAGES
from compress.tasks.classes import agreement_row, finite, label_ids, required
from compress.tasks.coco_metrics import Gold, rows, same_objects, write_gold
from compress.tasks.image_inputs import encode_places, load_model
from compress.tasks.lazy_modules import losses, np, pa, torch
from compress.tasks.task import (
    LOGITS,
    Examples,
    Head,
    NamedArrays,
    Task,
    relative_limit,
    split_files,
    starter_recipe,
)
from compress.utils.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from transformers.utils import ModelOutput

    from compress.models.model import Processor, TorchModel
    from compress.results.report import Measurement

_PLAIN_LOGITS, BOXES = "pred_logits", "pred_boxes"
"""Names of the outputs in DETR's own code; transformers has the same name for boxes only."""
_LOSS_TYPE = "ForObjectDetection"
"""transformers' name of the loss of models whose last class means no object."""
_SEPARATE_MODEL_TYPES = frozenset({"rt_detr", "rt_detr_v2", "d_fine"})
"""Model types that select the highest-scoring positions as queries and have an independent sigmoid per class."""
_DENOISING = "denoising_meta_values"
"""Output of RT-DETR that counts the denoising queries added during training."""
_SIZE, _GOLD = "size", "gold"
"""Additional inputs of an example: height and width of the image, and its reference objects as JSON."""
_COORDINATES = 4
_LEAST_SCORE = 0.5
"""Score from which a detection counts as an object for users, as in transformers' pipeline."""
_NO_OBJECT = -1.0
"""Class id in labels that marks no object. Labels are padded with it."""
_BOX_COST, _OVERLAP_COST = 5.0, 2.0
"""Matching costs of a box's L1 distance and overlap relative to that of classes (Carion et al. 2020, section A.4)."""


@dataclass(frozen=True)
class Detections(Head):
    """Class logits and box of each query.

    The last class means no object, unless classes are ``separate``: then each class has an independent sigmoid. Boxes
    are center, width and height relative to the image. ``processor`` converts them to detections, ``labels`` are the
    class names.
    """

    processor: Processor = None
    labels: tuple[str, ...] | None = None
    separate: bool = False
    outputs: ClassVar[tuple[str, ...]] = (LOGITS, BOXES)
    answer: ClassVar[str] = "detections"
    answer_label: ClassVar[str] = "logits and boxes"
    while_training: ClassVar[tuple[str, ...]] = (_DENOISING,)

    def read(self, outputs: Mapping[str, Any], batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return [B, queries, classes + 4 (+ 1)], without the queries that exist only during training."""
        answers = torch.cat([outputs[LOGITS], outputs[BOXES]], dim=-1)
        denoising = outputs.get(_DENOISING)
        # `dn_num_split` is the number of denoising queries, which come first, and that of the other queries.
        return answers if denoising is None else answers[:, denoising["dn_num_split"][0] :]

    def aligned(self, candidates: np.ndarray, expected: np.ndarray) -> np.ndarray:
        """Return the answers with their queries in the order of ``expected``, for models that sort queries by score.

        Rounding changes the order of two queries with similar scores.
        """
        from scipy.optimize import linear_sum_assignment

        if not self.separate or not (np.isfinite(candidates).all() and np.isfinite(expected).all()):
            return candidates
        # The largest difference of logits and boxes for each pair of queries, [B, expected, candidates].
        differences = np.abs(expected[:, :, None] - candidates[:, None]).max(axis=-1)
        return np.stack(
            [queries[linear_sum_assignment(cost)[1]] for queries, cost in zip(candidates, differences, strict=True)]
        )


class ObjectDetection(Task):
    """Hugging Face `object-detection`: DETR, YOLOS, RT-DETR and D-FINE, which compute their own matching loss."""

    name = "object-detection"
    columns = (
        Column("image", kind="image"),
        Column(
            "objects",
            label=True,
            read=read_objects,
            expected=EXPECTED,
            within=Categories(),
            fewest=1,
            check=check_inside,
        ),
    )
    capabilities = frozenset({READS_ROWS, TAKES_IMAGES, HAS_CLASSES, SINGLE_CALL, LOCALIZES})
    architectures = ("ForObjectDetection",)
    starter = starter_recipe(
        "my-detector",
        "a smaller, faster object detector, from my own images and boxes",
        "hustvl/yolos-tiny",
        split_files("jsonl", {"image": "image", "objects": "objects"}),
        {
            "finetune": {"epochs": 20, "learning_rate": 5.0e-5, "batch_size": 8},
            "onnx": {},
            "onnx_int8": {"method": "static"},
        },
        relative_limit("map", 0.97),
        baseline="finetune",
    )
    ratios = ("map", "map_50")
    metrics = ("map", "map_50", "map_75", "map_{object_size}", "mar_{number}", "ap_{label}", "agreement")

    def __init__(self, separate: bool = False) -> None:
        """Set whether classes are ``separate``: each has an independent sigmoid, and no class means no object."""
        self._separate = separate
        self.app_steps = ("prepare-image", "boxes")

    def variants(self) -> tuple[Task, ...]:
        """Return the variant whose last class means no object, and the one with separate classes."""
        return (self, SEPARATE)

    def specialize(self, config: Mapping[str, Any]) -> Task:
        """Return the variant for the model type."""
        return SEPARATE if is_separate(config) else self

    def load(self, directory: Path, labels: Sequence[str] | None, trust_remote_code: bool) -> TorchModel:
        """Load weights and image processor. A missing head is initialized randomly.

        Raises `ModelError` for files that do not load, and `DataError` for labels that a trained head lacks.
        """
        model = load_model(self.name, directory, ("ObjectDetection",), labels, trust_remote_code, _plain_answers)
        config = model.module.config.to_dict()
        known = MODULE_KEY in config or is_separate(config)
        if not known and getattr(model.module, "loss_type", None) != _LOSS_TYPE:
            raise ModelError(
                f"The queries of a {type(model.module).__name__} don't choose one class or none.",
                where=str(directory),
                expected="DETR, YOLOS, or another model that transformers trains as these; RT-DETR or D-FINE",
                hint="choose one of them",
            )
        if not hasattr(model.processor, "post_process_object_detection"):
            raise ModelError(
                f"A {type(model.processor).__name__} does not convert outputs to boxes.",
                where=str(directory),
                expected="the preprocessor_config.json of a detector, e.g. of YolosImageProcessor",
            )
        return model

    def encode(self, rows: pa.Table, processor: Processor, labels: Sequence[str] | None, max_length: int) -> Examples:
        """Preprocess the images with the model's processor; ``labels`` [n, objects, 5] are class and box.

        Boxes are center, width and height relative to the image; class -1 is no object. Raises `DataError` for a
        broken image, or a processor that keeps the sizes of images.

        Args:
            rows: Rows with the task's columns; label columns are optional.
            processor: Processor of the model.
            labels: Class names of the model, or None to ignore labels.
            max_length: Has no effect, since there is no text.
        """

        from compress.data.media import picture_size

        values = rows["image"].to_pylist()
        sizes = [picture_size(value) for value in values]
        extra_inputs: list[dict[str, np.ndarray]] = [{_SIZE: np.array(size[::-1])} for size in sizes]
        head = Detections(processor, None if labels is None else tuple(labels), self._separate)
        if labels is None or "objects" not in rows.column_names:
            return replace(encode_places(values, processor, extra_inputs), head=head)
        annotations = [objects_in(value) for value in rows["objects"].to_pylist()]
        max_objects = max([1, *(len(objects.boxes) for objects in annotations)])
        label_array = np.full((len(annotations), max_objects, 1 + _COORDINATES), _NO_OBJECT, "f4")
        for row, (objects, size) in enumerate(zip(annotations, sizes, strict=True)):
            ids = label_ids(objects.categories, labels)
            extra_inputs[row][_GOLD] = np.array(write_gold(Gold(ids.tolist(), objects.categories, objects.boxes)))
            label_array[row, : len(ids), 0] = ids
            label_array[row, : len(ids), 1:] = relative_boxes(np.array(objects.boxes).reshape(-1, _COORDINATES), size)
        return replace(encode_places(values, processor, extra_inputs), labels=label_array, head=head)

    def targets(self, labels: torch.Tensor) -> Mapping[str, Any]:
        """Return classes and boxes of each image in the form that transformers' models match with their predictions."""
        objects = [image_labels[image_labels[:, 0] >= 0] for image_labels in labels]
        return {"labels": [{"class_labels": rows[:, 0].long(), "boxes": rows[:, 1:].float()} for rows in objects]}

    def loss(self, outputs: ModelOutput, labels: torch.Tensor) -> torch.Tensor:
        """Return the model's own loss: classes, boxes and overlaps after matching (Carion et al. 2020, section 3.1)."""
        loss: torch.Tensor = outputs.loss
        return loss

    def distance(self, mine: torch.Tensor, taught: torch.Tensor, temperature: float) -> torch.Tensor:
        """Return the softened KL of classes and the distance of boxes, after matching the queries."""
        return losses.matched_distance(mine, taught, temperature, _BOX_COST, _OVERLAP_COST, self._separate)

    def predicted_labels(self, outputs: ModelOutput, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the objects that the model detects, as labels."""
        best_logits, classes = outputs.logits.detach().max(dim=-1, keepdim=True)
        # A logit below 0 is a sigmoid below 0.5. Without separate classes, the last class means no object.
        is_empty = best_logits < 0 if self._separate else classes == outputs.logits.shape[-1] - 1
        classes = torch.where(is_empty, _NO_OBJECT, classes.float())
        return torch.cat([classes, outputs.pred_boxes.detach()], dim=-1)

    def collect(self, outputs: NamedArrays, examples: Examples, indices: Sequence[int]) -> NamedArrays:
        """Return detections [batch, queries, 6], as in `coco_metrics`, and references as JSON.

        Raises `DataError` for rows without objects, and `ModelError` for answers that are not finite.
        """
        required(examples.labels, "boxes", "objects")
        answers = finite(examples.answers(outputs, {}))
        # `Joined.more` reads the additional inputs without decoding the image.
        inputs = getattr(examples.inputs, "more", examples.inputs.__getitem__)
        rows = [inputs(index) for index in indices]
        sizes = np.stack([row[_SIZE] for row in rows])
        detected = detections(answers, sizes, getattr(examples.head, "processor", None))
        return {"found": detected, _GOLD: np.array([str(row[_GOLD]) for row in rows])}

    def measure(self, collected: NamedArrays, labels: np.ndarray | None, model: str, target: str) -> list[Measurement]:
        """Return COCO's mAP and the metrics that belong to it, with intervals over images.

        Args:
            collected: Collected outputs of all examples.
            labels: Labels of all examples.
            model: Name of the model in the report.
            target: Name of the target in the report.
        """
        return rows(collected, model, target)

    def interpret(
        self,
        answers: Sequence[Any],
        examples: Examples,
        rows: pa.Table,
        processor: Processor,
        labels: Sequence[str] | None,
    ) -> list[Any]:
        """Return the objects in each image with a `score` of at least 0.5, as `label`, `score` and `box` in pixels.

        Args:
            answers: Answer to each example, as `Examples.answers` returns them, or a generated text.
            examples: The examples that `raw_examples` made of the rows.
            rows: Rows of raw inputs.
            processor: Processor of the model.
            labels: Class names of the model, if it has any.
        """
        inputs = getattr(examples.inputs, "more", examples.inputs.__getitem__)
        sizes = np.stack([inputs(index)[_SIZE] for index in range(len(examples))])
        predictions = []
        for image in detections(finite(np.stack(answers)), sizes, processor):
            objects = []
            for score, class_id, x, y, width, height in image[image[:, 0].argsort()[::-1]].tolist():
                if score >= _LEAST_SCORE:
                    label = labels[int(class_id)] if labels else str(int(class_id))
                    box = {"xmin": x, "ymin": y, "xmax": x + width, "ymax": y + height}
                    objects.append({"label": label, "score": score, "box": box})
            predictions.append(objects)
        return predictions

    def compare(self, collected: NamedArrays, reference: NamedArrays, model: str, target: str) -> list[Measurement]:
        """Return the share of images in which both models detect the same objects.

        Args:
            collected: Collected outputs of the model.
            reference: Collected outputs of the baseline.
            model: Name of the model in the report.
            target: Name of the target in the report.
        """
        return [agreement_row(same_objects(collected, reference), model, target)]


def is_separate(config: Mapping[str, Any]) -> bool:
    """Return whether the model of a config has an independent sigmoid per class."""
    return config.get("model_type") in _SEPARATE_MODEL_TYPES


def _plain_answers(outputs: ModelOutput, targets: Any, config: PretrainedConfig) -> ModelOutput:
    """Convert the outputs of a torch module that is no transformers model to DETR's, with DETR's loss.

    The module returns class logits and boxes, in this order or by the names in DETR's own code.
    """
    from transformers import DetrConfig
    from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss
    from transformers.models.detr.modeling_detr import DetrObjectDetectionOutput

    # A plain network returns a dictionary or a pair.
    pair = tuple(outputs.get(name) for name in (_PLAIN_LOGITS, BOXES)) if isinstance(outputs, Mapping) else outputs
    if not isinstance(pair, tuple) or len(pair) != 2 or any(getattr(tensor, "ndim", 0) != 3 for tensor in pair):
        raise ModelError(
            f"The module gives a {type(outputs).__name__} that has no classes and boxes of queries.",
            where="module",
            expected=f"logits [batch, queries, classes + 1] and boxes [batch, queries, 4], as a pair or under "
            f"{_PLAIN_LOGITS} and {BOXES}",
        )
    logits, boxes = pair
    loss = None
    if targets is not None:
        # The config supplies DETR's weights of the parts of the loss.
        detr_config = DetrConfig(num_labels=config.num_labels)
        loss, *_ = ForObjectDetectionLoss(logits, targets, logits.device, boxes, detr_config)
    return DetrObjectDetectionOutput(loss=loss, logits=logits, pred_boxes=boxes)


def relative_boxes(boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return boxes [k, 4] (x, y, width, height in pixels) as center, width and height relative to the image.

    ``size`` is width and height. Parts outside the image are cut off.
    """
    image_size = np.array(size, dtype=np.float64)
    top_left = np.clip(boxes[:, :2] / image_size, 0, 1)
    bottom_right = np.clip((boxes[:, :2] + boxes[:, 2:]) / image_size, 0, 1)
    return np.concatenate([(top_left + bottom_right) / 2, bottom_right - top_left], axis=1)


def detections(answers: np.ndarray, sizes: np.ndarray, processor: Processor) -> np.ndarray:
    """Return answers [B, queries, ...] as detections [B, queries, 6] in the format of `coco_metrics`.

    ``sizes`` [B, 2] are heights and widths. There are as many detections as queries, whatever their
    scores; processors that choose pairs of query and class may return one query several times.
    """
    # The processor expects a model output, so answers are split into logits and boxes again.
    logits, boxes = (torch.from_numpy(part) for part in np.split(answers, [answers.shape[-1] - _COORDINATES], axis=-1))
    outputs = SimpleNamespace(logits=logits, pred_boxes=boxes)
    results = processor.post_process_object_detection(outputs, threshold=-1.0, target_sizes=torch.from_numpy(sizes))
    parts = [[result["scores"][:, None], result["labels"][:, None], result["boxes"]] for result in results]
    stacked = np.stack([torch.cat([part.float() for part in fields], dim=-1).numpy() for fields in parts])
    # The processor returns corners (x1, y1, x2, y2), and `coco_metrics` expects x, y, width and height.
    stacked[..., 4:] -= stacked[..., 2:4]
    return stacked


TASK, SEPARATE = ObjectDetection(), ObjectDetection(separate=True)

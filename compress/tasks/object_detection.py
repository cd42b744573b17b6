"""Object detection: boxes around what is in a picture, with a class each. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

from compress.data.columns import Column
from compress.data.objects import EXPECTED, Categories, check_inside, objects_in, read_objects
from compress.models.remote_code import MODULE_KEY
from compress.tasks.capability import HAS_CLASSES, LOCALIZES, READS_ROWS, SINGLE_CALL, TAKES_IMAGES
from compress.tasks.task import LOGITS, CollectedOutputs, Examples, Task
from compress.utils.errors import DataError, ModelError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import torch

    from compress.models.torch_model import TorchModel
    from compress.results.measurement import Measurement

_PLAIN_LOGITS, BOXES = "pred_logits", "pred_boxes"
_LOSS = "ForObjectDetection"
"""transformers' name of the loss of models whose last class is none."""
_SEPARATE = frozenset({"rt_detr", "rt_detr_v2", "d_fine"})
"""Models whose queries are the places of a picture that score highest, and say yes or no to each class by itself."""
_DENOISING = "denoising_meta_values"
"""What RT-DETR says of the queries that it was given beside its own, before them, with labels to learn from."""
_SIZE, _GOLD = "size", "gold"
_COORDINATES = 4
_NOTHING, _UNKNOWN = -1.0, -100.0
"""In place of a class: no object, and a picture whose objects are not known."""
_BOX_COST, _OVERLAP_COST = 5.0, 2.0
"""Of a box's distance and of its overlap beside that of classes (Carion et al. 2020, section A.4)."""

_STARTER: dict[str, Any] = {
    "name": "my-detector",
    "description": "a smaller, faster object detector, from my own pictures and the boxes in them",
    "model": "hustvl/yolos-tiny",
    "data": {
        "splits": {"train": "train.jsonl", "validation": "validation.jsonl", "test": "test.jsonl"},
        "columns": {"image": "image", "objects": "objects"},
    },
    "stages": [
        {"finetune": {"epochs": 20, "learning_rate": 5.0e-5, "batch_size": 8}},
        {"onnx": {}},
        {"onnx_int8": {"method": "static"}},
    ],
    "baseline": "finetune",
    "targets": ["cpu"],
    "benchmark": {},
    "limits": [{"metric": "map", "at_least": 0.97, "of": "baseline"}],
}


@dataclass(frozen=True)
class Detections:
    """Of each query the logits of its classes and its box: a `Head`.

    The last class is none, unless classes are ``separate``. Boxes are centre, width and height in shares of the
    picture. ``processor`` makes them detections, ``labels`` are the names of the classes.
    """

    processor: Any = None
    labels: tuple[str, ...] | None = None
    separate: bool = False
    outputs: ClassVar[tuple[str, ...]] = (LOGITS, BOXES)
    answer: ClassVar[str] = "detections"
    answer_label: ClassVar[str] = "logits and boxes"
    while_training: ClassVar[tuple[str, ...]] = (_DENOISING,)

    def read(self, outputs: Mapping[str, Any], batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """[B, queries, classes + 4], or one more of none; without queries that are there for training alone."""
        import torch

        found = torch.cat([outputs[LOGITS], outputs[BOXES]], dim=-1)
        more = outputs.get(_DENOISING)
        return found if more is None else found[:, more["dn_num_split"][0] :]

    def aligned(self, found: np.ndarray, expected: np.ndarray) -> np.ndarray:
        """Answers with their queries in the order of those ``expected``, where they have none of their own.

        They come by their scores, so that rounding changes places of two that are nearly alike.
        """
        import numpy as np
        from scipy.optimize import linear_sum_assignment

        if not self.separate or not (np.isfinite(found).all() and np.isfinite(expected).all()):
            return found
        apart = np.abs(expected[:, :, None] - found[:, None]).max(axis=-1)
        return np.stack([own[linear_sum_assignment(cost)[1]] for own, cost in zip(found, apart, strict=True)])


class ObjectDetection(Task):
    """Hugging Face `object-detection`: DETR, YOLOS, RT-DETR, D-FINE, which learn by a matching of their own."""

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
    starter = _STARTER
    ratios = ("map", "map_50")

    def __init__(self, separate: bool = False) -> None:
        """``separate``: classes are yes or no each, and there is none of nothing."""
        self._separate = separate
        self.app_steps = ("prepare-image", "boxes")

    def variants(self) -> tuple[Task, ...]:
        """Those whose last class is none, and those whose classes are separate."""
        return (self, SEPARATE)

    def specialize(self, config: Mapping[str, Any]) -> Task:
        """By the model's type."""
        return SEPARATE if is_separate(config) else self

    def load(self, directory: Path, labels: Sequence[str] | None, trust_remote_code: bool) -> TorchModel:
        """Load weights and image processor. Without a trained head, a new one is drawn from torch's generator.

        Raises `ModelError` for files that do not load, and `DataError` for labels that a trained head lacks.
        """
        from compress.tasks.dense_vision import load_model

        model = load_model(self.name, directory, ("ObjectDetection",), labels, trust_remote_code, _plain_answers)
        config = model.module.config.to_dict()
        known = MODULE_KEY in config or is_separate(config)
        if not known and getattr(model.module, "loss_type", None) != _LOSS:
            raise ModelError(
                f"The queries of a {type(model.module).__name__} don't choose one class or none.",
                where=str(directory),
                expected="DETR, YOLOS, or another model that transformers trains as these; RT-DETR or D-FINE",
                hint="choose one of them",
            )
        if not hasattr(model.processor, "post_process_object_detection"):
            raise ModelError(
                f"A {type(model.processor).__name__} makes no boxes of what a model answers.",
                where=str(directory),
                expected="the preprocessor_config.json of a detector, e.g. of YolosImageProcessor",
            )
        return model

    def encode(self, rows: pa.Table, processor: Any, labels: Sequence[str] | None, max_length: int) -> Examples:
        """Pictures as the model's own processor prepares them; ``labels`` [n, objects, 5] are class and box.

        Boxes are centre, width and height in shares of the picture; -1 is the class of no object. ``max_length`` means
        nothing here. Raises `DataError` for a broken picture, or a processor that leaves them in sizes of their own.
        """
        import numpy as np

        from compress.data.media import picture_size
        from compress.tasks.classes import label_ids
        from compress.tasks.coco_metrics import Gold, write_gold
        from compress.tasks.dense_vision import encode_places

        values = rows["image"].to_pylist()
        sizes = [picture_size(value) for value in values]
        more: list[dict[str, np.ndarray]] = [{_SIZE: np.array(size[::-1])} for size in sizes]
        head = Detections(processor, None if labels is None else tuple(labels), self._separate)
        if labels is None or "objects" not in rows.column_names:
            return replace(encode_places(values, processor, more), head=head)
        found = [objects_in(value) for value in rows["objects"].to_pylist()]
        known = np.full((len(found), max([1, *(len(one.boxes) for one in found)]), 1 + _COORDINATES), _NOTHING, "f4")
        for place, (one, size) in enumerate(zip(found, sizes, strict=True)):
            ids = label_ids(one.categories, labels)
            more[place][_GOLD] = np.array(write_gold(Gold(ids.tolist(), one.categories, one.boxes)))
            known[place, : len(ids), 0] = ids
            known[place, : len(ids), 1:] = shares(np.array(one.boxes).reshape(-1, _COORDINATES), size)
        return replace(encode_places(values, processor, more), labels=known, head=head)

    def targets(self, labels: torch.Tensor) -> Mapping[str, Any]:
        """Classes and boxes of each picture, as transformers' models match them with what they found."""
        return {
            "labels": [
                {"class_labels": own[own[:, 0] >= 0, 0].long(), "boxes": own[own[:, 0] >= 0, 1:].float()}
                for own in labels
            ]
        }

    def loss(self, outputs: Any, labels: torch.Tensor) -> torch.Tensor:
        """The model's own: classes, boxes and overlaps after a matching (Carion et al. 2020, section 3.1)."""
        loss: torch.Tensor = outputs.loss
        return loss

    def distance(self, mine: torch.Tensor, taught: torch.Tensor, temperature: float) -> torch.Tensor:
        """After a matching of queries: softened KL of classes, and how far boxes are from those of what is there."""
        from compress.numerics.detection import matched_distance

        return matched_distance(mine, taught, temperature, _BOX_COST, _OVERLAP_COST, self._separate)

    def predicted_labels(self, outputs: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What the model finds in each picture, none where a query finds nothing."""
        import torch

        best, chosen = outputs.logits.detach().max(dim=-1, keepdim=True)
        nothing = best < 0 if self._separate else chosen == outputs.logits.shape[-1] - 1
        chosen = torch.where(nothing, _NOTHING, chosen.float())
        return torch.cat([chosen, outputs.pred_boxes.detach()], dim=-1)

    def collect(
        self, outputs: Mapping[str, np.ndarray], examples: Examples, indices: Sequence[int]
    ) -> CollectedOutputs:
        """What is found [batch, queries, 6], as `boxes` has it, and what is there, as JSON.

        Raises `DataError` for rows without objects, `ModelError` for answers that are not finite.
        """
        import numpy as np

        if examples.labels is None:
            raise DataError("The split has no boxes, so nothing can be evaluated on it.", expected="a column objects")
        answers = examples.answers(outputs, {})
        if not np.isfinite(answers).all():
            raise ModelError("The model's outputs are not finite.", hint="export or quantize it anew")
        inputs = getattr(examples.inputs, "more", examples.inputs.__getitem__)
        rows = [inputs(index) for index in indices]
        found = detections(answers, np.stack([row[_SIZE] for row in rows]), getattr(examples.head, "processor", None))
        return {"found": found, _GOLD: np.array([str(row[_GOLD]) for row in rows])}

    def measure(self, kept: CollectedOutputs, labels: np.ndarray | None, model: str, target: str) -> list[Measurement]:
        """COCO's mAP and its parts, with intervals over pictures."""
        from compress.tasks.coco_metrics import rows

        return rows(kept, model, target)

    def compare(
        self, kept: CollectedOutputs, reference: CollectedOutputs, model: str, target: str
    ) -> list[Measurement]:
        """In how many pictures both find the same objects."""
        from compress.tasks.classes import agreement_row
        from compress.tasks.coco_metrics import same_objects

        return [agreement_row(same_objects(kept, reference), model, target)]

    def probabilities(self, kept: CollectedOutputs) -> np.ndarray | None:
        """None: a picture has many answers."""
        return None


def is_separate(config: Mapping[str, Any]) -> bool:
    """Whether the model of a config says yes or no to each class by itself, so that there is none of nothing."""
    return config.get("model_type") in _SEPARATE


def _plain_answers(found: Any, targets: Any, config: Any) -> Any:
    """A plain network's classes and boxes of each query, in this order or by DETR's own names, with DETR's loss."""
    from transformers import DetrConfig
    from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss
    from transformers.models.detr.modeling_detr import DetrObjectDetectionOutput

    pair = tuple(found.get(name) for name in (_PLAIN_LOGITS, BOXES)) if isinstance(found, Mapping) else found
    if not isinstance(pair, tuple) or len(pair) != 2 or any(getattr(one, "ndim", 0) != 3 for one in pair):
        raise ModelError(
            f"The module gives a {type(found).__name__} that has no classes and boxes of queries.",
            where="module",
            expected=f"logits [batch, queries, classes + 1] and boxes [batch, queries, 4], as a pair or under "
            f"{_PLAIN_LOGITS} and {BOXES}",
        )
    logits, boxes = pair
    loss = None
    if targets is not None:
        costs = DetrConfig(num_labels=config.num_labels)
        loss, *_ = ForObjectDetectionLoss(logits, targets, logits.device, boxes, costs)
    return DetrObjectDetectionOutput(loss=loss, logits=logits, pred_boxes=boxes)


def shares(boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Boxes [k, 4] of x, y, width and height in pixels as centre, width and height in shares of a picture's ``size``.

    ``size`` is width and height; what reaches out of the picture is cut off.
    """
    import numpy as np

    whole = np.array(size, dtype=np.float64)
    first = np.clip(boxes[:, :2] / whole, 0, 1)
    last = np.clip((boxes[:, :2] + boxes[:, 2:]) / whole, 0, 1)
    return np.concatenate([(first + last) / 2, last - first], axis=1)


def detections(answers: np.ndarray, sizes: np.ndarray, processor: Any) -> np.ndarray:
    """What the model's processor makes of answers [B, queries, ...], [B, queries, 6], as `boxes` has it.

    ``sizes`` [B, 2] are heights and widths. Every query counts, however low its score.
    """
    import numpy as np
    import torch

    logits, boxes = (torch.from_numpy(part) for part in np.split(answers, [answers.shape[-1] - _COORDINATES], axis=-1))
    outputs = SimpleNamespace(logits=logits, pred_boxes=boxes)
    found = processor.post_process_object_detection(outputs, threshold=-1.0, target_sizes=torch.from_numpy(sizes))
    parts = [[one["scores"][:, None], one["labels"][:, None], one["boxes"]] for one in found]
    corners = np.stack([torch.cat([part.float() for part in own], dim=-1).numpy() for own in parts])
    corners[..., 4:] -= corners[..., 2:4]
    return corners


TASK, SEPARATE = ObjectDetection(), ObjectDetection(separate=True)

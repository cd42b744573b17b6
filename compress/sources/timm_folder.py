"""Conversion of a timm folder to a starting folder. Imports no torch."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.models.config_checks import MODULE_KEY, TIMM_NETWORK, is_timm
from compress.models.folder_checks import WEIGHTS
from compress.models.json_file import read_json
from compress.sources.build_model import write_once
from compress.utils.errors import MissingExtraError, ModelError
from compress.utils.progress import Progress, SilentProgress
from compress.utils.storage import cache_key, digest_file

_CONFIG, _PREPROCESSOR = "config.json", "preprocessor_config.json"
_REVISION = 1
"""Increase it when the same files should be converted into another folder."""
_RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}
"""Pillow's numbers of timm's interpolation names."""
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CROP = 0.875
"""Default crop share of timm."""


def is_timm_folder(folder: Path) -> bool:
    """Return True if a folder's config.json is timm's. Raises `ModelError` for invalid JSON."""
    return folder.is_dir() and (folder / _CONFIG).is_file() and is_timm(read_json(folder / _CONFIG))


def made_folder(folder: Path, cache: Path) -> Path:
    """Return the path to which `convert_timm` writes, whether it exists or not. Raises `ModelError`."""
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise ModelError(
            "The folder has a config of timm and no weights that a recipe can start from.",
            where=str(folder),
            expected=f"a {WEIGHTS}, as timm's save_for_hf writes it",
        )
    # The converted folder depends on the config and the weights only.
    digests = {path.name: digest_file(path) for path in (folder / _CONFIG, weights)}
    return cache / f"timm-{cache_key({'revision': _REVISION, 'files': digests})[:32]}"


def convert_timm(folder: Path, cache: Path, progress: Progress | None = None) -> Path:
    """Return the folder below ``cache`` with builder function and image preprocessing, written on the first call.

    The weights are timm's own file. Raises `ModelError`, and `MissingExtraError` if timm is needed and missing.
    """

    def write(output: Path) -> None:
        (progress or SilentProgress()).note(f"making {folder.name} of timm ready in {cache}")
        config = read_json(folder / _CONFIG)
        # The config with the builder function, its arguments and the class names.
        pretrained = config["pretrained_cfg"]
        classes = int(config.get("num_classes", pretrained.get("num_classes", 0)))
        arguments = {**(config.get("model_args") or {}), "architecture": config["architecture"], "num_classes": classes}
        # timm needs the size of fixed inputs to build position embeddings.
        if pretrained.get("fixed_input_size") and "img_size" not in arguments:
            arguments["img_size"] = list(pretrained["input_size"][-2:])
        if (channels := pretrained.get("input_size", [3])[0]) != 3:
            arguments.setdefault("in_chans", channels)
        result: dict[str, Any] = {MODULE_KEY: {"module": TIMM_NETWORK, "arguments": arguments}}
        if names := _class_names(config, classes, folder):
            result["id2label"] = dict(enumerate(names))
            result["label2id"] = {name: index for index, name in enumerate(names)}
        output.mkdir()
        for name, content in ((_CONFIG, result), (_PREPROCESSOR, preparation(pretrained, folder))):
            (output / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        shutil.copyfile(folder / WEIGHTS, output / WEIGHTS)

    return write_once(made_folder(folder, cache), write)


def _class_names(config: Mapping[str, Any], classes: int, folder: Path) -> list[str]:
    """Return the config's class names, ImageNet's if timm knows the subset, or numbered ones; none without a head."""
    names: list[str] = list(config.get("label_names") or config["pretrained_cfg"].get("label_names") or ())
    if not names and classes:
        try:
            from timm.data import ImageNetInfo, infer_imagenet_subset
        except ModuleNotFoundError as error:
            raise MissingExtraError("timm", "timm", "A model of timm") from error
        # timm knows the subset of ImageNet from the number of classes and the config.
        subset = infer_imagenet_subset({**config, "num_classes": classes})
        generic = [f"LABEL_{index}" for index in range(classes)]
        names = list(ImageNetInfo(subset).label_descriptions()) if subset else generic
    if len(names) != classes:
        raise ModelError(
            f"The model has {classes} classes and {len(names)} names for them.",
            where=str(folder / _CONFIG),
            expected="a label_names for each class, or none at all",
        )
    # Two of ImageNet's classes are called crane, and two maillot.
    counts = Counter(names)
    return [name if counts[name] == 1 else f"{name} ({index})" for index, name in enumerate(names)]


def preparation(pretrained: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return timm's preprocessing of images as an image processor's config. Raises `ModelError` if that is impossible.

    It follows timm's `create_transform` for evaluation. The shorter edge is resized to the input's size over
    ``crop_pct`` (both edges if ``crop_mode`` is squash), and the centre is cropped; the crop may be off by a pixel if
    the remainder is odd.
    """
    height, width = (int(edge) for edge in pretrained.get("input_size", (3, 224, 224))[-2:])
    share, mode = pretrained.get("crop_pct") or _CROP, pretrained.get("crop_mode") or "center"
    # timm resizes by the inverse of the crop share.
    scaled = [math.floor(edge / share) for edge in (height, width)]
    resample = _RESAMPLE.get(pretrained.get("interpolation") or "bicubic")
    # Other crops and filters have no equivalent in transformers' processors.
    if mode not in ("center", "squash") or resample is None or (mode == "center" and height != width):
        raise ModelError(
            f"No image processor prepares pictures as the model wants: crop_mode {mode}, {height} by {width} pixels, "
            f"interpolation {pretrained.get('interpolation')}.",
            where=str(folder / _CONFIG),
            expected="square pictures with the middle cut out, or crop_mode squash, and an interpolation of Pillow's",
        )
    size = {"shortest_edge": scaled[0]} if mode == "center" else {"height": scaled[0], "width": scaled[1]}
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": pretrained.get("input_size", [3])[0] == 3,
        **{"do_resize": True, "size": size, "resample": resample},
        **{"do_center_crop": True, "crop_size": {"height": height, "width": width}},
        **{"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True},
        "image_mean": list(pretrained.get("mean") or _MEAN),
        "image_std": list(pretrained.get("std") or _STD),
    }

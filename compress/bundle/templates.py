"""The files of a bundle that are written from its manifest: examples in four languages, and the page."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files

from compress.bundle.manifest import Manifest
from compress.targets import AppProfile

PAGE, STAND_INS, SCRIPTS = "index.html", "stand_ins.json", ("answer.mjs", "page.mjs", "style.css")
EXAMPLES = "examples"
_PLACE = re.compile(r"\{\{(\w+)\}\}")
_WRITTEN = (".kt", ".swift")
_SHOWN = 3


def examples(manifest: Manifest, profile: AppProfile) -> dict[str, bytes]:
    """Path -> contents of the target's examples."""
    found = {}
    for name in profile.examples:
        text = _template("examples", name)
        if name.endswith(_WRITTEN):
            text = _filled(text, _in_code(manifest))
        found[f"{EXAMPLES}/{name}"] = text.encode()
    return found


def page(manifest: Manifest, texts: Sequence[str]) -> dict[str, bytes]:
    """Path -> contents of the page that answers by itself; ``texts`` are shown to try."""
    shown = [text for text in texts if 0 < len(text) <= 60][:_SHOWN] or ["Hello"]
    buttons = (f'<button type="button" class="example">{escape(text)}</button>' for text in shown)
    provenance = manifest.provenance
    facts = f"{manifest.name}, recipe {provenance.recipe}; {manifest.runtime.name} {manifest.runtime.minimum_version}"
    values = {
        "name": escape(manifest.name),
        "task": escape(manifest.task.replace("-", " ").capitalize()),
        "model": escape(manifest.model),
        "tokenizer": escape(manifest.preprocessing.tokenizer),
        "first": escape(shown[0]),
        "examples": "\n".join(buttons),
        "facts": escape(facts),
    }
    found = {name: _template("web", name).encode() for name in SCRIPTS}
    return {**found, PAGE: _filled(_template("web", PAGE), values).encode()}


def _in_code(manifest: Manifest) -> dict[str, str]:
    rule, labels = manifest.preprocessing, manifest.postprocessing.labels
    names = [entry.name for entry in manifest.inputs]
    kotlin = {"input_ids": "ids", "attention_mask": "LongArray(ids.size) { 1 }"}
    swift = {"input_ids": "ids.map(Int64.init)", "attention_mask": "ids.map { _ in 1 }"}
    return {
        "name": manifest.name.replace("\n", " "),
        "version": manifest.runtime.minimum_version,
        "labels_kotlin": ", ".join(_quoted(label, '\\"$', "\\u{:04x}") for label in labels),
        "labels_swift": ", ".join(_quoted(label, '\\"', "\\u{{{:x}}}") for label in labels),
        "prefix": ", ".join(map(str, rule.prefix_ids)),
        "suffix": ", ".join(map(str, rule.suffix_ids)),
        "max_length": str(rule.max_length),
        "model": manifest.model,
        "tokenizer": rule.tokenizer,
        "output": manifest.postprocessing.output,
        "inputs_kotlin": ", ".join(f'"{name}" to {kotlin[name]}' for name in names),
        "inputs_swift": ", ".join(f'"{name}": {swift[name]}' for name in names),
    }


def _quoted(label: str, special: str, code: str) -> str:
    """A string in a language where a backslash goes before ``special``, and ``code`` writes a control character."""
    marks = ("\\" + mark if mark in special else code.format(ord(mark)) if mark < " " else mark for mark in label)
    return '"' + "".join(marks) + '"'


def _template(folder: str, name: str) -> str:
    return (files("compress.bundle") / folder / name).read_text(encoding="utf-8")


def _filled(text: str, values: Mapping[str, str]) -> str:
    return _PLACE.sub(lambda place: values[place[1]], text)

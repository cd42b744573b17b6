"""The files of a bundle that are written from its manifest: examples in four languages, the page and the model card."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from html import escape
from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from compress.bundle.format import bundled
from compress.bundle.kind import Case, Kind
from compress.bundle.manifest import MANIFEST, SELFTEST, SIGNATURE, Manifest
from compress.targets import AppProfile, Language

PAGE = "index.html"
EXAMPLES = "examples"
_SOURCES = files("compress.bundle")
_PLACE = re.compile(r"\{\{(\w+)\}\}")
_WRITTEN = (".kt", ".swift")
_IDENTIFIER = re.compile(r"^[a-z0-9][a-z0-9.-]*$")
_MODELS: Mapping[Language, str] = {"python": "model.py", "kotlin": "Model.kt", "swift": "Model.swift"}
"""The other half of an example in that language; the page's code has it in itself."""


def examples(manifest: Manifest, kind: Kind, profile: AppProfile) -> dict[str, bytes]:
    """Path -> contents of the target's examples: those of the task, and the model that they ask, of the format."""
    languages, form = profile.apps[manifest.format].languages, bundled(manifest.format)
    own, models = _SOURCES / EXAMPLES / kind.examples, files(form.examples) / EXAMPLES
    names = [(own, kind.example(language)) for language in languages]
    names += [(own, name) for name in kind.inputs.node_files if "node" in languages]
    names += [(models, _MODELS[language]) for language in languages if language in _MODELS]
    found = {}
    for folder, name in names:
        text = (folder / name).read_text(encoding="utf-8")
        if name.endswith(_WRITTEN):
            text = _filled(text, _in_code(manifest))
        found[f"{EXAMPLES}/{name}"] = text.encode()
    return found


def page(manifest: Manifest, kind: Kind, cases: Sequence[Case]) -> dict[str, bytes]:
    """Path -> contents of the page that answers by itself; some of ``cases`` are shown to try."""
    provenance = manifest.provenance
    facts = f"{manifest.name}, recipe {provenance.recipe}; {manifest.runtime.name} {manifest.runtime.minimum_version}"
    values = {
        "name": escape(manifest.name),
        "task": escape(manifest.task.replace("-", " ").capitalize()),
        "model": escape(manifest.model),
        "facts": escape(facts),
        **kind.inputs.in_page(manifest.preprocessing, cases),
    }
    web = _SOURCES / "web"
    steps = (kind.inputs.folder, kind.answers.folder) if kind.client.prepares else ()
    own = [place for name in (*steps, kind.name) for place in (web / name).iterdir()]
    places = (*(web / name for name in kind.client.shared), *sorted(own, key=lambda at: at.name))
    found = {place.name: place.read_text(encoding="utf-8") for place in places}
    found[PAGE] = _filled(found[PAGE], values)
    return {name: text.encode() for name, text in found.items()}


def model_card(manifest: Manifest, kind: Kind, profile: AppProfile, unmeasured: str | None) -> str:
    """README.md with the front matter that Hugging Face reads: what the model is for, how an app runs it, its limits.

    ``unmeasured``: why the self-test has no answers, if it has none.
    """
    one, too_large = manifest.preprocessing.in_words()
    gets, trust = manifest.postprocessing.in_words()
    licence = next(entry.licence for entry in manifest.licences if entry.of == "model")
    languages = () if profile.version is not None else profile.apps[manifest.format].languages
    written = Environment(trim_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined)
    written.filters["json"] = partial(json.dumps, ensure_ascii=False)
    return written.from_string((_SOURCES / "card.md").read_text(encoding="utf-8")).render(
        manifest=manifest,
        kind=kind,
        profile=profile,
        unmeasured=unmeasured,
        one=one,
        too_large=too_large,
        gets=gets,
        trust=trust,
        licence=licence,
        identified=_IDENTIFIER.match(licence.lower()),
        library=bundled(manifest.format).library,
        examples=", ".join(f"`{EXAMPLES}/{kind.example(language)}`" for language in languages),
        manifest_file=MANIFEST,
        selftest=SELFTEST,
        signature=SIGNATURE,
    )


def _in_code(manifest: Manifest) -> dict[str, str]:
    return {
        "name": manifest.name.replace("\n", " "),
        "version": manifest.runtime.minimum_version,
        "model": manifest.model,
        "inputs": ", ".join(f'"{entry.name}"' for entry in manifest.inputs),
        "outputs": ", ".join(f'"{entry.name}"' for entry in manifest.outputs),
        "signatures_kotlin": ", ".join(f'"{one.name}" to {one.length or 0}' for one in manifest.signatures),
        "output": manifest.postprocessing.output,
        **manifest.preprocessing.in_code(),
        **manifest.postprocessing.in_code(),
    }


def _filled(text: str, values: Mapping[str, str]) -> str:
    return _PLACE.sub(lambda place: values[place[1]], text)

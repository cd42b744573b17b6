"""Files of a bundle that are written from its manifest: examples in Python or JavaScript, the page, the model card."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from html import escape
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from compress.formats.registry import FORMATS
from compress.formats.target_profile import AppProfile
from compress.plugins.apps.app_type import Case, Kind
from compress.plugins.apps.format import bundled
from compress.plugins.apps.manifest import MANIFEST, SELFTEST, SIGNATURE, Manifest
from compress.plugins.apps.provenance import Figures
from compress.plugins.provenance.card import card_data, render_card

PAGE = "index.html"
EXAMPLES = "examples"
_SOURCES = files("compress.plugins.apps")
_MODEL = "model.py"
"""Part of the Python example that runs the model; every format has its own."""


TEMPLATES = Environment(
    loader=PackageLoader("compress.plugins.apps", ""),
    trim_blocks=True,
    keep_trailing_newline=True,
    undefined=StrictUndefined,
)
TEMPLATES.filters |= {
    "flat": lambda text: " ".join(text.split()),
    "html": escape,
    "json": partial(json.dumps, ensure_ascii=False),
}


def examples(manifest: Manifest, kind: Kind, profile: AppProfile) -> dict[str, bytes]:
    """Path -> contents of the target's examples: those of the task, and the model that they ask, of the format."""
    languages, form = profile.apps[manifest.format].languages, bundled(manifest.format)
    models, values, found = files(form.examples) / EXAMPLES, _values(manifest), {}
    for language in languages:
        own = f"{EXAMPLES}/{kind.examples}/{kind.example(language)}"
        own += ".jinja" if language == "python" else ""
        # Node's are plain JavaScript, with braces of their own.
        raw = language == "node"
        found[kind.example(language)] = (
            (_SOURCES / own).read_text(encoding="utf-8") if raw else TEMPLATES.get_template(own).render(values)
        )
        for name in kind.inputs.node_files if raw else ():
            found[name.rpartition("/")[2]] = (_SOURCES / EXAMPLES / name).read_text(encoding="utf-8")
        if language == "python":
            found[_MODEL] = (models / _MODEL).read_text(encoding="utf-8")
    return {f"{EXAMPLES}/{name}": text.encode() for name, text in found.items()}


def page(manifest: Manifest, kind: Kind, cases: Sequence[Case]) -> dict[str, bytes]:
    """Path -> contents of the page that answers by itself; some of ``cases`` are shown to try."""
    runtime, recipe = manifest.runtime, manifest.provenance.recipe
    shown = kind.inputs.shown(cases)
    web = _SOURCES / "web"
    steps = (kind.inputs.folder, kind.answers.folder) if kind.client.prepares else (kind.answers.folder,)
    own = [place for name in (*steps, kind.name) if (web / name).is_dir() for place in (web / name).iterdir()]
    shared = (web / name for name in (*kind.client.shared, *kind.inputs.page_files))
    places = (*shared, *sorted(own, key=lambda at: at.name))
    found = {place.name: place.read_bytes() for place in places}
    written = TEMPLATES.get_template(f"web/{kind.name}/{PAGE}").render(
        _values(manifest),
        task=manifest.task.replace("-", " ").capitalize(),
        facts=f"{manifest.name}, recipe {recipe}; {runtime.name} {runtime.minimum_version}",
        shown=shown,
    )
    return {**found, PAGE: written.encode()}


def model_card(
    manifest: Manifest, kind: Kind, profile: AppProfile, unmeasured: str | None, figures: Figures | None
) -> str:
    """README.md, a card as every run has one: what the model is for, how an app runs it, its limits.

    ``unmeasured``: why the self-test has no answers, if it has none. ``figures`` are what its run measured.
    """
    one, too_large = manifest.preprocessing.in_words()
    gets, trust = manifest.postprocessing.in_words()
    licence = next(entry.licence for entry in manifest.licences if entry.of == "model")
    languages = () if profile.version is not None else profile.apps[manifest.format].languages
    library = FORMATS[manifest.format].library or manifest.format
    results = figures.results if figures else None
    return render_card(
        "plugins/apps/card.md",
        card_data(licence, manifest.task, library, model_name=manifest.name, eval_results=results),
        figures.rows if figures else (),
        title=manifest.name,
        licences=[(entry.of, entry.licence) for entry in manifest.licences],
        manifest=manifest,
        kind=kind,
        profile=profile,
        unmeasured=unmeasured,
        one=one,
        too_large=too_large,
        gets=gets,
        trust=trust,
        examples=", ".join(f"`{EXAMPLES}/{kind.example(language)}`" for language in languages),
        manifest_file=MANIFEST,
        selftest=SELFTEST,
        signature=SIGNATURE,
    )


def _values(manifest: Manifest) -> dict[str, Any]:
    """What examples and pages are filled with; formats' own know the plain texts among it."""
    return {
        "manifest": manifest,
        "rule": manifest.preprocessing,
        "end": manifest.postprocessing,
        "name": manifest.name.replace("\n", " "),
        "version": manifest.runtime.minimum_version,
        "model": manifest.model,
        "output": manifest.postprocessing.output,
    }

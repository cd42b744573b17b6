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
from compress.plugins.apps.app_type import AppType, Case
from compress.plugins.apps.format import find_bundled_format
from compress.plugins.apps.manifest import MANIFEST, SELFTEST, SIGNATURE, Manifest
from compress.plugins.apps.provenance import RunMeasurements
from compress.plugins.provenance.card import card_data, render_card

PAGE = "index.html"
EXAMPLES = "examples"
_SOURCES = files("compress.plugins.apps")
_MODEL = "model.py"
"""Part of the Python example that runs the model. Every format has its own."""


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


def examples(manifest: Manifest, kind: AppType, profile: AppProfile) -> dict[str, bytes]:
    """Return the contents of the target's examples by path: the task's program, and the module that runs the model."""
    languages, bundled_format = profile.apps[manifest.format].languages, find_bundled_format(manifest.format)
    models, values, contents = files(bundled_format.examples) / EXAMPLES, _values(manifest), {}
    for language in languages:
        template_path = f"{EXAMPLES}/{kind.examples}/{kind.example(language)}"
        template_path += ".jinja" if language == "python" else ""
        # Node examples are no templates: JavaScript uses braces itself.
        is_plain = language == "node"
        contents[kind.example(language)] = (
            (_SOURCES / template_path).read_text(encoding="utf-8")
            if is_plain
            else TEMPLATES.get_template(template_path).render(values)
        )
        for name in kind.inputs.node_files if is_plain else ():
            contents[name.rpartition("/")[2]] = (_SOURCES / EXAMPLES / name).read_text(encoding="utf-8")
        if language == "python":
            contents[_MODEL] = (models / _MODEL).read_text(encoding="utf-8")
    return {f"{EXAMPLES}/{name}": text.encode() for name, text in contents.items()}


def page(manifest: Manifest, kind: AppType, cases: Sequence[Case]) -> dict[str, bytes]:
    """Return the contents of the page by path. Some of ``cases`` are offered to try."""
    runtime, recipe = manifest.runtime, manifest.provenance.recipe
    shown = kind.inputs.shown(cases)
    web = _SOURCES / "web"
    # A library that prepares inputs itself needs only the folder that interprets answers.
    steps = (kind.inputs.folder, kind.answers.folder) if kind.client.prepares else (kind.answers.folder,)
    task_files = [path for name in (*steps, kind.name) if (web / name).is_dir() for path in (web / name).iterdir()]
    shared = (web / name for name in (*kind.client.shared, *kind.inputs.page_files))
    paths = (*shared, *sorted(task_files, key=lambda at: at.name))
    contents = {path.name: path.read_bytes() for path in paths}
    html = TEMPLATES.get_template(f"web/{kind.name}/{PAGE}").render(
        _values(manifest),
        task=manifest.task.replace("-", " ").capitalize(),
        facts=f"{manifest.name}, recipe {recipe}; {runtime.name} {runtime.minimum_version}",
        shown=shown,
    )
    return {**contents, PAGE: html.encode()}


def model_card(
    manifest: Manifest, kind: AppType, profile: AppProfile, unmeasured: str | None, figures: RunMeasurements | None
) -> str:
    """Return the model card (README.md): purpose, use in an app, limits and measurements.

    Args:
        manifest: Manifest of the bundle.
        kind: Application type.
        profile: Platform of the application.
        unmeasured: Reason why the self-test has no answers, if it has none.
        figures: Measurements of the run.
    """
    input_name, too_large = manifest.preprocessing.in_words()
    answer, caveat = manifest.postprocessing.in_words()
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
        one=input_name,
        too_large=too_large,
        gets=answer,
        trust=caveat,
        examples=", ".join(f"`{EXAMPLES}/{kind.example(language)}`" for language in languages),
        manifest_file=MANIFEST,
        selftest=SELFTEST,
        signature=SIGNATURE,
    )


def _values(manifest: Manifest) -> dict[str, Any]:
    """Return the values for example and page templates."""
    return {
        "manifest": manifest,
        "rule": manifest.preprocessing,
        "end": manifest.postprocessing,
        "name": manifest.name.replace("\n", " "),
        "version": manifest.runtime.minimum_version,
        "model": manifest.model,
        "output": manifest.postprocessing.output,
    }

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
from compress.plugins.apps.app_type import SCRIPTS, AppType, Case
from compress.plugins.apps.format import find_bundled_format
from compress.plugins.apps.manifest import MANIFEST, SELFTEST, SIGNATURE, Manifest
from compress.plugins.provenance.card import card_data, render_card
from compress.results.report import Measurement

PAGE = "index.html"
EXAMPLES = "examples"
_SOURCES = files("compress.plugins.apps")
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
    contents = {}
    for language in profile.apps[manifest.format].languages:
        path = f"{EXAMPLES}/{kind.examples}/{SCRIPTS[language]}"
        if language == "python":
            # Every format has its own part of the example that runs the model, and names its package.
            model = files(find_bundled_format(manifest.format).examples) / EXAMPLES / "model.py"
            contents["model.py"] = model.read_bytes()
            package = contents["model.py"].decode().partition("pip install ")[2].split()[0]
            values = {**_values(manifest), "package": package}
            contents[SCRIPTS[language]] = TEMPLATES.get_template(f"{path}.jinja").render(values).encode()
        else:
            # Node examples are no templates: JavaScript uses braces itself.
            contents[SCRIPTS[language]] = (_SOURCES / path).read_bytes()
            for name in kind.inputs.node_files:
                contents[name.rpartition("/")[2]] = (_SOURCES / EXAMPLES / name).read_bytes()
    return {f"{EXAMPLES}/{name}": content for name, content in contents.items()}


def page(manifest: Manifest, kind: AppType, cases: Sequence[Case]) -> dict[str, bytes]:
    """Return the contents of the page by path. Some of ``cases`` are offered to try."""
    runtime, web = manifest.runtime, _SOURCES / "web"
    # A library that prepares inputs itself needs only the folder that interprets answers.
    steps = (kind.inputs.web, kind.answers.web) if kind.client.prepares else (kind.answers.web,)
    task_files = [path for name in (*steps, kind.name) if (web / name).is_dir() for path in (web / name).iterdir()]
    shared = (web / name for name in (*kind.client.shared, *kind.inputs.page_files))
    paths = (*shared, *sorted(task_files, key=lambda at: at.name))
    contents = {path.name: path.read_bytes() for path in paths}
    html = TEMPLATES.get_template(f"web/{kind.name}/{PAGE}").render(
        _values(manifest),
        task=manifest.task.replace("-", " ").capitalize(),
        facts=f"{manifest.name}, recipe {manifest.provenance.recipe}; {runtime.name} {runtime.minimum_version}",
        shown=kind.inputs.shown(cases),
    )
    return {**contents, PAGE: html.encode()}


def model_card(
    manifest: Manifest, kind: AppType, profile: AppProfile, unmeasured: str | None, figures: Sequence[Measurement]
) -> str:
    """Return the model card (README.md): purpose, use in an app, limits and measurements.

    Args:
        manifest: Manifest of the bundle.
        kind: Application type.
        profile: Platform of the application.
        unmeasured: Reason why the self-test has no answers, if it has none.
        figures: Measurements of the run.
    """
    one, too_large = manifest.preprocessing.in_words()
    gets, trust = manifest.postprocessing.in_words()
    licence = next(entry.licence for entry in manifest.licences if entry.of == "model")
    languages = () if profile.version is not None else profile.apps[manifest.format].languages
    library = FORMATS[manifest.format].library or manifest.format
    return render_card(
        "plugins/apps/card.md",
        # The results stand in the table alone. As front matter they would hide the text from readers of the file.
        card_data(licence, manifest.task, library),
        figures,
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
        examples=[f"{EXAMPLES}/{SCRIPTS[language]}" for language in languages],
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

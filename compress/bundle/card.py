"""The model card, README.md, with the front matter that Hugging Face reads."""

from __future__ import annotations

import json
import re

from compress.bundle.format import bundled
from compress.bundle.kind import Kind
from compress.bundle.manifest import MANIFEST, SELFTEST, SIGNATURE, Manifest
from compress.targets import AppProfile

_IDENTIFIER = re.compile(r"^[a-z0-9][a-z0-9.-]*$")


def model_card(manifest: Manifest, kind: Kind, profile: AppProfile, unmeasured: str | None) -> str:
    """What the model is for, how it was measured, how an app runs it, and what is not known of it.

    ``unmeasured``: why the self-test has no answers, if it has none.
    """
    article = "An" if manifest.task[0] in "aeiou" else "A"
    one, too_large = manifest.preprocessing.in_words()
    gets, trust = manifest.postprocessing.in_words()
    licence = next(entry.licence for entry in manifest.licences if entry.of == "model")
    short = licence.lower()
    head = [f"license: {short}"] if _IDENTIFIER.match(short) else ["license: other", f"license_name: {_yaml(licence)}"]
    lines = [
        "---",
        *head,
        f"pipeline_tag: {manifest.task}",
        f"library_name: {bundled(manifest.format).library}",
        "---",
        f"# {manifest.name}",
        "",
        f"{article} {manifest.task} model for {profile.target.description}, run by {manifest.runtime.name}. "
        f"{one} {gets}.",
        "",
        "## Run it",
        "",
        *_steps(manifest, kind, profile, unmeasured is None),
        "",
        f"`{MANIFEST}` says all of this to a program; `{SELFTEST}` has {kind.inputs.many} as they are prepared, and "
        + (f"no {kind.answers.many}: {unmeasured}." if unmeasured else f"{kind.answers.many}."),
        too_large,
        "",
        "## Measured",
        "",
        *_measured(manifest),
        "",
        "## Limits",
        "",
        f"What it learned from decides what it is good for: ask it about {kind.inputs.many} of that kind. {trust}",
        "",
        "## Licences",
        "",
        *(f"- {entry.of}: {entry.licence}" for entry in manifest.licences),
        "",
    ]
    return "\n".join(lines)


def _steps(manifest: Manifest, kind: Kind, profile: AppProfile, measured: bool) -> list[str]:
    runtime = f"{manifest.runtime.package} {manifest.runtime.minimum_version} or newer"
    if profile.version is not None:
        return [
            "1. `compress bundle-verify .` finds a changed byte and runs the self-test"
            f" (`{SIGNATURE}`, where there is one: `--signer KEY.pub`).",
            "2. `python3 -m http.server` here, and open the page that it names. It asks no other server for anything.",
            "3. `node examples/run.mjs --selftest` runs the same in Node; an app imports `answer.mjs`.",
            "4. Have your server compress `.wasm`, `.onnx`, `.json` and `.mjs` (brotli or gzip), and cache them.",
        ]
    files = ", ".join(f"`examples/{kind.example(language)}`" for language in profile.apps[manifest.format].languages)
    return [
        "1. `compress bundle-verify .` finds a changed byte and runs the self-test"
        f" (`{SIGNATURE}`, where there is one: `--signer KEY.pub`).",
        f"2. Take the runtime ({runtime}) into your app, and the folder `model/`.",
        f"3. Begin with {files}; {kind.inputs.many} are prepared by `preprocessing` in the manifest, and nothing else.",
        "4. Run the cases of the self-test on the device once: ids must be equal, pixels within 0.0001, features",
        "   within 0.001" + (f", and {kind.answers.many} within its tolerance." if measured else "."),
    ]


def _measured(manifest: Manifest) -> list[str]:
    provenance = manifest.provenance
    if not provenance.measured:
        return ["Nothing: the model did not come from a run's folder."]
    rows = [f"| {name} | {value:.6g} |" for name, value in provenance.measured.items()]
    return [
        f"By the run of the recipe {provenance.recipe}, on the file that ships, not on the device.",
        "",
        "| what | value |",
        "|---|---|",
        *rows,
    ]


def _yaml(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)

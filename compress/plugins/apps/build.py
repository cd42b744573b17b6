"""Making a bundle: everything is written beside its place, proven there, and only then given its name."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from compress.formats.model_file import format_of, model_file, model_files
from compress.formats.runtime import Batch, get_runtime, why_unavailable
from compress.formats.target_profile import AppProfile
from compress.formats.targets import TARGETS, in_format
from compress.models.processor import load_processor
from compress.pipeline.licence_detection import NOT_STATED
from compress.plugins.apps.app_type import Kind
from compress.plugins.apps.app_types import KINDS, kind_of
from compress.plugins.apps.archive import write_zip
from compress.plugins.apps.bundled_format import Contents
from compress.plugins.apps.client import FOLDER as RUNTIME_FOLDER
from compress.plugins.apps.download_size import check_budget, transferred, zipped
from compress.plugins.apps.format import bundled, minimum_version, open_model, shape_of, unread_reason
from compress.plugins.apps.format import contents as contents_of
from compress.plugins.apps.manifest import (
    CARD,
    MANIFEST,
    MODEL_FOLDER,
    SELFTEST,
    SIGNED,
    Manifest,
    Runtime,
    TensorRecord,
)
from compress.plugins.apps.provenance import Figures, find_figures, find_licences, find_provenance
from compress.plugins.apps.selftest import Asked, SelfTest, make_selftest, unmeasured_selftest
from compress.plugins.apps.templates import examples, model_card, page
from compress.plugins.apps.verify import verify_folder
from compress.plugins.provenance.run_view import SBOM
from compress.plugins.provenance.signature import sign
from compress.recipe.recipe import Recipe
from compress.tasks.capability import GENERATES
from compress.tasks.registry import get_task
from compress.utils.digests import FileRecord, digest_file
from compress.utils.errors import InputError, ModelError, StorageError
from compress.utils.progress import Progress

_SLOW_IN_PAGES = (
    "WebAssembly is slow with weights in few bits: with `expand_on_load: true` of the stage onnx a chat model is "
    "many times as fast in a page, and takes the memory of its float weights there"
)


@dataclass(frozen=True)
class Wanted:
    """Request for a bundle: a model's folder, its recipe, and the user's options."""

    model: Path
    recipe: Recipe
    recipe_file: Path
    profile: AppProfile
    samples: tuple[str, ...] = ()
    licence: str | None = None
    key: Path | None = None
    most_bytes: int | None = None


@dataclass(frozen=True)
class Bundle:
    """A finished bundle: its folder, the same as a zip, and its manifest."""

    folder: Path
    archive: Path
    manifest: Manifest


def build(wanted: Wanted, output: Path, progress: Progress) -> Bundle:
    """Write the folder ``output`` and ``output``.zip, or nothing.

    Raises `InputError` for a model or task that can't be bundled, an output that is there already or a budget that is
    missed, and `StorageError` where it can't be written.
    """
    archive = Path(f"{output}.zip")
    _check(wanted, output, archive)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as scratch:
            folder, packed = Path(scratch) / "bundle", Path(scratch) / "bundle.zip"
            folder.mkdir()
            manifest, contents = _fill(folder, wanted, progress)
            if wanted.key is not None:
                sign(folder, wanted.key, SIGNED)
            verify_folder(folder, None)
            if wanted.profile.version is not None:
                KINDS[manifest.steps].client.try_out(folder, progress)
            write_zip(folder, packed)
            if wanted.most_bytes is not None:
                sizes = zipped(packed) if wanted.profile.version is None else transferred(folder)
                check_budget(sizes, wanted.most_bytes, manifest.model, contents)
            folder.rename(output)
            packed.rename(archive)
    except OSError as error:
        raise StorageError(
            f"The bundle cannot be written: {error.strerror or error}.", where=str(error.filename or output)
        ) from error
    if any(entry.licence == NOT_STATED for entry in manifest.licences):
        progress.note("the model's licence is not stated; name it with --licence, so that an app may ship it")
    if (
        wanted.profile.version is not None
        and GENERATES in get_task(manifest.task).capabilities
        and contents.few_bit_products
    ):
        progress.note(_SLOW_IN_PAGES)
    return Bundle(output, archive, manifest)


def _check(wanted: Wanted, output: Path, archive: Path) -> None:
    form, allowed = format_of(wanted.model), wanted.profile.apps
    if form not in allowed:
        raise InputError(
            f"A bundle for {wanted.profile.name} cannot hold a model of {wanted.recipe.task} in the format {form}.",
            where=str(wanted.model),
            expected=" or ".join(allowed),
            hint="hand over the model's folder itself: transformers.js, optimum and llama.cpp open it as it is",
        )
    if (unread := unread_reason(bundled(form))) is not None:
        raise InputError(f"The model cannot be bundled here: {unread}.", where=str(wanted.model))
    for place in (output, archive):
        if place.exists() or place.is_symlink():
            raise InputError("The output is there already.", where=str(place), hint="remove it, or name another -o")


def _fill(folder: Path, wanted: Wanted, progress: Progress) -> tuple[Manifest, Contents]:
    """Every file, the manifest last."""
    shutil.copytree(wanted.model, folder / MODEL_FOLDER, copy_function=shutil.copyfile)
    kind, model = kind_of(wanted.recipe.task, wanted.model), folder / MODEL_FOLDER
    file = model_file(model) if kind.graphs == 1 else model_files(model)[0]
    written = format_of(file)
    form = bundled(written)
    target = TARGETS[form.target]
    silent = why_unavailable(target)
    contents, session = contents_of(form, file), None
    if kind.graphs > 1:
        others = [contents_of(form, one) for one in model_files(model)[1:]]
        contents = contents._replace(integers=any(one.integers for one in (contents, *others)))
    if silent is None:
        session = open_model(form, file if kind.graphs == 1 else model)
    shape = shape_of(form.interface(file, session), kind, str(file))
    processor, longest = load_processor(wanted.model), wanted.recipe.data.max_length
    rule = kind.inputs.find_rule(folder, processor, min(longest, shape.longest or longest))
    end = kind.answers.find_end(model, shape.outputs)
    cases = kind.inputs.make_cases(folder, rule, wanted.samples, processor)
    if session is None:
        test = unmeasured_selftest(cases, silent or "")
    else:
        made_with = f"{target.runtime} {get_runtime(target.runtime).build()}"
        asked = Asked(session, kind.inputs.open(folder, rule), kind.answers, end)
        _check_fits(asked.way.feed(cases[0]), shape.inputs)
        test = make_selftest(asked, cases, contents.integers, made_with)
    profile = wanted.profile
    figures = find_figures(wanted.recipe, wanted.recipe_file, _run_of(wanted), profile.name)
    if figures is not None and (bill := _run_of(wanted) / SBOM).is_file():
        shutil.copyfile(bill, folder / SBOM)
    licences = find_licences(wanted.recipe, wanted.recipe_file.parent, wanted.licence)
    manifest = Manifest(
        name=wanted.recipe.name,
        task=wanted.recipe.task,
        target=profile.name,
        runtime=_runtime(profile, kind, written, minimum_version(form, file)),
        format=written,
        model=file.relative_to(folder).as_posix(),
        opsets=contents.opsets,
        inputs=shape.inputs,
        outputs=shape.outputs,
        axes=dict(shape.axes),
        signatures=shape.signatures,
        preprocessing=rule,
        postprocessing=end,
        licences=(*licences, *kind.client.licences(kind.inputs.tokenizes)) if profile.version else licences,
        provenance=find_provenance(wanted.recipe, wanted.recipe_file, _run_of(wanted), profile.name),
        files={},
    )
    return _write(folder, manifest, kind, profile, test, figures, progress), contents


def _check_fits(feed: Batch, inputs: Sequence[TensorRecord]) -> None:
    """Raises `ModelError` where what an app prepares is of another size than the model takes."""
    for entry in inputs:
        given = feed[entry.name].shape if entry.name in feed else entry.shape
        if any(isinstance(wanted, int) and wanted != found for wanted, found in zip(entry.shape, given, strict=False)):
            raise ModelError(
                f"The model takes {entry.name} of shape {list(entry.shape)}, and an app would give it {list(given)}.",
                where="preprocessor_config.json",
                expected="a processor that brings every input to the model's size",
                hint='for pictures "do_resize": true and "size", which changes nothing of those that have it already',
            )


def _run_of(wanted: Wanted) -> Path:
    """Where its report would be: the recipe's folder, if the model lies below it."""
    folder = wanted.recipe_file.resolve().parent
    return folder if wanted.model.resolve().is_relative_to(folder) else wanted.model.parent


def _runtime(profile: AppProfile, kind: Kind, written: str, minimum_version: str) -> Runtime:
    app = profile.apps[written]
    name, package, least = app.runtime, app.package, minimum_version
    if profile.version is not None:
        name, package, least = kind.client.runs(profile)
    provider = in_format(profile, written).target.provider
    return Runtime(name=name, package=package, minimum_version=least, execution_provider=provider)


def _write(
    folder: Path,
    manifest: Manifest,
    kind: Kind,
    profile: AppProfile,
    test: SelfTest,
    figures: Figures | None,
    progress: Progress,
) -> Manifest:
    card = model_card(manifest, kind, profile, test.unmeasured, figures)
    written = {SELFTEST: test.to_bytes(), CARD: card.encode()}
    written |= examples(manifest, kind, profile)
    if profile.version is not None:
        (folder / RUNTIME_FOLDER).mkdir()
        kind.client.copy(folder / RUNTIME_FOLDER, kind.inputs.tokenizes, progress)
        written |= page(manifest, kind, test.cases)
        written |= kind.inputs.more_for_page(folder, manifest.preprocessing)
    for name, content in written.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    files = {
        path.relative_to(folder).as_posix(): FileRecord(size_bytes=path.stat().st_size, sha256=digest_file(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    whole = manifest.model_copy(update={"files": files})
    (folder / MANIFEST).write_bytes(whole.sealed())
    return whole

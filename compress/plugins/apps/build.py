"""Creation of bundles in a temporary folder, which is verified and then renamed."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from compress.formats.model_file import format_of, model_file, model_files
from compress.formats.runtime import Batch, get_runtime, why_unavailable
from compress.formats.target_profile import AppProfile
from compress.formats.targets import TARGETS, in_format
from compress.inspection.budget import size_advice
from compress.models.config_checks import max_positions
from compress.models.json_file import read_optional_json
from compress.models.processor import load_processor
from compress.pipeline.licence_detection import NOT_STATED
from compress.plugins.apps.app_type import AppType, Inputs
from compress.plugins.apps.app_types import APP_TYPES, find_app_type
from compress.plugins.apps.archive import write_zip
from compress.plugins.apps.bundled_format import FormatContents
from compress.plugins.apps.client import FOLDER as RUNTIME_FOLDER
from compress.plugins.apps.format import (
    find_bundled_format,
    minimum_version,
    open_model,
    record_interface,
    unread_reason,
)
from compress.plugins.apps.manifest import (
    CARD,
    MANIFEST,
    MODEL_FOLDER,
    SELFTEST,
    SIGNED,
    Manifest,
    ManifestRuntime,
    TensorRecord,
)
from compress.plugins.apps.provenance import find_licences, find_measurements, find_provenance
from compress.plugins.apps.selftest import ModelUnderTest, SelfTest, make_selftest, unmeasured_selftest
from compress.plugins.apps.templates import examples, model_card, page
from compress.plugins.apps.verify import verify_folder
from compress.plugins.provenance.run_view import SBOM
from compress.recipe.recipe import Recipe
from compress.results.report import Measurement
from compress.tasks.capability import GENERATES
from compress.tasks.registry import TASKS
from compress.utils.errors import InputError, ModelError, StageError, StorageError
from compress.utils.progress import Progress
from compress.utils.ssh_signatures import sign_file
from compress.utils.storage import FileRecord, digest_file

# Python has no brotli module. Node, which browser bundles need anyway, has one.
_SIZES = """
const [zlib, fs] = [require("zlib"), require("fs")], c = zlib.constants;
const params = {[c.BROTLI_PARAM_QUALITY]: 11, [c.BROTLI_PARAM_LGWIN]: 24};
const size = (path) => zlib.brotliCompressSync(fs.readFileSync(path), {params}).length;
process.stdout.write(JSON.stringify(JSON.parse(fs.readFileSync(0, "utf8")).map(size)));
"""


def brotli_sizes(folder: Path) -> dict[str, int]:
    """Return the brotli size of each file that a page of the bundle may request, by path.

    Raises:
        InputError: Node, whose brotli is used, is not installed.
        StageError: Node fails.
    """
    program = shutil.which("node")
    if program is None:
        raise InputError("A budget for browsers is counted in brotli, which takes Node.", hint="put node on PATH")
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    # A page never asks for the rest.
    names = [name for name in names if not name.startswith(("examples/", "runtime/LICENSE", CARD, SELFTEST))]
    try:
        done = subprocess.run(
            [program, "-e", _SIZES], cwd=folder, input=json.dumps(names), capture_output=True, text=True,
            timeout=600, check=True,
        )  # fmt: skip
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise StageError(f"Node could not compress the bundle: {error}") from error
    return dict(zip(names, json.loads(done.stdout), strict=True))


def check_budget(sizes: Mapping[str, int], most: int, model: str, contents: FormatContents) -> None:
    """Raise `InputError` if the files exceed ``most`` bytes, with the largest files and advice.

    Args:
        sizes: Transferred bytes of each file.
        most: Size limit in bytes.
        model: Path of the model in the bundle.
        contents: Operators and tensors of the model.
    """
    total = sum(sizes.values())
    if total <= most:
        return
    largest = sorted(sizes, key=lambda name: -sizes[name])[:5]
    runtime = sum(size for name, size in sizes.items() if name.startswith("runtime/"))
    weighed = sum(size for name, size in sizes.items() if name == model or name.startswith(f"{model}/"))
    shown = ", ".join(f"{name} {sizes[name] / 1e6:.2f} MB" for name in largest)
    raise InputError(
        f"The bundle has {total / 1e6:.2f} MB compressed, {(total - most) / 1e6:.2f} MB too many.",
        where=f"biggest, compressed: {shown}",
        expected=f"at most {most} bytes",
        hint="; ".join(size_advice(contents.stored, weighed, runtime, most)),
    )


@dataclass(frozen=True)
class BundleRequest:
    """Request for a bundle: folder and recipe of a model, and the user's options."""

    model: Path
    recipe: Recipe
    recipe_file: Path
    profile: AppProfile
    samples: tuple[str, ...] = ()
    licence: str | None = None
    key: Path | None = None
    most_bytes: int | None = None

    @property
    def run(self) -> Path:
        """Return the folder of the run: the recipe's folder if the model lies below it, else the model's parent."""
        folder = self.recipe_file.resolve().parent
        return folder if self.model.resolve().is_relative_to(folder) else self.model.parent


@dataclass(frozen=True)
class Bundle:
    """Finished bundle: its folder, the zip of this folder, and the manifest."""

    folder: Path
    archive: Path
    manifest: Manifest


def build(request: BundleRequest, output: Path, progress: Progress) -> Bundle:
    """Write the folder ``output`` and ``output``.zip, or nothing.

    Args:
        request: Model and options.
        output: Folder to create.
        progress: Shows the steps.

    Returns:
        The finished bundle.

    Raises:
        InputError: The model or task cannot be bundled, the output exists, or the size limit is exceeded.
        StorageError: The bundle cannot be written.
    """
    archive = Path(f"{output}.zip")
    _check(request, output, archive)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as scratch:
            folder, packed = Path(scratch) / "bundle", Path(scratch) / "bundle.zip"
            folder.mkdir()
            manifest, contents = _fill(folder, request, progress)
            if request.key is not None:
                sign_file(folder, request.key, SIGNED)
            # Verify the folder as a user would, before anything gets its final name.
            verify_folder(folder, None)
            if request.profile.version is not None:
                APP_TYPES[manifest.steps].client.try_out(folder, progress)
            write_zip(folder, packed)
            # Browsers request single files, whereas other platforms download the zip.
            if request.most_bytes is not None:
                if request.profile.version is None:
                    with zipfile.ZipFile(packed) as opened:
                        sizes = {entry.filename: entry.compress_size for entry in opened.infolist()}
                else:
                    sizes = brotli_sizes(folder)
                check_budget(sizes, request.most_bytes, manifest.model, contents)
            # The scratch folder is on the same disk, so that both renames are atomic.
            folder.rename(output)
            packed.rename(archive)
    except OSError as error:
        raise StorageError(
            f"The bundle cannot be written: {error.strerror or error}.", where=str(error.filename or output)
        ) from error
    if any(entry.licence == NOT_STATED for entry in manifest.licences):
        progress.note("the model's licence is not stated; name it with --licence, so that an app may ship it")
    is_page, generates = request.profile.version is not None, GENERATES in TASKS[manifest.task].capabilities
    if is_page and generates and contents.few_bit_products:
        progress.note(
            "WebAssembly is slow with weights in few bits: with `expand_on_load: true` of the stage onnx a chat model "
            "is many times as fast in a page, and takes the memory of its float weights there"
        )
    return Bundle(output, archive, manifest)


def _check(request: BundleRequest, output: Path, archive: Path) -> None:
    """Raise `InputError` if the model cannot be bundled for the profile, or the output exists."""
    format_name, allowed = format_of(request.model), request.profile.apps
    if format_name not in allowed:
        raise InputError(
            f"A bundle for {request.profile.name} cannot hold a model of {request.recipe.task} in the format "
            f"{format_name}.",
            where=str(request.model),
            expected=" or ".join(allowed),
            hint="hand over the model's folder itself: transformers.js, optimum and llama.cpp open it as it is",
        )
    if (unread := unread_reason(find_bundled_format(format_name))) is not None:
        raise InputError(f"The model cannot be bundled here: {unread}.", where=str(request.model))
    for path in (output, archive):
        if path.exists() or path.is_symlink():
            raise InputError("The output is there already.", where=str(path), hint="remove it, or name another -o")


def _fill(folder: Path, request: BundleRequest, progress: Progress) -> tuple[Manifest, FormatContents]:
    """Write all files of the bundle, the manifest last.

    Returns:
        The manifest, and the operators and tensors of the model file.
    """
    shutil.copytree(request.model, folder / MODEL_FOLDER, copy_function=shutil.copyfile)
    kind, model = find_app_type(request.recipe.task, request.model), folder / MODEL_FOLDER
    file = model_file(model) if kind.graphs == 1 else model_files(model)[0]
    format_name = format_of(file)
    bundled_format = find_bundled_format(format_name)
    target, profile = TARGETS[bundled_format.target], request.profile
    # Some formats run only on other machines. Their self-test has inputs without answers.
    unavailable_reason = why_unavailable(target)
    contents, session = bundled_format.contents(file), None
    # One graph with integer arithmetic is enough for the larger tolerance.
    if kind.graphs > 1:
        contents = contents._replace(integers=any(bundled_format.contents(f).integers for f in model_files(model)))
    if unavailable_reason is None:
        session = open_model(bundled_format, file if kind.graphs == 1 else model)
    shape = record_interface(bundled_format.interface(file, session), kind, str(file))
    # The rules come from the processor of transformers. Every built-in and user sample verifies them.
    processor, positions = load_processor(request.model), max_positions(read_optional_json(model / "config.json"))
    # A model with learned positions cannot read beyond them, whatever the recipe says.
    longest = min(filter(None, (request.recipe.data.max_length, shape.longest, positions)))
    rule = kind.inputs.find_rule(folder, processor, longest)
    postprocessing = kind.answers.find_postprocessing(model, shape.outputs)
    preparation = kind.inputs(folder, rule)
    cases = preparation.make_cases(request.samples, processor)
    if session is None:
        selftest = unmeasured_selftest(cases, unavailable_reason or "")
    else:
        made_with = f"{target.runtime} {get_runtime(target.runtime).build()}"
        _check_fits(preparation.feed(cases[0]), shape.inputs)
        tested_model = ModelUnderTest(session, preparation, kind.answers, postprocessing)
        selftest = make_selftest(tested_model, cases, contents.integers, made_with)
    figures = find_measurements(request.recipe_file, request.run, profile.name)
    if figures and (request.run / SBOM).is_file():
        shutil.copyfile(request.run / SBOM, folder / SBOM)
    licences = find_licences(request.recipe, request.recipe_file.parent, request.licence)
    manifest = Manifest(
        name=request.recipe.name,
        task=request.recipe.task,
        target=profile.name,
        runtime=_runtime(profile, kind, format_name, minimum_version(bundled_format, file)),
        format=format_name,
        model=file.relative_to(folder).as_posix(),
        opsets=contents.opsets,
        inputs=shape.inputs,
        outputs=shape.outputs,
        axes=dict(shape.axes),
        signatures=shape.signatures,
        preprocessing=rule,
        postprocessing=postprocessing,
        licences=(*licences, *kind.client.licences(kind.inputs.tokenizes)) if profile.version else licences,
        provenance=find_provenance(request.recipe, request.recipe_file, request.run, profile.name),
        files={},
    )
    return _write(folder, manifest, preparation, profile, selftest, figures, progress), contents


def _check_fits(feed: Batch, inputs: Sequence[TensorRecord]) -> None:
    """Raise `ModelError` if prepared inputs have another size than the model takes."""
    for entry in inputs:
        prepared_shape = feed[entry.name].shape if entry.name in feed else entry.shape
        # Only fixed sizes can be compared. A named axis has any size.
        if any(
            isinstance(expected_size, int) and expected_size != prepared_size
            for expected_size, prepared_size in zip(entry.shape, prepared_shape, strict=False)
        ):
            raise ModelError(
                f"The model takes {entry.name} of shape {list(entry.shape)}, and an app would give it "
                f"{list(prepared_shape)}.",
                where="preprocessor_config.json",
                expected="a processor that brings every input to the model's size",
                hint='for pictures "do_resize": true and "size", which changes nothing of those that have it already',
            )


def _runtime(profile: AppProfile, kind: AppType, written: str, minimum_version: str) -> ManifestRuntime:
    """Return the runtime for the manifest. A page has its own runtime library."""
    app = profile.apps[written]
    name, package, least = app.runtime, app.package, minimum_version
    if profile.version is not None:
        name, package, least = kind.client.runtime(profile)
    provider = in_format(profile, written).target.provider
    return ManifestRuntime(name=name, package=package, minimum_version=least, execution_provider=provider)


def _write(
    folder: Path,
    manifest: Manifest,
    preparation: Inputs,
    profile: AppProfile,
    test: SelfTest,
    figures: Sequence[Measurement],
    progress: Progress,
) -> Manifest:
    """Write self-test, card, examples and page, and then the manifest with the digests of all files.

    Args:
        folder: Folder of the bundle.
        manifest: Manifest without files.
        preparation: Preparation of inputs.
        profile: Platform of the application.
        test: Self-test.
        figures: Measurements of the run for the card.
        progress: Shows downloads.
    """
    kind = APP_TYPES[manifest.steps]
    card = model_card(manifest, kind, profile, test.unmeasured, figures)
    contents_by_name = {SELFTEST: test.to_bytes(), CARD: card.encode()}
    contents_by_name |= examples(manifest, kind, profile)
    if profile.version is not None:
        (folder / RUNTIME_FOLDER).mkdir()
        kind.client.copy(folder / RUNTIME_FOLDER, kind.inputs.tokenizes, progress)
        contents_by_name |= page(manifest, kind, test.cases)
        contents_by_name |= preparation.more_for_page()
    for name, content in contents_by_name.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    # The manifest is written last, since it lists the digests of all other files.
    files = {
        path.relative_to(folder).as_posix(): FileRecord(size_bytes=path.stat().st_size, sha256=digest_file(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    complete = manifest.model_copy(update={"files": files})
    (folder / MANIFEST).write_bytes(complete.sealed())
    return complete

"""Command `compress profile ARTIFACT`: time of each operator, compared with the limits of this machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from compress.benchmark.profile import OperatorProfile
    from compress.benchmark.profiled_calls import ProfiledCalls, TextPhase
    from compress.formats.target_profile import Target
    from compress.pipeline.artifact import Artifact
    from compress.utils.progress import Progress


def profile(
    artifact: Annotated[Path, typer.Argument(help="A run's folder or name, its model/ folder, or any exported model.")],
    recipe: Annotated[Path | None, typer.Option(help="Recipe; default: the recipe.yaml beside the model.")] = None,
    target: Annotated[str, typer.Option(help="Target of the model, on the processor.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the runtime; default: the recipe's.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Examples in a batch; default 1.")] = None,
    phase: Annotated[
        Literal["token", "prompt"] | None,
        typer.Option(help="Text generation: profile one token after a prompt (default), or the prompt."),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            min=1, help="Text generation: tokens of the prompt; default: the smallest of `benchmark.contexts`."
        ),
    ] = None,
    part: Annotated[
        str | None,
        typer.Option(help="Image generation: `text_encoder`, `vae_decoder`, or the denoiser (default)."),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Time budget of the measurement.")] = 5.0,
    html: Annotated[Path | None, typer.Option(help="Write a page with a roofline chart to this file.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Write the profile as JSON.")] = False,
) -> None:
    """Time every operator on real examples or text, against the arithmetic and bandwidth that this machine reaches."""
    from compress.formats.targets import find_target
    from compress.pipeline.artifact import check_opens, find_artifact
    from compress.report.progress import ConsoleProgress
    from compress.tasks.capability import GENERATES_IMAGES
    from compress.utils.errors import InputError

    subject, runtime_target = find_artifact(artifact, recipe), find_target(target)
    check_opens(subject.folder, runtime_target)
    # Check the file first, since the measurement takes a while.
    if html is not None and (html.is_dir() or not html.absolute().parent.is_dir()):
        raise InputError(
            "The page cannot be written there.", where=str(html), expected="the name of a file in a folder that exists"
        )
    from compress.benchmark.operators import profile_operators, refuse_other_devices
    from compress.formats.quiet_output import quiet_libraries

    refuse_other_devices(runtime_target)
    quiet_libraries()
    progress = ConsoleProgress()
    benchmark, seed = subject.recipe.benchmark, subject.recipe.seed
    generates_images = GENERATES_IMAGES in subject.task.capabilities
    if part is not None and not generates_images:
        raise InputError(f"--part has no effect for {subject.task.name}.", expected="a model that generates images")
    if generates_images:
        idle: dict[str, object] = {"--batch-size": batch_size, "--phase": phase, "--context": context}
        folder, calls = _part_calls(subject, runtime_target, part, idle, progress)
    else:
        folder, calls = subject.folder, _calls(subject, batch_size, phase, context, progress)
    result = profile_operators(folder, calls, runtime_target, threads or benchmark.threads, seconds, progress, seed)
    _print_profile(result, html, json_, progress)


def _print_profile(result: OperatorProfile, html: Path | None, json_: bool, progress: Progress) -> None:
    """Print a profile, and write its page if a file is named.

    Args:
        result: The profile.
        html: File of the page.
        json_: Print JSON.
        progress: Progress display.

    Raises:
        InputError: The page cannot be written.
    """
    from compress.utils.errors import InputError

    if html is not None:
        from compress.report.profile_views import profile_page

        try:
            html.write_text(profile_page(result), encoding="utf-8")
        except OSError as error:
            raise InputError(f"The page cannot be written: {error.strerror}.", where=str(html)) from error
        progress.note(f"wrote {html}")
    if json_:
        typer.echo(json.dumps(result.to_json()))
        return
    from compress.cli.output import show_hint
    from compress.report.profile_formatting import method_notes
    from compress.report.profile_views import console_profile
    from compress.utils.terminal import Console

    Console().print(console_profile(result))
    for note in method_notes(result):
        show_hint(note)


def _part_calls(
    artifact: Artifact, target: Target, part: str | None, idle: dict[str, object], progress: Progress
) -> tuple[Path, ProfiledCalls]:
    """Return the folder of a component, and its inputs during the generation of an image for the first test prompt.

    Args:
        artifact: Artifact.
        target: Target that runs it.
        part: Name of the component.
        idle: Options of other kinds of models.
        progress: Progress display.

    Raises:
        InputError: The component doesn't exist, or an option is for another kind of model.
    """
    from compress.benchmark.profiled_calls import MAX_CALLS, ProfiledCalls
    from compress.formats.runtime import ComponentSession, get_runtime
    from compress.models.pipeline_folder import UNET, image_generation_hook
    from compress.utils.errors import InputError

    _refuse_idle(artifact, idle, "--part")
    session = get_runtime(target.runtime).open(artifact.folder, target, 1)
    assert isinstance(session, ComponentSession), "the model generates images"
    chosen = part or UNET
    if chosen not in session.parts:
        raise InputError(f"The model has no part {chosen!r}.", where="--part", expected=", ".join(session.parts))
    examples = artifact.examples(progress)
    component_inputs = image_generation_hook("component_inputs")
    # Generate one image and record the inputs of the component.
    feeds = component_inputs(session, chosen, examples.batch([0]), MAX_CALLS)
    return artifact.folder / chosen, ProfiledCalls(tuple(feeds))


def _refuse_idle(artifact: Artifact, options: Mapping[str, object], expected: str) -> None:
    """Raise `InputError` for options that have no effect on this kind of model."""
    from compress.utils.errors import InputError

    names = " and ".join(name for name, value in options.items() if value is not None)
    if names:
        raise InputError(f"No effect on {artifact.task.name}: {names}.", expected=expected)


def _calls(
    artifact: Artifact, batch_size: int | None, phase: TextPhase | None, context: int | None, progress: Progress
) -> ProfiledCalls:
    """Return the profiled calls from the test split.

    Args:
        artifact: Artifact.
        batch_size: Examples in a batch.
        phase: Phase of text generation.
        context: Tokens of the prompt of text generation.
        progress: Progress display.

    Raises:
        InputError: An option is for another kind of task.
    """
    from compress.benchmark.profiled_calls import MAX_CALLS, batch_calls, text_calls
    from compress.pipeline.timing import beginning
    from compress.tasks.capability import GENERATES

    recipe, generates = artifact.recipe, GENERATES in artifact.task.capabilities
    idle = {"--batch-size": batch_size} if generates else {"--phase": phase, "--context": context}
    _refuse_idle(artifact, idle, "--phase and --context" if generates else "--batch-size")
    examples = artifact.examples(progress)
    if not generates:
        return batch_calls(examples, batch_size or 1, recipe.seed)
    # The prompt is the beginning of real rows, joined until it is long enough.
    length = context or min(recipe.benchmark.contexts)
    return text_calls(beginning(examples, MAX_CALLS * (length + 1)), phase or "token", length)

"""Table of all targets: those of the formats and the platforms that apps are bundled for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from compress.formats.registry import FORMATS, PLATFORMS
from compress.formats.target_profile import AppProfile, Target, TargetProfile
from compress.utils.errors import InputError, nearest_name


def _with_formats(profile: TargetProfile) -> TargetProfile:
    """Return the profile with the other formats that it accepts and their app runtimes."""
    apps = {form: spec.taken_by[profile.name] for form, spec in FORMATS.items() if profile.name in spec.taken_by}
    profile = replace(profile, formats=tuple(form for form in apps if form != profile.target.format))
    if isinstance(profile, AppProfile):
        profile = replace(profile, apps={form: app for form, app in apps.items() if app is not None})
    return profile


PROFILES: Mapping[str, TargetProfile] = {
    profile.name: _with_formats(profile)
    for profile in (*(target for spec in FORMATS.values() for target in spec.targets), *PLATFORMS)
}
TARGETS: Mapping[str, Target] = {name: profile.target for name, profile in PROFILES.items()}


REFERENCE: TargetProfile = next(
    profile for profile in PROFILES.values() if FORMATS[profile.target.format].written_by is None
)
"""Profile that runs the weights as stages leave them.

Others are compared with it, and it measures where no other can.
"""


def in_format(profile: TargetProfile, form: str) -> TargetProfile:
    """Return the profile with files of another format and the runtime that opens them."""
    target = profile.target
    if form == target.format:
        return profile
    runtimes = FORMATS[form].runtimes
    if target.runtime in runtimes:
        return replace(profile, target=replace(target, format=form))
    runtime, runtime_spec = next(iter(runtimes.items()))
    return replace(profile, target=replace(target, format=form, runtime=runtime, provider=runtime_spec.provider))


def _suggestion(name: str, names: Sequence[str]) -> str | None:
    """Return a question with the most similar of ``names``, or with the target whose description has the name."""
    described = (
        other
        for other in names
        if name.lower() in f"{PROFILES[other].target.description} {PROFILES[other].instead_of}".lower()
    )
    near = nearest_name(name, names) or next(described, None)
    return f"did you mean {near!r}?" if near else None


def find_profile(name: str) -> TargetProfile:
    """Return the profile of that name.

    Raises:
        InputError: The name is unknown; the message lists the known names and the nearest one.
    """
    if name not in PROFILES:
        hint = _suggestion(name, list(PROFILES))
        raise InputError(f"There is no target {name!r}.", expected=f"one of {', '.join(PROFILES)}", hint=hint)
    return PROFILES[name]


def find_target(name: str) -> Target:
    """Return the target of that name; raise the errors of `find_profile`."""
    return find_profile(name).target


def find_app_profile(name: str) -> AppProfile:
    """Return the app profile of that name.

    Raises:
        InputError: There is no such profile, or no app is bundled for it.
    """
    profile = PROFILES.get(name)
    if not isinstance(profile, AppProfile):
        bundled = [other.name for other in PROFILES.values() if isinstance(other, AppProfile)]
        what = f"There are no bundles for the target {name!r}." if profile else f"There is no target {name!r}."
        raise InputError(what, expected=f"one of {', '.join(bundled)}", hint=_suggestion(name, bundled))
    return profile

"""Which samples there are: those of the installed packages that register some under `compress.samples`."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from types import MappingProxyType
from typing import Any

from compress.errors import SampleError
from compress.plugins import SAMPLES, UnusablePluginError, load_plugin, plugin_errors, plugins
from compress.samples.sample import Sample

INSTALL = "pip install ./recipes/samples"
"""In a checkout of this project: what its recipes and examples run on."""


@cache
def known_samples() -> Mapping[str, Sample]:
    """Every sample by its name. An entry point names a tuple of them; `plugin_errors` has those that can't be used."""
    found: dict[str, Sample] = {}

    def accept(value: Any) -> tuple[Sample, ...]:
        if not isinstance(value, tuple) or not all(isinstance(each, Sample) for each in value):
            raise UnusablePluginError("it is no tuple of `compress.samples.sample.Sample`")
        twice = [each.name for each in value if each.name in found]
        if twice:
            raise UnusablePluginError(f"another package has samples named {', '.join(twice)}; uninstall one of the two")
        return value

    for entry in plugins(SAMPLES, ()).values():
        found.update({sample.name: sample for sample in load_plugin(entry, accept) or ()})
    return MappingProxyType(found)


def find_sample(name: str) -> Sample:
    """The sample of that name, with or without `sample:` before it. Raises `SampleError`."""
    bare = name.removeprefix("sample:")
    known = known_samples()
    if bare in known:
        return known[bare]
    nearest = get_close_matches(bare, known, n=1)
    said = [f"There is no sample {bare!r}." + (f" Did you mean {nearest[0]!r}?" if nearest else "")]
    said += [str(error) for error in plugin_errors() if error.group == SAMPLES]
    raise SampleError(
        " ".join(said),
        expected=f"one of {', '.join(known)}" if known else "a package of samples, of which none is installed",
        mend="`compress samples` lists them" if known else f"{INSTALL} in a checkout of compress",
    )

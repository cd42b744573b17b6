"""Every stage: those of models, those of the formats, and others by the entry point `compress.stages`.

Recipes name stages by `kind`, so kinds are unique over all packages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Union

from pydantic import Field

from compress.formats.registry import FORMATS
from compress.formats.spec import load
from compress.plugins import UnusablePluginError, load_extensions
from compress.stages.base import AnyStage, Stage
from compress.stages.kinds import CORE_STAGES


def _kind(cls: type[AnyStage]) -> str:
    kind: str = cls.model_fields["kind"].default
    return kind


def _accepted(found: object) -> type[AnyStage]:
    """Return an extension's stage. Raises `UnusablePluginError`."""
    if not (isinstance(found, type) and issubclass(found, Stage)):
        raise UnusablePluginError(f"{found!r} is no stage; expected a subclass of compress.stages.base.Stage")
    if not hasattr(found, "output_type"):
        raise UnusablePluginError(f"{found.__name__} must subclass Stage[InputModel, OutputModel]")
    if lacking := sorted(found.__abstractmethods__):
        raise UnusablePluginError(f"{found.__name__} lacks {', '.join(lacking)}")
    if not isinstance(found.model_fields["kind"].default, str):
        raise UnusablePluginError(f"{found.__name__} has no kind; expected `kind: Literal[...] = ...`")
    return found


_REFERENCES = (*CORE_STAGES.values(), *(spec.stage for spec in FORMATS.values() if spec.stage))
_INCLUDED: dict[str, type[AnyStage]] = {_kind(cls): cls for cls in map(load, _REFERENCES)}
STAGES: dict[str, type[AnyStage]] = _INCLUDED | load_extensions("stages", _INCLUDED, _accepted, _kind)
if TYPE_CHECKING:
    RecipeStage = AnyStage
else:
    RecipeStage = Annotated[Union[tuple(STAGES.values())], Field(discriminator="kind")]  # noqa: UP007

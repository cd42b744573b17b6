"""Function `compress.search` of the Python API."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from compress.plugins.search.cli_options import SearchOptions, build_document
from compress.plugins.search.run import SearchResult, SearchRun
from compress.recipe.document import Document
from compress.utils.errors import InputError, did_you_mean
from compress.utils.progress import Progress


def search(
    recipe: Document | None,
    overrides: Sequence[str],
    artifacts: Path,
    progress: Progress,
    *,
    resume: bool = False,
    workers: str | None = None,
    **options: Any,
) -> SearchResult:
    """Run a search and return its folder and record. Raises any `CompressError`.

    Args:
        recipe: Recipe with a `search` block; None if the options name `model` and `data`.
        overrides: Replacements of fields, `FIELD=VALUE`.
        artifacts: Folder of the cache and the searches.
        progress: Progress display.
        resume: Continue the latest search of this recipe.
        workers: `ray[:ADDRESS]` to try recipes on the machines of a Ray cluster.
        **options: Fields of `SearchOptions`.
    """
    names = [field.name for field in fields(SearchOptions)]
    for name in options:
        if name not in names:
            raise InputError(
                f"compress.search has no option {name!r}.{did_you_mean(name, names)}",
                expected=f"one of {', '.join((*names, 'resume', 'workers'))}",
            )
    minimize = options.get("minimize", ())
    options["minimize"] = (minimize,) if isinstance(minimize, str) else tuple(minimize)
    document, folder, origin = build_document(recipe, SearchOptions(**options), overrides)
    return SearchRun(document, folder, artifacts, progress, resume, workers, origin=origin).run()

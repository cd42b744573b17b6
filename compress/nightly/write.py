"""Writing a night and its views into its folder."""

from __future__ import annotations

import json

from compress.cache import storage_errors
from compress.nightly.entry_run import relative
from compress.nightly.page import night_page
from compress.nightly.run import NightDone
from compress.nightly.views import night_junit, night_markdown
from compress.report.folders import point_latest
from compress.report.write import write_whole


def write_night(done: NightDone, description: str = "") -> None:
    """Write night.json, night.md, junit.xml and night.html, then turn `latest` to them. Raises `StorageError`."""
    contents = {
        "night.json": night_json(done),
        "night.md": night_markdown(done.night),
        "junit.xml": night_junit(done.night),
        "night.html": night_page(done.night, done.nights, done.series, description),
    }
    for name, content in contents.items():
        write_whole(done.folder / name, content)
    with storage_errors(done.folder):
        point_latest(done.folder)


def night_json(done: NightDone) -> str:
    """The night as JSON, with its exit code and where its files lie."""
    content = done.night.model_dump(mode="json")
    whole = {**content, "exit_code": done.night.exit_code, "folder": relative(done.folder)}
    return json.dumps(whole, indent=2, ensure_ascii=False) + "\n"

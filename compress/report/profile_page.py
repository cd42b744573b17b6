"""A profile as one self-contained page."""

from __future__ import annotations

import json
from pathlib import PurePath

from compress.bench.profile import Profile
from compress.report import profile_words, rows
from compress.report.html import render
from compress.report.roofline_chart import roofline_chart


def profile_page(profile: Profile) -> str:
    """The whole page. Every text of the profile is escaped."""
    name = artifact_name(profile)
    return render(
        "report/templates/profile.html",
        f"{name} \u00b7 compress profile",
        json.dumps(profile.to_json()),
        name=name,
        profile=profile,
        drawing=roofline_chart(profile),
        words=profile_words,
        rows=rows,
    )


def artifact_name(profile: Profile) -> str:
    """`quickstart/2026-11-25T15-03-48` for the model folder of a run, else the last part of the path."""
    parts = [part for part in PurePath(profile.artifact).parts if part != "/"]
    return "/".join(parts[-3:-1]) if len(parts) > 2 and parts[-1] == "model" else (parts or ["artifact"])[-1]

"""Tests of bundles are left out if the plug-in apps is not installed."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("compress.plugins.apps") else ["test_bundle_*.py"]

#!/usr/bin/env python3
"""Write the bill of materials of this tool as CycloneDX JSON: every pinned package with the SHA-256 of its files.

Usage: `sbom.py FILE`. Parts: the core, and as optional the packages of extras and of development.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from cyclonedx.model import ExternalReference, ExternalReferenceType, HashAlgorithm, HashType, XsUri
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentScope, ComponentType
from cyclonedx.model.license import LicenseExpression
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

ROOT = Path(__file__).resolve().parents[1]
REQUIRED = ("torch-cpu", "core")


def main(output: Path) -> None:
    """Write the bill of materials to ``output``."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tool = _component(project["name"], project["version"], ComponentType.APPLICATION)
    tool.licenses.add(LicenseExpression(project["license"]))
    bom = Bom()
    bom.metadata.component = tool
    for part in (*REQUIRED, "build", "apart", "rest"):
        for component in _components(ROOT / ".ci" / "requirements" / f"{part}.txt"):
            component.scope = ComponentScope.REQUIRED if part in REQUIRED else ComponentScope.OPTIONAL
            bom.components.add(component)
    required = [part for part in bom.components if part.scope is ComponentScope.REQUIRED]
    bom.register_dependency(tool, required)
    output.write_text(JsonV1Dot6(bom).output_as_string(indent=1))


def _components(requirements: Path) -> Iterator[Component]:
    text = requirements.read_text().replace(" \\\n", " ")
    for name, version, hashes in re.findall(r"^([\w.-]+)==(\S+)(.*)$", text, re.MULTILINE):
        component = _component(name, version, ComponentType.LIBRARY)
        # A component has one hash of each kind, and a package several files.
        for digest in re.findall(r"sha256:(\w+)", hashes):
            file = HashType(alg=HashAlgorithm.SHA_256, content=digest)
            url = XsUri(f"https://pypi.org/project/{name}/{version.partition('+')[0]}/#files")
            component.external_references.add(
                ExternalReference(type=ExternalReferenceType.DISTRIBUTION, url=url, hashes=[file])
            )
        yield component


def _component(name: str, version: str, kind: ComponentType) -> Component:
    purl = PackageURL("pypi", name=name, version=version)
    return Component(name=name, version=version, type=kind, purl=purl, bom_ref=str(purl))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Model card, software bill of materials, SLSA provenance and signature of a finished run."""

from __future__ import annotations

from compress.plugins import Command, PluginSpec

SPEC = PluginSpec(
    name="provenance",
    summary="Write model card, bill of materials and signed provenance of a run.",
    verifiers={"provenance": "compress.plugins.provenance.cli:PROVENANCE"},
    commands={
        "papers": Command(
            "compress.plugins.provenance.cli:write_run_provenance",
            "Write model card, bill of materials and provenance of a run, and list what its licences require.",
            "compress papers quickstart --output papers",
            "Ship",
        ),
        "push-to-hub": Command(
            "compress.plugins.provenance.cli:push_to_hub",
            "List the files of a run for the Hugging Face Hub, with sizes and card; send them with --push.",
            "compress push-to-hub quickstart my-org/quickstart",
            "Ship",
        ),
    },
    run_finished={"provenance": "compress.plugins.provenance.write:write_after_run"},
)

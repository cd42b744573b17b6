"""torch.export's programs, as a format of `compress`. Importing this imports no torch."""

from __future__ import annotations

from compress.formats.spec import FormatSpec, RuntimeSpec
from compress.formats.target_profile import App, Target, TargetProfile

FORMAT = FormatSpec(
    name="pt2",
    suffix=".pt2",
    written_by="pt2",
    stage="compress_pt2.stage:Pt2",
    runtimes={"torch-export": RuntimeSpec(runtime="compress_pt2.runtime:RUNTIME", provider="cpu", package="torch")},
    targets=(TargetProfile(Target("pt2", "torch-export", "cpu", "a torch.export program on this processor", "pt2")),),
    taken_by={"desktop": App("torch", "PyPI: torch", ("python",))},
    inspector="compress_pt2.read:PROBED",
    tensors="compress_pt2.read:read_tensors",
    library="pytorch",
)

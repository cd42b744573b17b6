"""Other people's packages in environments of their own that see ours, each with versions that ours cannot have."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass, field, replace
from pathlib import Path

from filelock import FileLock


@dataclass(frozen=True)
class ForeignEnvironment:
    """An environment that is made once for this user, over the packages that are installed here.

    ``steps`` are installed one after another; ``variables`` are those of a script that runs there, which finds none of
    our packages that are ``hidden``.
    """

    name: str
    steps: tuple[tuple[str, ...], ...]
    flags: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)
    hidden: tuple[str, ...] = ()

    def python(self) -> Path:
        """Its interpreter. The pip of here installs, which is quicker than to install another, and compiles nothing."""
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        home = cache / "compress" / "tests" / self.name
        python, ready = home / "bin" / "python", home / "ready"
        # As a folder of packages, of which the links to what is installed as editable are followed too.
        ours = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
        hidden = "".join(f"import sys; sys.modules[{name!r}] = None\n" for name in self.hidden)
        seen = ours + hidden
        home.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{home}.lock"):
            if not ready.exists() or ready.read_text() != seen:
                venv.create(home, clear=True)
                (site,) = home.glob("lib/python*/site-packages")
                (site / "ours.pth").write_text(ours)
                (site / "hidden.pth").write_text(hidden)
                pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-compile"]
                for requirements in self.steps:
                    command = [*pip, "--disable-pip-version-check", *self.flags, *requirements]
                    subprocess.run(command, check=True, timeout=900, env=os.environ | {"BUILD_CUDA_EXT": "0"})
                ready.write_text(seen)
        return python

    def run(self, script: Path, *arguments: str) -> str:
        """What a script printed there."""
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", **self.variables}
        command = [str(self.python()), "-W", "ignore", str(script), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
        assert done.returncode == 0, done.stderr[-3000:] or sys.executable
        return done.stdout


GPTQMODEL = ForeignEnvironment(
    "gptqmodel-7.5.0",
    # What it is built with comes first, since its build has to see torch.
    (("setuptools>=77.0.1,<83", "wheel"), ("gptqmodel==7.5.0", "numpy==2.2.6", "requests")),
    ("--no-build-isolation",),
)
"""It needs another numpy, and its torchao warns at import."""
S3 = ForeignEnvironment("s3-2026.9.0", (("s3fs==2026.9.0", "moto[s3,server]==5.2.5", "python-dateutil<3"),))
"""botocore needs an older python-dateutil; moto is a server that speaks S3."""
SENTENCE_TRANSFORMERS = ForeignEnvironment(
    "sentence-transformers-5.2.3-diffusers-0.35.2",
    (
        (
            *("sentence-transformers==5.2.3", "optimum-onnx==0.1.0", "transformers==4.57.6", "datasets==4.4.2"),
            "diffusers==0.35.2",
        ),
    ),
    variables={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    hidden=("torchao",),
)
"""With its ONNX backend, and optimum's pipelines of diffusers; it needs transformers 4, and that an older diffusers."""
OPTIMUM_INTEL = ForeignEnvironment(
    "optimum-intel-2.2.0",
    (("optimum-intel==2.2.0", "transformers==5.5.4", "huggingface-hub==1.21.0", "datasets==4.4.2"),),
    variables={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    hidden=("diffusers",),
)
"""It needs an older transformers, and that an older huggingface-hub and datasets."""
OPTIMUM_INTEL_DRAWS = replace(
    OPTIMUM_INTEL,
    name="optimum-intel-2.2.0-diffusers-0.37.1",
    steps=((*OPTIMUM_INTEL.steps[0], "diffusers==0.37.1"),),
    hidden=("torchao",),
)
"""With the diffusers that its transformers and huggingface-hub go with."""

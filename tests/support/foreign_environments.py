"""Third-party packages in virtual environments that also see the installed packages of this one.

Each environment has package versions that conflict with those installed here.
"""

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
    """A virtual environment on top of the installed packages, created once per user.

    ``steps`` are pip installations in this order; ``variables`` are set for scripts that run in the environment, where
    our packages in ``hidden`` cannot be imported.
    """

    name: str
    steps: tuple[tuple[str, ...], ...]
    flags: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)
    hidden: tuple[str, ...] = ()

    def python(self) -> Path:
        """Return the path of the environment's interpreter; create the environment if it is missing or outdated.

        The pip of this environment installs the packages without compilation, since another pip would have to be
        installed first.
        """
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        home = cache / "compress" / "tests" / self.name
        python, ready = home / "bin" / "python", home / "ready"
        # addsitedir also processes .pth files, and so finds packages installed as editable.
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
        """Run a script in the environment and return its standard output."""
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", **self.variables}
        command = [str(self.python()), "-W", "ignore", str(script), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
        assert done.returncode == 0, done.stderr[-3000:] or sys.executable
        return done.stdout


GPTQMODEL = ForeignEnvironment(
    "gptqmodel-7.5.0",
    # Build dependencies come first, because the build needs torch and so runs without isolation.
    (("setuptools>=77.0.1,<83", "wheel"), ("gptqmodel==7.5.0", "numpy==2.2.6", "requests")),
    ("--no-build-isolation",),
)
"""gptqmodel requires another numpy, and its version of torchao warns at import."""
S3 = ForeignEnvironment("s3-2026.9.0", (("s3fs==2026.9.0", "moto[s3,server]==5.2.5", "python-dateutil<3"),))
"""botocore requires an older python-dateutil; moto is a local S3 server."""
SENTENCE_TRANSFORMERS = ForeignEnvironment(
    "sentence-transformers-5.2.3-model2vec-0.8.2-diffusers-0.35.2",
    (
        (
            *("sentence-transformers==5.2.3", "optimum-onnx==0.1.0", "transformers==4.57.6", "datasets==4.4.2"),
            *("diffusers==0.35.2", "model2vec==0.8.2"),
        ),
    ),
    variables={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    hidden=("torchao",),
)
"""sentence-transformers with its ONNX backend, model2vec, and the diffusers pipelines of optimum.

It requires transformers 4, which in turn requires an older diffusers.
"""
OPTIMUM_INTEL = ForeignEnvironment(
    "optimum-intel-2.2.0",
    (("optimum-intel==2.2.0", "transformers==5.5.4", "huggingface-hub==1.21.0", "datasets==4.4.2"),),
    variables={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    hidden=("diffusers",),
)
"""optimum-intel requires an older transformers, which requires an older huggingface-hub and datasets."""
OPTIMUM_INTEL_DRAWS = replace(
    OPTIMUM_INTEL,
    name="optimum-intel-2.2.0-diffusers-0.37.1",
    steps=((*OPTIMUM_INTEL.steps[0], "diffusers==0.37.1"),),
    hidden=("torchao",),
)
"""optimum-intel with a diffusers version that is compatible with its transformers and huggingface-hub."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
SHARED = REPO.parent / "shared"
# all weights and their records, of which an installed package carries a part
os.environ["TIMM_ULSAM_WEIGHTS"] = str(REPO / "weights")


def own_environment(**env: str) -> dict[str, str]:
    """Environment of a process whose package finds its weights by itself, but for what `env` says."""
    return {k: v for k, v in os.environ.items() if k != "TIMM_ULSAM_WEIGHTS"} | env


@pytest.fixture
def python(tmp_path):
    """Run code in a fresh interpreter, away from the checkout: what is imported is the installed package."""

    def run(
        code: str, *, warnings: str = "error::RuntimeWarning", cwd: Path = tmp_path, check: bool = True, **env: str
    ):
        environment = own_environment(**{"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": warnings, **env})
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, check=False
        )
        assert not check or done.returncode == 0, done.stderr
        return done

    return run


@pytest.fixture
def checkout(tmp_path):
    """A copy of package and weights that a test may change."""
    folder = tmp_path / "checkout"
    shutil.copytree(REPO / "timm_ulsam", folder / "timm_ulsam", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(REPO / "weights", folder / "weights")
    return folder

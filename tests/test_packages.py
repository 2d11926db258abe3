"""Packages that must not meet: a study does not begin with both builds of ONNX Runtime."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from open_autoglm import packages
from open_autoglm.errors import UserError
from open_autoglm.hardware import Gpus
from open_autoglm.schemas import Gpu

GPU = Gpu(name="NVIDIA H100", memory_bytes=80 * 2**30, driver="580.65", compute_capability="9.0")


@pytest.fixture
def both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The metadata of onnxruntime-gpu beside the onnxruntime that is installed."""
    info = tmp_path / "site" / "onnxruntime_gpu-1.31.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.31.1\n")
    monkeypatch.syspath_prepend(info.parent)
    return info.parent


def command(site: Path, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, in that environment."""
    environment = {**os.environ, "PYTHONPATH": str(site), "AUTOGLM_HOME": str(home)}
    asked = [sys.executable, "-m", "open_autoglm.cli", *arguments]
    return subprocess.run(asked, env=environment, capture_output=True, text=True, check=False)


def test_optimize_refuses_both_and_says_which_to_remove(both: Path, tmp_path: Path, tiny_glm: Path) -> None:
    """Exit code 2 and one sentence, before anything is written."""
    home = tmp_path / "home"
    done = command(both, home, "optimize", "--model-path", str(tiny_glm), "--input-shape", "1,32")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    cpu = version("onnxruntime")
    assert line.startswith(f"error: onnxruntime {cpu} and onnxruntime-gpu 1.31.1 are both installed")
    assert ": remove onnxruntime" in line
    assert "pip uninstall -y onnxruntime onnxruntime-gpu && pip install " in line
    assert not home.exists()


@pytest.mark.parametrize(
    ("gpus", "remove", "stays"),
    [
        (
            Gpus((), "no NVIDIA driver found"),
            "onnxruntime-gpu, since no NVIDIA driver found",
            "onnxruntime==",
        ),
        (Gpus((GPU,), ""), "onnxruntime, since there is a GPU here", "onnxruntime-gpu[cuda,cudnn]==1.31.1"),
    ],
    ids=["cpu", "gpu"],
)
@pytest.mark.usefixtures("both")
def test_the_one_that_fits_the_machine_stays(
    gpus: Gpus, remove: str, stays: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is installed again, since its files are half the other's."""
    monkeypatch.setattr(packages, "find_gpus", lambda: gpus)
    clash = packages.find_clash()
    assert clash is not None
    assert clash.sentence.endswith(f"remove {remove}")
    assert f"pip install '{stays}" in clash.mend


@pytest.mark.usefixtures("both")
def test_the_flow_refuses_both_as_well() -> None:
    """It may be started without the command line."""
    from open_autoglm.schemas import OptimizeSpec
    from tasks.load import load

    with pytest.raises(UserError, match="are both installed"):
        load.fn(OptimizeSpec(model_path="anything"))


def test_one_of_them_is_no_clash() -> None:
    """As in every environment that the extras make."""
    assert packages.find_clash() is None
    packages.check_packages()

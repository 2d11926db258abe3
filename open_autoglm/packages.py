"""What is installed, and packages that must not be installed together: which one to remove."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from open_autoglm.errors import UserError
from open_autoglm.hardware import find_gpus

_CPU, _GPU = "onnxruntime", "onnxruntime-gpu"


class Clash(NamedTuple):
    """What is wrong, and the command that mends it."""

    sentence: str
    mend: str


def find_clash() -> Clash | None:
    """Both builds of ONNX Runtime at once. They write the same folder, so what runs is a mixture: whichever
    was installed last, and nobody knows which provider a figure is of."""
    cpu, gpu = version_of(_CPU), version_of(_GPU)
    if cpu is None or gpu is None:
        return None
    gpus = find_gpus()
    remove, why = (_CPU, "there is a GPU here") if gpus.gpus else (_GPU, gpus.reason)
    sentence = (
        f"{_CPU} {cpu} and {_GPU} {gpu} are both installed and overwrite each other's files: "
        f"remove {remove}, since {why}"
    )
    # What both wrote belongs to both, so the one that stays must be written anew.
    stays = f"{_GPU}[cuda,cudnn]=={gpu}" if gpus.gpus else f"{_CPU}=={cpu}"
    return Clash(sentence, f"pip uninstall -y {_CPU} {_GPU} && pip install '{stays}'")


def check_packages() -> None:
    """Refuse to begin a study with packages that clash. Raises UserError."""
    if (clash := find_clash()) is not None:
        raise UserError(f"{clash.sentence}; {clash.mend}")


def version_of(*packages: str) -> str | None:
    """The version of the first of ``packages`` that is installed, by its metadata alone."""
    for package in packages:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None

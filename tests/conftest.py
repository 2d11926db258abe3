"""Fixtures every room's tests may ask for, and an environment that talks to no network and no server."""

# ruff: noqa: E402 - the environment is set before torch, transformers, mlflow and prefect read it, on import
from __future__ import annotations

import os

os.environ.update(
    OMP_NUM_THREADS="1",  # a tiny model has no work for a second thread, which then waits busily
    HF_HUB_OFFLINE="1",
    DO_NOT_TRACK="true",
    MLFLOW_DISABLE_TELEMETRY="true",
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
    PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT="false",
)
for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
    os.environ.pop(name, None)

import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tiny_models import build_checkpoint

from open_autoglm import engines
from open_autoglm.schemas import Candidate, Checkpoint

if TYPE_CHECKING:
    from registries import MlflowServer, Shelf

    from open_autoglm.settings import Settings

if find_spec("hypothesis"):  # a GPU host may lack it
    import hypothesis

    # The same examples in every run, however loaded the machine, and nothing left in the working tree.
    hypothesis.settings.register_profile("suite", derandomize=True, deadline=None, database=None)
    hypothesis.settings.load_profile("suite")

REPOSITORY = Path(__file__).resolve().parent.parent
GPU_TESTS = ("test_gpu.py", "test_tensorrt_gpu.py")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """``pytest -m gpu`` imports the tests for GPUs alone: a GPU host has not what the others need."""
    alone = config.option.markexpr == "gpu" and collection_path.suffix == ".py"
    return collection_path.name not in GPU_TESTS if alone else None


@pytest.fixture(scope="session", autouse=True)
def own_lease(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A device lease of the tests' own: they time nothing, so they need not wait for a study on this host."""
    os.environ["AUTOGLM_LEASE_DIR"] = str(tmp_path_factory.mktemp("lease"))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings whose home is this test's own."""
    from open_autoglm.settings import Settings

    return Settings(home=tmp_path / "home")


@pytest.fixture(scope="session")
def shared_settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings of a home that tests share, so that an export or a reference is made once for all of them."""
    from open_autoglm.settings import Settings

    return Settings(home=tmp_path_factory.mktemp("shared") / "home")


@pytest.fixture(scope="session")
def shared_ledger(shared_settings: Settings) -> Path:
    """What preflight found, for all tests: a family is tried once and not by every module, 5 to 25 s each."""
    shared_settings.home.mkdir(exist_ok=True)
    return shared_settings.ledger


@pytest.fixture(scope="session")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `traced_once` keeps what was traced, by the checkpoint's digest."""
    return tmp_path_factory.mktemp("traces")


@pytest.fixture(scope="module")
def traced_once(traces: Path) -> Iterator[None]:
    """transformers' route traces each checkpoint once, 10 s each: recipes differ in what follows."""
    from open_autoglm.export import transformers_route

    trace = transformers_route.export

    def export(checkpoint: Checkpoint, output: Path, scratch: Path) -> None:
        kept = traces / checkpoint.digest
        if not kept.exists():
            trace(checkpoint, output, scratch)
            shutil.copytree(output, kept)
        else:
            shutil.copytree(kept, output, dirs_exist_ok=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers_route, "export", export)
        yield


@pytest.fixture
def fake_engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Candidate]]:
    """The third-party engine in ``tests/plugin``, discovered here and in children; makes its candidates."""
    folder = Path(__file__).parent / "plugin"
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    for cached in (engines.names, engines.get):
        cached.cache_clear()
    from fake_engine import candidate

    yield candidate
    for cached in (engines.names, engines.get):
        cached.cache_clear()


@pytest.fixture(scope="session")
def tiny_glm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer GLM checkpoint. Shared: copy it before changing it."""
    return build_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny-glm", "glm")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama checkpoint. Shared: copy it before changing it."""
    return build_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny-llama", "llama")


@pytest.fixture(scope="session")
def tiny_bundle(tiny_glm: Path, shared_ledger: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the tiny GLM whose sessions have slots. Shared: copy it before changing it."""
    from bundles import onnxruntime_bundle

    return onnxruntime_bundle(tiny_glm, tmp_path_factory.mktemp("tiny-bundle"), ledger=shared_ledger)


@pytest.fixture(scope="session")
def shelf(tiny_glm: Path, tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    """A registry that tests share, as its database takes seconds to make: each has a model of its own."""
    from registries import make_shelf

    return make_shelf(tmp_path_factory.mktemp("registry"), tiny_glm)


@pytest.fixture(scope="session")
def mlflow_server(shelf: Shelf) -> Iterator[MlflowServer]:
    """MLflow's server in front of the shelf's registry. Who stops it starts it again."""
    from registries import MlflowServer

    server = MlflowServer(shelf.home)
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def prefect_harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A temporary Prefect server and result store; 10 to 16 s, so only flow tests ask for it."""
    from prefect.settings import (
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
        PREFECT_LOCAL_STORAGE_PATH,
        temporary_settings,
    )
    from prefect.testing.utilities import prefect_test_harness

    results = tmp_path_factory.mktemp("prefect-results")
    with (
        temporary_settings({PREFECT_LOCAL_STORAGE_PATH: results}),
        prefect_test_harness(server_startup_timeout=120),
        temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}),
    ):
        yield


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The real 135 M demo GLM, written once into ``.autoglm/cache/demo`` and kept between runs."""
    from open_autoglm.demo_model import write_demo_model
    from open_autoglm.settings import HOME_NAME

    home = Path(os.environ.get("AUTOGLM_HOME", REPOSITORY / HOME_NAME))
    cache = home / "cache" / "demo"
    return write_demo_model(cache / "demo-glm", download_cache=cache, progress=lambda _: None)

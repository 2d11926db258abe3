"""The directions of the arrows: who may import whom, and when. Read from the source; nothing is imported."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
CORE, TASKS, FLOWS = "open_autoglm", "tasks", "flows"
RUNTIMES = {
    "torch", "onnxruntime", "onnxruntime_genai", "llama_cpp", "openvino", "tensorrt", "tensorrt_rtx",
    "tensorrt_rtx_bindings", "torchao",
}  # fmt: skip

WHO_MAY_IMPORT = {
    "prefect": {"flows/", "tasks/"},
    "tasks": {"flows/", "tasks/"},
    "flows": {"flows/", "open_autoglm/cli/commands.py"},
    "mlflow": {"open_autoglm/tracking/", "open_autoglm/pyfunc_model.py"},
    "great_expectations": {"open_autoglm/quality/gates.py"},
    "onnxruntime": {
        "open_autoglm/engines/onnxruntime_session.py",
        "open_autoglm/engines/capability_onnxruntime.py",  # whether it works, in a child
        "open_autoglm/export/",
    },
    "onnxruntime_genai": {"open_autoglm/export/"},
    "onnx": {"open_autoglm/export/"},
    "openvino": {"open_autoglm/engines/openvino_engine.py", "open_autoglm/export/"},
    "tensorrt": {"open_autoglm/export/tensorrt_api.py"},
    "tensorrt_rtx": {"open_autoglm/export/tensorrt_api.py"},
    "tensorrt_rtx_bindings": {"open_autoglm/export/tensorrt_api.py"},
    "torchao": {"open_autoglm/engines/torch_weights.py"},
    "pynvml": {"open_autoglm/measure/device_memory.py", "open_autoglm/measure/gpu_conditions.py"},
    "llama_cpp": {"open_autoglm/export/llamacpp_library.py"},
    "gguf": {"open_autoglm/demo_model.py", "open_autoglm/export/gguf_writer.py"},
    "yaml": {"open_autoglm/monitoring/config.py"},
    "matplotlib": {"open_autoglm/figures.py", "open_autoglm/monitoring/picture.py"},
    "jinja2": {
        "open_autoglm/report.py",
        "open_autoglm/serving/service.py",
    },  # chat templates raise its errors
    "fastapi": {"open_autoglm/serving/"},
    "starlette": {"open_autoglm/serving/"},
    "uvicorn": {"open_autoglm/serving/"},
    "prometheus_client": {"open_autoglm/serving/"},
    "httpx": {"open_autoglm/cli/running.py", "open_autoglm/monitoring/"},
    "scipy": {
        "open_autoglm/measure/comparison.py",
        "open_autoglm/measure/statistics.py",
        "open_autoglm/monitoring/baseline.py",
        "open_autoglm/monitoring/promises.py",
        "open_autoglm/monitoring/shift.py",
        "open_autoglm/quality/metrics.py",
    },
    "torch": {
        "open_autoglm/engines/capability_torch.py",  # whether it works on a GPU, in a child
        "open_autoglm/engines/torch_session.py",
        "open_autoglm/engines/torch_weights.py",
        "open_autoglm/engines/tensorrt_executor.py",  # CUDA memory
        "open_autoglm/export/",
        "open_autoglm/analysis.py",  # the module tree, on the meta device
        "open_autoglm/checkpoint.py",  # the same
        "open_autoglm/weights.py",  # pickles, if they are allowed
        "open_autoglm/demo_model.py",
        "open_autoglm/pruning/",  # derivatives
        "open_autoglm/recovery/",  # distillation
        "open_autoglm/hardware_bench.py",  # matmul peaks
    },
}
"""Files, or folders with a slash, that may import each library; nobody else may."""

LIGHT = {"open_autoglm", "click", "pydantic", "pydantic_core", "pydantic_settings", "numpy"}
"""What the core may import at module level and the command line therefore pays for."""


class Import(NamedTuple):
    file: str
    module: str
    deferred: bool

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.file} imports {self.module}"


def sources(*packages: str) -> list[Path]:
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


def imports_of(path: Path) -> Iterator[Import]:
    """All imports in a file. Deferred ones are inside a function, or for type checkers only."""
    file = path.relative_to(ROOT).as_posix()

    def visit(node: ast.AST, deferred: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(file, alias.name, deferred) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            yield Import(file, node.module or "", deferred)
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        typing_only = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.iter_child_nodes(node):
            yield from visit(child, deferred or function or typing_only)

    return visit(ast.parse(path.read_text()), deferred=False)


IMPORTS = [found for path in sources(CORE, TASKS, FLOWS) for found in imports_of(path)]


def requirements(*extras: str) -> set[str]:
    """Names of the packages pyproject.toml asks for, as indexes write them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"]]
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    return {normal(re.split(r"[\[<>=!~ ]", line, maxsplit=1)[0]) for line in lines}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


# ── arrows ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("library", WHO_MAY_IMPORT)
def test_a_library_is_imported_only_where_it_belongs(library: str) -> None:
    """Each framework and runtime has its own place, so that it can be replaced there."""
    places = tuple(WHO_MAY_IMPORT[library])
    users = [found for found in IMPORTS if found.package == library]
    assert [str(found) for found in users if not found.file.startswith(places)] == []


def test_only_the_command_line_knows_the_flow() -> None:
    """The one arrow upwards, and inside a function: the command line runs the flow itself."""
    upwards = [f for f in IMPORTS if f.file.startswith(CORE) and f.package in (FLOWS, TASKS)]
    assert [str(found) for found in upwards] == ["open_autoglm/cli/commands.py imports flows.optimize"]
    assert upwards[0].deferred


def test_tasks_do_not_know_the_flow() -> None:
    """A task can be used in another flow."""
    assert [str(f) for f in IMPORTS if f.file.startswith(TASKS) and f.package == FLOWS] == []


def test_the_core_does_not_know_the_command_line() -> None:
    """What the product knows can be used without a terminal."""
    inside = [f for f in IMPORTS if f.file.startswith(CORE) and not f.file.startswith("open_autoglm/cli/")]
    assert [str(found) for found in inside if found.module.startswith("open_autoglm.cli")] == []


def test_runtimes_are_imported_inside_functions_only() -> None:
    """So that listing the engines costs nothing and a missing runtime is a reason, not an error."""
    early = [f for f in IMPORTS if f.package in RUNTIMES and not f.deferred]
    assert [str(found) for found in early] == []


HEAVY_BY_NATURE = {
    "open_autoglm/cli/running.py": {"httpx"},  # imported by its two commands alone
    "open_autoglm/monitoring/diagnosis.py": {"httpx"},
    "open_autoglm/monitoring/http.py": {"httpx"},  # asked by flows alone
    "open_autoglm/monitoring/prometheus.py": {"httpx"},
    "open_autoglm/pyfunc_model.py": {"mlflow", "pandas"},  # MLflow itself runs this file
    "open_autoglm/serving/admin.py": {"fastapi"},
    "open_autoglm/serving/api.py": {"fastapi", "starlette"},  # a server needs them from the start
    "open_autoglm/serving/asgi.py": {"orjson"},
    "open_autoglm/serving/connection.py": {"uvicorn"},
    "open_autoglm/serving/failures.py": {"orjson", "starlette"},
    "open_autoglm/serving/inference.py": {"orjson", "starlette"},
    "open_autoglm/serving/local.py": {"psutil"},
    "open_autoglm/serving/metrics.py": {"prometheus_client"},
    "open_autoglm/serving/server.py": {"prometheus_client", "uvicorn"},
    "open_autoglm/serving/service.py": {"psutil"},
}


def test_the_core_is_light_at_module_level() -> None:
    """Importing any of it, an engine included, imports no library that takes seconds."""
    early = [f for f in IMPORTS if f.file.startswith(CORE) and not f.deferred]
    heavy = [
        str(f)
        for f in early
        if f.package not in LIGHT | sys.stdlib_module_names | HEAVY_BY_NATURE.get(f.file, set())
    ]
    assert heavy == []


def test_what_measures_does_not_know_what_decides() -> None:
    """A round, an interval and a race can be used without a study, and favour nobody."""
    above = ("trials", "heats", "bracket", "search", "selection", "conclusion", "study", "tracking", "memo")
    modules = {f"open_autoglm.{name}" for name in above}
    found = [
        f for f in IMPORTS if f.file.startswith("open_autoglm/measure/") and part_of(f.module) in modules
    ]
    assert [str(upwards) for upwards in found] == []


def part_of(module: str) -> str:
    """The module or package of the core that ``module`` is, or lies in."""
    return ".".join(module.split(".")[:2])


def test_engines_do_not_know_each_other() -> None:
    """Each is a plug-in: it knows the contract and may know the exporters, not its rivals."""
    shared = (
        "contract", "gpu", "nvidia", "onnxruntime_placement", "onnxruntime_session", "standard_schemes",
        "tensorrt_executor", "tensorrt_session", "torch_session", "torch_weights", "unloadable",
    )  # fmt: skip
    capability = ("capability", *(f"capability_{part}" for part in ("driver", "elf", "packages")))
    allowed = {f"open_autoglm.engines.{name}" for name in (*shared, *capability)}
    found = [f for f in IMPORTS if f.file.startswith("open_autoglm/engines/")]
    rivals = [f for f in found if f.module.startswith("open_autoglm.engines") and f.module not in allowed]
    assert [str(found) for found in rivals] == []


# ── packages ─────────────────────────────────────────────────────────────────────────────────────


def test_no_flow_shadows_a_library() -> None:
    """Prefect may put flows/ first on the path: ``evaluate.py`` there would be everybody's `evaluate`."""
    taken = set(sys.stdlib_module_names) | set(packages_distributions())
    names = {path.stem for path in (ROOT / FLOWS).glob("*.py")} - {"__init__"}
    assert names
    assert names & taken == set()


BROUGHT_BY = {
    "huggingface_hub": "transformers",
    "tokenizers": "transformers",
    "pydantic_core": "pydantic",
    "markupsafe": "jinja2",
    "starlette": "fastapi",
}
"""Parts of another library's interface, of the version that library chooses."""

OPTIONAL = {
    "llama_cpp": ["llama-cpp-python"],
    "openvino": ["openvino"],
    "tensorrt": ["tensorrt-cu13"],
    "tensorrt_rtx": ["tensorrt-rtx-cu13-bindings"],
    "tensorrt_rtx_bindings": ["tensorrt-rtx-cu13-bindings"],
    "pynvml": ["nvidia-ml-py"],
    "torchao": ["torchao"],
}
"""Who provides what need not be installed here."""


def test_every_library_that_is_imported_is_asked_for() -> None:
    """Nothing works only because something else happens to bring it."""
    asked = requirements("cpu", "gpu", "llamacpp", "openvino", "tensorrt", "torchao", "trt-rtx")
    providers = {**OPTIONAL, **packages_distributions()}
    ours = sys.stdlib_module_names | {CORE, TASKS, FLOWS}
    unasked = []
    for found in IMPORTS:
        package = BROUGHT_BY.get(found.package, found.package)
        distributions = {normal(name) for name in providers.get(package, [package])}
        if package not in ours and not distributions & asked:
            unasked.append(str(found))
    assert unasked == []


def locked() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.partition("==") for line in lines if "==" in line and not line.startswith("#"))
    return {normal(name.strip()): version.strip() for name, _, version in pairs}


def pinned() -> dict[str, Any]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    optional = [line for extra in ("cpu", "llamacpp", "openvino", "trt-rtx") for line in extras[extra]]
    lines = [*project["dependencies"], *optional]
    return {normal(line.partition("==")[0]): line.partition("==")[2] for line in lines if "==" in line}


def test_every_dependency_is_locked() -> None:
    """In constraints.txt or by an exact pin: one set of versions that is known to run together."""
    assert (
        sorted(requirements("cpu", "llamacpp", "openvino", "trt-rtx") - locked().keys() - pinned().keys())
        == []
    )


def test_no_package_has_two_versions() -> None:
    """An exact pin in pyproject.toml is the locked version."""
    twice = pinned().keys() & locked().keys()
    assert {name: pinned()[name] for name in twice} == {name: locked()[name] for name in twice}


def test_every_runtime_dependency_has_its_reason_written() -> None:
    """One line each in docs/dependencies.md."""
    written = normal((ROOT / "docs" / "dependencies.md").read_text().replace("`", " "))
    asked = requirements("cpu", "gpu", "llamacpp", "openvino", "tensorrt", "trt-rtx")
    missing = [name for name in asked if not re.search(rf"(?<![\w-]){name}(?![\w-])", written)]
    assert missing == []

"""The whole story on tiny real models: run, resumed, repeated, without an answer, and killed on the way."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from studies import demo_hardware

from open_autoglm import engines
from open_autoglm.bundle import evidence_of, open_bundle
from open_autoglm.hardware import probe_hardware
from open_autoglm.hardware_bench import Peaks
from open_autoglm.measure.isolation import Failure
from open_autoglm.measure.racing import TWIN_SUFFIX
from open_autoglm.objectives import final_of
from open_autoglm.schemas import OptimizeSpec, Study, Trial
from open_autoglm.search import rank_figure
from open_autoglm.settings import Settings
from open_autoglm.study import RESULT, load_study
from open_autoglm.trials import Bench, evaluate_trial

SMALL: dict[str, Any] = {
    "prompt_tokens": 32,
    "output_tokens": 8,
    "rounds": 4,
    "timing_budget_s": 2,
    "quality_tokens": 64,
    "min_quality": 0.5,
    "max_token_flips": 1,
}
FLAGS = [
    "--input-shape=1,32",
    "--output-tokens=8",
    "--rounds=4",
    "--timing-budget-s=2",
    "--quality-tokens=64",
    "--max-token-flips=100%",
    "--json",
]
OPTIMIZE = [str(Path(sys.executable).with_name("open-autoglm")), "optimize", *FLAGS]
ONNX = tuple(f"onnxruntime-{kind}" for kind in ("dynamic-int8", "fp32", "w4-b32", "w8-b32", "w8a8"))

pytestmark = pytest.mark.usefixtures("prefect_harness")


@pytest.fixture(scope="module")
def settings(shared_ledger: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """One home for all studies here, the third-party engine installed, no compiler, the peaks made up."""
    root = tmp_path_factory.mktemp("flow")
    plugin = Path(__file__).parent / "plugin"
    peaks = Peaks(**demo_hardware().model_dump(include=set(Peaks.model_fields)), foreign_share=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOGLM_HOME", str(root / "home"))
        patch.setenv("CXX", "no-compiler-here")  # compiling takes longer than all the rest
        patch.setenv("PYTHONPATH", str(plugin))
        patch.syspath_prepend(plugin)
        patch.setattr("open_autoglm.hardware.measure_peaks", lambda *_: peaks)
        for cached in (engines.names, engines.get):
            cached.cache_clear()
        probe_hardware(root / "home" / "hardware")
        if shared_ledger.exists():
            shutil.copy(shared_ledger, Settings().ledger)
        yield Settings()
    for cached in (engines.names, engines.get):
        cached.cache_clear()


def optimize(spec: OptimizeSpec) -> Study:
    from flows.optimize import optimize

    study: Study = optimize(spec)
    return study


def versions(name: str) -> list[Any]:
    from mlflow import MlflowClient

    return list(MlflowClient(Settings().mlflow_uri).search_model_versions(f"name = '{name}'"))


def modified(folder: Path) -> dict[str, int]:
    """When each file was written last, in ns."""
    return {str(f.relative_to(folder)): f.stat().st_mtime_ns for f in folder.rglob("*") if f.is_file()}


# ── a tiny Llama, in this process ────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def spec(settings: Settings, tiny_llama: Path) -> OptimizeSpec:
    return OptimizeSpec(
        model_path=str(tiny_llama),
        engines=("onnxruntime", "tensorrt", "fake"),
        search_generations=0,  # each neighbour would be another export
        output=str(settings.home.parent / "llama"),
        **SMALL,
    )


@pytest.fixture(scope="module")
def study(spec: OptimizeSpec) -> Study:
    return optimize(spec)


def test_every_candidate_has_its_story(study: Study) -> None:
    """In the final, out before it, crashed, or vetoed: it says what became of it and stops no other."""
    assert {trial.id for trial in study.trials} == {*ONNX, "fake-crash", "tensorrt-fp16"}
    crashed, vetoed = study.trial("fake-crash"), study.trial("tensorrt-fp16")
    assert (crashed.status, crashed.reason) == ("crashed", "screening: ended with SIGSEGV")
    assert vetoed.status == "vetoed"
    assert "NVIDIA" in vetoed.reason
    for name in ONNX:
        trial = study.trial(name)
        assert trial.quality is not None
        assert trial.screening is not None
        assert trial.screening.footprint.peak_rss_bytes > 2**20
        assert trial.mlflow_run_id is not None
        assert trial.finalist == (trial.status == "ok")
        assert (trial.fall is not None) == (trial.status == "stopped")


def test_the_final_is_interleaved_and_knows_its_noise(study: Study) -> None:
    """At most three candidates and the leader's twin, every second heat in reverse, each round of all."""
    final = final_of(study.races)
    assert final is not None
    assert final.noise is not None
    finalists = [name for name in final.heats[0] if not name.endswith(TWIN_SUFFIX)]
    assert 0 < len(finalists) <= 3
    assert len(final.heats[0]) == len(finalists) + 1
    assert set(finalists) == {trial.id for trial in study.trials if trial.finalist}
    assert all(set(heat) == set(final.heats[0]) for heat in final.heats)
    for heat, mirrored in zip(final.heats[::2], final.heats[1::2], strict=False):
        assert mirrored == heat[::-1]
    for name in finalists:
        trial = study.trial(name)
        assert trial.measurements is not None
        assert len(trial.measurements.counted) == len(final.heats) >= SMALL["rounds"]
        assert trial.metrics["peak_rss_bytes"].median > 2**20
        assert trial.capsule is not None
    assert {c.candidate for c in study.comparisons} == {*finalists} - {study.champion}


def test_an_exact_engine_keeps_all_of_the_quality(study: Study) -> None:
    """The same arithmetic as the reference gives its perplexity, on both paths."""
    quality = study.trial("onnxruntime-fp32").quality
    assert quality is not None
    assert quality.prefill.ratio == pytest.approx(1, abs=1e-4)
    assert quality.decode.ratio == pytest.approx(1, abs=1e-4)
    assert quality.greedy_same_tokens == (quality.greedy_tokens,) * 2


def test_the_champion_is_the_quickest_that_is_allowed(study: Study) -> None:
    """The verdict, the champion and the gate agree."""
    assert study.verdict.kind == "champion"
    assert study.gate is not None
    assert study.gate.passed
    feasible = [trial for trial in study.trials if trial.feasible]
    quickest = min(feasible, key=lambda trial: trial.metrics["e2e_ms"].median)
    assert study.champion == quickest.id
    assert study.incumbent is None


def test_the_directory_holds_the_whole_study(study: Study) -> None:
    """The result reads back as it was returned, with samples, logs, report, figures, bundle and Data Docs."""
    root = study.output_dir
    assert load_study(root) == study
    page = (root / "report.html").read_text()
    for trial in study.trials:
        assert trial.id in page
    manifest, _ = open_bundle(root / "bundle")
    quality = study.trial(study.champion or "").quality
    assert quality is not None
    assert [one.same_tokens for one in evidence_of(manifest).golden] == list(quality.greedy_same_tokens)
    assert (root / "data-docs" / "index.html").is_file()
    timed = {f"{trial.id}.json" for trial in study.trials if trial.measurements is not None}
    assert {path.name for path in (root / "samples").iterdir()} == timed
    assert (root / "logs" / "fake-crash-screening.log").is_file()
    assert (root / "bench.json").is_file()
    assert [path.name for path in root.rglob(".*") if path.name != ".lock"] == []


def test_the_registry_serves_the_champion(study: Study) -> None:
    """By its alias, through MLflow alone, it continues a text; each trial has a run below the study's."""
    import mlflow
    from mlflow import MlflowClient

    assert study.registration is not None
    client, before = MlflowClient(Settings().mlflow_uri), mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(Settings().mlflow_uri)
    model = mlflow.pyfunc.load_model(f"models:/{study.registration.model_name}@champion")
    (answer,) = model.predict(["The capital of France"], params={"max_new_tokens": 4})
    assert isinstance(answer, str)
    mlflow.set_tracking_uri(before)
    parent = client.get_run(study.registration.run_id)
    assert parent.info.status == "FINISHED"
    below = client.search_runs(
        [parent.info.experiment_id], f"tags.mlflow.parentRunId = '{parent.info.run_id}'"
    )
    assert {run.info.run_name for run in below} == {trial.id for trial in study.trials}


def test_running_it_again_repeats_nothing(study: Study, spec: OptimizeSpec) -> None:
    """Screenings, heats and exports are those of before; the champion is confirmed as the same version."""
    kept = (Settings().home / "results", Settings().exports)
    before = [modified(folder) for folder in kept]
    again = optimize(spec)
    assert [modified(folder) for folder in kept] == before
    assert again.id == study.id
    for trial in again.trials:
        assert ("screening" in trial.reused) == (trial.screening is not None)
        assert ("final" in trial.reused) == trial.finalist
    assert again.races == study.races
    assert again.incumbent is not None
    assert again.incumbent.trial_id == again.champion == study.champion
    assert again.verdict.kind == "champion"
    assert "it is the registered champion, measured again" in again.verdict.reasons[0]
    assert study.registration is not None
    assert len(versions(study.registration.model_name or "")) == 1


def test_the_next_in_line_take_the_places_of_those_that_fall(
    study: Study, spec: OptimizeSpec, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two places, and two entrants that a full evaluation finds lossy, the third and fourth come to the
    final and the fifth stays out; running it again says the same."""
    order = sorted((t for t in study.trials if t.screening), key=lambda trial: rank_figure(trial, spec))
    first, second, third, fourth, fifth = (trial.id for trial in order)

    def evaluated(bench: Bench, trial: Trial, reference: Path | Failure, settings: Settings) -> Trial:
        scored = evaluate_trial(bench, trial, reference, settings)
        if trial.id not in (first, second) or scored.quality is None:
            return scored
        return scored.model_copy(update={"quality": scored.quality.model_copy(update={"ratio": 0.4})})

    monkeypatch.setattr("tasks.evaluate.evaluate_trial", evaluated)
    monkeypatch.setattr("open_autoglm.bracket.MOST_ENTRANTS", 2)
    monkeypatch.setattr("open_autoglm.bracket.HOPELESS", 1e9)
    output = str(settings.home.parent / "refilled")
    asked = spec.model_copy(update={"output": output, "register_as": "refilled"})
    for found in (optimize(asked), optimize(asked)):
        assert {t.id: t.fall.stage for t in found.trials if t.fall} == {
            first: "evaluation",
            second: "evaluation",
            fifth: "screening",
        }
        assert {trial.id for trial in found.trials if trial.finalist} == {third, fourth}
        assert found.trial(fifth).reason == "screening: place 5 in short rounds, for 2 places"
        assert found.champion in (third, fourth)
        assert all(trial.mlflow_run_id for trial in found.trials)


# ── a tiny GLM, by the command line ──────────────────────────────────────────────────────────────


@pytest.fixture
def environment(settings: Settings) -> dict[str, str]:
    """What the command line needs to find this test's server."""
    from prefect.settings import PREFECT_API_URL

    return {**os.environ, "PREFECT_API_URL": str(PREFECT_API_URL.value()), "PREFECT_HOME": str(settings.home)}


def screenings(settings: Settings) -> dict[Path, int]:
    """What was kept of first looks, and when it was written."""
    return {path: path.stat().st_mtime_ns for path in settings.home.glob("results/screenings/[!.]*.json")}


def test_a_killed_study_goes_on_where_it_stopped(
    tiny_glm: Path, settings: Settings, environment: dict[str, str], tmp_path: Path
) -> None:
    """SIGKILL leaves no child; the same command repeats no finished screening, and searches on to the end,
    where the champion is served if that is asked for."""
    root = tmp_path / "study"
    asked = ["--engines=torch", "--min-quality=0.5", f"--model-path={tiny_glm}", f"--output={root}"]
    command = [*OPTIMIZE, *asked]
    others = screenings(settings).keys()
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as running:
        deadline = time.monotonic() + 300
        while not screenings(settings).keys() - others:
            assert running.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.1)
        children = psutil.Process(running.pid).children(recursive=True)
        running.kill()
    psutil.wait_procs(children, timeout=5)
    assert [child for child in children if child.is_running() and child.status() != "zombie"] == []
    assert not (root / RESULT).exists()
    before = screenings(settings)

    said = tmp_path / "stderr.txt"
    with (
        said.open("w") as errors,
        subprocess.Popen(
            [*command, "--serve=0"], env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as running,
    ):
        assert running.stdout is not None
        found = running.stdout.readline()
        assert found, said.read_text()
        url = re.search(r"http://\S+", running.stdout.readline())
        assert url, said.read_text()
        models = httpx.get(f"{url[0]}/models").json()["data"]
        running.send_signal(signal.SIGTERM)
        assert running.wait(60) == 0
    study = Study.model_validate_json(found)
    assert study.bundle is not None
    assert [model["bundle_digest"] for model in models] == [study.bundle.digest]
    after = screenings(settings)
    assert {path: after[path] for path in before} == before
    assert sum("screening" in trial.reused for trial in study.trials) == len(before.keys() - others)
    assert {trial.id: trial.status for trial in study.trials if trial.status != "stopped"}.items() <= {
        "torch-fp32": "ok",
        "torch-bf16": "ok",
        "torch-bf16-t1": "ok",
        "torch-bf16-compile": "vetoed",  # without a compiler, as the ones below
        "torch-int8-compile": "vetoed",
        "torch-int4-compile": "vetoed",
    }.items()
    assert [line.split(":")[0] for line in study.search] == ["torch-bf16 with threads 1 instead of all"]
    assert study.verdict.kind == "champion"
    assert load_study(root).champion == study.champion
    assert "champion" in said.read_text()


def test_if_nothing_is_feasible_nothing_is_registered(
    study: Study, tiny_llama: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    """Exit code 3, the nearest candidate with its distance, a report, no registered model, and no heat run.

    What an earlier study found out about the same candidates is enough to say so.
    """
    root = tmp_path / "study"
    needed = [trial.screening.footprint.peak_rss_bytes for trial in study.trials if trial.screening]
    goal = f"--goal=minimise tpot subject to rss <= {min(needed) - 1}B, quality >= 50%, flips <= 100%"
    asked = ["--engines=onnxruntime", goal, "--register-as=nobody", "--search-generations=0"]
    limits = [flag for flag in OPTIMIZE if not flag.startswith("--max-token-flips")]  # the goal sets them
    command = [*limits, *asked, f"--output={root}", f"--model-path={tiny_llama}"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 3, result.stderr
    told = Study.model_validate_json(result.stdout.splitlines()[-1])
    assert (told.verdict.kind, told.champion, told.bundle) == ("nothing_feasible", None, None)
    assert (told.spec.objective, told.races) == ("tpot", ())
    assert {trial.id for trial in told.trials} == set(ONNX)
    for trial in told.trials:
        assert [miss.limit for miss in trial.misses] == ["max_memory"]
        assert trial.screening == study.trial(trial.id).screening
    smallest = min(told.trials, key=lambda trial: trial.misses[0].measured)
    assert told.verdict.nearest == smallest.id
    assert (root / "report.html").is_file()
    assert versions("nobody") == []
    assert "Traceback" not in result.stderr

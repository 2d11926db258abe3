"""The command line: what it answers, and the one sentence each wrong request gets."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
from studies import demo_hardware, demo_study

from open_autoglm import engines
from open_autoglm.checkpoint import load_checkpoint
from open_autoglm.cli import main
from open_autoglm.files import sha256_file
from open_autoglm.hardware_bench import Peaks
from open_autoglm.pruning.loop import PruningRun, PruningStep
from open_autoglm.schemas import Analysis, Checkpoint, HeadPruning, OptimizeSpec, Study
from open_autoglm.settings import HOME_NAME, Settings
from open_autoglm.study import open_study, save_study

Damage = Callable[[Path], object]


class Outcome(NamedTuple):
    code: int
    stdout: str
    stderr: str


Cli = Callable[..., Outcome]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "project" / HOME_NAME


@pytest.fixture
def cli(home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Cli:
    """Run a command in an empty project, in this process; the peaks of the host are not measured anew."""
    home.parent.mkdir()
    monkeypatch.chdir(home.parent)
    monkeypatch.delenv("AUTOGLM_HOME", raising=False)
    hardware = demo_hardware().model_dump(include=set(Peaks.model_fields))
    peaks = Peaks(**hardware, foreign_share=0)
    monkeypatch.setattr("open_autoglm.hardware.measure_peaks", lambda *_: peaks)

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["open-autoglm", *map(str, arguments)])
        capfd.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return Outcome(code, *capfd.readouterr())

    return run


@pytest.fixture
def glm(tiny_glm: Path, tmp_path: Path) -> Path:
    """A copy of the tiny GLM that a test may damage."""
    return Path(shutil.copytree(tiny_glm, tmp_path / "glm"))


def refusal(outcome: Outcome) -> str:
    """The one sentence of a refused request: exit code 2, nothing on stdout, one line on stderr."""
    assert outcome.code == 2, outcome.stderr
    assert outcome.stdout == ""
    (line,) = outcome.stderr.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


# ── wrong requests ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--input-shape", "0,512"], "--input-shape: '0,512' is not a shape; write batch,prompt tokens"),
        (["--input-shape", "a,b"], "--input-shape: 'a,b' is not a shape"),
        (["--input-shape", "512"], "--input-shape: '512' is not a shape"),
        (["--input-shape", "1,²"], "--input-shape: '1,²' is not a shape"),
        (["--input-shape", "-1,512"], "--input-shape: '-1,512' is not a shape"),
        (["--input-shape", "5000,32"], "--input-shape: Input should be less than or equal to 1024"),
        (["--input-shape", "1,4096"], "has a context of 512: ask for shorter ones"),
        (
            ["--input-shape", "1,449", "--output-tokens", "64"],
            "449 tokens and 64 new ones make 513, but tiny-glm has a context of 512: ask for shorter ones "
            "(--input-shape, --output-tokens)",
        ),
        (["--output-tokens", "1"], "--output-tokens: Input should be greater than or equal to 2"),
        (["--max-latency", "50"], "--max-latency: '50' has no unit: write a duration like 50ms"),
        (["--max-latency", "-50ms"], "--max-latency: '-50ms' must be greater than zero"),
        (["--max-latency", "50MB"], "--max-latency: the unit 'MB' of '50MB' is not known"),
        (["--max-tpot", "soon"], "--max-tpot: 'soon' is not a duration"),
        (["--max-memory", "2"], "--max-memory: '2' has no unit: write a size like 2GiB"),
        (["--min-quality", "0"], "--min-quality: Input should be greater than 0"),
        (["--max-token-flips", "0%"], "--max-token-flips: Input should be greater than 0"),
        (["--max-token-flips", "few"], "--max-token-flips: Input should be a valid number"),
        (["--rounds", "1"], "--rounds: Input should be greater than or equal to 3"),
        (["--engines", "torch,onyx"], "unknown engine 'onyx': choose from "),
        (["--register-as", "a b"], "--register-as: "),
        (["--target-width", "0"], "--target-width: Input should be greater than 0"),
        (["--target-width", "1"], "--target-width: Input should be less than 1"),
        (["--timing-budget-s", "0"], "--timing-budget-s: Input should be greater than 0"),
        (["--search-generations", "6"], "--search-generations: Input should be less than or equal to 5"),
        (["--request-rate-per-s", "0"], "--request-rate-per-s: Input should be greater than 0"),
        (["--request-rate-per-s", "2"], "a request rate means nothing in the single_stream scenario"),
        (["--scenario", "server"], "needs a mean arrival rate: add --request-rate-per-s"),
        (
            ["--scenario", "server", "--request-rate-per-s", "2", "--input-shape", "4,32"],
            "not in batches of 4: write --input-shape 1,32, or choose --scenario offline",
        ),
        (["--objective", "goodput"], "add --scenario server and --request-rate-per-s"),
        (
            ["--objective", "goodput", "--scenario", "server", "--request-rate-per-s", "2"],
            "add --max-latency, --max-tpot or both",
        ),
        (["--length-mix", "128"], "--length-mix: "),
        (["--length-mix", "32/8:0"], "--length-mix: "),
        (["--length-mix", "32/1:1"], "--length-mix: "),
        (["--length-mix", "4096/8:1,32/8:3"], "has a context of 512: ask for shorter ones (--length-mix)"),
        (["--goal", "go fast"], "--goal: 'go fast' is not a goal; write it like: minimise ttft_p95"),
        (["--goal", "minimise ttft", "--max-tpot", "1ms"], "so does --max-tpot: give one of them"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_option_is_refused_by_name(
    arguments: list[str], sentence: str, cli: Cli, home: Path, tiny_glm: Path
) -> None:
    """The sentence names the flag, quotes what was given and says what to write; nothing is made."""
    shape = [] if "--input-shape" in arguments else ["--input-shape", "1,32"]
    assert sentence in refusal(cli("optimize", "--model-path", tiny_glm, *shape, *arguments))
    assert not home.exists()


@pytest.mark.parametrize(
    ("flag", "value"), [("--scenario", "burst"), ("--objective", "speed"), ("--rounds", "many")]
)
def test_a_word_that_is_no_choice_is_refused(
    flag: str, value: str, cli: Cli, home: Path, tiny_glm: Path
) -> None:
    """The flag, what was given, and what may stand there instead."""
    outcome = cli("optimize", "--model-path", tiny_glm, flag, value)
    assert (outcome.code, outcome.stdout) == (2, "")
    assert f"Invalid value for '{flag}': '{value}' is not " in outcome.stderr
    assert not home.exists()


def removed(*names: str) -> Damage:
    return lambda directory: [(directory / name).unlink() for name in names]


def configured(**entries: object) -> Damage:
    def damage(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))

    return damage


def cut(directory: Path) -> None:
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def flipped(position: int) -> Damage:
    """One bit of the weights, after the checksum was taken."""

    def damage(directory: Path) -> None:
        weights = directory / "model.safetensors"
        (directory / "SHA256SUMS").write_text(f"{sha256_file(weights)}  {weights.name}\n")
        content = bytearray(weights.read_bytes())
        content[position] ^= 1
        weights.write_bytes(content)

    return damage


def sharded_without_the_second(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "model-00001-of-00002.safetensors")
    shards = {"lm_head.weight": "model-00002-of-00002.safetensors", "a": "model-00001-of-00002.safetensors"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def not_finite(directory: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def pickled(directory: Path) -> None:
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (shutil.rmtree, "does not exist: check the path"),
        (lambda d: [f.unlink() for f in d.iterdir()], "is empty: pass the directory that holds config.json"),
        (removed("model.safetensors"), "holds no weights"),
        (cut, "model.safetensors .* is truncated or damaged"),
        (flipped(-1), "does not match its SHA-256 checksum"),
        (flipped(20), "model.safetensors .* (is truncated or damaged|lack)"),
        (sharded_without_the_second, "shard model-00002-of-00002.safetensors .* is missing"),
        (configured(model_type="glm99"), "does not know the model_type 'glm99'"),
        (configured(model_type="bert", architectures=["BertForMaskedLM"]), "does not generate text"),
        (pickled, "only pickled weights .* --allow-pickle"),
        (removed("tokenizer.json"), "has no tokenizer: add tokenizer.json"),
    ],
    ids=[
        "missing", "empty", "no-weights", "truncated", "flipped", "flipped-header", "missing-shard",
        "unknown-type", "encoder", "pickle", "no-tokenizer",
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["optimize", "analyze"])
def test_a_checkpoint_that_cannot_be_used_is_refused(
    command: str, damage: Damage, sentence: str, cli: Cli, home: Path, glm: Path
) -> None:
    """What is wrong, where, and how to mend it; the checkpoint and the project stay as they were."""
    damage(glm)
    before = sorted(glm.iterdir()) if glm.exists() else None
    assert re.search(sentence, refusal(cli(command, "--model-path", glm, "--input-shape", "1,32")))
    assert not home.exists()
    assert (sorted(glm.iterdir()) if glm.exists() else None) == before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--keep-quality", "99"], "--keep-quality: '99' is not a share; write it like 99% or 0.99"),
        (["--keep-quality", "0%"], "--keep-quality: '0%' is not a share"),
        (["--keep-quality", "all"], "--keep-quality: 'all' is not a share"),
        (["-o", "."], ". is not empty; choose an empty or a new directory"),
        (["-o", "notes.txt/below"], "notes.txt is a file; choose a directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_wish_to_prune_is_refused(
    arguments: list[str], sentence: str, cli: Cli, home: Path, tiny_glm: Path
) -> None:
    """By name, before anything is read."""
    (home.parent / "notes.txt").touch()
    output = [] if "-o" in arguments else ["-o", "out"]
    assert sentence in refusal(cli("prune", tiny_glm, *output, *arguments))
    assert [path.name for path in home.parent.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (shutil.rmtree, "does not exist: check the path"),
        (cut, "model.safetensors .* is truncated or damaged"),
        (not_finite, "holds NaN or infinite numbers: fetch the file again"),
    ],
    ids=["missing", "truncated", "nan"],
)
def test_a_checkpoint_that_cannot_be_pruned_is_refused(
    damage: Damage, sentence: str, cli: Cli, home: Path, glm: Path
) -> None:
    """As `optimize` refuses it, and nothing is written."""
    damage(glm)
    assert re.search(sentence, refusal(cli("prune", glm, "-o", "out")))
    assert list(home.parent.iterdir()) == []


def pruning_run(checkpoint: Checkpoint, pruned: Checkpoint | None) -> PruningRun:
    """A run that tried one level; it was accepted if there is a ``pruned`` checkpoint."""
    level = HeadPruning(kv_groups=1, heads_per_group=2, of_kv_groups=2, of_heads_per_group=2)
    step = PruningStep(
        level=level,
        parameters_removed=24_960,
        verdict="rejected" if pruned is None else "accepted",
        ratio=0.871,
        ratio_interval=(0.852, 0.893),
        path="decode",
        tokens=768,
    )
    return PruningRun(
        checkpoint=checkpoint.name,
        checkpoint_digest=checkpoint.digest,
        parameters=177_728,
        keep_quality=0.9,
        steps=(step,),
        accepted=None if pruned is None else level,
        pruned=pruned,
        conclusion="What came of it.",
    )


@pytest.mark.parametrize("found", [True, False])
def test_prune_shows_its_steps_and_writes_what_was_accepted(
    found: bool, cli: Cli, home: Path, tiny_glm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table, the answer and the place; exit code 3 and no directory if every head is needed."""
    checkpoint = load_checkpoint(str(tiny_glm))
    run = pruning_run(checkpoint, checkpoint if found else None)
    monkeypatch.setattr("open_autoglm.pruning.loop.prune", lambda *_, **__: run)
    outcome = cli("prune", tiny_glm, "--keep-quality", "90%", "-o", "out")
    assert outcome.code == (0 if found else 3)
    told = " ".join(outcome.stdout.split())
    assert "at least 90.0% of the quality is to be kept" in told
    verdict = "accepted" if found else "rejected"
    assert f"2 of 4 1 of 2 0.02 M (14.0%) 87.10% 85.20% to 89.30% decode 768 {verdict}" in told
    assert "What came of it." in told
    assert ((home.parent / "out" / "config.json").exists(), f"Written to {home.parent / 'out'}" in told) == (
        found,
        found,
    )
    again = cli("prune", tiny_glm, "-o", "other", "--json")
    assert PruningRun.model_validate_json(again.stdout).steps == run.steps


def test_an_output_below_a_file_is_refused(cli: Cli, home: Path, tiny_glm: Path, tmp_path: Path) -> None:
    """No right in the world makes a directory there."""
    (tmp_path / "file").touch()
    asked = ["--model-path", tiny_glm, "--input-shape", "1,32"]
    told = refusal(cli("optimize", *asked, "--output", tmp_path / "file" / "study"))
    assert f"{tmp_path / 'file'} is a file; choose a directory" in told
    assert not home.exists()


def test_an_output_that_holds_other_things_is_refused(cli: Cli, home: Path, tiny_glm: Path) -> None:
    """They may be somebody's."""
    (home.parent / "notes.txt").touch()
    asked = ["--model-path", tiny_glm, "--input-shape", "1,32"]
    assert "is not empty and holds no study" in refusal(cli("optimize", *asked, "--output", "."))
    assert [path.name for path in home.parent.iterdir()] == ["notes.txt"]


def test_the_output_of_another_study_is_refused(cli: Cli, home: Path, tiny_glm: Path) -> None:
    """Before a server is started, and without touching that study."""
    from open_autoglm.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(str(tiny_glm))
    other = OptimizeSpec(model_path=str(tiny_glm), rounds=99)
    open_study(other, checkpoint, demo_hardware(), Settings(home=home), home.parent / "out")
    asked = ["--model-path", tiny_glm, "--input-shape", "1,32", "--output", "out"]
    assert "belongs to another study" in refusal(cli("optimize", *asked))
    assert [path.name for path in (home.parent / "out").iterdir()] == ["identity.json"]


def test_a_disk_too_small_is_refused(
    cli: Cli, home: Path, tiny_glm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a server is started and before a byte is exported."""
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    told = refusal(cli("optimize", "--model-path", tiny_glm, "--input-shape", "1,32"))
    assert "the exports need" in told
    assert "AUTOGLM_HOME" in told
    assert [path.name for path in home.iterdir()] == ["hardware"]


def test_a_gpu_that_is_not_here_is_refused(cli: Cli, tiny_glm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never measured on the CPU instead."""
    monkeypatch.setattr("open_autoglm.hardware.find_gpus", lambda: ((), "no NVIDIA driver found"))
    asked = ["--model-path", tiny_glm, "--input-shape", "1,32", "--target-device", "gpu"]
    assert "gpu is not here: no NVIDIA driver found; choose cpu or auto" in refusal(cli("optimize", *asked))


def test_a_wrong_setting_is_refused(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables come from people too."""
    monkeypatch.setenv("AUTOGLM_MLFLOW_PORT", "99999")
    assert "AUTOGLM_MLFLOW_PORT" in refusal(cli("report"))


def test_a_missing_option_shows_the_usage(cli: Cli) -> None:
    """Which option, and where to read more."""
    outcome = cli("optimize")
    assert outcome.code == 2
    assert "Missing option '--model-path'" in outcome.stderr
    assert "--help" in outcome.stderr


# ── answers ──────────────────────────────────────────────────────────────────────────────────────


def test_a_dry_run_shows_the_plan_and_measures_nothing(cli: Cli, home: Path, tiny_glm: Path) -> None:
    """Every candidate with its reason; only what was found out about the host is kept."""
    outcome = cli("optimize", "--model-path", tiny_glm, "--input-shape", "1,32", "--dry-run")
    assert outcome.code == 0
    assert "candidates would be measured" in outcome.stdout
    for name in ("torch-fp32", "onnxruntime-w8-b32", "tensorrt-fp16"):
        assert name in outcome.stdout
    assert [path.name for path in home.iterdir()] == ["hardware"]


def test_with_json_the_last_line_is_the_study(cli: Cli, tiny_glm: Path) -> None:
    """All of stdout, in fact: what people read goes to stderr."""
    asked = ["--model-path", tiny_glm, "--input-shape", "2,32", "--engines", "torch", "--max-memory", "2GiB"]
    outcome = cli("optimize", *asked, "--dry-run", "--json")
    (line,) = outcome.stdout.splitlines()
    study = Study.model_validate_json(line)
    assert study.verdict.kind == "dry_run"
    assert (study.spec.batch_size, study.spec.prompt_tokens) == (2, 32)
    assert study.spec.max_memory == "2GiB"
    assert {trial.engine for trial in study.trials} == {"torch"}
    assert "candidates would be measured" in outcome.stderr


def planned(cli: Cli, model: Path, *asked: object) -> OptimizeSpec:
    """The spec of a dry run with these flags."""
    outcome = cli("optimize", "--model-path", model, *asked, "--dry-run", "--json")
    assert outcome.code == 0, outcome.stderr
    return Study.model_validate_json(outcome.stdout).spec


def test_a_scenario_and_how_long_to_time_it_are_flags(cli: Cli, tiny_glm: Path) -> None:
    """Arrivals, the mix of lengths, and when the rounds may end."""
    mix = ["--length-mix", "32/8:3,128/16:1", "--scenario", "server", "--request-rate-per-s", "2.5"]
    ends = [
        "--rounds",
        "20",
        "--target-width",
        "0.02",
        "--timing-budget-s",
        "30",
        "--search-generations",
        "2",
    ]
    spec = planned(cli, tiny_glm, *mix, *ends)
    assert (spec.scenario, spec.request_rate_per_s) == ("server", 2.5)
    assert spec.length_mix == "32/8:3,128/16:1"
    assert (spec.prompt_tokens, spec.output_tokens) == (128, 16)
    assert (spec.rounds, spec.target_width, spec.timing_budget_s) == (20, 0.02, 30)
    assert spec.search_generations == 2


def test_a_goal_says_the_same_as_its_flags(cli: Cli, tiny_glm: Path) -> None:
    """One line, or a flag for each part of it."""
    shape = ["--input-shape", "1,32"]
    goal = planned(
        cli,
        tiny_glm,
        *shape,
        "--goal",
        "minimise tpot subject to ttft <= 1s, rss <= 2GiB, quality >= 95%, flips <= 5%",
    )
    flags = ["--objective", "tpot", "--max-latency", "1s", "--max-memory", "2GiB", "--min-quality", "0.95"]
    flags += ["--max-token-flips", "0.05"]
    assert goal == planned(cli, tiny_glm, *shape, *flags)


def test_what_is_not_said_stays_as_the_spec_has_it() -> None:
    """The flags' defaults are those of a run that is started in the Prefect UI."""
    from open_autoglm.cli.commands import make_spec
    from open_autoglm.cli.main import optimize

    context = optimize.make_context("optimize", ["--model-path", "m"])
    arguments = {name: context.params[name] for name in context.params.keys() - {"dry_run", "as_json"}}
    assert make_spec(arguments) == OptimizeSpec(model_path="m")


def test_analyze_tells_structure_and_roofline(cli: Cli, tiny_glm: Path) -> None:
    """As a table, or as one object with the same content."""
    asked = ["analyze", "--model-path", tiny_glm, "--input-shape", "1,32"]
    shown = cli(*asked)
    assert shown.code == 0
    for word in ("GlmForCausalLM", "GQA", "prefill", "decode", "Roofline"):
        assert word in shown.stdout
    analysis = Analysis.model_validate_json(cli(*asked, "--json").stdout)
    assert analysis.profile.layers == 2
    assert analysis.bound("prefill", "fp32").bound_ms > 0


def test_engines_lists_all_of_them(cli: Cli) -> None:
    """Those that can run here, and how to get those that cannot."""
    assert set(engines.names()) <= set(cli("engines").stdout.split())
    probes = {probe["engine"]: probe for probe in json.loads(cli("engines", "--json").stdout)}
    assert set(probes) == set(engines.names())
    assert probes["torch"]["stage"] == "ready"
    assert probes["tensorrt"]["install"].startswith("pip install 'open-autoglm[tensorrt]'")


def test_report_shows_the_latest_study_again(cli: Cli, home: Path) -> None:
    """From anywhere in the project, with its page written anew."""
    root = home / "studies" / "one"
    save_study(demo_study(output_dir=root, trials=(), champion=None, pareto=()))
    outcome = cli("report")
    assert outcome.code == 0
    assert "demo-glm" in outcome.stdout
    assert (root / "report.html").read_text().startswith("<!doctype html>")
    assert Study.model_validate_json(cli("report", root, "--json").stdout).id == demo_study().id


def test_report_without_a_study_is_refused(cli: Cli, tmp_path: Path) -> None:
    """Whether none was named or a wrong one was."""
    assert "there is no finished study under" in refusal(cli("report"))
    assert "there is no finished study at" in refusal(cli("report", tmp_path))


def test_doctor_finds_this_machine_fit(cli: Cli) -> None:
    """Exit code 0 if a study can run here, and a way to mend each thing that is missing."""
    outcome = cli("doctor", "--json")
    findings = json.loads(outcome.stdout)
    problems = [finding for finding in findings if finding["state"] == "problem"]
    assert outcome.code == (2 if problems else 0)
    assert all(finding["mend"] for finding in problems)
    assert {"CPU", "memory"} <= {finding["subject"] for finding in findings}
    subjects = [finding["subject"] for finding in findings]
    assert [name for name in subjects if name.startswith("GPU engine ")] == [
        "GPU engine torch",
        "GPU engine onnxruntime-cuda",
        "GPU engine onnxruntime-tensorrt",
        "GPU engine tensorrt",
        "GPU engine tensorrt-rtx",
    ]


COMMANDS = [
    "", "optimize", "analyze", "engines", "report", "reproduce", "serve", "promote", "rollback", "canary",
    "events", "prune", "doctor", "demo-model",
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, cli: Cli) -> None:
    """``--help`` and ``-h`` alike."""
    outcome = cli(*command.split(), "--help")
    assert outcome.code == 0
    assert outcome.stdout == cli(*command.split(), "-h").stdout
    assert "Usage: open-autoglm" in outcome.stdout


def test_reproduce_needs_a_study_and_a_trial(cli: Cli, home: Path, tmp_path: Path) -> None:
    """Its help tells the exit codes; a study that is not there and a trial nobody timed are named."""
    told = cli("reproduce", "--help").stdout
    assert "reproduce [OPTIONS] STUDY TRIAL" in told
    assert "Exit code 0 if they do, 3 if they do not" in " ".join(told.split())
    assert "there is no finished study at" in refusal(cli("reproduce", tmp_path, "torch-fp32"))
    save_study(demo_study(output_dir=home / "studies" / "one", trials=(), champion=None, pareto=()))
    told = refusal(cli("reproduce", home / "studies" / "one", "torch-fp32"))
    assert told.startswith("torch-fp32 is not one of its trials in ")


def test_help_imports_nothing_heavy() -> None:
    """It answers at once because the libraries that take seconds are not touched."""
    heavy = ("torch", "transformers", "mlflow", "prefect", "pydantic", "numpy", "onnx", "onnxruntime", "rich")
    code = (
        "import sys\nfrom open_autoglm.cli import main\nsys.argv = ['open-autoglm', 'optimize', '--help']\n"
        f"main()\nprint('loaded:', *[name for name in {heavy} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "loaded:"


def test_the_installed_command_is_this_one() -> None:
    """The script that pip writes calls the same entry point, and knows its version."""
    script = Path(sys.executable).with_name("open-autoglm")
    result = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("open-autoglm, version ")

"""Pruned models recovered: from which texts, how far, through kills and failures, and only if it helps."""

from __future__ import annotations

import os
import resource
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_models import build_checkpoint

from open_autoglm.checkpoint import load_checkpoint
from open_autoglm.measure.child import resolve
from open_autoglm.measure.isolation import Child, Failure
from open_autoglm.pruning.importance import load_fp32
from open_autoglm.pruning.surgery import KeptHeads, remove_heads
from open_autoglm.quality.texts import TEXTS, encode, load_tokenizer, windows
from open_autoglm.recovery import store, training
from open_autoglm.recovery.adapters import Adapters, write_merged
from open_autoglm.recovery.state import Progress, load
from open_autoglm.recovery.store import Recovered, discard, recover
from open_autoglm.recovery.texts import lessons, window_in_turn
from open_autoglm.recovery.training import RecoveryJob, Training, learning_rate
from open_autoglm.schemas import Checkpoint, HeadPruning
from open_autoglm.settings import Settings
from open_autoglm.weights import SAFETENSORS

CONTEXT = 64
USUAL_RATE = training.LEARNING_RATE
STEPS = 30
LEVEL = HeadPruning(kv_groups=1, heads_per_group=1, of_kv_groups=2, of_heads_per_group=2, recover_steps=STEPS)


@pytest.fixture(scope="module", autouse=True)
def fit_for_tiny_models() -> Iterator[None]:
    """A larger rate, which a model of 64 dimensions needs in so few steps (children have the usual one), and
    one thread, which is faster than two that wait for each other."""
    import torch

    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "LEARNING_RATE", 5e-3)
        patch.setenv("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A GLM that has learned a little from other windows, so that its heads are of use."""
    import torch

    directory = build_checkpoint(tmp_path_factory.mktemp("whole") / "glm", max_position_embeddings=CONTEXT)
    model, tokenizer = load_fp32(directory), load_tokenizer(load_checkpoint(str(directory)))
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    drawn = [windows(tokenizer, kind, "calibration", 240, CONTEXT, seed=0) for kind in TEXTS]
    for batch in torch.from_numpy(np.concatenate(drawn, axis=1).reshape(-1, 8, CONTEXT)):
        optimiser.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimiser.step()
    model.save_pretrained(directory)
    return load_checkpoint(str(directory))


@pytest.fixture(scope="module")
def pruned(whole: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    directory = tmp_path_factory.mktemp("pruned")
    remove_heads(whole, [KeptHeads((1,), (2,)), KeptHeads((0,), (1,))], LEVEL, directory)
    return load_checkpoint(str(directory))


def job(whole: Checkpoint, pruned: Checkpoint, state: Path, **changes: Any) -> RecoveryJob:
    usual = {"key": "k", "steps": STEPS, "seconds": 600.0, "seed": 0}
    return RecoveryJob(whole=whole, pruned=pruned, state=state, **{**usual, **changes})


@pytest.fixture(scope="module")
def in_one_go(
    whole: Checkpoint, pruned: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Progress, Checkpoint]:
    """Recovered in this process, uninterrupted."""
    root = tmp_path_factory.mktemp("once")
    found = Training(job(whole, pruned, root / "state"))
    progress = found.go_on(600)
    return progress, found.finish(root / "recovered").checkpoint


class Here:
    """In the place of a child: the same jobs, in this process."""

    def __init__(self, _: Path) -> None:
        self.asked: list[str] = []

    def ask(self, reference: str, payload: Any, *_: Any) -> Any:
        self.asked.append(reference.partition(":")[2])
        return resolve(reference)(payload)

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: object) -> None:
        pass


# ── texts and rates ──────────────────────────────────────────────────────────────────────────────


def test_nothing_is_learned_from_what_it_is_judged_by(whole: Checkpoint) -> None:
    """Windows are of the calibration texts, none of the evaluation texts; the held-out are not learned."""
    tokenizer, found = load_tokenizer(whole), lessons(whole)
    evaluation = [encode(tokenizer, kind, "eval") for kind in TEXTS]
    calibration = [encode(tokenizer, kind, "calibration") for kind in TEXTS]
    held_out = {window.tobytes() for window in found.held_out}
    assert held_out.isdisjoint(window.tobytes() for window in found.learned)
    assert len(held_out) == 8
    for window in np.concatenate([found.learned[::97], found.held_out]):
        assert any(holds(text, window) for text in calibration)
        assert not any(holds(text, window) for text in evaluation)


def holds(text: NDArray[np.int64], window: NDArray[np.int64]) -> bool:
    views = np.lib.stride_tricks.sliding_window_view(text, len(window))
    return bool((views == window).all(axis=1).any())


def test_every_window_is_learned_before_any_again() -> None:
    """In an order of the seed's, which needs no memory."""
    turns = [[window_in_turn(index, 7, seed) for index in range(14)] for seed in (0, 1)]
    assert all(set(Counter(turn).values()) == {2} and len(set(turn[:7])) == 7 for turn in turns)
    assert turns[0][:7] != turns[0][7:]
    assert turns[0] != turns[1]


def test_the_rate_rises_and_falls() -> None:
    """Over the warm-up and half a cosine, to nearly nothing; a plan may be shorter than the warm-up."""
    rates = [learning_rate(step, 100) for step in range(100)]
    assert max(rates) == rates[9] == rates[10] == training.LEARNING_RATE
    assert all(a < b for a, b in pairwise(rates[:10]))
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert rates[-1] < training.LEARNING_RATE / 1000
    assert learning_rate(4, 5) == training.LEARNING_RATE / 2


# ── what it comes to ─────────────────────────────────────────────────────────────────────────────


def perplexity(path: Path, texts: NDArray[np.int64]) -> float:
    """Of the evaluation windows ``texts[rows, n]``."""
    import torch

    ids = torch.from_numpy(texts)
    with torch.no_grad():
        return float(load_fp32(path)(input_ids=ids, labels=ids).loss.exp())


def test_recovery_brings_quality_back(
    whole: Checkpoint, pruned: Checkpoint, in_one_go: tuple[Progress, Checkpoint]
) -> None:
    """The losses fall, and more of the whole model's quality is kept on texts that were never read."""
    progress, recovered = in_one_go
    assert progress.ended.startswith("30 of 30 steps in ")
    assert np.mean(progress.losses[-5:]) < 0.8 * np.mean(progress.losses[:5])
    assert progress.best.mean < 0.8 * progress.looks[0].mean
    tokenizer = load_tokenizer(whole)
    texts = np.concatenate([windows(tokenizer, kind, "eval", 32, CONTEXT, seed=1) for kind in TEXTS])
    reference = perplexity(whole.path, texts)
    before, after = (reference / perplexity(path, texts) for path in (pruned.path, recovered.path))
    assert before < after < 1.01
    assert 1 - after < 0.75 * (1 - before)


def test_the_first_look_is_at_the_pruned_model(
    whole: Checkpoint, pruned: Checkpoint, in_one_go: tuple[Progress, Checkpoint]
) -> None:
    """Before a step is taken the additions add nothing: its KL divergence is the definition's."""
    import torch

    ids = torch.from_numpy(lessons(whole).held_out)
    with torch.no_grad():
        there, here = (load_fp32(c.path)(ids).logits.double().log_softmax(-1) for c in (whole, pruned))
    expected = (there.exp() * (there - here)).sum(-1).reshape(-1, 32).mean(1)  # blocks of 32 tokens
    np.testing.assert_allclose(in_one_go[0].looks[0].divergences, expected, rtol=1e-3, atol=1e-5)


def test_merged_weights_are_the_adapted_model(tmp_path: Path) -> None:
    """In bf16 shards too: the dtypes stay, and the logits are those of the model with its additions."""
    import torch
    from transformers import AutoModelForCausalLM

    directory = build_checkpoint(tmp_path / "whole", "llama")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    (directory / SAFETENSORS).unlink()
    model.save_pretrained(directory, max_shard_size="60kB")
    student, adapted = load_checkpoint(str(directory)), load_fp32(directory)
    tensors = Adapters(adapted, seed=0).tensors
    for name, tensor in tensors.items():
        if name.endswith(".up"):
            tensor.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(len(name)))
    assert {name.split(".")[3] for name in tensors} >= {"q_proj", "o_proj", "gate_proj", "down_proj"}
    (tmp_path / "out").mkdir()
    write_merged(
        student, {n: t.detach() for n, t in tensors.items()}, adapted.base_model_prefix, tmp_path / "out"
    )
    merged = load_checkpoint(str(tmp_path / "out"))
    assert merged.weight_dtype == "bf16"
    assert [file.path for file in merged.files] == [file.path for file in student.files]
    ids = torch.arange(4, 28)[None]
    with torch.no_grad():
        plain, expected, found = (m(ids).logits for m in (model.float(), adapted, load_fp32(merged.path)))
    assert float((found - expected).abs().max()) < 0.2 * float((plain - expected).abs().max())


# ── through kills and failures ───────────────────────────────────────────────────────────────────


class Mortal(Child):
    """A child that is killed while it works on its twelfth slice, or just after."""

    slices = 0

    def ask(self, reference: str, *arguments: Any, **options: Any) -> Any:
        self.slices += reference.endswith(":go_on")
        if self.slices == 12:
            threading.Timer(0.01, os.kill, (self.pid, signal.SIGKILL)).start()
        return super().ask(reference, *arguments, **options)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(home=tmp_path_factory.mktemp("recovery") / "home")


@pytest.fixture(scope="module")
def resumed(whole: Checkpoint, pruned: Checkpoint, home: Settings) -> tuple[Failure, int, Recovered]:
    """What the killed attempt answered, how far it had come, and what the next one came to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "SLICE_S", 1e-9)  # a step each
        patch.setattr(store, "Child", Mortal)
        failure = recover(whole, pruned, LEVEL, home, home.home / "log")
    assert isinstance(failure, Failure)
    (state,) = home.checkpoints.glob("*.state")
    (key,) = {Progress.model_validate_json(metadata_of(state)).key}
    found = load(state, key)
    assert found is not None
    name = state.name.removesuffix(".state")  # killed while it wrote, it would have left these
    (home.checkpoints / f".{name}.state.half").touch()
    (home.checkpoints / f".{name}.half").mkdir()
    recovered = recover(whole, pruned, LEVEL, home, home.home / "log")
    assert isinstance(recovered, Recovered)
    return failure, found[0].step, recovered


def metadata_of(state: Path) -> str:
    from safetensors import safe_open

    with safe_open(state, framework="pt") as file:
        return str(file.metadata()["progress"])


def test_a_killed_recovery_goes_on_and_ends_as_if_nothing_had_been(
    whole: Checkpoint,
    pruned: Checkpoint,
    resumed: tuple[Failure, int, Recovered],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not from the beginning, and with the same losses and weights up to rounding."""
    failure, step, recovered = resumed
    assert "killed by SIGKILL" in failure.reason
    assert 0 < step < STEPS
    monkeypatch.setattr(training, "LEARNING_RATE", USUAL_RATE)  # the children's
    once = Training(job(whole, pruned, tmp_path / "state"))
    progress = once.go_on(600)
    np.testing.assert_allclose(recovered.progress.losses, progress.losses, rtol=1e-3)
    assert [look.step for look in recovered.progress.looks] == [look.step for look in progress.looks]
    written = load_fp32(once.finish(tmp_path / "recovered").checkpoint.path).named_parameters()
    for (name, expected), (_, found) in zip(
        written, load_fp32(recovered.checkpoint.path).named_parameters(), strict=True
    ):
        np.testing.assert_allclose(found.detach(), expected.detach(), atol=1e-4, err_msg=name)


def test_the_result_is_a_checkpoint_with_its_record(
    whole: Checkpoint, pruned: Checkpoint, home: Settings, resumed: tuple[Failure, int, Recovered]
) -> None:
    """What it was made from and the raw losses lie beside it, and nothing unfinished does."""
    recovered = resumed[2]
    checkpoint, recovery = recovered.checkpoint, recovered.recovery
    assert load_checkpoint(str(checkpoint.path)) == checkpoint
    assert checkpoint.digest != pruned.digest
    assert [file.path for file in checkpoint.files] == [file.path for file in pruned.files]
    assert recovery.helped
    assert recovery.divergence_before is not None
    assert recovery.divergence_after is not None
    assert recovery.divergence_after < recovery.divergence_before
    assert recovery.gain_interval is not None
    assert recovery.gain_interval[0] > 0
    assert recovery.tokens == STEPS * training.WINDOWS_PER_STEP * CONTEXT
    assert "KL from the whole model" in recovery.reason
    record = Recovered.model_validate_json(recovery.record.read_bytes())
    assert record == recovered
    assert (record.whole_digest, record.pruned_digest) == (whole.digest, pruned.digest)
    assert len(record.progress.losses) == STEPS
    name = checkpoint.path.name
    assert {path.name for path in home.checkpoints.iterdir()} == {name, f"{name}.json", f"{name}.lock"}


def test_what_was_recovered_once_is_not_recovered_again(
    whole: Checkpoint,
    pruned: Checkpoint,
    home: Settings,
    resumed: tuple[Failure, int, Recovered],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same inputs find the same result; damaged, it is not trusted."""
    monkeypatch.setattr(store, "Child", Here)
    monkeypatch.setattr(training, "begin", None)
    assert recover(whole, pruned, LEVEL, home, home.home / "log") == resumed[2]
    place = resumed[2].checkpoint.path
    kept = (place / SAFETENSORS).read_bytes()
    (place / SAFETENSORS).write_bytes(kept[:-1] + b"\x01")
    with pytest.raises(TypeError, match="not callable"):
        recover(whole, pruned, LEVEL, home, home.home / "log")
    (place / SAFETENSORS).write_bytes(kept)


def test_a_state_that_cannot_be_trusted_is_not_taken_up(
    whole: Checkpoint, pruned: Checkpoint, tmp_path: Path
) -> None:
    """Damaged, or of another recovery."""
    state = tmp_path / "state"
    begun = Training(job(whole, pruned, state, steps=3))
    begun.go_on(600)
    assert load(state, "another") is None
    assert Training(job(whole, pruned, state, steps=3)).progress == begun.progress
    state.write_bytes(state.read_bytes()[:-1])
    assert load(state, "k") is None
    assert Training(job(whole, pruned, state, steps=3)).progress.step == 0


def test_a_loss_that_is_not_finite_ends_it(
    whole: Checkpoint,
    pruned: Checkpoint,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """With the reason, and the pruned checkpoint stays what is served."""
    monkeypatch.setattr(store, "Child", Here)
    monkeypatch.setattr(training, "LEARNING_RATE", 1e30)
    found = recover(whole, pruned, LEVEL, settings, tmp_path / "log")
    assert isinstance(found, Recovered)
    assert (found.recovery.helped, found.checkpoint) == (False, pruned)
    assert "kept as it was: diverged: its loss" in found.recovery.reason
    assert [path for path in settings.checkpoints.iterdir() if path.is_dir()] == []


def test_a_recovery_that_gains_nothing_is_not_kept(
    whole: Checkpoint,
    pruned: Checkpoint,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Neither where no step comes nearer, as here from the whole model itself, nor within the noise."""
    monkeypatch.setattr(store, "Child", Here)
    short = LEVEL.model_copy(update={"recover_steps": 4})
    same = recover(whole, whole, short, settings, tmp_path / "log")
    assert isinstance(same, Recovered)
    assert (same.recovery.helped, same.checkpoint) == (False, whole)
    assert "no step came nearer to the whole model" in same.recovery.reason
    monkeypatch.setattr(store, "_gain", lambda *_: (-0.001, 0.002))
    noise = recover(whole, pruned, short, settings, tmp_path / "log")
    assert isinstance(noise, Recovered)
    assert (noise.recovery.helped, noise.checkpoint) == (False, pruned)
    assert "not beyond noise (95 %: -0.001 to 0.002 nats per token)" in noise.recovery.reason
    assert [path for path in settings.checkpoints.iterdir() if path.is_dir()] == []


def test_time_that_does_not_suffice_makes_a_shorter_plan(
    whole: Checkpoint, pruned: Checkpoint, tmp_path: Path
) -> None:
    """After the warm-up, so that the rate still falls to the end; without any time nothing is learned."""
    progress = Training(job(whole, pruned, tmp_path / "state", steps=100_000, seconds=3.0)).go_on(600)
    assert progress.step <= progress.planned_steps < 100_000
    assert progress.looks[-1].step == progress.step
    assert f"{progress.step} of 100000 steps" in progress.ended
    none = Training(job(whole, pruned, tmp_path / "none", seconds=1e-6)).go_on(600)
    assert (none.step, none.best.step) == (0, 0)
    assert none.ended.startswith("0 of 30 steps in ")


@contextmanager
def files_of_at_most(count: int) -> Iterator[None]:
    """Writing more fails in the middle of the file, as on a full disk."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_nothing_half_written(
    whole: Checkpoint, pruned: Checkpoint, tmp_path: Path
) -> None:
    """Neither a state nor a checkpoint; an older state stays, and the recovery goes on from it."""
    state = tmp_path / "state"
    begun = Training(job(whole, pruned, state, steps=2))
    with files_of_at_most(100_000), pytest.raises(OSError, match="large"):
        begun.go_on(600)
    assert list(tmp_path.iterdir()) == []
    begun.go_on(600)
    saved = state.read_bytes()
    with files_of_at_most(100_000):
        with pytest.raises(OSError, match="large"):
            begun.finish(tmp_path / "recovered")
        with pytest.raises(OSError, match="large"):
            begun.go_on(600)
    assert list(tmp_path.iterdir()) == [state]
    assert state.read_bytes() == saved
    assert Training(job(whole, pruned, state, steps=2)).finish(tmp_path / "recovered").look.step == 2


def test_what_is_discarded_is_gone(
    whole: Checkpoint,
    home: Settings,
    resumed: tuple[Failure, int, Recovered],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The recovered and the cut it was made from; twice does no harm."""
    place = resumed[2].checkpoint.path
    monkeypatch.setattr(store.pruned_store, "stored", lambda *_: pruned_of(resumed[2]))
    for _ in range(2):
        discard(whole, LEVEL, home)
    assert not place.exists()
    assert not resumed[2].recovery.record.exists()


def pruned_of(recovered: Recovered) -> Checkpoint:
    return recovered.checkpoint.model_copy(update={"digest": recovered.pruned_digest})

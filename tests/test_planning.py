"""Plans: who is on the list, in what order, and the sentence of everyone who is off it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from studies import demo_analysis, demo_checkpoint, demo_profile

from open_autoglm import engines
from open_autoglm.analysis import profile_config
from open_autoglm.engines.contract import ExportContext, Session, SessionOptions
from open_autoglm.errors import AutoGLMError, UserError
from open_autoglm.planning import check_workload, judge, plan, resolve_device
from open_autoglm.schemas import (
    Analysis,
    Candidate,
    Checkpoint,
    Device,
    Dimension,
    ExportedModel,
    Gpu,
    Knob,
    OptimizeSpec,
    Probe,
)

ANALYSIS = demo_analysis().model_copy(
    update={"profile": demo_profile().model_copy(update={"lm_head_parameters": 28_311_552})}
)
H100 = Gpu(name="NVIDIA H100", memory_bytes=80 * 2**30, driver="580.65")


def spec(**fields: Any) -> OptimizeSpec:
    return OptimizeSpec(model_path="here", **fields)


def candidate(name: str, precision: Any = "fp32", bits: float = 32, **fields: Any) -> Candidate:
    return Candidate(
        id=name,
        engine=name.partition("-")[0],
        device=fields.pop("device", "cpu"),
        precision=precision,
        weight_bits=bits,
        proposed_because="a test asks for it",
        **fields,
    )


class Proposing:
    """An engine that proposes what it is told to; planning calls nothing else of it."""

    summary = "proposes"

    def __init__(self, name: str, *proposals: Candidate, lacking: Probe | None = None) -> None:
        self.name = name
        self.proposals = proposals
        self.lacking = lacking
        self.asked: list[tuple[Analysis, OptimizeSpec, Device]] = []

    def probe(self, device: Device) -> Probe:
        return self.lacking or Probe(engine=self.name, stage="ready", reason=device)

    def propose(self, analysis: Analysis, spec: OptimizeSpec, device: Device) -> list[Candidate]:
        self.asked.append((analysis, spec, device))
        return list(self.proposals)

    def dimensions(
        self, candidate: Candidate, analysis: Analysis, spec: OptimizeSpec
    ) -> tuple[Dimension, ...]:
        raise NotImplementedError

    def variant(self, candidate: Candidate, knobs: Mapping[str, Knob]) -> Candidate:
        raise NotImplementedError

    def recipe(self, candidate: Candidate) -> dict[str, Any] | None:
        raise NotImplementedError

    def export(self, candidate: Candidate, checkpoint: Checkpoint, context: ExportContext) -> str:
        raise NotImplementedError

    def open(self, candidate: Candidate, exported: ExportedModel, options: SessionOptions) -> Session:
        raise NotImplementedError


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make the given engines the only ones there are."""

    def only(*installed: Proposing) -> None:
        known = {engine.name: engine for engine in installed}
        monkeypatch.setattr(engines, "names", lambda: tuple(known))
        monkeypatch.setattr(engines, "get", known.__getitem__)

    return only


def vetoes(candidates: list[Candidate]) -> dict[str, str | None]:
    return {c.id: c.vetoed_because for c in candidates}


def test_the_reference_comes_first(install: Any) -> None:
    """Whatever order engines are in, the reference leads and the others keep theirs."""
    install(
        Proposing("a", candidate("a-1"), candidate("a-2")),
        Proposing("b", candidate("b-1"), candidate("b-2", reference=True)),
        Proposing("c"),
    )
    assert [c.id for c in plan(ANALYSIS, spec(), "cpu")] == ["b-2", "a-1", "a-2", "b-1"]


def test_only_the_engines_asked_for(install: Any) -> None:
    """`engines` of the spec chooses, and naming one twice changes nothing."""
    chosen, other = Proposing("a", candidate("a-1")), Proposing("b", candidate("b-1"))
    install(chosen, other)
    asked = spec(engines=("a", "a"))
    assert [c.id for c in plan(ANALYSIS, asked, "cpu")] == ["a-1"]
    assert chosen.asked == [(ANALYSIS, asked, "cpu")]
    assert other.asked == []


def test_an_unknown_engine_is_the_users_error() -> None:
    """The real registry refuses a name that nobody installed."""
    with pytest.raises(UserError, match="unknown engine 'onnxrutnime'"):
        plan(ANALYSIS, spec(engines=("onnxrutnime",)), "cpu")


def test_an_engine_that_cannot_run_is_listed_with_the_cure(install: Any) -> None:
    """Each candidate of a missing engine is vetoed with the probe's reason and its install command."""
    missing = Probe(engine="a", stage="missing", reason="a is not installed", install="pip install a")
    install(Proposing("a", candidate("a-1"), candidate("a-2"), lacking=missing))
    reason = "a is not installed; mend it with: pip install a"
    assert vetoes(plan(ANALYSIS, spec(), "cpu")) == {"a-1": reason, "a-2": reason}


def test_an_engines_own_veto_stands(install: Any) -> None:
    """A candidate that its engine already vetoed keeps that reason."""
    install(Proposing("a", candidate("a-1", vetoed_because="no compiler")))
    assert vetoes(plan(ANALYSIS, spec(max_tpot="1us"), "cpu")) == {"a-1": "no compiler"}


def test_what_does_not_fit_in_memory_is_vetoed_even_if_it_is_the_reference(install: Any) -> None:
    """With 400 MB left, 538 MB of fp32 weights cannot load; the sentence has both figures."""
    install(Proposing("a", candidate("a-1", reference=True), candidate("a-2", "int4", 4.5)))
    hardware = ANALYSIS.hardware.model_copy(update={"available_memory_bytes": 400_000_000})
    found = vetoes(plan(ANALYSIS.model_copy(update={"hardware": hardware}), spec(), "cpu"))
    assert found == {
        "a-1": "does not fit in memory: weights, KV cache and runtime need at least 602 MiB, "
        "and 381 MiB are available",
        "a-2": None,
    }


@pytest.mark.parametrize(
    ("limit", "sentence"),
    [
        ({"max_memory": "300MB"}, "cannot meet max_memory 300MB: .* need at least 602 MiB"),
        ({"max_latency": "150ms"}, "cannot meet max_latency 150ms: even at 2 times .* a TTFT of 310 ms"),
        ({"max_tpot": "5ms"}, r"cannot meet max_tpot 5ms: even at 2 times .* a TPOT of 9\.71 ms"),
    ],
)
def test_a_limit_beyond_the_roofline_vetoes_all_but_the_reference(
    install: Any, limit: dict[str, str], sentence: str
) -> None:
    """Who cannot meet a limit at the bound is not measured; the yardstick is, whatever the limits."""
    install(Proposing("a", candidate("a-1", reference=True), candidate("a-2"), candidate("a-3", "int4", 4.5)))
    reference, wide, narrow = plan(ANALYSIS, spec(**limit), "cpu")
    assert reference.vetoed_because is None
    assert re.fullmatch(sentence, wide.vetoed_because or "")
    assert narrow.vetoed_because is None


def test_a_limit_just_below_the_bound_is_left_to_measurement(install: Any) -> None:
    """Measured peaks drift, so a bound of 19 ms does not veto a limit of 15 ms."""
    install(Proposing("a", candidate("a-1")))
    assert vetoes(plan(ANALYSIS, spec(max_tpot="15ms"), "cpu")) == {"a-1": None}
    assert vetoes(plan(ANALYSIS, spec(max_tpot="9ms"), "cpu"))["a-1"] is not None


def test_the_cpus_peaks_do_not_judge_a_gpu(install: Any) -> None:
    """On a GPU only its own memory vetoes."""
    install(Proposing("a", candidate("a-1", device="gpu")))
    tight = spec(max_tpot="1ms", max_memory="300MB")
    for memory, fits in ((80 * 2**30, True), (500_000_000, False), (0, True)):
        gpu = H100.model_copy(update={"memory_bytes": memory})
        hardware = ANALYSIS.hardware.model_copy(update={"gpus": (gpu,)})
        (found,) = plan(ANALYSIS.model_copy(update={"hardware": hardware}), tight, "gpu")
        assert (found.vetoed_because is None) is fits


def test_two_engines_must_not_share_an_id(install: Any) -> None:
    """Ids name directories, so a collision between plug-ins is refused before anything is written."""
    install(
        Proposing("a", candidate("a-1")), Proposing("b", candidate("a-1").model_copy(update={"engine": "b"}))
    )
    with pytest.raises(AutoGLMError, match="engines a and b both propose 'a-1'"):
        plan(ANALYSIS, spec(), "cpu")


def test_the_built_in_engines_make_a_plan() -> None:
    """Through the real registry: one reference, able to run, and GPU engines off the list with a reason."""
    candidates = plan(ANALYSIS, spec(), "cpu")
    assert [c.id for c in candidates if c.reference] == [candidates[0].id]
    assert candidates[0].precision == "fp32"
    assert candidates[0].vetoed_because is None
    assert len({c.id for c in candidates}) == len(candidates)
    assert all(c.vetoed_because for c in candidates if c.device == "gpu")


# fmt: off
EXPERTS: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": 0, "moe_intermediate_size": 24,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
}
LATENT: dict[str, Any] = {
    **EXPERTS, "kv_lora_rank": 24, "q_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 8,
    "v_head_dim": 20,
}
MIXTURES: dict[str, dict[str, Any]] = {
    "glm4_moe": EXPERTS,
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": {**LATENT, "index_head_dim": 40, "index_n_heads": 2},
}
# fmt: on


@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize("model_type", MIXTURES)
def test_experts_are_refused_by_every_engine_that_exports(model_type: str, device: Device) -> None:
    """Each says so before anything is exported, wherever it could run; torch alone serves them, unrounded."""
    from transformers import AutoConfig

    profile = profile_config(AutoConfig.for_model(model_type, **MIXTURES[model_type]))
    assert profile.experts == 4
    hardware = ANALYSIS.hardware.model_copy(update={"gpus": (H100,)})
    analysis = ANALYSIS.model_copy(update={"profile": profile, "hardware": hardware})
    for name in engines.names():
        for found in engines.get(name).propose(analysis, spec(), device):
            refused = name != "torch" or found.precision in ("int8", "int4", "fp8")
            assert (model_type in str(found.vetoed_because)) is refused, found.id
    usable = [found for found in plan(analysis, spec(), device) if found.vetoed_because is None]
    assert {found.engine for found in usable} <= {"torch"}
    assert device == "gpu" or usable[0].reference


@pytest.mark.parametrize("cache", ["growing", "static"])
@pytest.mark.parametrize("model_type", MIXTURES)
def test_torch_serves_a_mixture_of_experts(model_type: str, cache: str, tmp_path: Path) -> None:
    """With either cache it says what the model says when it reads all at once without one."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **MIXTURES[model_type]))
    model.eval().save_pretrained(tmp_path)
    tokens = np.arange(1, 13)[None]
    with torch.no_grad():
        wanted = model(torch.from_numpy(tokens), use_cache=False).logits.numpy()
    reference = next(c for c in engines.get("torch").propose(ANALYSIS, spec(), "cpu") if c.reference)
    chosen = reference.model_copy(update={"knobs": {**reference.knobs, "kv_cache": cache}})
    files = ExportedModel(
        candidate_id=chosen.id, path=tmp_path, digest="", route="", size_bytes=0, build_s=0, reused=True
    )
    session = engines.get("torch").open(chosen, files, SessionOptions(batch_size=1, max_tokens=16, threads=1))
    found = [session.prefill(tokens[:, :9]), *(session.decode(tokens[:, at]) for at in (9, 10, 11))]
    session.close()
    np.testing.assert_allclose(np.stack(found, axis=1), wanted[:, 8:], rtol=1e-3, atol=1e-4)


def test_auto_takes_a_gpu_if_there_is_one() -> None:
    """auto, cpu and gpu resolve to what is here."""
    cpu_only = ANALYSIS.hardware
    with_gpu = cpu_only.model_copy(update={"gpus": (H100,)})
    assert resolve_device("auto", cpu_only) == resolve_device("cpu", with_gpu) == "cpu"
    assert resolve_device("auto", with_gpu) == resolve_device("gpu", with_gpu) == "gpu"


def test_a_gpu_that_is_not_there_is_the_users_error() -> None:
    """Asking for a GPU without one says why none was found."""
    with pytest.raises(UserError, match="no NVIDIA driver is loaded; choose cpu or auto"):
        resolve_device("gpu", ANALYSIS.hardware)


def test_a_workload_must_fit_the_context() -> None:
    """Prompt and output together may fill the context and no more."""
    checkpoint = demo_checkpoint()
    check_workload(spec(prompt_tokens=8128, output_tokens=64), checkpoint)
    with pytest.raises(UserError, match=r"make 8193, but demo-glm has a context of 8192"):
        check_workload(spec(prompt_tokens=8129, output_tokens=64), checkpoint)


def test_the_longest_request_of_a_mix_must_fit_the_context() -> None:
    """The longest prompt and the longest output need not be asked for together."""
    checkpoint = demo_checkpoint()
    check_workload(spec(length_mix="8000/8:1,512/1024:1"), checkpoint)
    sentence = "a prompt of 8000 tokens and 193 new ones make 8193, but demo-glm has a context of 8192"
    with pytest.raises(UserError, match=rf"{sentence}: ask for shorter ones \(--length-mix\)"):
        check_workload(spec(length_mix="8000/193:1,512/1024:1"), checkpoint)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"scenario": "server"}, "needs a mean arrival rate: add --request-rate-per-s"),
        ({"request_rate_per_s": 2}, "means nothing in the single_stream scenario: add --scenario server"),
        (
            {"scenario": "offline", "request_rate_per_s": 2},
            "means nothing in the offline scenario: add --scenario server",
        ),
        (
            {"scenario": "server", "request_rate_per_s": 2, "batch_size": 4},
            "not in batches of 4: write --input-shape 1,512, or choose --scenario offline",
        ),
        ({"objective": "goodput", "max_tpot": "20ms"}, "add --scenario server and --request-rate-per-s"),
        (
            {"objective": "goodput", "scenario": "server", "request_rate_per_s": 2},
            "add --max-latency, --max-tpot or both",
        ),
    ],
)
def test_a_request_that_contradicts_itself_is_the_users_error(fields: dict[str, Any], sentence: str) -> None:
    """One sentence says what does not go together and which flags mend it."""
    with pytest.raises(UserError, match=re.escape(sentence)):
        check_workload(spec(**fields), demo_checkpoint())


@pytest.mark.parametrize(
    "fields",
    [
        {"scenario": "server", "request_rate_per_s": 0.5},
        {"scenario": "offline", "batch_size": 8},
        {"length_mix": "512/32:9,128/64:1"},
        {"objective": "goodput", "scenario": "server", "request_rate_per_s": 2, "max_latency": "1s"},
    ],
)
def test_a_request_that_is_whole_passes(fields: dict[str, Any]) -> None:
    """Each scenario with what it needs; any scenario with a mix of lengths."""
    check_workload(spec(**fields), demo_checkpoint())


def test_a_mix_is_vetoed_by_its_shortest_request(install: Any) -> None:
    """The median may be made of short prompts, so the bound of the long ones is no evidence."""
    install(Proposing("a", candidate("a-1")))
    assert vetoes(plan(ANALYSIS, spec(max_latency="150ms"), "cpu"))["a-1"] is not None
    mixed = spec(max_latency="150ms", length_mix="64/16:9,512/64:1")
    assert vetoes(plan(ANALYSIS, mixed, "cpu")) == {"a-1": None}


def test_a_variant_is_judged_by_its_own_bytes() -> None:
    """Of two block sizes the one with fewer scales fits a limit that the other cannot meet."""
    engine = engines.get("onnxruntime")
    proposed = {c.id: c for c in engine.propose(ANALYSIS, spec(), "cpu")}
    narrow = engine.variant(proposed["onnxruntime-w8-b32"], {"block_size": 128})
    wide = engine.variant(proposed["onnxruntime-w8-b32"], {"block_size": 16})
    tight = spec(max_memory="235MiB")
    assert judge(narrow, ANALYSIS, tight) == narrow
    assert "cannot meet max_memory 235MiB" in (judge(wide, ANALYSIS, tight).vetoed_because or "")

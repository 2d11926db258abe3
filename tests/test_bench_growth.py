"""The benchmark of growth: where it looks, the random models it writes, its table and plot."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import pytest
import tiny_models
from benches import exported_trial, real_candidate, tiny_bench
from rich.console import Console
from studies import demo_analysis

from benchmarks.growth import Growth, TimedConversation, why
from benchmarks.growth_points import Bounds, Export, Figures, Place, Point, expected_s, growth_table, places
from benchmarks.laboratory import Laboratory
from benchmarks.plots import growth_plot
from benchmarks.random_model import RandomModelJob, write_random_model
from open_autoglm.checkpoint import load_checkpoint
from open_autoglm.measure.isolation import Failure
from open_autoglm.measure.statistics import summarise
from open_autoglm.schemas import Footprint
from open_autoglm.settings import Settings
from open_autoglm.trials import Stopped


def test_one_thing_is_varied_at_a_time() -> None:
    found = places((128, 512, 2048), (1, 4), (2, 30), longest_prompt=8176)
    assert {(p.model, p.prompt_tokens, p.batch_size, p.curves) for p in found} == {
        ("2", 512, 1, ("layers",)),
        ("30", 128, 1, ("prompt",)),
        ("30", 512, 1, ("layers", "prompt", "batch")),
        ("30", 2048, 1, ("prompt",)),
        ("30", 512, 4, ("batch",)),
    }


def test_the_cheap_places_come_first_so_that_a_limit_takes_the_dear_ones() -> None:
    found = places((128, 512, 8192), (1, 16), (2, 30), longest_prompt=8176)
    cost = [int(p.model) * p.prompt_tokens * p.batch_size for p in found]
    assert cost == sorted(cost)


def test_a_prompt_beyond_the_context_is_as_long_as_the_context_allows() -> None:
    found = places((128, 2048, 8192), (1,), (2,), longest_prompt=500)
    assert [p.prompt_tokens for p in found] == [128, 500]


@pytest.mark.parametrize("tied", [False, True])
def test_a_random_model_is_a_checkpoint_of_the_size_asked_for(tmp_path: Path, tied: bool) -> None:
    """transformers finds every weight it wants in the files, and none it does not want."""
    from transformers import AutoModelForCausalLM

    like = tiny_models.build_checkpoint(tmp_path / "like", tie_word_embeddings=tied)
    job = RandomModelJob(
        like=like, output=tmp_path / "made", changes={"num_hidden_layers": 3}, dtype="bfloat16"
    )
    done = write_random_model(job)
    checkpoint = load_checkpoint(str(tmp_path / "made"))
    model, said = AutoModelForCausalLM.from_pretrained(checkpoint.path, output_loading_info=True)
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]
    assert model.config.num_hidden_layers == 3
    assert done.parameters == model.num_parameters()
    assert checkpoint.weight_bytes >= 2 * done.parameters
    assert len(list(checkpoint.path.glob("*.safetensors"))) >= 3


def test_the_same_seed_writes_the_same_weights(tmp_path: Path) -> None:
    like = tiny_models.build_checkpoint(tmp_path / "like")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_random_model(RandomModelJob(like=like, output=tmp_path / name, changes={}, seed=seed))
    digests = [load_checkpoint(str(tmp_path / name)).digest for name in "abc"]
    assert digests[0] == digests[1] != digests[2]


def make_point(layers: int, ms: float) -> Point:
    memory = Footprint(peak_rss_bytes=10**8, peak_pss_bytes=10**8, mapped_file_bytes=0)
    figures = Figures(
        ttft_ms=summarise([ms], "ms"),
        tpot_ms=summarise([ms / 10], "ms"),
        footprint=memory,
        bounds=Bounds(ttft_ms=ms / 2, tpot_ms=ms / 40),
        disturbed_rounds=0,
    )
    place = Place(model=str(layers), prompt_tokens=512, batch_size=1, curves=("layers",))
    return Point(place=place, candidate="onnxruntime-w8a8", figures=figures)


def make_export(layers: int, seconds: float) -> Export:
    name, size = "onnxruntime-w8a8", 10**8
    return Export(
        model=str(layers), candidate=name, checkpoint_bytes=size, peak_rss_bytes=3 * size, seconds=seconds
    )


def test_a_point_is_expected_to_take_as_long_as_the_last_and_its_prompts_longer() -> None:
    """Of 10 s, four requests of 1 s; at four times the work those take 4 s each. Nothing tells of another
    candidate, or of a model of another shape."""
    done = [make_point(2, 5), make_point(8, 1000).model_copy(update={"seconds": 10.0})]
    longer = Place(model="8", prompt_tokens=2048, batch_size=1, curves=("prompt",))
    assert expected_s(longer, "onnxruntime-w8a8", 4, done, []) == pytest.approx(10 + 4 * 3)
    assert expected_s(done[0].place, "onnxruntime-w8a8", 4, done, []) == 10
    assert expected_s(longer, "torch-bf16", 4, done, []) == 0
    other = longer.model_copy(update={"model": "1.5B"})
    assert expected_s(other, "onnxruntime-w8a8", 4, done, [make_export(8, 3)]) == 0


def test_an_export_to_come_counts_by_its_layers() -> None:
    """Until it is made."""
    place = make_point(30, 1).place
    exports = [make_export(2, 1), make_export(8, 4)]
    assert expected_s(place, "onnxruntime-w8a8", 4, [], exports) == pytest.approx(4 * 30 / 8)
    assert expected_s(place, "onnxruntime-w8a8", 4, [], [*exports, make_export(30, 9)]) == 0


def test_what_is_expected_to_end_too_late_is_skipped_and_saved(tmp_path: Path) -> None:
    """With what it needs and what is left; no model is written for it, and the others are tried."""
    growth = Growth(tmp_path / "no-such-model", tmp_path, 60, tmp_path / "growth.json")
    growth.points.append(make_point(2, 9000).model_copy(update={"seconds": 50.0}))
    (skipped,) = growth.visit(make_point(8, 1).place, ("onnxruntime-w8a8",))
    assert skipped.figures is None
    assert skipped.reason == "skipped: time: about 158 s needed, 60 s left"
    assert [path.name for path in tmp_path.iterdir()] == ["growth.json"]
    saved = json.loads((tmp_path / "growth.json").read_text())
    assert [Point.model_validate(point) for point in saved["points"]] == growth.points
    assert growth.points[1:] == [skipped]


def test_after_the_end_nothing_is_begun(tmp_path: Path) -> None:
    growth = Growth(tmp_path / "no-such-model", tmp_path, 0, tmp_path / "growth.json")
    taken = growth.visit(make_point(8, 1).place, ("onnxruntime-w8a8", "torch-bf16"))
    assert [point.reason for point in taken] == ["skipped: time: none left"] * 2


def test_a_point_that_takes_too_long_is_cut_off(tiny_glm: Path, settings: Settings, tmp_path: Path) -> None:
    """Each answer has to come before the end, wherever the point is by then; the child is gone."""
    bench = tiny_bench(tiny_glm, settings, tmp_path / "study")
    trial = exported_trial(bench, settings, real_candidate("torch-fp32"))
    laboratory = Laboratory(bench, demo_analysis(), settings)
    with pytest.raises(Stopped) as cut:
        TimedConversation(laboratory, trial, tmp_path / "log", time.monotonic() - 1)
    assert why(cut.value.failure) == "skipped: time: gave no answer within 0.01 s and was killed"
    assert why(Failure("crashed", "SIGSEGV")) == "crashed: SIGSEGV"


def test_every_point_and_export_is_in_the_table() -> None:
    late = make_point(30, 1).model_copy(update={"figures": None, "reason": "skipped: time: late"})
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(growth_table([make_point(2, 40), late], [make_export(2, 4)]))
    text = console.export_text()
    assert "40 (20)" in text
    assert "4.0 (1.0)" in text
    assert "skipped: time: late" in text
    assert "3.0 × the checkpoint" in text


def test_the_plot_draws_what_was_found() -> None:
    late = make_point(30, 1).model_copy(update={"figures": None, "reason": "late"})
    drawn = [growth_plot(points, "svg") for points in ([make_point(2, 40), make_point(8, 90)], [late])]
    assert all(svg.startswith(b"<?xml") for svg in drawn)
    assert drawn[0] != drawn[1]

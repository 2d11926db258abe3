"""The benchmark of growth: where it looks, the random models it writes, its table and plot."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import tiny_models
from rich.console import Console

from benchmarks.growth_points import Bounds, Export, Figures, Place, Point, growth_table, places
from benchmarks.plots import growth_plot
from benchmarks.random_model import RandomModelJob, write_random_model
from open_autoglm.checkpoint import load_checkpoint
from open_autoglm.measure.statistics import summarise
from open_autoglm.schemas import Footprint


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


def test_every_point_and_export_is_in_the_table() -> None:
    late = make_point(30, 1).model_copy(update={"figures": None, "reason": "the time limit came first"})
    export = Export(
        model="2", candidate="onnxruntime-w8a8", checkpoint_bytes=10**8, peak_rss_bytes=3 * 10**8, seconds=4
    )
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(growth_table([make_point(2, 40), late], [export]))
    text = console.export_text()
    assert "40 (20)" in text
    assert "4.0 (1.0)" in text
    assert "the time limit came first" in text
    assert "3.0 × the checkpoint" in text


def test_the_plot_draws_what_was_found() -> None:
    late = make_point(30, 1).model_copy(update={"figures": None, "reason": "late"})
    drawn = [growth_plot(points, "svg") for points in ([make_point(2, 40), make_point(8, 90)], [late])]
    assert all(svg.startswith(b"<?xml") for svg in drawn)
    assert drawn[0] != drawn[1]

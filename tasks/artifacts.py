"""The study as Prefect artifacts: verdict, table, two plots and a link to MLflow."""

from __future__ import annotations

import base64

from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)

from open_autoglm import evidence, readout
from open_autoglm.figures import comparisons_figure, pareto_figure
from open_autoglm.schemas import Study, Trial
from open_autoglm.settings import Settings

_COLUMNS = {"e2e_ms": "to last token ms", "ttft_ms": "TTFT ms", "tpot_ms": "TPOT ms"}


def publish(study: Study) -> None:
    """Create the artifacts. Call inside a task or flow run."""
    reasons = "\n".join(f"- {reason}" for reason in readout.reasons(study))
    others = "\n".join(
        f"- **{t.id}** ({readout.standing(study, t)}): {'; '.join(readout.why(t))}"
        for t in study.trials
        if t.id != study.champion
    )
    page = Settings().shown(study.output_dir / "report.html")
    create_markdown_artifact(
        f"## {readout.headline(study)}\n\n{reasons}\n\nReport: `{page}`\n\n"
        f"### How sure is this\n\n{evidence.noise_words(study)}\n\n### Why not the others\n\n{others}",
        key="verdict",
        description=f"Study {study.id}",
    )
    create_table_artifact([_row(study, trial) for trial in study.trials], key="engines")
    _publish_picture(pareto_figure(study), "pareto", "Latency and memory")
    if study.comparisons:
        _publish_picture(comparisons_figure(study), "comparisons", "Paired changes and the noise floor")
    link = readout.study_link(study, Settings().mlflow_url)
    if link is not None:
        create_link_artifact(link, key="mlflow", link_text="The study in MLflow; make up starts its server")


def _publish_picture(png: bytes, key: str, description: str) -> None:
    """As a data URI, which is shown without a file server; the plots are small."""
    picture = base64.b64encode(png).decode()
    create_image_artifact(f"data:image/png;base64,{picture}", key=key, description=description)


def _row(study: Study, trial: Trial) -> dict[str, str]:
    return {
        "candidate": trial.id,
        "standing": readout.standing(study, trial),
        **{heading: readout.figure_words(trial, name) for name, heading in _COLUMNS.items()},
        "peak RSS MiB": readout.figure_words(trial, "peak_rss_bytes", 2**20),
        "quality": readout.quality_words(trial),
    }

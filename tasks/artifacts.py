"""The study as Prefect artifacts: verdict, table, Pareto plot and a link to MLflow."""

from __future__ import annotations

import base64

from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)

from open_autoglm import readout
from open_autoglm.figures import pareto_figure
from open_autoglm.schemas import Study
from open_autoglm.settings import Settings

_COLUMNS = {"ttft_ms": "TTFT ms", "tpot_ms": "TPOT ms", "tokens_per_s": "tokens/s"}


def publish(study: Study) -> None:
    """Create the artifacts. Call inside a task or flow run."""
    reasons = "\n".join(f"- {reason}" for reason in readout.reasons(study))
    others = "\n".join(
        f"- **{t.id}** ({t.status}): {t.reason}" for t in study.trials if t.id != study.champion
    )
    create_markdown_artifact(
        f"## {readout.headline(study)}\n\n{reasons}\n\nReport: `{study.output_dir / 'report.html'}`\n\n"
        f"### Why not the others\n\n{others}",
        key="verdict",
        description=f"Study {study.id}",
    )
    create_table_artifact([_row(study, index) for index in range(len(study.trials))], key="engines")
    # A data URI is shown without a file server; the plot is small.
    picture = base64.b64encode(pareto_figure(study)).decode()
    create_image_artifact(f"data:image/png;base64,{picture}", key="pareto", description="Latency and memory")
    link = readout.study_link(study, Settings().mlflow_url)
    if link is not None:
        create_link_artifact(link, key="mlflow", link_text="The study in MLflow; make up starts its server")


def _row(study: Study, index: int) -> dict[str, str]:
    trial = study.trials[index]
    figures = {
        heading: readout.number(trial.metrics[name].median) if name in trial.metrics else "–"
        for name, heading in _COLUMNS.items()
    }
    memory = trial.metrics.get("peak_rss_bytes")
    return {
        "candidate": trial.id,
        "status": trial.status,
        **figures,
        "peak RSS": readout.quantity(memory.median, "bytes") if memory else "–",
        "quality": f"{trial.quality.ratio:.4f}" if trial.quality else "–",
    }

"""The champion as an MLflow model: MLflow copies this file into the model and runs it when it loads one.

The bundle is the model's only artifact. open-autoglm itself must be installed where the model is
loaded (use ``--env-manager local``): engines are found by entry point, which a copied folder has not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import pandas as pd

from open_autoglm.bundle import SERVED_TOKENS, BundleModel
from open_autoglm.errors import UserError


class PyfuncBundle(mlflow.pyfunc.PythonModel):  # type: ignore[misc]  # mlflow ships no types
    """A :class:`BundleModel` behind MLflow's ``predict``."""

    def load_context(self, context: Any) -> None:
        """Open the bundle; ``load_model(uri, model_config={"max_tokens": 8192})`` gives it more room."""
        options = context.model_config or {}
        max_tokens = int(options.get("max_tokens", SERVED_TOKENS))
        self._model = BundleModel(Path(context.artifacts["bundle"]), max_tokens=max_tokens)

    def predict(self, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> list[str]:
        """Continue each prompt of the first column; ``params`` may hold ``max_new_tokens``.

        MLflow makes the frame of what it is given: strings, records such as ``{"prompt": …}``, a frame;
        its scoring server takes strings as ``inputs`` and records as ``dataframe_records``.
        """
        prompts = model_input.iloc[:, 0].tolist()
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise UserError('a prompt is not text: pass a list of strings, or of {"prompt": "…"}')
        return self._model.generate(prompts, **(params or {}))


mlflow.models.set_model(PyfuncBundle())

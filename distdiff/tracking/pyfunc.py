"""The model as MLflow runs it: this file is copied beside the weights and run when the model is loaded."""

from __future__ import annotations

import os
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel


class Imputes(PythonModel):
    """Cells in, their imputed means out; see :func:`distdiff.tracking.predict.predict`."""

    def load_context(self, context: Any) -> None:
        """Load weights (safetensors) and settings (JSON); nothing is unpickled.

        Packages that the model's own kinds come from are trusted by the environment variable ``DISTDIFF_TRUST``
        (separated by commas), as MLflow hands nothing of its caller's through.
        """
        from distdiff.model import Model

        trust = [name for name in os.environ.get("DISTDIFF_TRUST", "").split(",") if name]
        self.model = Model.load(context.artifacts["model"], trust=trust)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Impute a frame, the AnnData file at a path (text), or what MLflow's server makes of a request."""
        from distdiff.tracking.predict import predict

        return predict(self.model, model_input, **(params or {}))


set_model(Imputes())

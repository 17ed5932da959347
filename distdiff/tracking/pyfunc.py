"""The model as MLflow runs it: MLflow copies this file beside the weights and runs it when the model is loaded."""

from __future__ import annotations

import json
import os
from typing import Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel


class InvalidInput(MlflowException, ValueError):
    """Input that cannot be imputed; ``mlflow models serve`` answers with status 400 and the sentence alone."""

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence, error_code=INVALID_PARAMETER_VALUE)
        self.sentence = sentence

    def serialize_as_json(self) -> str:
        """Return the answer of the server; MLflow would put the whole input before the sentence."""
        return json.dumps({"error_code": self.error_code, "message": self.sentence})


class ImputationModel(PythonModel):
    """Imputes cells (see :func:`distdiff.tracking.predict.predict`)."""

    def load_context(self, context: Any) -> None:
        """Load weights (safetensors) and settings (JSON); nothing is unpickled.

        The environment variable ``DISTDIFF_TRUST`` names packages (separated by commas) whose code the model may run,
        as MLflow passes no arguments on.
        """
        from distdiff.model import Model

        trust = [name for name in os.environ.get("DISTDIFF_TRUST", "").split(",") if name]
        self.model = Model.load(context.artifacts["model"], trust=trust)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Impute a frame, an AnnData, the AnnData file at a path, or a request to MLflow's server.

        Raises
        ------
        InvalidInput
            The input cannot be imputed.
        """
        from distdiff.tracking.predict import predict

        try:
            return predict(self.model, model_input, **(params or {}))
        except MlflowException:
            raise
        except ValueError as error:
            raise InvalidInput(str(error)) from error


set_model(ImputationModel())

"""Settings say *where*: directories, addresses, ports. What to do is said by a spec.

Precedence: argument > environment (``AUTOGLM_*``) > ``.env`` > defaults.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from pydantic import Field, ModelWrapValidatorHandler, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from open_autoglm.errors import UserError

HOME_NAME = ".autoglm"


def find_home() -> Path:
    """The nearest ``.autoglm`` directory at or above the current one, else one to be made here.

    Like git's: commands run anywhere inside a project find the same studies and registry.
    """
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / HOME_NAME).is_dir():
            return folder / HOME_NAME
    return here / HOME_NAME


class Settings(BaseSettings):
    """Where things are kept and where servers listen. Every field is an ``AUTOGLM_`` variable."""

    model_config = SettingsConfigDict(env_prefix="AUTOGLM_", env_file=".env", extra="ignore", frozen=True)

    home: Path = Field(default_factory=find_home, description="studies, exports, databases, logs")
    tracking_uri: str = Field("", description="MLflow; SQLite inside `home` if empty")
    prefect_port: int = Field(4200, ge=1, le=65535)
    mlflow_port: int = Field(5000, ge=1, le=65535)
    prometheus_port: int = Field(9190, ge=1, le=65535, description="of `make up-monitoring`, not Debian's")
    alertmanager_port: int = Field(9193, ge=1, le=65535)
    alert_bridge_port: int = Field(9195, ge=1, le=65535)
    trial_timeout_s: float = Field(1800, gt=0, description="limit for one child process")
    trial_reuse_hours: float = Field(24, ge=0, description="a resumed study keeps trials younger than this")
    follow_s: float = Field(15, gt=0, description="how often an endpoint asks the registry for its aliases")
    api_keys: SecretStr = Field(SecretStr(""), description="of an endpoint's callers, separated by commas")
    admin_keys: SecretStr = Field(SecretStr(""), description="of who may administer an endpoint")

    @model_validator(mode="wrap")
    @classmethod
    def _in_one_sentence(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(value)
        except ValidationError as error:
            problem = error.errors()[0]
            variable = f"AUTOGLM_{str(problem['loc'][0]).upper()}"
            raise UserError(f"{variable}: {problem['msg']} (got {problem['input']!r})") from None

    @model_validator(mode="after")
    def _absolute(self) -> Self:
        object.__setattr__(self, "home", self.home.expanduser().absolute())
        return self

    def shown(self, path: Path) -> Path:
        """For people: what lies under `home` from its name on, and other places whole."""
        return path.relative_to(self.home.parent) if path.is_relative_to(self.home) else path

    @property
    def exports(self) -> Path:
        return self.home / "exports"

    @property
    def checkpoints(self) -> Path:
        """Of those that were made here: converted or pruned."""
        return self.home / "checkpoints"

    @property
    def studies(self) -> Path:
        return self.home / "studies"

    @property
    def ledger(self) -> Path:
        return self.home / "export-ledger.json"

    @property
    def mlflow_uri(self) -> str:
        return self.tracking_uri or f"sqlite:///{self.home / 'mlflow.db'}"

    @property
    def mlflow_artifacts(self) -> Path:
        return self.home / "mlflow-artifacts"

    @property
    def prefect_url(self) -> str:
        return f"http://127.0.0.1:{self.prefect_port}"

    @property
    def mlflow_url(self) -> str:
        return f"http://127.0.0.1:{self.mlflow_port}"

    @property
    def prometheus_url(self) -> str:
        return f"http://127.0.0.1:{self.prometheus_port}"

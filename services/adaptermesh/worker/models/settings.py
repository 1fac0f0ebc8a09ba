"""Where the model cache is, from the environment."""

from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class ModelSettings(BaseSettings):
    """Settings of the model cache; `ADAPTERMESH_HOME` is the folder that every service uses."""

    model_config = SettingsConfigDict(env_prefix="ADAPTERMESH_", extra="ignore")

    home: Path = Field(
        default_factory=lambda: Path.home() / ".adaptermesh",
        description="Folder for everything that is kept on this machine; the models are in `models`.",
    )

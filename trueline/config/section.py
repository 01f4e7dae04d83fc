"""What every section of the configuration has in common."""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Frozen, and any key it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    def conflicts(self) -> list[str]:
        """Sentences about keys that do not go together; asked for once the whole configuration is there."""
        return []


def refuse_conflicts(config: Config) -> None:
    """All conflicts of a configuration and of its sections as one ValueError."""
    sections = [value for value in dict(config).values() if isinstance(value, Config)]
    sentences = [sentence for part in (*sections, config) for sentence in part.conflicts()]
    if sentences:
        raise ValueError("\n".join(sentences))

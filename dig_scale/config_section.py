"""What all sections of a recipe share: their base, and numbers with bounds."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """Base of all recipe sections: frozen, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

"""The targets of our kernels as data: targets.toml, read and checked."""

from __future__ import annotations

import tomllib
from importlib.resources import files
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Measure = Literal["of_gemm", "of_copy", "over_rival", "over_bf16", "share", "total_us"]


class Target(BaseModel):
    """One target.

    Attributes:
        text: what is wanted, in words.
        at_least / at_most: the number wanted, of the ratio; one of the two.
        measure: how the ratio comes from the rows of one block (`ratios`).
        where: which of our rows count: a condition on columns of results.parquet, in the words of pandas' `query`.
        suites: which suites hold such rows; none: no suite times this.
        rivals: providers that `over_rival` may take the fastest of; none: all other arms.
        stages: what `share` and `total_us` add up.
        why: where it is not met: the reason, as far as profiling shows it. Written by hand.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    text: str
    at_least: float | None = Field(default=None, gt=0)
    at_most: float | None = Field(default=None, gt=0)
    measure: Measure
    where: str = ""
    suites: tuple[str, ...]
    rivals: tuple[str, ...] = ()
    stages: tuple[str, ...] = ()
    why: str = ""

    @model_validator(mode="after")
    def _one_bound(self) -> Target:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("needs one of at_least and at_most")
        if self.suites and not self.where:
            raise ValueError("needs a where")
        return self

    @staticmethod
    def measures() -> tuple[str, ...]:
        """Every known measure."""
        return get_args(Measure)

    def met_by(self, value: float) -> bool:
        """Whether a ratio, as measured and not rounded, reaches the target."""
        return value >= self.at_least if self.at_least is not None else value <= float(self.at_most or 0.0)


def read_targets() -> list[Target]:
    """The targets, in the order of the file."""
    return parsed(files(__package__).joinpath("targets.toml").read_text(encoding="utf-8"))


def parsed(text: str) -> list[Target]:
    """The targets of such a file's text.

    Raises:
        ValueError: it is broken; one line.
    """
    try:
        return [Target(**row) for row in tomllib.loads(text)["target"]]
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"targets.toml: not TOML: {error}") from None
    except (KeyError, TypeError):
        raise ValueError("targets.toml: expected [[target]] tables and nothing else") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(
            f"targets.toml: {'.'.join(map(str, first['loc']))}: {first['msg']}: {first['input']}"
        ) from None

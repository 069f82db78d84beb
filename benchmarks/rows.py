"""What there is to measure: every row, its contenders, what is asked of them, and whether this machine can."""

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib.util import find_spec
from typing import Literal, NamedTuple

import torch

from .timing import Run, Spread, spread


class Disagreement(Exception):
    """Contenders that should compute the same do not: their times would mean nothing."""


class Figure(NamedTuple):
    """A compared figure: median and quartiles of those of the single rounds."""

    value: float
    lower: float
    upper: float


@dataclass(frozen=True)
class Comparison:
    """One contender beside another, and what is asked of it.

    Attributes:
        contender: Name of the contender in question.
        against: Name of the one it is compared with.
        measure: `faster`: how many times less it takes. `times`: how many times as much. `above`: how much more than
            `limit` it takes, as a share of `against`.
        goal: What the figure must reach: at least this if `faster`, less than this if `times` and 1, else at most this.
            None to report it only.
        limit: See `measure`.
        quantity: What is compared: `seconds` of a call, or `saved_bytes`, kept from forward to backward.
    """

    contender: str
    against: str
    measure: Literal["faster", "times", "above"]
    goal: float | None = None
    limit: str | None = None
    quantity: Literal["seconds", "saved_bytes"] = "seconds"

    def names(self) -> list[str]:
        return [n for n in (self.contender, self.against, self.limit) if n is not None]

    def value(self, quantities: Mapping[str, float]) -> float:
        """The figure, from each contender's quantity."""
        mine, theirs = quantities[self.contender], quantities[self.against]
        if self.measure == "faster":
            return theirs / mine
        if self.measure == "times":
            return mine / theirs
        return (mine - quantities[self.limit]) / theirs

    def figure(self, samples: Mapping[str, list[float]]) -> Figure:
        """The figure and its spread, from each contender's quantity in every round."""
        rounds = zip(*(samples[name] for name in self.names()), strict=True)
        single: Spread = spread([self.value(dict(zip(self.names(), values, strict=True))) for values in rounds])
        return Figure(single.median, single.lower, single.upper)

    def reached(self, value: float) -> bool | None:
        if self.goal is None:
            return None
        if self.measure == "faster":
            return value >= self.goal
        if self.measure == "times" and self.goal == 1:
            return value < 1
        return value <= self.goal


@dataclass
class Case:
    """A row made ready: everything is built, and what should agree does.

    Attributes:
        contenders: What to time, by name.
        context: Entered around all timing.
        memory: Bytes by kind (`saved_bytes`, `peak_bytes`) of each contender.
        skipped: Contenders that cannot be here, with the reason.
        note: What differs from the row's description, if anything.
    """

    contenders: dict[str, Run]
    context: Callable[[], AbstractContextManager] = nullcontext
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Options:
    """What holds for a whole run.

    Attributes:
        threads: Threads of PyTorch and of ONNX Runtime on the CPU.
        quick: Whether to measure shortly, to see that it works.
    """

    threads: int = 2
    quick: bool = False


@dataclass(frozen=True)
class Row:
    """One thing to measure.

    Attributes:
        id: Unique name: device, what, how, size and variant, parted by slashes.
        what: The same in words.
        build: Builds what is timed and checks that it agrees; raises `Disagreement` if it does not.
        comparisons: Figures to take from it.
        needs: What must be there, of `cuda`, `onnxruntime`, `c++`.
        seconds: Time to spend on it.
    """

    id: str
    what: str
    build: Callable[[Options], Case]
    comparisons: tuple[Comparison, ...]
    needs: tuple[str, ...] = ()
    seconds: float = 5.0

    @property
    def device(self) -> str:
        return self.id.partition("/")[0]

    def missing(self) -> str | None:
        """Why it cannot be measured here, or None if it can."""
        return next((reason for need in self.needs if (reason := _missing(need)) is not None), None)


def _missing(need: str) -> str | None:
    if need == "cuda":
        return None if torch.cuda.is_available() else "no CUDA device"
    if need == "onnxruntime":
        packages = [name for name in ("onnx", "onnxruntime") if find_spec(name) is None]
        return f"{' and '.join(packages)} not installed" if packages else None
    compilers = (os.environ.get("CXX"), "g++", "clang++", "cl")
    return None if any(c and shutil.which(c) for c in compilers) else "no C++ compiler for torch.compile"


def all_rows() -> list[Row]:
    """Every row there is, in the order of the report."""
    from . import layer, model, systems

    # what is compiled comes last: eager training rows after it in one process were a fifth or more less ahead
    return sorted([*layer.rows(), *model.rows(), *systems.rows()], key=lambda row: "/compile/" in row.id)


def select(rows: Iterable[Row], patterns: Iterable[str]) -> list[Row]:
    """Rows whose id contains any of the shell patterns."""
    return [row for row in rows if any(fnmatchcase(row.id, f"*{pattern}*") for pattern in patterns)]

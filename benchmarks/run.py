"""Measure rows, and keep what came out as JSON."""

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import timm_ulsam
from timm_ulsam.files import write_text

from .rows import Case, Comparison, Disagreement, Figure, Options, Row
from .timing import CudaEvents, Samples, measure, settle_allocator, spread, wall_clock

SCHEMA = 1
RESULTS = Path(__file__).resolve().parent / "results"

Result = dict[str, Any]


def _comparison(comparison: Comparison, case: Case, samples: Samples) -> Result | None:
    if comparison.quantity == "seconds":
        quantities = samples.seconds
    else:
        quantities = {name: [float(kinds[comparison.quantity])] for name, kinds in case.memory.items()}
    if not all(name in quantities for name in comparison.names()):
        return None
    figure: Figure = comparison.figure(quantities)
    return {
        "contender": comparison.contender,
        "against": comparison.against,
        "limit": comparison.limit,
        "measure": comparison.measure,
        "quantity": comparison.quantity,
        **figure._asdict(),
        "goal": comparison.goal,
        "reached": comparison.reached(figure.value),
    }


def _contender(name: str, case: Case, samples: Samples) -> Result:
    times = spread(samples.seconds[name])
    return {
        "median_s": times.median,
        "lower_s": times.lower,
        "upper_s": times.upper,
        "calls_a_round": samples.calls[name],
        **case.memory.get(name, {}),
    }


def run_row(row: Row, options: Options) -> Result:
    """Measure one row. Its `status` is `measured`, `not measured` or `failed`, the latter two with a `reason`."""
    result: Result = {"id": row.id, "device": row.device, "what": row.what}
    reason = row.missing()
    if reason is not None:
        return {**result, "status": "not measured", "reason": reason}
    try:
        case = row.build(options)
        clock = CudaEvents() if row.device == "gpu" else wall_clock
        with case.context():
            samples = measure(
                case.contenders,
                clock,
                seconds=0.02 * row.seconds if options.quick else row.seconds,
                min_rounds=3 if options.quick else 9,
            )
    except Exception as error:  # whatever broke one row must not cost the others
        kind = "" if isinstance(error, Disagreement) else f"{type(error).__name__}: "
        return {**result, "status": "failed", "reason": kind + " ".join(str(error).split())}
    compared = (_comparison(c, case, samples) for c in row.comparisons)
    return {
        **result,
        "status": "measured",
        "rounds": len(next(iter(samples.seconds.values()))),
        "contenders": {name: _contender(name, case, samples) for name in case.contenders},
        "skipped": case.skipped,
        "note": case.note,
        "comparisons": [c for c in compared if c is not None],
    }


def run(rows: Iterable[Row], options: Options, progress: Callable[[int, Row, Result | None], None]) -> list[Result]:
    """Measure rows, one after the other.

    Args:
        rows: What to measure.
        options: How.
        progress: Called with the row's place, from 0, the row, and None before it is measured, its result after.
    """
    torch.set_num_threads(options.threads)
    settle_allocator()
    results = []
    for index, row in enumerate(rows):
        progress(index, row, None)
        results.append(run_row(row, options))
        progress(index, row, results[-1])
    return results


def report(results: list[Result], options: Options, complete: bool, load: float | None) -> Result:
    """What is written: the rows, and what is to be known of the run.

    Args:
        results: The rows, as `run` made them.
        options: How they were measured.
        complete: Whether these are all rows of their device, measured in full.
        load: Processes that were busy on the machine before the run, None if unknown.
    """
    cuda = torch.cuda.is_available()
    return {
        "schema": SCHEMA,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "complete": complete,
        "quick": options.quick,
        "threads": options.threads,
        "load": None if load is None else round(load, 2),
        "cpu": cpu_name(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions(),
        "rows": results,
    }


def cpu_name() -> str:
    """Name of the processor."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Versions of what was measured and what it was measured with; None for what is not there."""
    found = {name: _version(name) for name in ("torch", "timm", "triton", "onnxruntime")}
    return {
        "python": platform.python_version(),
        **found,
        "cuda": torch.version.cuda,
        "timm_ulsam": timm_ulsam.__version__,
        "commit": _commit(Path(timm_ulsam.__file__).resolve().parent),
    }


def _commit(folder: Path) -> str | None:
    """Commit that the code comes from, with `+changes` if the package is not as committed."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if not git("ls-files", "__init__.py"):
            return None  # installed inside some other repository
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def write(path: Path, content: Result) -> None:
    """Write JSON: to a temporary name first, so that no half of it can ever be read."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def read(path: Path) -> Result:
    """Read what `write` wrote.

    Raises:
        ValueError: If it is something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise ValueError(f"{path} is no result of this benchmark (schema {SCHEMA})")
    return content


def show_progress(total: int) -> Callable[[int, Row, Result | None], None]:
    """Progress on standard error."""

    started = time.monotonic()

    def show(index: int, row: Row, result: Result | None) -> None:
        nonlocal started
        if result is None:
            started = time.monotonic()
            print(f"[{index + 1}/{total}] {row.id} ... ", end="", file=sys.stderr, flush=True)
        else:
            words = f"{result['rounds']} rounds" if result["status"] == "measured" else result["reason"]
            print(f"{result['status']}: {words}, {time.monotonic() - started:.0f} s", file=sys.stderr)

    return show

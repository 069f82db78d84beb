"""Results as a table for the terminal and as the performance section of the README."""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from .model import FOLDED, LIMIT, OURS, PLAIN
from .rows import Comparison, Row
from .systems import FOLDED as SYSTEM_FOLDED
from .systems import WITH, WITHOUT

BEGIN, END = "<!-- performance:begin -->", "<!-- performance:end -->"
SYSTEMS_BEGIN, SYSTEMS_END = "<!-- speed:begin -->", "<!-- speed:end -->"

Result = dict[str, Any]


def _number(value: float, digits: int = 3) -> str:
    """A positive number to so many significant digits, without an exponent."""
    if value <= 0 or not math.isfinite(value):
        return str(value)
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(value)))}f}"


def _figure(compared: Result) -> str:
    value = compared["value"]
    return f"{100 * value:+.1f} %" if compared["measure"] == "above" else f"{_number(value)}x"


def _with_spread(compared: Result) -> str:
    if compared["quantity"] != "seconds":
        return _figure(compared)
    ends = (compared["lower"], compared["upper"])
    ends = [f"{100 * end:+.1f}" for end in ends] if compared["measure"] == "above" else map(_number, ends)
    return f"{_figure(compared)} ({' to '.join(ends)})"


def goal(compared: Result) -> str:
    """What is asked of a figure, empty if nothing is."""
    bound = compared["goal"]
    if bound is None:
        return ""
    if compared["measure"] == "faster":
        return f">= {bound:g}x"
    if compared["measure"] == "above":
        return f"<= {100 * bound:g} %"
    return "< 1x" if bound == 1 else f"<= {bound:g}x"


def _verdict(compared: Result) -> str:
    asked = goal(compared)
    return asked and f"{asked}: {'reached' if compared['reached'] else 'missed'}"


def describe(compared: Result) -> str:
    """A compared figure in words."""
    figure, against = _with_spread(compared), compared["against"]
    if compared["quantity"] == "saved_bytes":
        words = f"keeps {figure} what {against} keeps for backward"
    elif compared["measure"] == "faster":
        words = f"{figure} faster than {against}"
    elif compared["measure"] == "times":
        words = f"{figure} the time of {against}"
    else:
        words = f"{figure} of {against} above {compared['limit']}"
    return f"{words}; {_verdict(compared)}" if compared["goal"] is not None else words


def _milliseconds(contender: Result, key: str = "median_s") -> str:
    return _number(1e3 * contender[key])


def _megabytes(size: int) -> str:
    return f"{_number(size / 1e6)} MB"


_MEMORY = {"saved_bytes": "for backward it keeps", "peak_bytes": "at its peak it holds"}


def table(results: Sequence[Result]) -> str:
    """Everything measured, one line a contender, and one for every row that was not measured."""
    lines = [("row", "contender", "ms", "quartiles", "compared")]
    for result in results:
        if result["status"] != "measured":
            lines.append((result["id"], "", "", "", f"{result['status']} ({result['reason']})"))
            continue
        row_id = result["id"]
        for name, contender in result["contenders"].items():
            quartiles = f"{_milliseconds(contender, 'lower_s')} to {_milliseconds(contender, 'upper_s')}"
            said = [describe(c) for c in result["comparisons"] if c["contender"] == name]
            said += [f"{words} {_megabytes(contender[kind])}" for kind, words in _MEMORY.items() if kind in contender]
            first, *rest = said or [""]
            lines.append((row_id, name, _milliseconds(contender), quartiles, first))
            lines += [("", "", "", "", more) for more in rest]
            row_id = ""
        lines += [("", name, "", "", f"left out: {reason}") for name, reason in result["skipped"].items()]
        if result["note"]:
            lines.append(("", "", "", "", f"note: {result['note']}"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if place == 2 else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def listing(rows: Sequence[Row]) -> str:
    """Every row with its goals, and why it cannot be measured here if so."""
    lines = []
    for row in rows:
        missing = row.missing()
        lines.append(row.id if missing is None else f"{row.id}  [not here: {missing}]")
        for comparison in row.comparisons:
            asked = goal(_unmeasured(comparison))
            if asked:
                lines.append(f"    {comparison.contender} beside {_other(comparison)}: {asked}")
    return "\n".join(lines)


def _other(comparison: Comparison) -> str:
    if comparison.quantity == "saved_bytes":
        return f"{comparison.against}, bytes kept for backward"
    if comparison.measure == "above":
        return f"{comparison.limit}, in shares of {comparison.against}"
    return f"{comparison.against}, {'how many times faster' if comparison.measure == 'faster' else 'times its time'}"


def _unmeasured(comparison: Comparison) -> Result:
    return {**asdict(comparison), "value": None, "reached": None}


class _View:
    """What is known of one row, measured or not."""

    def __init__(self, row: Row, result: Result | None) -> None:
        self.row = row
        self.result = result or {"status": "not measured"}
        self.measured = self.result["status"] == "measured"
        self._compared = (
            self.result["comparisons"] if self.measured else [_unmeasured(comparison) for comparison in row.comparisons]
        )

    def compared(self, contender: str, against: str, measure: str, quantity: str = "seconds") -> Result | None:
        wanted = (contender, against, measure, quantity)
        found = (c for c in self._compared if (c["contender"], c["against"], c["measure"], c["quantity"]) == wanted)
        return next(found, None)

    def figure(self, *wanted: str, spread: bool = False) -> str:
        """A figure to print in a table, empty if there is none."""
        compared = self.compared(*wanted)
        if compared is None or compared["value"] is None:
            return ""
        return _with_spread(compared) if spread else _figure(compared)

    def goal(self, *wanted: str) -> str:
        compared = self.compared(*wanted)
        if compared is None:
            return ""
        return _verdict(compared) if self.measured else goal(compared)

    def what(self) -> str:
        note = self.result.get("note")
        return f"{self.row.what} ({note})" if note else self.row.what

    def times(self, *contenders: str) -> tuple[str, ...]:
        """Times to print in a table, or that there are none."""
        if not self.measured:
            return (self.result["status"], *[""] * (len(contenders) - 1))
        return tuple(_milliseconds(self.result["contenders"][name]) for name in contenders)

    def memory(self, kind: str, *contenders: str) -> tuple[str, ...]:
        """Sizes to print in a table, or that there are none."""
        if not self.measured:
            return (self.result["status"] if kind == "saved_bytes" else "", *[""] * (len(contenders) - 1))
        sizes = [self.result["contenders"][name].get(kind) for name in contenders]
        return tuple("" if size is None else _megabytes(size) for size in sizes)


def _markdown_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *lines))


def _layer_table(views: dict[str, _View], device: str) -> str:
    lines = []
    for view in views.values():
        _, kind, mode, *rest = view.row.id.split("/")
        if kind != "layer" or view.row.device != device or rest[-1] == "channels_last":
            continue
        ours = "ulsam compiled" if mode == "compile" else "ulsam"
        folded = ours.replace("ulsam", "ulsam folded")
        beside = views.get(f"{view.row.id}/channels_last")
        asked = [g for g in (view.goal(ours, "published", "faster"), view.goal(ours, "copy", "times")) if g]
        lines.append(
            (
                view.what(),
                *view.times("published", ours),
                *(view.times("published compiled") if mode == "compile" else [""]),
                view.figure(ours, "published", "faster", spread=True),
                view.figure(folded, "published", "faster"),
                beside.figure(ours, "published", "faster") if beside else "",
                view.figure(ours, "copy", "times"),
                "; ".join(asked),
            )
        )
    head = ("work", "published, ms", "ULSAM, ms", "published compiled, ms", "faster", "folded", "channels_last")
    head = (*head, "to a copy", "goals")
    return _markdown_table(head, lines)


def _memory_table(views: dict[str, _View]) -> str:
    share = ("ulsam", "published", "times", "saved_bytes")
    head = ["training step", "published keeps", "ULSAM keeps", "share", "goal", "published, peak", "ULSAM, peak"]
    lines = [
        (
            f"{view.row.device.upper()}, {view.row.what.partition(', ')[2]}",
            *view.memory("saved_bytes", "published", "ulsam"),
            view.figure(*share),
            view.goal(*share),
            *view.memory("peak_bytes", "published", "ulsam"),
        )
        for view in views.values()
        if "/layer/train/" in view.row.id and not view.row.id.endswith("channels_last")
    ]
    return _markdown_table(head, lines)


def _model_table(views: dict[str, _View], device: str) -> str:
    beside, above, folded = (OURS, PLAIN, "times"), (OURS, PLAIN, "above"), (FOLDED, PLAIN, "times")
    head = (f"{device.upper()}, ms", f"`{PLAIN}`", f"`{OURS}`", "limit", "ratio", "folded", "above the limit", "goals")
    lines = [
        (
            view.what(),
            *view.times(PLAIN, OURS, LIMIT),
            view.figure(*beside, spread=True),
            view.figure(*folded),
            view.figure(*above, spread=True),
            "; ".join(g for g in (view.goal(*beside), view.goal(*above)) if g),
        )
        for view in views.values()
        if "/model/" in view.row.id and view.row.device == device
    ]
    return _markdown_table(head, lines)


def _machine(report: Result, device: str) -> str:
    v = report["versions"]
    threads = f"{report['threads']} thread{'s' * (report['threads'] > 1)}"
    where = f"{report['gpu']}, CUDA {v['cuda']}" if device == "gpu" else f"{report['cpu']}, {threads}"
    packages = {"torch": "PyTorch", "timm": "timm"}
    packages |= {"triton": "Triton"} if device == "gpu" else {"onnxruntime": "ONNX Runtime"}
    software = [f"{name} {v[key]}" for key, name in packages.items() if v[key]]
    commit, _, changes = (v["commit"] or "unknown").partition("+")
    text = f"{where}; {', '.join(software)}; commit {commit[:7]}{' with changes' if changes else ''}, {report['date']}"
    if device == "cpu" and (report["load"] or 0) > 0.5:
        text += f"; load average of the minute before: {report['load']}"
    if report["quick"] or not report["complete"]:
        text += "; **a shortened run, to be replaced by a complete one**"
    return text


def _system_table(views: Sequence[_View]) -> str:
    head = ("CPU, ms", "without", "with", "folded", "with, beside without", "folded, beside without", "goal")
    lines = []
    for view in views:
        times = dict.fromkeys((WITHOUT, WITH, SYSTEM_FOLDED), "")
        if view.measured:
            times |= {name: _milliseconds(c) for name, c in view.result["contenders"].items()}
        else:
            times[WITHOUT] = view.result["status"]
        folded = (SYSTEM_FOLDED, WITHOUT, "times")
        lines.append(
            (
                view.what(),
                *times.values(),
                view.figure(WITH, WITHOUT, "times", spread=True),
                view.figure(*folded, spread=True),
                view.goal(*folded),
            )
        )
    return _markdown_table(head, lines)


def _views(rows: Sequence[Row], reports: Sequence[Result]) -> tuple[list[_View], dict[str, str]]:
    """Rows with what was measured of them, and by device where that was; the first of two measurements counts."""
    results: dict[str, Result] = {}
    machines: dict[str, str] = {}
    wanted = {row.id for row in rows}
    for report in reports:
        for result in report["rows"]:
            if result["id"] not in wanted:
                continue
            known = results.get(result["id"])
            if known is None or (known["status"] != "measured" and result["status"] == "measured"):
                results[result["id"]] = result
            if result["status"] == "measured":
                machines.setdefault(result["device"], _machine(report, result["device"]))
    return [_View(row, results.get(row.id)) for row in rows], machines


def markdown(rows: Sequence[Row], reports: Sequence[Result]) -> str:
    """The performance section of the README, between its markers.

    Args:
        rows: All rows, in order; those that no report measured stand as such.
        reports: What `run.report` made and `run.read` read; of two measurements of one row the first counts.
    """
    found, machines = _views([row for row in rows if "/system/" not in row.id], reports)
    views = {view.row.id: view for view in found}
    parts = [BEGIN]
    for device, name in (("cpu", "CPU"), ("gpu", "GPU")):
        where = machines.get(device, "not measured")
        parts.append(textwrap.fill(f"The layer on a {name} ({where}):", 120, break_on_hyphens=False))
        parts.append(_layer_table(views, device))
    parts += ["Memory:", _memory_table(views), "The model:"]
    return "\n\n".join([*parts, _model_table(views, "cpu"), _model_table(views, "gpu"), END])


def systems_markdown(rows: Sequence[Row], reports: Sequence[Result]) -> str:
    """The section of docs/systems.md on speed, between its markers; for the arguments see `markdown`."""
    views, machines = _views([row for row in rows if "/system/" in row.id], reports)
    where = textwrap.fill(f"Measured on a CPU ({machines.get('cpu', 'not measured')}):", 120, break_on_hyphens=False)
    return "\n\n".join([SYSTEMS_BEGIN, where, _system_table(views), SYSTEMS_END])

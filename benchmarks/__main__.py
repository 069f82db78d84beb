"""The command `python -m benchmarks`."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .report import listing, markdown, systems_markdown, table
from .rows import Options, Row, all_rows, select
from .run import RESULTS, Result, read, report, run, show_progress, write


class UsageError(Exception):
    """Something about the command line that cannot be."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure ULSAM beside the published module, a copy, and whole models, and the models of the other "
        "systems beside the same networks without them. Every row that this machine can measure is measured; "
        "contenders are checked to agree, then timed alternately. A complete run writes benchmarks/results/cpu.json "
        "and cpu-systems.json, and gpu.json where there is a GPU; of rows that are only a part of such a file "
        "nothing is written without --output.",
        epilog="example: python -m benchmarks --quick --only 'cpu/layer/infer' --output /tmp/layer.json",
    )
    verbs = parser.add_mutually_exclusive_group()
    verbs.add_argument("--list", action="store_true", help="list the rows and their goals, measure nothing")
    verbs.add_argument(
        "--markdown",
        nargs="+",
        type=Path,
        metavar="FILE.json",
        help="print the sections of the README and of docs/systems.md made from results, measure nothing",
    )
    parser.add_argument("--quick", action="store_true", help="few rounds and small batches, to see that it works")
    parser.add_argument(
        "--only",
        action="append",
        metavar="PATTERN",
        help="rows whose id contains this shell pattern; may be given several times",
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write all results to this file")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="CPU threads, default: %(default)s")
    return parser


def _rows(patterns: Sequence[str] | None) -> list[Row]:
    if patterns is None:
        return all_rows()
    rows = select(all_rows(), patterns)
    if not rows:
        raise UsageError(f"no row fits --only {' '.join(patterns)}; see --list")
    return rows


def _file(row_id: str) -> str:
    """Where a row's result belongs; what cannot be measured for want of a GPU stands beside what can."""
    device, kind = row_id.split("/")[:2]
    device = device if torch.cuda.is_available() else "cpu"
    return f"{device}-systems.json" if kind == "system" else f"{device}.json"


def _files(results: list[Result], args: argparse.Namespace) -> dict[Path, list[Result]]:
    """Where results go, and which of them: those of rows of which some are missing go nowhere by themselves."""
    if args.output is not None:
        return {args.output: results}
    files: dict[str, list[Result]] = {}
    for result in results:
        files.setdefault(_file(result["id"]), []).append(result)
    return {RESULTS / name: part for name, part in files.items() if _complete(part, args)}


def _complete(part: list[Result], args: argparse.Namespace) -> bool:
    found = {result["id"] for result in part if result["status"] != "failed"}
    measured = {_file(result["id"]) for result in part if result["status"] == "measured"}
    every = {row.id for row in all_rows() if _file(row.id) in measured}
    return not args.quick and bool(measured) and every <= found


def _measure(args: argparse.Namespace) -> int:
    rows = _rows(args.only)
    if args.threads < 1:
        raise UsageError(f"--threads {args.threads} is less than 1")
    if args.output is not None and (args.output.is_dir() or not args.output.absolute().parent.is_dir()):
        raise UsageError(f"--output {args.output} is not a file in a folder that exists")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    if load is not None and load > 0.5:
        print(f"warning: {load:.1f} processes are busy on this machine, CPU figures will be off", file=sys.stderr)
    options = Options(threads=args.threads, quick=args.quick)
    results = run(rows, options, show_progress(len(rows)))
    print(table(results))
    failed = [result for result in results if result["status"] == "failed"]
    for result in failed:
        print(f"benchmarks: error: {result['id']}: {result['reason']}", file=sys.stderr)
    files = _files(results, args)
    if failed and args.output is None:
        files = {}
    for path, part in files.items():
        write(path, report(part, options, _complete(part, args), load))
        print(f"written: {path}", file=sys.stderr)
    if not files:
        why = "rows failed" if failed else "the run was shortened"
        print(f"nothing written: {why}, and --output not given", file=sys.stderr)
    return 1 if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code.

    0 if all went well, goals reached or not; 1 if a row failed; 2 if the command line cannot be; 130 if interrupted.
    """
    args = _parser().parse_args(argv)
    try:
        if args.list:
            print(listing(_rows(args.only)))
        elif args.markdown is not None:
            rows, reports = all_rows(), [read(path) for path in args.markdown]
            print(f"{markdown(rows, reports)}\n\n{systems_markdown(rows, reports)}")
        else:
            return _measure(args)
    except (UsageError, OSError, ValueError) as error:
        print(f"benchmarks: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nbenchmarks: interrupted, nothing written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

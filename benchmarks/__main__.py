"""The command `python -m benchmarks`."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .report import listing, markdown, table
from .rows import Options, Row, all_rows, select
from .run import RESULTS, Result, read, report, run, show_progress, write


class UsageError(Exception):
    """Something about the command line that cannot be."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure ULSAM beside the published module, a copy, and whole models. Every row that this machine "
        "can measure is measured; contenders are checked to agree, then timed alternately. A complete run writes "
        "benchmarks/results/cpu.json, and gpu.json where there is a GPU; a shortened one writes nothing without "
        "--output.",
        epilog="example: python -m benchmarks --quick --only 'cpu/layer/infer' --output /tmp/layer.json",
    )
    verbs = parser.add_mutually_exclusive_group()
    verbs.add_argument("--list", action="store_true", help="list the rows and their goals, measure nothing")
    verbs.add_argument(
        "--markdown",
        nargs="+",
        type=Path,
        metavar="FILE.json",
        help="print the README's performance section made from results, measure nothing",
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


def _files(results: list[Result], args: argparse.Namespace) -> dict[Path, list[Result]]:
    """Where results go, and which of them."""
    if args.output is not None:
        return {args.output: results}
    if args.quick or args.only:
        return {}
    # what cannot be measured for want of a GPU stands beside what can, and no file of a GPU is touched
    gpu = [r for r in results if r["device"] == "gpu" and torch.cuda.is_available()]
    cpu = [r for r in results if r not in gpu]
    return {RESULTS / f"{name}.json": part for name, part in (("cpu", cpu), ("gpu", gpu)) if part}


def _complete(part: list[Result], args: argparse.Namespace) -> bool:
    ids = {result["id"] for result in part if result["status"] != "failed"}
    devices = {result["device"] for result in part if result["status"] == "measured"}
    every = {row.id for row in all_rows() if row.device in devices}
    return not args.quick and bool(devices) and every <= ids


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
            print(markdown(all_rows(), [read(path) for path in args.markdown]))
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

"""The command `timm-ulsam`."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict

from . import __version__

_DEFAULT_MODEL = "mobilenetv2_ulsam"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="timm-ulsam", description="Compact CNNs with subspace attention, for timm.")
    parser.add_argument("--version", action="version", version=f"timm-ulsam {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    zoo = verbs.add_parser(
        "list",
        help="list the models, their cost and their weights",
        description="List the models: system, parameters and multiply-adds with 1000 classes at this image size, "
        "weights and accuracy. With --systems: what each system changes in a network and what that costs.",
        epilog="example: timm-ulsam list --system doconv --json",
    )
    zoo.add_argument("--system", metavar="KEY", help="only the models of this system")
    zoo.add_argument("--systems", action="store_true", help="print the tables of docs/systems.md")
    form = zoo.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--markdown", action="store_true", help="print a Markdown table")
    zoo.set_defaults(run=_list)

    predict = verbs.add_parser(
        "predict",
        help="say what is in photographs, and draw where the model looked",
        description="Print the five most probable classes of every photograph.",
        epilog="example: timm-ulsam predict --demo --attention attention.png",
    )
    predict.add_argument("images", nargs="*", metavar="IMAGE", help="photographs to classify")
    predict.add_argument("--demo", action="store_true", help="classify three photographs that scikit-image carries")
    predict.add_argument("--model", default=_DEFAULT_MODEL, metavar="NAME", help="default: %(default)s")
    predict.add_argument("--attention", metavar="OUT.png", help="draw every attention map over the photographs")
    predict.add_argument("--json", action="store_true", help="print JSON")
    predict.set_defaults(run=_predict)
    return parser


def _list(args: argparse.Namespace) -> None:
    from .predict import InputError
    from .systems import SYSTEMS, costs_table, systems_table
    from .zoo import entries, markdown_table, table_rows

    if args.systems:
        if args.json or args.system:
            raise InputError("--systems prints the tables of all systems; not with --json or --system")
        print(f"{systems_table()}\n\n{costs_table()}")
        return
    keys = [system.key for system in SYSTEMS]
    if args.system not in (None, *keys):
        raise InputError(f"unknown system {args.system!r}; accepted: {', '.join(keys)}")
    zoo = entries(args.system)
    if args.json:
        print(json.dumps([asdict(entry) for entry in zoo], indent=2))
    elif args.markdown:
        print(markdown_table(zoo))
    else:
        rows = table_rows(zoo)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        numbers = ("parameters", "MACs", "px", "top-1")
        for row in rows:
            cells = zip(rows[0], row, widths, strict=True)
            print("  ".join(c.rjust(w) if head in numbers else c.ljust(w) for head, c, w in cells).rstrip())


def _predict(args: argparse.Namespace) -> None:
    from .predict import InputError, check_picture, demo_images, draw_attention, load_model, predict, read_image

    if bool(args.images) == args.demo:
        raise InputError("give photographs to classify, or --demo; not both")
    if args.attention:
        check_picture(args.attention)
    model = load_model(args.model)
    if args.demo:
        names, images = zip(*demo_images(), strict=True)
    else:
        names, images = args.images, map(read_image, args.images)
    if args.attention:
        images = list(images)
    predictions = predict(model, images)
    if args.attention:
        draw_attention(model, images, predictions, args.attention)
    if args.json:
        seen = [
            {"image": name, "predictions": [asdict(p) for p in best]}
            for name, best in zip(names, predictions, strict=True)
        ]
        result = {"model": args.model, "images": seen, "attention": args.attention}
        print(json.dumps(result, indent=2, ensure_ascii=False))
        return
    for name, best in zip(names, predictions, strict=True):
        print(name)
        for p in best:
            print(f"  {p.probability:6.1%}  {p.description}")
    if args.attention:
        print(f"attention maps drawn in {args.attention}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 after one line on what was wrong with the input."""
    args = _parser().parse_args(argv)
    from .predict import InputError
    from .pretrained import WeightsError

    try:
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (InputError, WeightsError, OSError) as error:
        message = " ".join(str(error).split())
        print(f"timm-ulsam: error: {message}", file=sys.stderr)
        return 2
    return 0

"""The command `timm-ulsam`."""

import argparse
import io
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
        "weights and accuracy. With --systems: what each system changes in a network and what that costs. With "
        "--runs, in a checkout: what training runs on a data set measured, those of baselines too.",
        epilog="example: timm-ulsam list --system doconv --json",
    )
    zoo.add_argument("--system", metavar="KEY", help="only the models of this system")
    zoo.add_argument("--systems", action="store_true", help="print the tables of docs/systems.md")
    zoo.add_argument("--runs", metavar="DATASET", help="print the table of recorded training runs on a data set")
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

    curve = verbs.add_parser(
        "curve",
        help="draw the learning curves of runs of train.py",
        description="Draw the top-1 accuracy after every epoch, a line for each summary.csv of timm's train.py.",
        epilog="example: timm-ulsam curve output/train/RUN/summary.csv --output curve.png",
    )
    curve.add_argument("logs", nargs="+", metavar="LOG", help="summary.csv, or the folder of a run that holds one")
    curve.add_argument("--output", required=True, metavar="OUT.png", help="picture to write")
    curve.set_defaults(run=_curve)

    package = verbs.add_parser(
        "package",
        help="turn a checkpoint of train.py into a Hub repository",
        description="Turn a checkpoint of timm's train.py (its EMA weights, if it has some) or a safetensors file into "
        "weights/ARCH.TAG/: model.safetensors, config.json and, if its facts are recorded, the model card. Nothing is "
        "unpickled but tensors and plain values.",
        epilog="example: timm-ulsam package output/train/RUN/model_best.pth.tar --arch mobilenetv2_ulsam --tag mine "
        "--labels classes.txt --dataset tiny-imagenet",
    )
    package.add_argument("checkpoint", metavar="CHECKPOINT", help="model_best.pth.tar, or weights in safetensors")
    package.add_argument("--arch", required=True, metavar="NAME", help="name of the model")
    package.add_argument("--tag", required=True, help="name of the weights")
    classes = package.add_mutually_exclusive_group(required=True)
    classes.add_argument("--labels", metavar="FILE", help="the classes; in every line its folder, a tab, its name")
    classes.add_argument("--data-dir", metavar="DIR", help="the data; every folder of DIR/train is a class")
    package.add_argument("--dataset", metavar="KEY", help="record accuracy on this data set of weights/datasets.yaml")
    package.add_argument("--config", metavar="FILE", help="options of train.py (default: the checkpoint's own)")
    package.add_argument("--output", metavar="DIR", help="write the folder here, and nothing beside it")
    package.set_defaults(run=_package)

    card = verbs.add_parser(
        "card",
        help="write the model cards from what is recorded",
        description="Write weights/NAME/README.md from weights/facts/NAME.yaml, the weights and their recipe.",
        epilog="example: timm-ulsam card mobilenetv2_ulsam.tin200",
    )
    card.add_argument("names", nargs="+", metavar="NAME", help="weights, ARCH.TAG")
    card.add_argument("--org", help="organization or user that is to publish them (default: timm-ulsam)")
    card.set_defaults(run=_card)

    publish = verbs.add_parser(
        "publish",
        help="publish weights at the Hugging Face Hub",
        description="Make weights/NAME/ the Hub repository ORG/NAME. What is there already is left as it is, and what "
        "does not belong there is deleted. The token is that of HF_TOKEN or `hf auth login`.",
        epilog="example: timm-ulsam publish mobilenetv2_ulsam.tin200 --org timm-ulsam --dry-run",
    )
    publish.add_argument("names", nargs="+", metavar="NAME", help="weights, ARCH.TAG")
    publish.add_argument("--org", required=True, help="organization or user")
    publish.add_argument("--private", action="store_true", help="make new repositories private")
    publish.add_argument("--revision", metavar="R", help="branch to commit to, made if missing (default: main)")
    publish.add_argument("--create-pr", action="store_true", help="open a pull request in the place of a commit")
    publish.add_argument("--dry-run", action="store_true", help="change nothing at the Hub, say what would change")
    publish.set_defaults(run=_publish)
    return parser


def _list(args: argparse.Namespace) -> None:
    from .errors import InputError
    from .records import runs, runs_table
    from .systems import SYSTEMS, costs_table, systems_table
    from .zoo import entries, markdown_table, text_table

    if args.systems:
        if args.json or args.system or args.runs is not None:
            raise InputError("--systems prints the tables of all systems; not with --json, --system or --runs")
        print(f"{systems_table()}\n\n{costs_table()}")
        return
    if args.runs is not None:
        if args.system:
            raise InputError("--runs prints the runs of all systems and of none; not with --system")
        found = runs(args.runs)
        print(json.dumps([asdict(run) for run in found], indent=2) if args.json else runs_table(found))
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
        print(text_table(zoo))


def _predict(args: argparse.Namespace) -> None:
    from .errors import InputError
    from .predict import check_picture, demo_images, draw_attention, load_model, predict, read_image

    if bool(args.images) == args.demo:
        raise InputError("give photographs to classify, or --demo; not both")
    if args.attention:
        check_picture(args.attention)
    model = load_model(args.model)
    if model.pretrained_cfg.get("description"):  # of an initialization, that it is no classifier yet
        print(f"timm-ulsam: {args.model}: {model.pretrained_cfg['description']}", file=sys.stderr)
    if args.demo:
        names, images = zip(*demo_images(), strict=True)
    else:
        names, images = args.images, map(read_image, args.images)
    if args.attention:
        images = list(images)
    predictions = predict(model, images)
    if args.json:
        if args.attention:  # what is printed names a picture that is there
            draw_attention(model, images, predictions, args.attention)
        seen = [
            {"image": name, "predictions": [asdict(p) for p in best]}
            for name, best in zip(names, predictions, strict=True)
        ]
        result = {"model": args.model, "images": seen, "attention": args.attention}
        print(json.dumps(result, indent=2))
        return
    for name, best in zip(names, predictions, strict=True):
        print(name)
        for p in best:
            print(f"  {p.probability:6.1%}  {p.description}")
    if args.attention:
        draw_attention(model, images, predictions, args.attention)
        print(f"attention maps drawn in {args.attention}")


def _curve(args: argparse.Namespace) -> None:
    from .curve import draw_curves

    draw_curves(args.logs, args.output)
    print(f"learning curves drawn in {args.output}")


def _package(args: argparse.Namespace) -> None:
    from .package import package

    done = package(
        args.checkpoint,
        args.arch,
        args.tag,
        labels=args.labels,
        data_dir=args.data_dir,
        dataset=args.dataset,
        config=args.config,
        output=args.output,
    )
    print(f"{done.folder}: {done.classes} classes, {done.source}, SHA-256 {done.digest}")
    for step in done.left_to_do:
        print(f"  left to do: {step}")


def _card(args: argparse.Namespace) -> None:
    from .card import write_card
    from .pretrained import HUB_ORG

    for name in args.names:
        print(write_card(name, args.org or HUB_ORG))


def _publish(args: argparse.Namespace) -> None:
    from huggingface_hub.utils import disable_progress_bars

    from .publish import publish

    if not sys.stderr.isatty():
        disable_progress_bars()
    options = dict(private=args.private, revision=args.revision, create_pr=args.create_pr, dry_run=args.dry_run)
    for done in publish(args.names, args.org, **options):
        changes = [f"add {path}" for path in done.added] + [f"delete {path}" for path in done.deleted]
        if done.created:
            changes.insert(0, "new repository")
        if done.proposed:
            print(f"{done.repo}: proposed already, {done.url}")
        elif not changes:
            print(f"{done.repo}: unchanged")
        else:
            print(f"{done.repo}: {', '.join(changes)}{f'; {done.url}' if done.url else ' (dry run)'}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 after one line on what was wrong with the input, 130."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names may have letters that a terminal lacks
    args = _parser().parse_args(argv)
    from .errors import InputError, KernelError, WeightsError

    try:
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return 130  # as a shell says of what an interrupt stopped
    except (InputError, KernelError, WeightsError, OSError) as error:
        message = " ".join(str(error).split())
        print(f"timm-ulsam: error: {message}", file=sys.stderr)
        return 2
    return 0

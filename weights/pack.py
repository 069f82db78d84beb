"""Turn a finished run of timm's train.py into `weights/<arch>.<tag>/`, the Hub repository of that model.

    python weights/pack.py RUN_DIR mobilenetv2_ulsam.tin200 --labels words.txt

Writes model.safetensors and config.json, records the digest in SHA256SUMS and copies the run's log to logs/. By hand
follow: the model card (README.md), the tag in `default_cfgs` of its model file, what the wheel carries of it in
pyproject.toml, and the README's table.
"""

import argparse
import hashlib
import shutil
import tempfile
from pathlib import Path

import timm
import yaml
from timm.data import resolve_data_config
from timm.models import load_checkpoint, save_for_hf

WEIGHTS = Path(__file__).resolve().parent


def pack(run: Path, name: str, labels: Path) -> None:
    arch, _, tag = name.partition(".")
    args = yaml.safe_load((run / "args.yaml").read_text(encoding="utf-8"))
    descriptions = dict(line.split("\t") for line in labels.read_text(encoding="utf-8").splitlines())
    if len(descriptions) != args["num_classes"]:
        raise SystemExit(f"{labels} holds {len(descriptions)} classes, the run was trained on {args['num_classes']}")

    data = resolve_data_config(args, verbose=False)
    model = timm.create_model(arch, num_classes=args["num_classes"], **args["model_kwargs"])
    height, width = data["input_size"][1:]
    stride = model.feature_info[-1]["reduction"]
    model.pretrained_cfg.update(
        tag=tag, input_size=data["input_size"], pool_size=(-(-height // stride), -(-width // stride))
    )
    for key in ("label_names", "label_descriptions"):
        model.pretrained_cfg.pop(key, None)  # those of the tag that is the default now
    load_checkpoint(model, str(run / "model_best.pth.tar"))

    with tempfile.TemporaryDirectory(dir=WEIGHTS) as temporary:
        save_for_hf(
            model,
            temporary,
            model_config={
                "pretrained_cfg": {"tag": tag, "num_classes": args["num_classes"]},
                "label_names": sorted(descriptions),  # class folders, in ImageFolder's order
                "label_descriptions": descriptions,
            },
            data_config=data,
            safe_serialization=True,
        )
        (WEIGHTS / name).mkdir(exist_ok=True)
        for file in Path(temporary).iterdir():
            file.replace(WEIGHTS / name / file.name)

    sums = {}
    for file in sorted(WEIGHTS.glob("*/model.safetensors")):
        sums[file.parent.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    lines = [f"{digest}  {folder}/model.safetensors\n" for folder, digest in sums.items()]
    (WEIGHTS / "SHA256SUMS.part").write_text("".join(lines), encoding="utf-8")
    (WEIGHTS / "SHA256SUMS.part").replace(WEIGHTS / "SHA256SUMS")
    (WEIGHTS / "logs").mkdir(exist_ok=True)
    shutil.copyfile(run / "summary.csv", WEIGHTS / "logs" / f"{name}.csv")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="output folder of train.py: args.yaml, summary.csv, model_best.pth.tar")
    parser.add_argument("name", help="<arch>.<tag>")
    parser.add_argument("--labels", type=Path, required=True, help="lines of: class folder, tab, English name")
    args = parser.parse_args()
    pack(args.run, args.name, args.labels)


if __name__ == "__main__":
    main()

"""Learning curves: what timm's train.py measured after every epoch."""

from collections.abc import Sequence
from pathlib import Path

from .errors import InputError
from .pictures import check_picture, write_figure
from .records import read_log


def read_curve(log: str | Path) -> tuple[str, dict[int, float]]:
    """The name of a run and its top-1 accuracy in percent by epoch, counted from 1.

    Args:
        log: summary.csv of train.py, or the folder that holds it.

    Raises:
        InputError: If it cannot be read or holds no accuracy; names the file.
    """
    path = Path(log)
    path = path / "summary.csv" if path.is_dir() else path
    measured = {epoch + 1: row["eval_top1"] for epoch, row in sorted(read_log(path).items()) if "eval_top1" in row}
    if not measured:
        raise InputError(f"{path} holds no eval_top1, the accuracy that train.py measures after an epoch")
    return (path.resolve().parent.name if path.name == "summary.csv" else path.stem), measured


def draw_curves(logs: Sequence[str | Path], out: str | Path) -> None:
    """Write one picture: the accuracy after every epoch, a line a run.

    Args:
        logs: summary.csv of every run, or the folders that hold them.
        out: Picture to write; its suffix names the format.

    Raises:
        InputError: If a log cannot be read, or the picture cannot be written (see `check_picture`).
    """
    curves = [read_curve(log) for log in logs]
    check_picture(out)
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, measured in curves:
        axes.plot(list(measured), list(measured.values()), marker=".", label=f"{name}: {measured[max(measured)]:.1f} %")
    axes.set(xlabel="epoch", ylabel="top-1 accuracy, %")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    write_figure(figure, Path(out))

"""Tables as people read them: Markdown, or columns of text."""

from collections.abc import Collection, Sequence


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Collection[str] = ()) -> str:
    """A Markdown table.

    Args:
        head: Names of the columns.
        rows: Their cells.
        numbers: Columns that are aligned to the right.
    """
    rules = ["---:" if name in numbers else "---" for name in head]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rules, *rows))


def text(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Collection[str] = ()) -> str:
    """The same for a terminal, in columns of equal width."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = []
    for row in (head, *rows):
        cells = zip(head, row, widths, strict=True)
        lines.append("  ".join(c.rjust(w) if name in numbers else c.ljust(w) for name, c, w in cells).rstrip())
    return "\n".join(lines)

import re
import shlex

import pytest
from conftest import REPO

from timm_ulsam.cli import _parser
from timm_ulsam.zoo import entries, markdown_table

PAGES = [REPO / name for name in ("README.md", "docs/fine-tuning.md", "docs/systems.md", "weights/README.md")]
README = PAGES[0].read_text(encoding="utf-8")


def blocks(page, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def test_the_zoo_table_is_current():
    assert markdown_table(entries("ulsam")) in README, (
        "replace it by what `timm-ulsam list --system ulsam --markdown` prints"
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_it_links_to_exists(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert links or page.name == "systems.md"
    assert all((page.parent / link).exists() for link in links), links


def test_its_python_runs(python):
    code = blocks(PAGES[0], "python")
    assert len(code) >= 4
    done = python("\n".join(code), cwd=REPO, TIMM_ULSAM_WEIGHTS=str(REPO / "weights"))
    assert done.stdout == ""


def test_every_command_of_ours_parses():
    commands = []
    for page in PAGES:
        for block in blocks(page, "sh"):
            lines = re.sub(r"\\\n", " ", block).splitlines()
            commands += [c for line in lines for c in re.findall(r"(?:^|&& )(timm-ulsam .*?)(?= &&|$)", line)]
        commands += re.findall(r"`(timm-ulsam (?:list|curve) [^`]*)`", page.read_text(encoding="utf-8"))
    assert len(commands) >= 8
    for command in commands:
        _parser().parse_args(shlex.split(command)[1:])  # leaves the process where it does not

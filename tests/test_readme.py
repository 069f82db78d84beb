import re

from conftest import REPO

from timm_ulsam.zoo import entries, markdown_table

README = (REPO / "README.md").read_text(encoding="utf-8")


def test_the_zoo_table_is_current():
    assert markdown_table(entries("ulsam")) in README, (
        "replace it by what `timm-ulsam list --system ulsam --markdown` prints"
    )


def test_every_file_it_links_to_exists():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert links
    assert all((REPO / link).exists() for link in links), links

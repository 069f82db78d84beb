"""torch.hub from a clone in which nothing is installed: our package comes from the clone, not from site-packages."""

import re
import sys
from importlib.metadata import requires

import pytest
from conftest import REPO

from timm_ulsam.systems import SYSTEMS, image_size, system_of
from timm_ulsam.zoo import model_names

REFERENCE = "timm-ulsam/timm-ulsam:main"


@pytest.fixture
def hub(python, tmp_path):
    """Run code with a clone at DIR, which is in torch.hub's cache too, as if torch.hub had fetched REFERENCE."""
    cache = tmp_path / "home" / "hub"
    cache.mkdir(parents=True)
    (cache / "timm-ulsam_timm-ulsam_main").symlink_to(REPO)
    head = f"import sys, torch; DIR = {str(REPO)!r}; REPO = {REFERENCE!r}\n"
    head += "cached = dict(skip_validation=True, trust_repo=True, verbose=False)\n"

    def run(code: str, **kwargs):
        # without autoload the installed package stays out, as if it were not there
        return python(head + code, TORCH_DEVICE_BACKEND_AUTOLOAD="0", TORCH_HOME=str(tmp_path / "home"), **kwargs)

    return run


def test_lists_every_model_of_the_zoo(hub):
    listed = hub("print(*torch.hub.list(REPO, **cached))").stdout.split()
    assert sorted(listed) == sorted(model_names())


def test_help_names_the_paper_of_every_model(hub):
    papers = {name: system_of(name).papers for name in model_names()}
    code = f"""
for name, papers in {papers!r}.items():
    found = torch.hub.help(REPO, name, skip_validation=True, trust_repo=True)
    assert any(paper in found for paper in papers), (name, found)
"""
    hub(code)


@pytest.mark.parametrize("name", [*SYSTEMS[0].models, *(next(iter(s.models)) for s in SYSTEMS[1:])])
def test_loads_from_the_hub_and_from_a_clone(name, hub):
    size = image_size(name) if "repmlp" in name else 32
    code = f"""
torch.hub.load(REPO, {name!r}, num_classes=10, **cached)
model = torch.hub.load(DIR, {name!r}, source='local', num_classes=10, in_chans=1).eval()
assert model(torch.randn(2, 1, {size}, {size})).shape == (2, 10)
"""
    hub(code)


def test_pretrained_weights_come_from_the_clone(hub):
    code = """
model = torch.hub.load(DIR, 'mobilenetv2_ulsam', source='local', pretrained=True)
assert model.pretrained_cfg['file'].startswith(DIR), model.pretrained_cfg['file']
assert sys.modules['timm_ulsam'].__file__.startswith(DIR), sys.modules['timm_ulsam'].__file__
assert model.num_classes == 200
"""
    hub(code)


def test_names_a_missing_dependency(hub):
    code = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == 'timm' else find(name, *rest)
torch.hub.load(DIR, 'mobilenetv2_ulsam', source='local')
"""
    done = hub(code, check=False)
    assert "Missing dependencies: timm" in done.stderr


def test_dependencies_are_the_packages():
    sys.path.insert(0, str(REPO))
    try:
        import hubconf
    finally:
        sys.path.pop(0)
    required = {re.match(r"[\w-]+", line)[0] for line in requires("timm-ulsam") if "extra" not in line}
    assert {name.replace("_", "-") for name in hubconf.dependencies} == required

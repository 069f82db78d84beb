"""timm knows our models, in whatever order things are imported. Each case in a fresh interpreter."""

import pkgutil
from importlib.metadata import entry_points

import pytest

import timm_ulsam

# A model registered twice is a UserWarning, a failing hook of ours a RuntimeWarning.
STRICT = "error::UserWarning,error::RuntimeWarning"
CREATES = "\nimport timm; assert timm.is_model('mobilenetv2_ulsam'), 'unknown to timm'"
MODULES = [m.name for m in pkgutil.walk_packages(timm_ulsam.__path__, "timm_ulsam.") if "__main__" not in m.name]
NEED_TRITON = {"timm_ulsam.ops.gpu", "timm_ulsam.ops.gpu_kernels", "timm_ulsam.ops.gpu_kernels_backward"}


def test_the_entry_point_is_installed():
    (ours,) = (e for e in entry_points(group="torch.backends") if e.name == "timm_ulsam")
    assert ours.value == "timm_ulsam:autoload"


@pytest.mark.parametrize(
    "code",
    [
        "import torch, timm",
        "import timm",
        "import timm_ulsam, timm",
        "import timm, timm_ulsam",
        "import timm_ulsam.models",
        "import timm.models",
        "import timm.layers",
        "from timm import create_model; create_model('mobilenetv2_ulsam', device='meta')",
        "from timm_ulsam import ULSAM; ULSAM(8)",
    ],
)
def test_timm_knows_the_models_after(code, python):
    done = python(code + CREATES, warnings=STRICT)
    assert "ulsam" not in done.stderr


@pytest.mark.parametrize("code", ["import timm_ulsam, timm", "import timm, timm_ulsam", "import timm_ulsam.models"])
def test_timm_knows_the_models_without_autoload_after(code, python):
    done = python(code + CREATES, warnings=STRICT, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert "ulsam" not in done.stderr


@pytest.mark.parametrize("module", MODULES)
def test_any_module_can_be_the_first_import(module, python):
    if module in NEED_TRITON:
        pytest.importorskip("triton")
    done = python(f"import {module}" + CREATES, warnings=STRICT)
    assert "ulsam" not in done.stderr


def test_without_autoload_and_without_us_timm_does_not_know(python):
    python("import timm; assert not timm.is_model('mobilenetv2_ulsam')", TORCH_DEVICE_BACKEND_AUTOLOAD="0")


def test_import_torch_alone_imports_neither_timm_nor_our_models(python):
    python(
        "import torch, sys; assert 'timm_ulsam' in sys.modules\n"
        "assert not {'timm', 'timm_ulsam.models'} & {*sys.modules}"
    )


def test_importing_the_package_imports_neither_torch_nor_timm(python):
    python("import timm_ulsam, sys; assert not {'torch', 'timm'} & {*sys.modules}, sys.modules.keys()")


def test_public_names_resolve_lazily(python):
    python(
        "import sys, timm_ulsam; assert 'ULSAM' in dir(timm_ulsam) and 'torch' not in sys.modules\n"
        "from timm_ulsam import ULSAM; assert ULSAM.__module__ == 'timm_ulsam.layers.ulsam'"
    )
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = timm_ulsam.no_such_name


def test_a_failure_breaks_nothing_even_where_warnings_are_errors(python):
    done = python(
        "import sys; sys.modules['wrapt'] = None; import torch, timm; assert torch.ones(1).item() == 1",
        warnings="error::RuntimeWarning",
    )
    assert done.stderr.count("timm-ulsam could not register its models with timm: ") == 1


@pytest.mark.parametrize("broken", ["wrapt", "timm_ulsam.models.mobilenet_ulsam"])
def test_a_failure_of_ours_is_one_warning_and_breaks_nothing(broken, python):
    block = f"import sys; sys.modules[{broken!r}] = None\n"
    use = "import torch, timm; timm.create_model('mobilenetv2_100', device='meta'); assert torch.ones(1).item() == 1"
    done = python(block + use, warnings="default::RuntimeWarning")
    assert done.stderr.count("timm-ulsam could not register its models with timm: ") == 1
    assert broken in done.stderr

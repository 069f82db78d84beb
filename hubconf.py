"""Entry points for torch.hub: `torch.hub.load(REPO, 'mobilenetv2_ulsam', pretrained=True)`.

Every one takes `pretrained` and what `timm.create_model` takes (`num_classes`, `in_chans`, `features_only`, ...), and
returns an `nn.Module`. Weights come from `weights/` in this repository, else from the Hugging Face Hub.
"""

dependencies = ["torch", "timm", "huggingface_hub", "safetensors", "wrapt"]


def _create(name, pretrained, **kwargs):
    # imported here, so that torch.hub can check the dependencies first and name a missing one
    import timm

    import timm_ulsam.models  # noqa: F401

    return timm.create_model(name, pretrained=pretrained, **kwargs)


def mobilenetv2_ulsam(pretrained=False, **kwargs):
    """MobileNetV2 with ULSAM (arXiv 2006.15102, 4 subspaces) in the place of blocks 13 and 16."""
    return _create("mobilenetv2_ulsam", pretrained, **kwargs)


def mobilenetv2_ulsam_s(pretrained=False, **kwargs):
    """MobileNetV2 with ULSAM (arXiv 2006.15102, 4 subspaces) in the place of blocks 12, 13, 15 and 16."""
    return _create("mobilenetv2_ulsam_s", pretrained, **kwargs)


def mobilenetv2_ulsam_l(pretrained=False, **kwargs):
    """MobileNetV2 with ULSAM (arXiv 2006.15102, 4 subspaces) inserted after block 16."""
    return _create("mobilenetv2_ulsam_l", pretrained, **kwargs)


def mobilenetv2_ulsam_050(pretrained=False, **kwargs):
    """MobileNetV2 at half width with ULSAM (arXiv 2006.15102, 4 subspaces) in the place of blocks 13 and 16."""
    return _create("mobilenetv2_ulsam_050", pretrained, **kwargs)


def mobilenetv1_ulsam(pretrained=False, **kwargs):
    """MobileNetV1 with ULSAM (arXiv 2006.15102, 4 subspaces) in the place of block 11."""
    return _create("mobilenetv1_ulsam", pretrained, **kwargs)


def mobilenetv1_ulsam_075(pretrained=False, **kwargs):
    """MobileNetV1 at width 0.75 with ULSAM (arXiv 2006.15102, 4 subspaces) in the place of block 11."""
    return _create("mobilenetv1_ulsam_075", pretrained, **kwargs)


def mobilenetv1_ulsam_050(pretrained=False, **kwargs):
    """MobileNetV1 at half width with ULSAM (arXiv 2006.15102, 4 subspaces) in the place of block 11."""
    return _create("mobilenetv1_ulsam_050", pretrained, **kwargs)

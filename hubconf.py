"""Entry points for torch.hub: `torch.hub.load(REPO, 'mobilenetv2_ulsam', pretrained=True)`.

Every one takes `pretrained` and what `timm.create_model` takes (`num_classes`, `in_chans`, `features_only`, ...), and
returns an `nn.Module`. Weights come from `weights/` in this repository, else from the Hugging Face Hub.
"""

dependencies = ["torch", "timm", "huggingface_hub", "safetensors", "wrapt"]

_MODELS = {
    "mobilenetv2_ulsam": "MobileNetV2 with ULSAM (arXiv 2006.15102, 4 subspaces) in the place of blocks 13 and 16.",
    "mobilenetv2_ulsam_s": "MobileNetV2 with ULSAM (arXiv 2006.15102) in the place of blocks 12, 13, 15 and 16.",
    "mobilenetv2_ulsam_l": "MobileNetV2 with ULSAM (arXiv 2006.15102, 4 subspaces) inserted after block 16.",
    "mobilenetv2_ulsam_050": "MobileNetV2 at half width with ULSAM (arXiv 2006.15102), blocks 13 and 16 replaced.",
    "mobilenetv1_ulsam": "MobileNetV1 with ULSAM (arXiv 2006.15102, 4 subspaces) in the place of block 11.",
    "mobilenetv1_ulsam_075": "MobileNetV1 at width 0.75 with ULSAM (arXiv 2006.15102) in the place of block 11.",
    "mobilenetv1_ulsam_050": "MobileNetV1 at half width with ULSAM (arXiv 2006.15102) in the place of block 11.",
    "resnet50_sa": "ResNet-50 with Shuffle Attention (arXiv 2102.00240), 64 groups.",
    "resnet101_sa": "ResNet-101 with Shuffle Attention (arXiv 2102.00240), 64 groups.",
    "resnet152_sa": "ResNet-152 with Shuffle Attention (arXiv 2102.00240), 64 groups.",
    "smt_tiny": "Scale-Aware Modulation Transformer (SMT, arXiv 2307.08579), tiny.",
    "smt_small": "Scale-Aware Modulation Transformer (SMT, arXiv 2307.08579), small.",
    "smt_base": "Scale-Aware Modulation Transformer (SMT, arXiv 2307.08579), base.",
    "smt_large": "Scale-Aware Modulation Transformer (SMT, arXiv 2307.08579), large.",
    "resnet18_doconv": "ResNet-18 with depthwise over-parameterization (DO-Conv, arXiv 2006.12030).",
    "resnet50_doconv": "ResNet-50 with depthwise over-parameterization (DO-Conv, arXiv 2006.12030).",
    "resnet101_doconv": "ResNet-101 with depthwise over-parameterization (DO-Conv, arXiv 2006.12030).",
    "resnext50_32x4d_doconv": "ResNeXt-50 32x4d with depthwise over-parameterization (DO-Conv, arXiv 2006.12030).",
    "mobilenetv1_doconv": "MobileNetV1 with depthwise over-parameterization (DO-Conv, arXiv 2006.12030).",
    "mobilenetv2_doconv": "MobileNetV2 with depthwise over-parameterization (DO-Conv, arXiv 2006.12030).",
    "resnet50_psconv": "ResNet-50 with poly-scale convolutions (PSConv, arXiv 2007.06191).",
    "resnet101_psconv": "ResNet-101 with poly-scale convolutions (PSConv, arXiv 2007.06191).",
    "resnext50_32x4d_psconv": "ResNeXt-50 32x4d with poly-scale convolutions (PSConv, arXiv 2007.06191).",
    "resnext101_32x4d_psconv": "ResNeXt-101 32x4d with poly-scale convolutions (PSConv, arXiv 2007.06191).",
    "resnet18_dbb": "ResNet-18 of diverse branch blocks (DBB, arXiv 2103.13425).",
    "resnet50_dbb": "ResNet-50 of diverse branch blocks (DBB, arXiv 2103.13425).",
    "mobilenetv1_dbb": "MobileNetV1 of diverse branch blocks (DBB, arXiv 2103.13425).",
    "repmlpnet_t224": "RepMLPNet (arXiv 2112.11081), T at 224 px.",
    "repmlpnet_t256": "RepMLPNet (arXiv 2112.11081), T at 256 px.",
    "repmlpnet_b224": "RepMLPNet (arXiv 2112.11081), B at 224 px.",
    "repmlpnet_b256": "RepMLPNet (arXiv 2112.11081), B at 256 px.",
    "repmlpnet_d256": "RepMLPNet (arXiv 2112.11081), D at 256 px.",
    "repmlpnet_l256": "RepMLPNet (arXiv 2112.11081), L at 256 px.",
    "resnet50_repmlp_light": "ResNet-50 with RepMLP (arXiv 2105.01883) in the place of 3x3 convolutions, light.",
    "resnet50_repmlp": "ResNet-50 with RepMLP (arXiv 2105.01883) in bottleneck blocks.",
    "shufflenetv2_050_weightnet": "ShuffleNetV2 0.5x with WeightNet (arXiv 2007.11823).",
    "shufflenetv2_100_weightnet": "ShuffleNetV2 1.0x with WeightNet (arXiv 2007.11823).",
    "shufflenetv2_150_weightnet": "ShuffleNetV2 1.5x with WeightNet (arXiv 2007.11823).",
    "shufflenetv2_200_weightnet": "ShuffleNetV2 2.0x with WeightNet (arXiv 2007.11823).",
}


def _entrypoint(name, doc):
    def entrypoint(pretrained=False, **kwargs):
        # imported here, so that torch.hub can check the dependencies first and name a missing one
        import timm

        import timm_ulsam.models  # noqa: F401

        return timm.create_model(name, pretrained=pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = doc
    return entrypoint


globals().update({name: _entrypoint(name, doc) for name, doc in _MODELS.items()})

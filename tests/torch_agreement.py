"""Compares our models with PyTorch's on the same random weights and images.

    pip install torch torchvision timm pretrainedmodels==0.7.4 six scipy
    python tests/torch_agreement.py
    python tests/torch_agreement.py --write

At full size, in single and double precision, and the small models whose logits are
stored for the everyday tests; --write replaces these. Exits with 1 if any logits differ
by more than 1e-4 of the largest. Models of a package that is missing are left out.
"""

import argparse
import copy
import importlib
import json
import sys
from collections import OrderedDict

import jax
import numpy as np
import torch
import torchvision
from torch import nn
from torch_cases import (
    SMALL,
    VECTORS,
    our_logits,
    our_small_logits,
    random_images,
    random_tensors,
    read_vectors,
    relative_difference,
)
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from agp_jax.models import make_model

TOLERANCE = 1e-4


def mobilenet():
    """Marvis' MobileNet, which Distiller prunes; it pools all 7 x 7 pixels."""
    blocks = [_conv_norm(3, 32, 3, 2, 1)]
    widths = [32, 64, 128, 128, 256, 256, *[512] * 6, 1024, 1024]
    for i in range(13):
        inputs, outputs = widths[i : i + 2]
        strides = 2 if i in (1, 3, 5, 11) else 1
        depthwise = _conv_norm(inputs, inputs, 3, strides, inputs)
        blocks.append([*depthwise, *_conv_norm(inputs, outputs, 1, 1, 1)])
    layers = [nn.Sequential(*block) for block in blocks]
    return nn.Sequential(
        OrderedDict(
            model=nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1)),
            flatten=nn.Flatten(),
            fc=nn.Linear(1024, 1000),
        )
    )


def _conv_norm(inputs, outputs, size, strides, groups):
    conv = nn.Conv2d(
        inputs, outputs, size, strides, size // 2, groups=groups, bias=False
    )
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]


def cifar_resnet(blocks):
    """Distiller's: torchvision's without the first pooling and the last stage."""
    model = ResNet(BasicBlock, [blocks, blocks, blocks, 1])
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = model.layer4 = nn.Identity()
    model.fc = nn.Linear(256, 10)
    return model


def resnext(stages):
    return ResNet(Bottleneck, stages, groups=32, width_per_group=4)


def cadene(stages):
    """pretrainedmodels' ResNeXt-101 with that many blocks of its stages."""
    package = importlib.import_module("pretrainedmodels")
    model = copy.deepcopy(package.resnext101_32x4d(pretrained=None))
    for i, blocks in enumerate(stages, start=4):
        model.features[i] = model.features[i][:blocks]
    model.avg_pool = nn.AdaptiveAvgPool2d(1)  # 7 x 7 pixels are all there are of 224
    return model


def vit(**sizes):
    timm = importlib.import_module("timm")
    return timm.create_model("vit_base_patch16_224", pretrained=False, **sizes)


def narrow(model, factor, classes=5):
    """The model with so many times fewer channels."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Conv2d):
            inputs, outputs = layer.in_channels, layer.out_channels
            layer = nn.Conv2d(
                inputs if inputs == 3 else inputs // factor,
                outputs // factor,
                layer.kernel_size,
                layer.stride,
                layer.padding,
                groups=max(layer.groups // factor, 1),
                bias=layer.bias is not None,
            )
        elif isinstance(layer, nn.BatchNorm2d):
            layer = nn.BatchNorm2d(layer.num_features // factor)
        elif isinstance(layer, nn.Linear):
            is_head = layer.out_features in (10, 1000)
            outputs = classes if is_head else layer.out_features // factor
            layer = nn.Linear(layer.in_features // factor, outputs)
        else:
            continue
        model.set_submodule(name, layer)
    return model


# Of each case: its published model, and the small one of `torch_cases`.
MODELS = {
    "alexnet": (
        torchvision.models.alexnet,
        lambda: narrow(torchvision.models.alexnet(), 32),
    ),
    "mobilenet": (mobilenet, lambda: narrow(mobilenet(), 8)),
    "resnet18": (
        torchvision.models.resnet18,
        lambda: narrow(ResNet(BasicBlock, [1, 2, 1, 1]), 16),
    ),
    "resnet20_projection": (
        lambda: narrow(cifar_resnet(3), 4, classes=10),
        lambda: narrow(cifar_resnet(1), 16),
    ),
    "resnet50": (
        torchvision.models.resnet50,
        lambda: narrow(ResNet(Bottleneck, [1, 2, 1, 1]), 16),
    ),
    "resnext101": (
        lambda: resnext([3, 4, 23, 3]),
        lambda: narrow(resnext([1, 1, 2, 1]), 8),
    ),
    "resnext101_cadene": (
        lambda: cadene([3, 4, 23, 3]),
        lambda: narrow(cadene([1, 1, 2, 1]), 8),
    ),
    "vit_b16": (
        vit,
        lambda: vit(
            img_size=(16, 24),
            patch_size=8,
            embed_dim=24,
            depth=2,
            num_heads=4,
            num_classes=5,
        ),
    ),
}


def fill(model):
    """Gives `model` random tensors, and returns their shapes by name."""
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    tensors = {k: torch.from_numpy(v) for k, v in random_tensors(shapes).items()}
    model.load_state_dict(tensors)
    return shapes


def measure_norms(model, images):
    """Sets the statistics of batch norms to those of `images`, as training would."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.from_numpy(images.transpose(0, 3, 1, 2)))


def their_logits(model, images):
    with torch.no_grad():
        return model.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()


def full_logits(case, dtype):
    """Ours and theirs, of a full-size model whose weights and images have `dtype`."""
    name, _, _ = SMALL[case]
    model = MODELS[case][0]()
    fill(model)
    size = 32 if name == "resnet20_projection" else 224
    images = random_images(size, size, count=4)
    measure_norms(model, images)
    images = images[:2].astype(dtype)
    theirs = their_logits(model.to(torch.from_numpy(images).dtype), images)
    state_dict = {k: v.numpy() for k, v in model.state_dict().items()}
    with jax.enable_x64(dtype == np.float64):
        ours = our_logits(name, make_model(name, theirs.shape[-1]), state_dict, images)
    return ours, theirs


def make_vector(case):
    """What `torch_cases.read_vectors` has of a case."""
    _, _, (height, width) = SMALL[case]
    model = MODELS[case][1]()
    shapes = fill(model)
    logits = their_logits(model, random_images(height, width))
    return {"shapes": shapes, "logits": logits.tolist()}


def report(case, size, ours, theirs):
    """Prints how far the logits are apart, and tells whether that is little enough."""
    relative = relative_difference(ours, theirs)
    absolute = np.abs(ours - theirs).max()
    largest = np.abs(theirs).max()
    print(
        f"{case:20} {size:6} {ours.dtype} {absolute:.2e} {relative:.2e} {largest:.2f}"
    )
    return relative <= TOLERANCE


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="store the small logits")
    write = parser.parse_args().write
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}")
    print("case                 size   dtype   absolute relative largest logit")
    vectors = read_vectors() if VECTORS.exists() else {}
    agree = True
    for case in MODELS:
        try:
            vector = make_vector(case)
        except ModuleNotFoundError as error:
            print(f"{case:20} skipped: {error}")
            continue
        vectors = {**vectors, case: vector} if write else vectors
        ours = our_small_logits(case, vector["shapes"])
        stored = np.array(vectors[case]["logits"])
        agree &= vectors[case]["shapes"] == vector["shapes"]
        agree &= report(case, "full", *full_logits(case, np.float32))
        agree &= report(case, "full", *full_logits(case, np.float64))
        agree &= report(case, "small", ours, np.array(vector["logits"]))
        agree &= report(case, "stored", ours, stored)
    if write:
        lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in vectors.items()]
        VECTORS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())

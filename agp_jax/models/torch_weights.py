"""Published PyTorch weights as variables of our models.

They come from torchvision (AlexNet, ResNets), torchvision or Cadene's pretrainedmodels
(ResNeXt-101), Intel Distiller (MobileNet, ResNet-20) and timm (ViT).

>>> import jax
>>> from agp_jax.models import make_model
>>> model = make_model("resnet18", num_classes=1000)
>>> init = lambda key: model.init(key, jnp.zeros((1, 224, 224, 3)), train=False)
>>> variables = jax.eval_shape(init, jax.random.key(0))
>>> published_names("resnet18", variables)["params/stage1/block0/norm1/scale"]
'layer1.0.bn1.weight'
"""

import importlib
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import numpy as safetensors_numpy

from agp_jax.trees import PyTree, flatten_with_paths

# Of each model: patterns of our modules, and what torch calls what they match.
_Patterns = list[tuple[str, str]]

_RESNET: _Patterns = [
    ("conv", "conv1"),
    ("norm", "bn1"),
    (r"stage(\d+)/block(\d+)/conv(\d)", r"layer\1.\2.conv\3"),
    (r"stage(\d+)/block(\d+)/norm(\d)", r"layer\1.\2.bn\3"),
    (r"stage(\d+)/block(\d+)/shortcut_conv", r"layer\1.\2.downsample.0"),
    (r"stage(\d+)/block(\d+)/shortcut_norm", r"layer\1.\2.downsample.1"),
    ("head", "fc"),
]
_CADENE: _Patterns = [
    ("conv", "features.0"),
    ("norm", "features.1"),
    *[
        (rf"stage{stage}/block(\d+)/{ours}", rf"features.{stage + 3}.\1.0.{theirs}")
        for stage in range(1, 5)
        for ours, theirs in [
            ("conv1", "0.0.0"),
            ("norm1", "0.0.1"),
            ("conv2", "0.0.3"),
            ("norm2", "0.0.4"),
            ("conv3", "0.1"),
            ("norm3", "0.2"),
            ("shortcut_conv", "1.0"),
            ("shortcut_norm", "1.1"),
        ]
    ],
    ("head", "last_linear"),
]
_MOBILENET: _Patterns = [
    ("conv", "model.0.0"),
    ("norm", "model.0.1"),
    *[
        (f"block{block}/{ours}", f"model.{block + 1}.{theirs}")
        for block in range(13)
        for ours, theirs in [
            ("depthwise", 0),
            ("norm1", 1),
            ("pointwise", 3),
            ("norm2", 4),
        ]
    ],
    ("head", "fc"),
]
_ALEXNET: _Patterns = [
    ("conv1", "features.0"),
    ("conv2", "features.3"),
    ("conv3", "features.6"),
    ("conv4", "features.8"),
    ("conv5", "features.10"),
    ("dense1", "classifier.1"),
    ("dense2", "classifier.4"),
    ("head", "classifier.6"),
]
_VIT: _Patterns = [
    ("class_token", "cls_token"),
    ("positions", "pos_embed"),
    ("patches", "patch_embed.proj"),
    (r"layer(\d+)/norm(\d)", r"blocks.\1.norm\2"),
    (r"layer(\d+)/attention/(query|key|value)", r"blocks.\1.attn.qkv"),
    (r"layer(\d+)/attention/out", r"blocks.\1.attn.proj"),
    (r"layer(\d+)/mlp(\d)", r"blocks.\1.mlp.fc\2"),
    ("norm", "norm"),
    ("head", "head"),
]
_PATTERNS = {
    "alexnet": _ALEXNET,
    "mobilenet": _MOBILENET,
    "resnet18": _RESNET,
    "resnet20_projection": _RESNET,
    "resnet50": _RESNET,
    "resnext101": _RESNET,
    "vit_b16": _VIT,
}
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
_FUSED = ("query", "key", "value")  # in this order they are one tensor in timm
_POOLED = 6  # height and width of what torchvision's AlexNet flattens
_MOST_NAMES = 20  # that an error lists of a kind


class WeightsError(ValueError):
    """Weights cannot be read or do not fit the model; says which, and what to do."""


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The tensors of a file by their names.

    Reads `.safetensors` and `.npz`, and where torch is installed also `.pth` and
    `.pth.tar`, whether they hold a state dict or a training checkpoint with one under
    "state_dict". Nothing is unpickled but by `torch.load(..., weights_only=True)`.

    Raises:
      WeightsError: if there is no such file, it is of another kind or damaged, it holds
        something else than arrays, or reading it takes torch and that is missing.
    """
    path = Path(path)
    suffix = next((x for x in _READERS if path.name.endswith(x)), None)
    if suffix is None:
        raise WeightsError(f"weights are read from {', '.join(_READERS)}, got {path}")
    if not path.is_file():
        raise WeightsError(f"{path} is no file; download or convert the weights first")
    try:
        return _READERS[suffix](path)
    except WeightsError:
        raise
    except Exception as error:  # damaged files make parsers fail in all kinds of ways
        reason = str(error).partition("\n")[0]
        raise WeightsError(
            f"{path} is not a readable {suffix} file of plain arrays, so it may be "
            "damaged or hold pickled objects; get it again, or save the state dict "
            f"alone as .safetensors ({type(error).__name__}: {reason})"
        ) from error


def from_state_dict(
    name: str, state_dict: Mapping[str, Any], variables: PyTree
) -> PyTree:
    """`variables` with the weights of a torch model, as NumPy arrays.

    Paths, shapes and dtypes are those of `variables`; what these hold is not read.
    Names may start with `module.`, which DataParallel adds, also after `features.`;
    `num_batches_tracked` is passed over. ResNeXt's may be torchvision's or Cadene's.

    Args:
      name: of a model in `agp_jax.models.MODELS`.
      state_dict: the torch model's tensors by name, as `read_state_dict` gives them.
      variables: `{"params": ..., "batch_stats": ...}` of arrays or
        `jax.ShapeDtypeStruct`.

    Raises:
      WeightsError: if tensors are missing, left over or misshapen (it names them), or
        the model has no published weights.
    """
    tensors = _strip_names(state_dict)
    is_cadene = name == "resnext101" and any(x.startswith("features.") for x in tensors)
    names = cadene_names(variables) if is_cadene else published_names(name, variables)
    paths, leaves, treedef = flatten_with_paths(variables)
    _check_tensors(name, tensors, names, dict(zip(paths, leaves, strict=True)))
    return treedef.unflatten(
        _convert(tensors[names[path]], path, leaf)
        for path, leaf in zip(paths, leaves, strict=True)
    )


def published_names(name: str, variables: PyTree) -> dict[str, str]:
    """What the published weights and pruning tables of a model call its variables.

    By our paths, such as "params/stage1/block0/conv1/kernel". ResNeXt's names are
    torchvision's; `cadene_names` has the others. Query, key and value of a ViT's layer
    are one tensor in timm and share its name.

    Raises:
      WeightsError: if the model has no published weights, or a path is not one of its.
    """
    if name not in _PATTERNS:
        raise WeightsError(
            f"{name!r} has no published weights; {', '.join(_PATTERNS)} have "
            "(Distiller's ResNet-20 is resnet20_projection)"
        )
    return _torch_names(_PATTERNS[name], variables)


def cadene_names(variables: PyTree) -> dict[str, str]:
    """What Cadene's ResNeXt-101 calls our variables, by their paths."""
    return _torch_names(_CADENE, variables)


def _torch_names(patterns: _Patterns, variables: PyTree) -> dict[str, str]:
    paths, _, _ = flatten_with_paths(variables)
    return {path: _torch_name(patterns, path) for path in paths}


def _torch_name(patterns: _Patterns, path: str) -> str:
    _, _, inner = path.partition("/")  # without "params" or "batch_stats"
    module, _, leaf = inner.rpartition("/")
    ours, suffix = (module, f".{_LEAVES[leaf]}") if leaf in _LEAVES else (inner, "")
    for pattern, theirs in patterns:
        if match := re.fullmatch(pattern, ours):
            return match.expand(theirs) + suffix
    raise WeightsError(
        f"the model has no variable {path!r}; give all that its init makes, "
        '{"params": ..., "batch_stats": ...}'
    )


def _strip_names(state_dict: Mapping[str, Any]) -> dict[str, np.ndarray]:
    tensors = {}
    for name, tensor in state_dict.items():
        stripped = re.sub(r"(^|\.)module\.", r"\1", name)
        if stripped in tensors:
            raise WeightsError(
                f"the state dict has {stripped!r} twice, with and without 'module.'; "
                "keep one of them"
            )
        if not stripped.endswith("num_batches_tracked"):
            tensors[stripped] = np.asarray(tensor)
    return tensors


def _check_tensors(
    model: str,
    tensors: Mapping[str, np.ndarray],
    names: Mapping[str, str],
    variables: Mapping[str, Any],
) -> None:
    """Raises if the tensors are not, one for one, those that the variables need."""
    missing = [f"{n} (our {p})" for p, n in names.items() if n not in tensors]
    extra = sorted(tensors.keys() - set(names.values()))
    misshapen = []
    for path, name in names.items():
        if name in tensors:
            tensor, needed = tensors[name], _torch_shape(path, variables[path].shape)
            if not jnp.issubdtype(tensor.dtype, jnp.floating):
                misshapen.append(f"{name} has {tensor.dtype}, our {path} takes floats")
            elif tensor.shape != needed:
                misshapen.append(
                    f"{name} has {tensor.shape}, our {path} takes {needed}"
                )
    kinds = {"missing": missing, "left over": extra, "misshapen": misshapen}
    found = [f"{kind}: {_listed(items)}" for kind, items in kinds.items() if items]
    if found:
        raise WeightsError(
            f"the state dict does not fit {model}: {'; '.join(found)}. It should be "
            "of this model, made for the variables' width, classes and image size"
        )


def _listed(items: list[str]) -> str:
    more = len(items) - _MOST_NAMES
    return ", ".join(items[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _torch_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the tensor that holds our variable in torch."""
    *_, layer, leaf = path.split("/")
    parts = len(_FUSED) if layer in _FUSED else 1
    if leaf == "bias":
        return (parts * math.prod(shape),)
    if leaf != "kernel":
        return shape
    if len(shape) == 4:
        height, width, inputs, outputs = shape
        return outputs, inputs, height, width
    split = len(shape) - 1 if layer == "out" else 1  # attention sums over two axes
    return parts * math.prod(shape[split:]), math.prod(shape[:split])


def _convert(tensor: np.ndarray, path: str, ours: Any) -> np.ndarray:
    """A tensor of torch as our variable at `path`."""
    *_, layer, leaf = path.split("/")
    if layer in _FUSED:
        tensor = np.split(tensor, len(_FUSED))[_FUSED.index(layer)]
    if leaf == "kernel":
        if layer == "dense1":  # its inputs are an image, flattened channels first
            tensor = tensor.reshape(len(tensor), -1, _POOLED, _POOLED)
            tensor = tensor.transpose(0, 2, 3, 1).reshape(len(tensor), -1)
        tensor = tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T
    return tensor.reshape(ours.shape).astype(ours.dtype)


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    return safetensors_numpy.load_file(path)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
        return {name: _named_dtype(archive[name]) for name in archive.files}


def _named_dtype(array: np.ndarray) -> np.ndarray:
    """NumPy's format has no name for bfloat16 and stores two bytes of nothing known."""
    return array.view(jnp.bfloat16) if array.dtype == "V2" else array


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        raise WeightsError(
            f"reading {path} takes torch, which is not installed; install it, or where "
            "it is, save the state dict as .safetensors (docs/models.md says how)"
        ) from error
    # Before 2.6 crafted files could run code despite weights_only (CVE-2025-32434).
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
        raise WeightsError(
            f"reading {path} safely takes torch 2.6 or newer, got {torch.__version__}; "
            "update it, or save the state dict as .safetensors"
        )
    contents = torch.load(path, map_location="cpu", weights_only=True)
    state_dict = contents.get("state_dict", contents)
    for name, tensor in state_dict.items():
        if not isinstance(tensor, torch.Tensor):
            raise WeightsError(
                f"{path} should hold tensors, got {type(tensor).__name__} for "
                f"{name!r}; save model.state_dict()"
            )
    return {
        name: (x.float() if x.is_floating_point() else x).detach().numpy()
        for name, x in state_dict.items()
    }


_READERS = {
    ".safetensors": _read_safetensors,
    ".npz": _read_npz,
    ".pth": _read_torch,
    ".pth.tar": _read_torch,
}

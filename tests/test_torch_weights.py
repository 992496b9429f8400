"""Published weights of PyTorch give torch's logits; what does not fit is named."""

import importlib.util
import io
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from torch_cases import (
    SMALL,
    our_small_logits,
    random_images,
    random_tensors,
    read_vectors,
    relative_difference,
    shapes_of,
)

from agp_jax.models import MODELS, make_model
from agp_jax.models.resnet import BasicBlock, ResNet
from agp_jax.models.torch_weights import (
    WeightsError,
    cadene_names,
    from_state_dict,
    published_names,
    read_state_dict,
)
from agp_jax.trees import flatten_with_paths

PUBLISHED = sorted(set(MODELS) - {"mlp", "resnet20"})


def full_shapes(name):
    small = name.startswith("resnet20")
    size = 32 if small else 224
    return shapes_of(make_model(name, 10 if small else 1000), random_images(size, size))


def tiny():
    """A name, a state dict of torch's, and the shapes of our variables."""
    name, model, size = SMALL["resnet18"]
    tensors = random_tensors(read_vectors()["resnet18"]["shapes"])
    return name, tensors, shapes_of(model, random_images(*size))


def same(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


# Numbers


@pytest.mark.parametrize("case", SMALL)
def test_logits_are_those_that_torch_computed(case):
    vector = read_vectors()[case]
    ours, theirs = our_small_logits(case, vector["shapes"]), np.array(vector["logits"])
    assert relative_difference(ours, theirs) < 1e-5
    assert relative_difference(ours[::-1], theirs) > 1e-3  # images make a difference


def test_logits_at_full_size_are_those_of_torch():
    needed = ("torch", "torchvision")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(
            f"needs {' and '.join(missing)}; python tests/torch_agreement.py compares "
            "all models with torch where these are installed"
        )
    script = Path(__file__).parent / "torch_agreement.py"
    command = [sys.executable, "-W", "ignore", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr


# Names


def test_names_are_those_of_the_published_tables():
    samples = {
        "alexnet": {
            "params/conv1/kernel": "features.0.weight",
            "params/conv2/kernel": "features.3.weight",
            "params/conv3/bias": "features.6.bias",
            "params/conv4/kernel": "features.8.weight",
            "params/conv5/kernel": "features.10.weight",
            "params/dense1/kernel": "classifier.1.weight",
            "params/dense2/kernel": "classifier.4.weight",
            "params/head/bias": "classifier.6.bias",
        },
        "mobilenet": {
            "params/conv/kernel": "model.0.0.weight",
            "batch_stats/norm/mean": "model.0.1.running_mean",
            "params/block0/depthwise/kernel": "model.1.0.weight",
            "params/block3/pointwise/kernel": "model.4.3.weight",
            "params/block12/pointwise/kernel": "model.13.3.weight",
            "params/block12/norm2/scale": "model.13.4.weight",
            "params/head/kernel": "fc.weight",
        },
        "resnet18": {
            "params/conv/kernel": "conv1.weight",
            "params/norm/bias": "bn1.bias",
            "params/stage4/block1/conv2/kernel": "layer4.1.conv2.weight",
            "params/stage4/block0/shortcut_conv/kernel": "layer4.0.downsample.0.weight",
            "batch_stats/stage1/block0/norm2/var": "layer1.0.bn2.running_var",
        },
        "resnet20_projection": {
            "params/stage2/block0/shortcut_conv/kernel": "layer2.0.downsample.0.weight",
            "params/stage3/block2/conv2/kernel": "layer3.2.conv2.weight",
            "params/head/kernel": "fc.weight",
        },
        "resnet50": {
            "params/stage3/block5/conv3/kernel": "layer3.5.conv3.weight",
            "params/stage1/block0/shortcut_norm/scale": "layer1.0.downsample.1.weight",
        },
        "resnext101": {
            "params/stage1/block0/conv1/kernel": "layer1.0.conv1.weight",
            "params/stage3/block22/conv2/kernel": "layer3.22.conv2.weight",
        },
        "vit_b16": {
            "params/class_token": "cls_token",
            "params/positions": "pos_embed",
            "params/patches/kernel": "patch_embed.proj.weight",
            "params/layer0/attention/query/kernel": "blocks.0.attn.qkv.weight",
            "params/layer11/attention/out/bias": "blocks.11.attn.proj.bias",
            "params/layer7/mlp2/kernel": "blocks.7.mlp.fc2.weight",
            "params/layer7/norm1/scale": "blocks.7.norm1.weight",
            "params/norm/bias": "norm.bias",
            "params/head/kernel": "head.weight",
        },
    }
    assert sorted(samples) == PUBLISHED
    for name, expected in samples.items():
        names = published_names(name, full_shapes(name))
        assert {path: names[path] for path in expected} == expected


def test_cadene_names_the_layers_of_a_branch_by_their_place():
    names = cadene_names(full_shapes("resnext101"))
    expected = {
        "params/conv/kernel": "features.0.weight",
        "batch_stats/norm/var": "features.1.running_var",
        "params/stage1/block0/conv1/kernel": "features.4.0.0.0.0.0.weight",
        "params/stage1/block0/conv2/kernel": "features.4.0.0.0.0.3.weight",
        "params/stage1/block0/conv3/kernel": "features.4.0.0.0.1.weight",
        "params/stage1/block0/norm3/bias": "features.4.0.0.0.2.bias",
        "params/stage4/block0/shortcut_conv/kernel": "features.7.0.0.1.0.weight",
        "params/stage3/block22/norm2/scale": "features.6.22.0.0.0.4.weight",
        "params/head/kernel": "last_linear.weight",
    }
    assert {path: names[path] for path in expected} == expected
    assert len(set(names.values())) == len(names)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_variable_has_a_name_of_its_own(name):
    variables = full_shapes(name)
    names = published_names(name, variables)
    paths, _, _ = flatten_with_paths(variables)
    assert list(names) == paths
    shared = 0
    if name == "vit_b16":  # query, key and value are one tensor
        fused = [x for x in names if re.search("query|key/|value", x)]
        assert len(fused) == 12 * 3 * 2
        shared = 12 * 2 * 2
    assert len(set(names.values())) == len(names) - shared


def test_names_are_those_of_torchs_own_models():
    for case, vector in read_vectors().items():
        name, model, size = SMALL[case]
        variables = shapes_of(model, random_images(*size))
        is_cadene = case == "resnext101_cadene"
        names = cadene_names(variables) if is_cadene else None
        names = names or published_names(name, variables)
        assert set(names.values()) == {
            x for x in vector["shapes"] if not x.endswith("num_batches_tracked")
        }


# Layouts, on numbers that say where they belong


def test_a_convolution_goes_from_oihw_to_hwio():
    name, tensors, variables = tiny()
    ours = from_state_dict(name, tensors, variables)["params"]["conv"]["kernel"]
    theirs = tensors["conv1.weight"]
    assert ours.shape == (7, 7, 3, 4)
    assert ours[1, 2, 0, 3] == theirs[3, 0, 1, 2]


def test_alexnets_first_dense_layer_reads_channels_last():
    _, model, size = SMALL["alexnet"]
    tensors = random_tensors(read_vectors()["alexnet"]["shapes"])
    variables = from_state_dict(
        "alexnet", tensors, shapes_of(model, random_images(*size))
    )
    image = np.random.RandomState(1).standard_normal((6, 6, 8)).astype(np.float32)
    np.testing.assert_allclose(
        image.ravel() @ variables["params"]["dense1"]["kernel"],
        tensors["classifier.1.weight"] @ image.transpose(2, 0, 1).ravel(),
        rtol=1e-4,
        atol=1e-5,
    )


def test_a_vits_query_key_and_value_are_thirds_of_one_tensor():
    _, model, size = SMALL["vit_b16"]
    tensors = random_tensors(read_vectors()["vit_b16"]["shapes"])
    variables = from_state_dict(
        "vit_b16", tensors, shapes_of(model, random_images(*size))
    )
    attention = variables["params"]["layer1"]["attention"]
    fused = tensors["blocks.1.attn.qkv.weight"]  # (3 * heads * head_dim, width)
    assert attention["key"]["kernel"].shape == (24, 4, 6)
    assert attention["query"]["kernel"][5, 2, 3] == fused[2 * 6 + 3, 5]
    assert attention["value"]["kernel"][5, 2, 3] == fused[48 + 2 * 6 + 3, 5]
    assert attention["key"]["bias"][1, 4] == tensors["blocks.1.attn.qkv.bias"][24 + 10]
    out = tensors["blocks.1.attn.proj.weight"]  # (width, heads * head_dim)
    assert attention["out"]["kernel"][2, 3, 5] == out[5, 2 * 6 + 3]


def test_variables_keep_their_paths_and_dtypes():
    name, tensors, variables = tiny()
    half = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), variables
    )
    for wanted in (variables, half):
        found = from_state_dict(name, tensors, wanted)
        assert jax.tree.structure(found) == jax.tree.structure(wanted)
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            assert isinstance(x, np.ndarray)
            assert (x.shape, x.dtype) == (y.shape, y.dtype)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"module.{name}",
        lambda name: name.replace("features.", "features.module."),
    ],
)
def test_prefixes_of_data_parallel_do_not_matter(rename):
    for case in ("alexnet", "resnet18"):
        name, model, size = SMALL[case]
        variables = shapes_of(model, random_images(*size))
        tensors = random_tensors(read_vectors()[case]["shapes"])
        renamed = {rename(k): v for k, v in tensors.items()}
        expected = from_state_dict(name, tensors, variables)
        assert same(from_state_dict(name, renamed, variables), expected)


def test_counters_of_batches_do_not_matter():
    name, tensors, variables = tiny()
    bare = {k: v for k, v in tensors.items() if "num_batches_tracked" not in k}
    assert len(bare) < len(tensors)
    expected = from_state_dict(name, tensors, variables)
    assert same(from_state_dict(name, bare, variables), expected)


# What is refused


def test_missing_tensors_are_named_by_torch_and_by_us():
    name, tensors, variables = tiny()
    del tensors["layer2.1.conv2.weight"], tensors["bn1.running_var"]
    with pytest.raises(WeightsError) as error:
        from_state_dict(name, tensors, variables)
    message = str(error.value)
    assert "does not fit resnet18: missing: bn1.running_var" in message
    assert "layer2.1.conv2.weight (our params/stage2/block1/conv2/kernel)" in message
    assert "left over" not in message and "misshapen" not in message


def test_tensors_that_are_left_over_are_named():
    name, tensors, variables = tiny()
    tensors["layer9.weight"] = np.zeros(3, np.float32)
    with pytest.raises(WeightsError, match=r"resnet18: left over: layer9\.weight\. "):
        from_state_dict(name, tensors, variables)


def test_misshapen_tensors_are_named_with_both_shapes():
    name, tensors, variables = tiny()
    tensors["fc.weight"] = np.zeros((1000, 32), np.float32)
    tensors["bn1.weight"] = np.zeros((4, 1), np.float32)
    with pytest.raises(WeightsError) as error:
        from_state_dict(name, tensors, variables)
    message = str(error.value)
    assert "fc.weight has (1000, 32), our params/head/kernel takes (5, 32)" in message
    assert "bn1.weight has (4, 1), our params/norm/scale takes (4,)" in message


def test_a_kernel_of_the_right_size_and_the_wrong_shape_is_refused():
    name, tensors, variables = tiny()
    tensors["fc.weight"] = tensors["fc.weight"].T
    with pytest.raises(WeightsError, match=r"fc.weight has \(32, 5\)"):
        from_state_dict(name, tensors, variables)


def test_integers_are_refused():
    name, tensors, variables = tiny()
    tensors["fc.bias"] = np.zeros(5, np.int8)
    with pytest.raises(WeightsError, match="fc.bias has int8, .* takes floats"):
        from_state_dict(name, tensors, variables)


def test_another_models_tensors_give_a_message_that_ends():
    name, _, variables = tiny()
    other = random_tensors(read_vectors()["mobilenet"]["shapes"])
    with pytest.raises(
        WeightsError, match=r"missing: .* and \d+ more; left over: "
    ) as e:
        from_state_dict(name, other, variables)
    assert len(str(e.value)) < 4000


def test_a_name_twice_is_refused():
    name, tensors, variables = tiny()
    tensors["module.fc.bias"] = tensors["fc.bias"]
    with pytest.raises(WeightsError, match="'fc.bias' twice"):
        from_state_dict(name, tensors, variables)


@pytest.mark.parametrize("name", ["mlp", "resnet20", "vgg"])
def test_models_without_published_weights_are_refused(name):
    message = f"'{name}' has no published weights; .*resnet20_projection"
    with pytest.raises(WeightsError, match=message):
        published_names(name, {})
    with pytest.raises(WeightsError, match=message):
        from_state_dict(name, {}, {})


def test_variables_of_another_model_or_params_alone_are_refused():
    _, _, variables = tiny()
    with pytest.raises(WeightsError, match="no variable 'conv/kernel'"):
        published_names("resnet18", variables["params"])
    with pytest.raises(WeightsError, match="no variable .*stage1"):
        published_names("mobilenet", variables)


# Files


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, jnp.bfloat16])
@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_files_give_back_what_was_saved(suffix, dtype, tmp_path):
    tensors = {
        "conv1.weight": np.arange(24).reshape(2, 3, 2, 2).astype(dtype),
        "bn1.num_batches_tracked": np.array(7),
    }
    path = tmp_path / f"weights{suffix}"
    if suffix == ".npz":
        np.savez(path, **tensors)
    else:
        save_file(tensors, path)
    found = read_state_dict(str(path))
    assert same(found, tensors)


def test_a_whole_model_comes_from_a_file(tmp_path):
    name, tensors, variables = tiny()
    save_file(tensors, tmp_path / "resnet18.safetensors")
    found = from_state_dict(
        name, read_state_dict(tmp_path / "resnet18.safetensors"), variables
    )
    assert same(found, from_state_dict(name, tensors, variables))


@pytest.mark.parametrize("name", ["weights.h5", "weights.tar", "weights", "a.pth.zip"])
def test_other_kinds_of_files_are_refused(name, tmp_path):
    (tmp_path / name).touch()
    kinds = r"read from \.safetensors, \.npz, \.pth, \.pth\.tar, got .*"
    with pytest.raises(WeightsError, match=kinds + re.escape(name)):
        read_state_dict(tmp_path / name)


@pytest.mark.parametrize("name", ["a.safetensors", "a.npz", "a.pth", "a.pth.tar"])
def test_a_missing_file_is_refused(name, tmp_path):
    with pytest.raises(WeightsError, match=f"{name} is no file"):
        read_state_dict(tmp_path / name)
    (tmp_path / name).mkdir()
    with pytest.raises(WeightsError, match=f"{name} is no file"):
        read_state_dict(tmp_path / name)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@pytest.mark.parametrize("damage", ["empty", "cut", "noise"])
def test_damaged_files_are_refused(suffix, damage, tmp_path):
    path = tmp_path / f"weights{suffix}"
    if suffix == ".npz":
        np.savez(path, x=np.arange(100.0))
    else:
        save_file({"x": np.arange(100.0)}, path)
    whole = path.read_bytes()
    contents = {"empty": b"", "cut": whole[:200], "noise": b"no weights at all" * 9}
    path.write_bytes(contents[damage])
    with pytest.raises(WeightsError, match="not a readable .*get it again"):
        read_state_dict(path)


def test_an_archive_of_something_else_is_refused(tmp_path):
    path = tmp_path / "weights.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.txt", "not an array")
    with pytest.raises(WeightsError, match="not a readable .npz file of plain arrays"):
        read_state_dict(path)


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_nothing_is_ever_unpickled(tmp_path):
    sprung = tmp_path / "sprung"
    pickled = pickle.dumps({"x": Trap(sprung)})
    objects = tmp_path / "objects.npz"
    np.savez(objects, x=np.array([Trap(sprung)], dtype=object))
    forged = tmp_path / "forged.npz"
    with zipfile.ZipFile(forged, "w") as archive:
        archive.writestr("x.npy", pickled)
    plain = tmp_path / "plain.npz"
    plain.write_bytes(pickled)
    foreign = tmp_path / "foreign.safetensors"
    foreign.write_bytes(pickled)
    for path in (objects, forged, plain, foreign):
        with pytest.raises(WeightsError, match="hold pickled objects"):
            read_state_dict(path)
    assert not sprung.exists()
    pickle.load(io.BytesIO(pickled))["x"].close()
    assert sprung.exists()  # the trap would have been sprung


@pytest.mark.parametrize("name", ["a.pth", "a.pth.tar"])
def test_pth_files_are_refused_without_torch(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # an import fails
    sprung = tmp_path / "sprung"
    (tmp_path / name).write_bytes(pickle.dumps({"x": Trap(sprung)}))
    with pytest.raises(WeightsError, match="takes torch, .*as .safetensors"):
        read_state_dict(tmp_path / name)
    assert not sprung.exists()


def test_pth_files_hold_a_state_dict_or_a_checkpoint_with_one(tmp_path):
    torch = pytest.importorskip("torch", reason="reading .pth takes torch")
    name, tensors, variables = tiny()
    state_dict = {k: torch.from_numpy(v) for k, v in tensors.items()}
    torch.save(state_dict, tmp_path / "a.pth")
    parallel = {f"module.{k}": v for k, v in state_dict.items()}
    checkpoint = {"epoch": 179, "arch": "resnet18", "state_dict": parallel}
    torch.save(checkpoint, tmp_path / "a.pth.tar")
    expected = from_state_dict(name, tensors, variables)
    for file in ("a.pth", "a.pth.tar"):
        found = from_state_dict(name, read_state_dict(tmp_path / file), variables)
        assert same(found, expected)
    torch.save({"x": torch.ones(3, dtype=torch.bfloat16)}, tmp_path / "b.pth")
    assert read_state_dict(tmp_path / "b.pth")["x"].tolist() == [1, 1, 1]


def test_pth_files_of_anything_but_tensors_are_refused(tmp_path):
    torch = pytest.importorskip("torch", reason="reading .pth takes torch")
    torch.save({"epoch": 3}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="hold tensors, got int for 'epoch'"):
        read_state_dict(tmp_path / "a.pth")
    sprung = tmp_path / "sprung"
    torch.save({"x": Trap(sprung)}, tmp_path / "b.pth")
    (tmp_path / "c.pth").write_bytes(pickle.dumps({"x": Trap(sprung)}))
    (tmp_path / "d.pth").write_bytes(b"")
    torch.save([1, 2], tmp_path / "e.pth")
    for name in ("b.pth", "c.pth", "d.pth", "e.pth"):
        with pytest.raises(WeightsError, match="not a readable .pth file"):
            read_state_dict(tmp_path / name)
    assert not sprung.exists()


def test_a_stage_may_have_any_number_of_blocks():
    variables = shapes_of(
        ResNet(5, (11, 1), BasicBlock, width=2), random_images(16, 16)
    )
    names = published_names("resnet18", variables)
    assert names["params/stage1/block10/conv1/kernel"] == "layer1.10.conv1.weight"

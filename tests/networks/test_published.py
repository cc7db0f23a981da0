"""Weights as they are published: whatever they are wrapped in, and what is said of those that do not fit."""

import argparse
import os
import pathlib

import pytest
import torch
from safetensors.torch import save_file

from gowide_dist import build_network
from gowide_dist.errors import RunError
from gowide_dist.networks.weights import check_weights, load_weights

SMALL = {"block": "basic", "depths": [1, 2], "base": 4, "stem": "imagenet"}


def network(num_classes=5, seed=0, **changes):
    torch.manual_seed(seed)
    return build_network({**SMALL, **changes}, num_classes)


PUBLIC = network(seed=1).state_dict()
UNCOUNTED = {name: value for name, value in PUBLIC.items() if "num_batches" not in name}
HEADLESS = {name: value for name, value in PUBLIC.items() if not name.startswith("fc.")}


def named(prefix, weights=PUBLIC):
    return {f"{prefix}{name}": value for name, value in weights.items()}


def within(wrapper):
    return {name.replace("layer2.", f"layer2.{wrapper}."): value for name, value in PUBLIC.items()}


class Arguments:  # as a training script keeps them beside the weights
    def __init__(self):
        self.lr = 0.1


WRAPPED = {
    "as torchvision": PUBLIC,
    "without counters": UNCOUNTED,
    "DistributedDataParallel": named("module."),
    "torch.compile": named("_orig_mod."),
    "both": named("_orig_mod.module."),
    "both, the other way round": named("module._orig_mod."),
    "compiled in parts": within("_orig_mod"),
    "FullyShardedDataParallel": named("_fsdp_wrapped_module.", within("_fsdp_wrapped_module")),
    "activation checkpointing": within("_checkpoint_wrapped_module"),
    "DeiT": {"model": PUBLIC, "optimizer": {"state": {0: {"momentum_buffer": torch.ones(4)}}}, "args": argparse.Namespace(lr=0.1)},
    "torchvision's reference": {"model": named("module."), "lr_scheduler": {"last_epoch": 3}, "epoch": 3},
    "its moving average": {"model": named("module.", network(seed=2).state_dict()), "model_ema": {"n_averaged": torch.tensor(7), **named("module.")}},
    "timm": {"arch": "resnet18", "state_dict": network(seed=2).state_dict(), "state_dict_ema": UNCOUNTED, "args": Arguments()},
    "params": {"params": UNCOUNTED},
    "Lightning": {"state_dict": named("net."), "hyper_parameters": {"path": pathlib.PurePosixPath("/data")}},
    "an encoder beside a projector": {"state_dict": {**named("module.encoder."), "module.projector.weight": torch.ones(2, 2)}},
    "a name nobody has thought of": {"weights of mine": {"deeper": named("module.")}},
    "sparse": {name: value.to_sparse() if name == "fc.weight" else value for name, value in PUBLIC.items()},
    "in half precision": {name: value.half() if value.is_floating_point() else value for name, value in PUBLIC.items()},
}  # fmt: skip


@pytest.mark.parametrize("name", WRAPPED)
def test_weights_load_whatever_they_are_wrapped_in(tmp_path, name):
    torch.save(WRAPPED[name], tmp_path / "weights.pth")
    loaded = network()
    load_weights(tmp_path / "weights.pth", loaded)
    for key, value in loaded.state_dict().items():
        assert value.dtype == PUBLIC[key].dtype
        assert torch.equal(value, PUBLIC[key].half().to(value) if "half" in name else PUBLIC[key])


def test_every_format_under_every_name(tmp_path):
    save_file(named("module.model."), tmp_path / "weights.safetensors")
    save_file(PUBLIC, tmp_path / "other.pth")
    torch.save(PUBLIC, tmp_path / "other.safetensors")
    torch.save({"state_dict": named("module.")}, tmp_path / "weights.pth.tar", _use_new_zipfile_serialization=False)
    for name in ("weights.safetensors", "weights.pth.tar", "other.pth", "other.safetensors"):
        loaded = network()
        load_weights(tmp_path / name, loaded)
        assert torch.equal(loaded.conv1.weight, PUBLIC["conv1.weight"])


OTHERS = {
    "other classes": (network(7).state_dict(), "of 7 classes, here are 5; init: {file: ..., classifier: fresh} draws"),
    "no classifier": (HEADLESS, r"without this network's classifier \(fc.weight, fc.bias\); init: {file: ..., classifier: fresh}"),
    "another classifier": ({**HEADLESS, "fc.0.weight": torch.ones(5, 9)}, r"without this network's classifier \(fc.weight, fc.bias\)"),
    "another width": (network(width=2).state_dict(), r"of another width: layer1.0.conv1.weight is \(8, 4, 3, 3\) there, \(4, 4, 3, 3\) here"),
    "other channels": (network(base=8).state_dict(), r"of another width: conv1.weight is \(8, 3, 7, 7\) there, \(4, 3, 7, 7\) here"),
    "another depth": (network(depths=[1, 4]).state_dict(), "of another depth: layer2 has 4 units there, 2 here"),
    "more blocks": (network(depths=[1, 2, 1]).state_dict(), "of another depth: layer3 has 1 units there, 0 here"),
    "other units": (network(block="bottleneck").state_dict(), "bottleneck units there, basic units here"),
    "another stem": (network(stem="small").state_dict(), r"of another stem: conv1.weight is \(4, 3, 3, 3\) there"),
    "grey images": ({**PUBLIC, "conv1.weight": torch.ones(4, 1, 7, 7)}, r"of another stem: conv1.weight is \(4, 1, 7, 7\) there"),
    "a deep stem": ({**{n: v for n, v in PUBLIC.items() if n != "conv1.weight"}, "conv1.0.weight": torch.ones(4, 3, 3, 3)}, "it lacks conv1.weight, has conv1.0.weight"),
    "more layers": ({**PUBLIC, "layer1.0.se.fc1.weight": torch.ones(2, 2)}, "of another network: it has layer1.0.se.fc1.weight"),
    "other names": ({"resnet.stem.weight": torch.ones(3), "resnet.head.weight": torch.ones(3)}, "names its weights resnet.stem.weight, resnet.head.weight, not conv1.weight"),
    "many equal layers": ({f"layers.{n}.{part}": torch.ones(3) for n in range(4) for part in ("conv1.weight", "attn.q", "attn.k", "attn.v")}, "names its weights layers.0.conv1.weight, layers.0.attn.q, not conv1"),
    "two networks": ({"student": named("module."), "teacher": PUBLIC}, "holds several networks, student. and teacher.; take one by init: {file: ..., prefix: student.}"),
    "a classifier of another name": ({**HEADLESS, "linear.weight": torch.ones(5, 8), "linear.bias": torch.ones(5)}, r"names its classifier linear.\*, not fc.\*; rename it there, or init: {file: ..., classifier: fresh}"),
    "a classifier that convolves": ({**PUBLIC, "fc.weight": torch.ones(5, 8, 1, 1)}, r"without this network's classifier \(fc.weight\)"),
    "masks": ({**{n: v for n, v in PUBLIC.items() if n != "fc.weight"}, "fc.weight_orig": torch.ones(5, 8), "fc.weight_mask": torch.ones(5, 8)}, "fc.weight_orig there is pruned by masks; call torch.nn.utils.prune.remove"),
    "codes of 8 bits": ({**PUBLIC, "conv1.weight": torch.ones(4, 3, 7, 7, dtype=torch.int8)}, "conv1.weight holds int8; save"),
    "complex numbers": ({**PUBLIC, "fc.bias": torch.ones(5) + 1j}, "fc.bias holds complex64"),
    "no values": ({**PUBLIC, "fc.bias": torch.ones(5, device="meta")}, "fc.bias has no values"),
    "negative variances": ({**PUBLIC, "bn1.running_var": -torch.ones(4)}, "bn1.running_var is negative"),
    "8-bit floats that overflowed": ({**PUBLIC, "fc.bias": torch.full((5,), torch.nan).to(torch.float8_e4m3fn)}, "fc.bias is not finite"),
    "no weights": ({"epoch": 3}, "holds no weights"),
    "a loss that diverged": ({**PUBLIC, "conv1.weight": torch.full((4, 3, 7, 7), torch.nan)}, "conv1.weight is not finite"),
    "a list": ([PUBLIC], "holds no weights"),
    "a tensor": (torch.ones(3), "holds no weights"),
    "a whole network": (network(), r"a whole object \(.*\), whose code is not run; save its state_dict\(\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_what_does_not_fit_is_named_by_its_cause(tmp_path, name):
    content, cause = OTHERS[name]
    torch.save(content, tmp_path / "weights.pth")
    loaded = network()
    with pytest.raises(RunError, match=f"weights.pth: {cause}|weights.pth: .*{cause}") as error:
        load_weights(tmp_path / "weights.pth", loaded)
    assert len(str(error.value)) < 300
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in network().state_dict().items())


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "weights.pth: empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "a pointer of Git LFS"),
        (b"\n<!DOCTYPE html><html>", "a web page in place"),
        (b"no pickle", "holds no weights"),
        (b'{"message": "Not Found"}', "JSON in place"),
        (b"PK\x03\x04 and no end", "cut short or damaged"),
        ((1000).to_bytes(8, "little") + b'{"fc.weight": {', "cut short or damaged"),
    ],
)
def test_what_was_downloaded_instead_is_named(tmp_path, content, cause):
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(RunError, match=cause):
        load_weights(tmp_path / "weights.pth", network())


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_a_torchscript_program(tmp_path):
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "weights.pth")
    with pytest.raises(RunError, match=r"a TorchScript program; save the state_dict\(\)"):
        load_weights(tmp_path / "weights.pth", network())


@pytest.mark.parametrize(
    "weights",
    [
        PUBLIC,
        HEADLESS,
        {**HEADLESS, "fc.weight": torch.ones(7, 8), "fc.bias": torch.ones(7)},
        {**HEADLESS, "fc.0.weight": torch.ones(9, 9)},
        {**HEADLESS, "last_linear.weight": torch.ones(7, 8), "last_linear.bias": torch.ones(7)},
    ],
)
def test_a_fresh_classifier_is_the_networks_own(tmp_path, weights):
    torch.save({"state_dict": named("module.", weights)}, tmp_path / "weights.pth")
    loaded = network(seed=3)
    load_weights(tmp_path / "weights.pth", loaded, fresh_classifier=True)
    expected = {
        **HEADLESS,
        **{name: value for name, value in network(seed=3).state_dict().items() if name.startswith("fc.")},
    }
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize("prefix", ["teacher", "teacher.", "teacher.module.", "state_dict.teacher"])
def test_one_of_several_networks(tmp_path, prefix):
    both = {**named("student.module.", network(seed=2).state_dict()), **named("teacher.")}
    torch.save({"state_dict": both}, tmp_path / "weights.pth")
    loaded = network()
    load_weights(tmp_path / "weights.pth", loaded, prefix=prefix)
    assert torch.equal(loaded.conv1.weight, PUBLIC["conv1.weight"])
    assert (
        check_weights(tmp_path / "weights.pth", loaded.architecture, 5, fresh_classifier=False, prefix=prefix)
        == "state_dict.teacher."
    )
    with pytest.raises(
        RunError, match=r"behind the prefix tutor.; there are some behind state_dict.student. and state_dict.teacher."
    ):
        load_weights(tmp_path / "weights.pth", loaded, prefix="tutor")
    torch.save(PUBLIC, tmp_path / "weights.pth")
    with pytest.raises(RunError, match=r"behind the prefix model.; the names there have none"):
        load_weights(tmp_path / "weights.pth", loaded, prefix="model")


class Harm:
    """Where it is unpickled, a file is written."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("is_zip", [True, False])
def test_code_in_a_file_does_not_run(tmp_path, is_zip):
    harm = Harm(f"touch {tmp_path / 'harm'}")
    torch.save({"model": PUBLIC, "args": harm}, tmp_path / "weights.pth", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(RunError, match="holds no weights"):
        load_weights(tmp_path / "weights.pth", network())
    assert not (tmp_path / "harm").exists()

"""What a quantised stage cannot do is said before anything is trained, and what is trained can be exported."""

import re

import pytest

from gowide_dist import build_network, load_recipe
from gowide_dist.effects import without_effect
from gowide_dist.errors import RecipeError
from gowide_dist.networks.quantised import _graph, rounded_nodes
from gowide_dist.train.fit import check_fit
from tests.fashion import write_job

NETS = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, 4), nn.Linear(4, num_classes)

    def forward(self, images):
        x = self.conv(images).mean((2, 3))
        return self.fc(x if x.mean().item() > 0 else -x)


class Scaled(Net):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.pool, self.gamma = nn.AdaptiveAvgPool2d(1), nn.Parameter(self.fc.weight.new_ones(4))

    def forward(self, images):
        x = self.conv(images)
        x = x * self.pool(x).sigmoid() * self.gamma.reshape(1, -1, 1, 1)
        return self.fc(self.pool(x).flatten(1))
"""


def recipe(tmp_path, network, *overrides):
    stage = {"train": "net", "objective": "labels", "epochs": 1, "optim": {"lr": 0.1}}
    (tmp_path / "nets.py").write_text(NETS)
    job = write_job(
        tmp_path,
        {
            "name": "small",
            "data": {"train": "train.beton", "val": "val.beton", "resolution": 16},
            "batch_size": 8,
            "networks": {"net": network},
            "stages": {"first": stage, "rounded": {**stage, "init": "first", "quantised": True}},
        },
    )
    return load_recipe(job, overrides, networks=tmp_path / "nets.py")


def test_a_network_without_a_graph_is_named_before_anything_is_trained(tmp_path, capfd):
    small = recipe(tmp_path, {"own": "Net"})
    with pytest.raises(RecipeError, match=r"stages.rounded.quantised: .own: Net.: .*torch.export cannot read it"):
        check_fit(small, small.instances.values(), 10)
    assert capfd.readouterr() == ("", ""), "torch prints the graph"


def test_batch_norms_that_do_not_synchronise_are_told(tmp_path):
    small = recipe(tmp_path, {"block": "basic", "depths": [1], "base": 8}, "sync_batch_norm=true")
    assert without_effect(small, small.instances.values(), 80) == [
        "sync_batch_norm: has no effect on rounded, which is quantised"
    ]


def test_rounded_tensors_are_activations_with_the_names_that_onnx_has(tmp_path):
    """The exporter writes a pool over all pixels as a mean; a scale that a multiplication reads is a weight."""
    recipe(tmp_path, {"own": "Scaled"})
    network = build_network({"own": "Scaled"}, num_classes=10, networks=tmp_path / "nets.py")
    network.settle(16)
    nodes = rounded_nodes(_graph(network, 16).graph)
    names = [node.name for node in nodes if node.op != "placeholder"]
    assert [re.sub(r"_\d+$", "", name) for name in names] == ["conv2d", "mean", "sigmoid", "mul", "mul", "mean"]

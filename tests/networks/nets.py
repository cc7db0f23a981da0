"""Networks of a user's own, as `--networks` takes them. Tests read this file; none imports it."""

from os import system  # noqa: F401  # imported, so that no recipe may name it

import torch
from torch import nn


class Staged(nn.Module):
    """Walked block by block; its dropout draws at random."""

    def __init__(self, num_classes, width=8, says=None):
        super().__init__()
        self.num_blocks, self.block_channels = 2, says or (width, 2 * width)
        sizes = ((3, width, 4), (width, 2 * width, 2))
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, k, 3, s, 1), nn.BatchNorm2d(k), nn.ReLU(inplace=True), nn.Dropout(0.1))
            for c, k, s in sizes
        )
        self.fc = nn.Linear(2 * width, num_classes)

    def block(self, index, x):
        return self.stages[index](x)

    def head(self, x):
        return self.fc(x.mean((2, 3)))

    def forward(self, images):
        return self.head(self.block(1, self.block(0, images)))


class Loose(Staged):
    """Has a parameter that no submodule has."""

    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.scale = nn.Parameter(self.fc.weight.new_ones(1))


class Auxiliary(nn.Module):
    """Grey images, a tuple of outputs, a head that teaches nothing, and weights that two layers share."""

    def __init__(self, num_classes):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, 2, 1)
        self.again = self.conv
        self.relu = nn.ReLU(inplace=True)
        self.last = nn.Conv2d(4, 8, 3, 2, 1)
        self.auxiliary = nn.Linear(4, num_classes)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, images):
        x = self.conv(images)
        middle = self.relu(x)
        return self.fc(self.last(middle).mean((2, 3))), self.auxiliary(middle.mean((2, 3)))


class Values(Staged):
    """Looks at values in training, as norms without momentum do."""

    def __init__(self, num_classes):
        super().__init__(num_classes)
        for stage in self.stages:
            stage[1].momentum = None


class Branching(Staged):
    """Does what depends on values, which no graph can say."""

    def forward(self, images):
        return super().forward(images if images.sum() > 0 else -images)


class Branches(nn.Module):
    """One convolution that its norm reads alone, if it is not also read `detached`, one with a skip, one run twice."""

    def __init__(self, num_classes, detached=False):
        super().__init__()
        self.detached = detached
        self.convs = nn.ModuleList(nn.Conv2d(channels, 4, 3, 2, 1) for channels in (3, 4, 4))
        self.read, self.skipped, self.shared = (nn.BatchNorm2d(4) for _ in range(3))
        self.fc = nn.Linear(4, num_classes)

    def forward(self, images):
        x = self.convs[0](images)
        x = self.read(x) + (x.detach() if self.detached else 0)
        x = self.convs[1](x)
        x = x + self.skipped(x)
        x = self.shared(self.convs[2](self.shared(self.convs[2](x))))
        return self.fc(x.mean((2, 3)))


class Extra(Staged):
    """Keeps more than tensors."""

    def get_extra_state(self):
        return {"steps": 1}

    def set_extra_state(self, state):
        pass


class Pair(Staged):
    """Its stages give tuples."""

    def block(self, index, x):
        return (self.stages[index](x),)


def rearranging(num_classes):
    return nn.Sequential(nn.PixelUnshuffle(4), nn.Conv2d(48, num_classes, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def frozen(num_classes):
    return Staged(num_classes).requires_grad_(False)


def double(num_classes):
    print("printed")
    torch.set_default_dtype(torch.float64)
    return Staged(num_classes)


def lazy(num_classes):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))


def leaves(num_classes):
    raise SystemExit(3)


def lookup(num_classes):
    return {}["width"]


def wrapped(num_classes):
    return nn.DataParallel(Staged(num_classes))


def empty(num_classes):
    return nn.Flatten()


def features(num_classes):
    return nn.Conv2d(3, num_classes, 3)


def nothing(num_classes):
    return None


def _hidden(num_classes):
    return Staged(num_classes)

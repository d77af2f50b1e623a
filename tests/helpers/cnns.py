"""Small networks, each with what one family of architectures brings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def layer(inputs, outputs, size=3, stride=1, groups=1, act=nn.ReLU):
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), act())


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.down = None
        if stride != 1 or inputs != outputs:
            down = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.down = nn.Sequential(down, nn.BatchNorm2d(outputs))

    def forward(self, x):
        shortcut = x if self.down is None else self.down(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        x += shortcut
        return self.relu(x)


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(*layer(3, 16, 7, 2), nn.MaxPool2d(3, 2, 1))
        self.layer1 = Block(16, 16, 1)
        self.layer2 = Block(16, 32, 2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(32, 10)

    def forward(self, x):
        x = self.layer2(self.layer1(self.stem(x)))
        return self.fc(torch.flatten(self.pool(x), 1))


class SqueezeExcite(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, 4, 1)
        self.fc2 = nn.Conv2d(4, channels, 1)

    def forward(self, x):
        return x * F.hardsigmoid(self.fc2(F.relu(self.fc1(self.pool(x)))))


class MobileNet(nn.Module):
    def __init__(self, act=nn.ReLU6, squeeze=False):
        super().__init__()
        self.stem = layer(3, 16, 3, 2, act=act)
        self.expand = layer(16, 32, 1, act=act)
        self.depthwise = layer(32, 32, 3, groups=32, act=act)
        self.squeeze = SqueezeExcite(32) if squeeze else nn.Identity()
        self.project = nn.Sequential(nn.Conv2d(32, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(16, 7)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.project(self.squeeze(self.depthwise(self.expand(x))))
        return self.fc(self.dropout(x.mean([2, 3])))


class Inception(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = layer(3, 8)
        self.one = layer(8, 8, 1)
        self.three = nn.Sequential(layer(8, 4, 1), layer(4, 8, 3))
        self.pooled = nn.Sequential(nn.AvgPool2d(3, 1, 1), layer(8, 4, 1))
        self.head = nn.Conv2d(20, 5, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.head(torch.cat([self.one(x), self.three(x), self.pooled(x)], 1))


class UNet(nn.Module):
    """Upsampling by a transposed convolution, or by an `nn.Upsample` of the given mode."""

    def __init__(self, mode=None):
        super().__init__()
        self.enter = layer(3, 8)
        self.pool = nn.MaxPool2d(2)
        self.bottom = layer(8, 16)
        if mode is None:
            self.up = nn.ConvTranspose2d(16, 8, 2, 2)
        else:
            self.up = nn.Sequential(nn.Upsample(scale_factor=2, mode=mode), nn.Conv2d(16, 8, 1))
        self.leave = layer(16, 8)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        high = self.enter(x)
        low = self.bottom(self.pool(high))
        return self.head(self.leave(torch.cat([high, self.up(low)], 1)))


class DenseNet(nn.Module):
    def __init__(self):
        super().__init__()
        widths = [8 + 4 * i for i in range(3)]
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths)
        self.convs = nn.ModuleList(nn.Conv2d(width, 4, 3, 1, 1) for width in widths)
        self.norm = nn.BatchNorm2d(20)
        self.fc = nn.Linear(20, 3)

    def forward(self, x):
        seen = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            seen.append(conv(F.relu(norm(torch.cat(seen, 1)))))
        x = F.relu(self.norm(torch.cat(seen, 1)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class ShuffleNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = layer(3, 16)
        self.branch = nn.Sequential(layer(8, 8, 1), layer(8, 8, 3, groups=8))
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x):
        left, right = self.stem(x).chunk(2, 1)
        x = torch.cat([left, self.branch(right)], 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(x)


class VGG(nn.Module):
    """A head that flattens more than one pixel, whose order is then that of the float model."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(layer(3, 8), nn.MaxPool2d(2), layer(8, 8), nn.MaxPool2d(2))
        self.pool = nn.AdaptiveAvgPool2d(7)
        self.classifier = nn.Sequential(
            nn.Linear(8 * 49, 16), nn.ReLU(True), nn.Dropout(), nn.Linear(16, 5)
        )

    def forward(self, x):
        return self.classifier(torch.flatten(self.pool(self.features(x)), 1))


class ConvNeXt(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 4, 4)
        self.depthwise = nn.Conv2d(16, 16, 7, 1, 3, groups=16)
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 64)
        self.down = nn.Linear(64, 16)
        self.scale = nn.Parameter(torch.full((16,), 0.5))
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.down(F.gelu(self.up(y)))
        x = x + y.permute(0, 3, 1, 2)
        return self.head(x.mean((-2, -1)))


class Several(nn.Module):
    """Two inputs, nested outputs, a layer called twice, and ops without an integer form."""

    def __init__(self):
        super().__init__()
        self.left = nn.Conv2d(3, 8, 3, padding=1)
        self.right = nn.Conv2d(1, 8, 3, padding=1, padding_mode="reflect")
        self.shared = nn.Conv2d(8, 8, 3, padding="same")

    def forward(self, x, y):
        a = self.shared(F.silu(self.left(x)))
        b = self.shared(torch.tanh(self.right(y)))
        total = F.pad(a + b, (0, 1, 0, 1))
        return {"total": total, "parts": (a, torch.softmax(b, 1))}


class Sequence(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv1d(3, 8, 5, padding=2)
        self.norm = nn.BatchNorm1d(8)
        self.pool = nn.MaxPool1d(2)
        self.second = nn.Conv1d(8, 8, 3, dilation=2)
        self.average = nn.AvgPool1d(2)
        self.fc = nn.Linear(8, 3)
        self.last = nn.BatchNorm1d(3)

    def forward(self, x):
        x = self.pool(F.leaky_relu(self.norm(self.first(x))))
        return self.last(self.fc(self.average(self.second(x)).mean(-1)))


class Volume(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv3d(2, 8, 3, padding=1)
        self.pool = nn.MaxPool3d(2)
        self.up = nn.ConvTranspose3d(8, 4, 2, 2)
        self.average = nn.AdaptiveAvgPool3d(1)

    def forward(self, x):
        return self.average(self.up(self.pool(torch.relu(self.first(x))))).flatten(1)


IMAGE = ((3, 32, 32),)
# Network and the shapes of its inputs, without the batch.
NETS = {
    "resnet": (ResNet, IMAGE),
    "mobilenet_v2": (MobileNet, IMAGE),
    "mobilenet_v3": (lambda: MobileNet(nn.Hardswish, squeeze=True), IMAGE),
    "efficientnet": (lambda: MobileNet(nn.SiLU, squeeze=True), IMAGE),
    "inception": (Inception, IMAGE),
    "unet": (UNet, IMAGE),
    "unet_nearest": (lambda: UNet("nearest"), IMAGE),
    "unet_bilinear": (lambda: UNet("bilinear"), IMAGE),
    "densenet": (DenseNet, IMAGE),
    "shufflenet": (ShuffleNet, IMAGE),
    "vgg": (VGG, IMAGE),
    "convnext": (ConvNeXt, IMAGE),
    "several": (Several, ((3, 16, 16), (1, 16, 16))),
    "sequence": (Sequence, ((3, 40),)),
    "volume": (Volume, ((2, 8, 8, 8),)),
}


def batch(shapes: tuple[tuple[int, ...], ...], size: int = 4, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(size, *shape, generator=generator) for shape in shapes)


def build(name: str) -> tuple[nn.Module, tuple[tuple[int, ...], ...]]:
    """A network in eval mode, with statistics in its BatchNorms as training leaves them."""
    torch.manual_seed(0)
    make, shapes = NETS[name]
    model = make()
    with torch.no_grad():
        for seed in range(4):
            model(*batch(shapes, 8, seed))
    return model.eval(), shapes

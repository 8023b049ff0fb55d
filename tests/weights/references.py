"""Published architectures, rebuilt from their definitions, and how a file of theirs is made and compared."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def randomised(net):
    """Nothing left at zero or one, activations of order one."""
    torch.manual_seed(7)
    for module in net.modules():
        if isinstance(module, (nn.modules.batchnorm._NormBase, nn.LayerNorm)):
            if module.weight is not None:
                nn.init.uniform_(module.weight, 0.3, 0.9)
                nn.init.normal_(module.bias, std=0.2)
            if getattr(module, "running_mean", None) is not None:
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
        elif isinstance(module, nn.Conv3d):
            nn.init.kaiming_normal_(module.weight)
    return net.eval()


def published(net, path, wrapper="state_dict", prefix="module."):
    state = {prefix + key: value for key, value in net.state_dict().items()}
    torch.save({wrapper: state, "epoch": 3, "best": np.float64(0.9), "optimizer": {"lr": 0.1}}, path)


def assert_same(maps, answers):
    """Equal to 1e-5 of the largest value, map by map."""
    for ours, theirs in zip(maps, answers, strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


class ReferenceBlock(nn.Module):
    """He et al. 2015, fig. 5, in 3D: MedicalNet's and 3D-ResNets-PyTorch's basic block and bottleneck."""

    def __init__(self, before, width, bottleneck, type_a=False, stride=1, dilation=1):
        super().__init__()
        after = 4 * width if bottleneck else width
        sizes = [before, width, width, after] if bottleneck else [before, width, width]
        self.convs = len(sizes) - 1
        for i in range(self.convs):
            wide = not bottleneck or i == 1
            turn = stride if i == (1 if bottleneck else 0) else 1
            kernel = (
                {"kernel_size": 3, "padding": dilation, "dilation": dilation} if wide else {"kernel_size": 1}
            )
            conv = nn.Conv3d(sizes[i], sizes[i + 1], stride=turn, bias=False, **kernel)
            self.add_module(f"conv{i + 1}", conv)
            self.add_module(f"bn{i + 1}", nn.BatchNorm3d(sizes[i + 1]))
        self.type_a, self.stride, self.missing = type_a, stride, after - before
        if (stride > 1 or before != after) and not type_a:
            self.downsample = nn.Sequential(
                nn.Conv3d(before, after, 1, stride, bias=False), nn.BatchNorm3d(after)
            )

    def forward(self, x):
        y = x
        for i in range(1, self.convs + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            y = F.relu(y) if i < self.convs else y
        if hasattr(self, "downsample"):
            x = self.downsample(x)
        elif self.missing or self.stride > 1:
            x = F.avg_pool3d(x, 1, self.stride)
            zeros = torch.zeros(x.shape[0], self.missing, *x.shape[2:])
            x = torch.cat([x, zeros], dim=1)
        return F.relu(x + y)


class TwiceRegistered(nn.Module):
    """nnU-Net's convolution, norm and activation: registered by name, and once more in a list."""

    def __init__(self, before, after, kernel, stride, active=True):
        super().__init__()
        self.conv = nn.Conv3d(before, after, kernel, stride, (kernel - 1) // 2, bias=kernel > 1)
        self.norm = nn.InstanceNorm3d(after, eps=1e-5, affine=True)
        self.all_modules = nn.Sequential(self.conv, self.norm, *[nn.LeakyReLU()] * active)

    def forward(self, x):
        return self.all_modules(x)


def reference_block(before, after, stride):
    block = nn.Module()
    block.conv1 = TwiceRegistered(before, after, 3, stride)
    block.conv2 = TwiceRegistered(after, after, 3, 1, active=False)
    pool = [nn.AvgPool3d(stride, stride)] if stride > 1 else []
    project = [TwiceRegistered(before, after, 1, 1, active=False)] if before != after else []
    block.skip = nn.Sequential(*pool, *project)
    return block


class ReferenceNnUNet(nn.Module):
    """nnU-Net's U-Net as its checkpoints have it, the decoder cut to its copy of the encoder."""

    def __init__(self, residual, features=(32, 64, 128, 256, 320, 320)):
        super().__init__()
        channels = [features[0] if residual else 1, *features]
        self.encoder, self.decoder = nn.Module(), nn.Module()
        self.encoder.stages = nn.Sequential()
        if residual:
            self.encoder.stem = nn.Module()
            self.encoder.stem.convs = nn.Sequential(TwiceRegistered(1, features[0], 3, 1))
        for i, blocks in enumerate((1, 3, 4, 6, 6, 6)):
            before, after, stride, stage = channels[i], channels[i + 1], 2 if i else 1, nn.Module()
            if residual:
                rest = [reference_block(after, after, 1) for _ in range(blocks - 1)]
                stage.blocks = nn.Sequential(reference_block(before, after, stride), *rest)
            else:
                stage.convs = nn.Sequential(
                    TwiceRegistered(before, after, 3, stride), TwiceRegistered(after, after, 3, 1)
                )
                stage = nn.Sequential(stage)
            self.encoder.stages.append(stage)
        self.decoder.encoder = self.encoder

    def forward(self, x):
        maps, x = [], self.encoder.stem.convs(x) if hasattr(self.encoder, "stem") else x
        for stage in self.encoder.stages:
            if hasattr(stage, "blocks"):
                for block in stage.blocks:
                    x = F.leaky_relu(block.conv2(block.conv1(x)) + block.skip(x), 0.01)
            else:
                x = stage[0].convs(x)
            maps.append(x)
        return maps


class ReferenceR3D(nn.Module):
    """kenshohara/3D-ResNets-PyTorch: stem of 7×7×7 that strides in-plane, shortcuts of type B, head."""

    def __init__(self, bottleneck, blocks, width=64):
        super().__init__()
        self.conv1 = nn.Conv3d(3, width, 7, (1, 2, 2), 3, bias=False)
        self.bn1 = nn.BatchNorm3d(width)
        channels = width
        for stage, count in enumerate(blocks):
            layer = nn.Sequential()
            for i in range(count):
                stride = 2 if stage and not i else 1
                layer.append(ReferenceBlock(channels, width << stage, bottleneck, stride=stride))
                channels = (4 if bottleneck else 1) * (width << stage)
            self.add_module(f"layer{stage + 1}", layer)
        self.fc = nn.Linear(channels, 7)

    def forward(self, x):
        maps = [F.relu(self.bn1(self.conv1(x)))]
        x = F.max_pool3d(maps[0], 3, 2, 1)
        for stage in range(1, 5):
            x = getattr(self, f"layer{stage}")(x)
            maps.append(x)
        return maps


class ConvModule(nn.Module):
    """mmcv's: convolution, norm with an epsilon of 1e-3, ReLU unless another follows a sum."""

    def __init__(self, before, after, kernel, stride=(1, 1, 1), active=True, groups=1):
        super().__init__()
        padding = [size // 2 for size in kernel]
        self.conv = nn.Conv3d(before, after, kernel, stride, padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm3d(after, eps=1e-3)
        self.active = active

    def forward(self, x):
        x = self.bn(self.conv(x))
        return F.relu(x) if self.active else x


class ReferenceCSNBlock(nn.Module):
    """mmaction2's CSNBottleneck3d, mode "ir": 1×1×1, depthwise 3×3×3, which strides, 1×1×1."""

    def __init__(self, before, width, stride):
        super().__init__()
        step = (stride,) * 3
        self.conv1 = ConvModule(before, width, (1, 1, 1))
        self.conv2 = nn.Sequential(ConvModule(width, width, (3, 3, 3), step, groups=width))
        self.conv3 = ConvModule(width, 4 * width, (1, 1, 1), active=False)
        if before != 4 * width:
            self.downsample = ConvModule(before, 4 * width, (1, 1, 1), step, active=False)

    def forward(self, x):
        y = self.conv3(self.conv2(self.conv1(x)))
        return F.relu(y + (self.downsample(x) if hasattr(self, "downsample") else x))


class ReferenceCSN(nn.Module):
    """mmaction2's recogniser: ResNet3dCSN without its second pool under `backbone`, and a head."""

    def __init__(self, blocks, width=64):
        super().__init__()
        self.backbone = backbone = nn.Module()
        backbone.conv1 = ConvModule(3, width, (3, 7, 7), (1, 2, 2))
        channels = width
        for stage, count in enumerate(blocks):
            layer = nn.Sequential()
            for i in range(count):
                layer.append(ReferenceCSNBlock(channels, width << stage, 2 if stage and not i else 1))
                channels = 4 * (width << stage)
            backbone.add_module(f"layer{stage + 1}", layer)
        self.cls_head = nn.Module()
        self.cls_head.fc_cls = nn.Linear(channels, 400)

    def forward(self, x):
        maps = [self.backbone.conv1(x)]
        x = F.max_pool3d(maps[0], (1, 3, 3), (1, 2, 2), (0, 1, 1))
        for stage in range(1, 5):
            x = getattr(self.backbone, f"layer{stage}")(x)
            maps.append(x)
        return maps


def centred(conv, taps):
    """A 2D convolution in the middle of `taps` slices; all but the stem stride over depth as in-plane."""
    stem = conv.kernel_size == (7, 7)
    spatial = conv.kernel_size[0] // 2
    stride = (1 if stem else conv.stride[0], *conv.stride)
    deep = nn.Conv3d(
        conv.in_channels,
        conv.out_channels,
        (taps, *conv.kernel_size),
        stride,
        (taps // 2, spatial, spatial),
        bias=False,
    )
    nn.init.zeros_(deep.weight)
    deep.weight.data[:, :, taps // 2] = conv.weight.data
    return deep


class ReferenceMerlin(nn.Module):
    """StanfordMIMI/Merlin's I3ResNet of a ResNet of torchvision, with its two heads.

    Takes (x, y, z) in RAS, turns to (z, x, y), shows the volume three times; maps as (z, x, y).
    """

    def __init__(self, net2d):
        super().__init__()
        self.conv1, self.bn1 = centred(net2d.conv1, 3), deepened(net2d.bn1)
        for stage in range(1, 5):
            layer = nn.Sequential()
            for block in getattr(net2d, f"layer{stage}"):
                for i, taps in ((1, 1), (2, 3), (3, 1)):
                    setattr(block, f"conv{i}", centred(getattr(block, f"conv{i}"), taps))
                    setattr(block, f"bn{i}", deepened(getattr(block, f"bn{i}")))
                if block.downsample is not None:
                    conv, norm = block.downsample
                    block.downsample = nn.Sequential(centred(conv, 1), deepened(norm))
                layer.append(block)
            self.add_module(f"layer{stage}", layer)
        self.classifier = nn.Conv3d(net2d.fc.in_features, 1692, 1)
        self.contrastive_head = nn.Conv3d(net2d.fc.in_features, 512, 1)

    def forward(self, x):
        x = x.permute(0, 1, 4, 2, 3).expand(-1, 3, -1, -1, -1)
        maps = [F.relu(self.bn1(self.conv1(x)))]
        x = F.max_pool3d(maps[0], 3, 2, 1)
        for stage in range(1, 5):
            x = getattr(self, f"layer{stage}")(x)
            maps.append(x)
        return maps


def deepened(norm):
    """A batch norm for volumes with the tensors of one for images."""
    deep = nn.BatchNorm3d(norm.num_features)
    deep.load_state_dict(norm.state_dict())
    return deep


class ReferenceAnatomix(nn.Module):
    """neel-dey/anatomix: a list of layers, each convolution with norm and activation; encoder and decoder."""

    def __init__(self, downs, width, dev):
        super().__init__()
        layers, self.kept, self.ups = [], [], []

        def add(before, after):
            layers.append(nn.Conv3d(before, after, 3, padding=1, padding_mode="reflect", bias=dev))
            layers.append(nn.InstanceNorm3d(after, eps=1e-2) if dev else nn.BatchNorm3d(after))
            layers.append(nn.ReLU())

        add(1, width)
        for level in range(downs + 1):
            add(width << max(0, level - 1), width << level)
            add(width << level, width << level)
            self.kept.append(len(layers) - 1)
            if level < downs:
                layers.append(nn.AvgPool3d(2) if dev else nn.MaxPool3d(2))
        for level in reversed(range(downs)):
            self.ups.append(len(layers))
            layers.append(nn.Upsample(scale_factor=2, mode="trilinear" if dev else "nearest"))
            add(3 * width << level, width << level)
            add(width << level, width << level)
        layers.append(nn.Conv3d(width, 32 if dev else 16, 3, padding=1, padding_mode="reflect", bias=dev))
        self.model = nn.Sequential(*layers)

    def forward(self, x):
        maps = []
        for number, layer in enumerate(self.model[: self.ups[0]]):
            x = layer(x)
            if number in self.kept:
                maps.append(x)
        return maps

"""Networks as users bring them: each is proven exact, or refused in one line that says why."""

import copy
import importlib.util
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medi3d.errors import Medi3dError, ShapeError, SourceError
from medi3d.inflation import inflate, verify
from medi3d.models.networks import create_classifier, create_segmenter

SHARED = Path(os.environ.get("MEDI3D_SHARED", "../shared")) / "cases" / "networks.py"


class Net(nn.Module):
    """A strided convolution, and a `forward` of choice."""

    def __init__(self, forward, conv=None):
        super().__init__()
        self.conv, self.run = conv or nn.Conv2d(3, 8, 3, 2, 1), forward

    def forward(self, x):
        return self.run(self.conv, x)


class OwnForward(nn.Conv2d):
    """Scales its kernel."""

    def forward(self, x):
        return F.conv2d(x, 2 * self.weight, self.bias, self.stride, self.padding)


class OwnConvForward(nn.Conv2d):
    """As some libraries do it."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, 2 * weight, bias)


class OwnTransposed(nn.ConvTranspose2d):
    """Scales its answer."""

    def forward(self, x):
        return 2 * super().forward(x)


class Inherits(nn.Conv2d):
    """Only another name."""


def positions(conv, x):
    y = conv(x)
    return [
        y,
        torch.linspace(0, 1, y.shape[2], dtype=y.dtype).view(1, 1, -1, 1).expand(len(y), 1, -1, y.shape[3]),
    ]


def rearranged(conv, x):
    from einops import rearrange

    return rearrange(conv(x), "b c (h p) (w q) -> b (c p q) h w", p=2, q=2)


EXACT = {
    "none": Net(lambda conv, x: [None, conv(x)]),
    "nested": Net(lambda conv, x: {"a": (conv(x), [conv(x)])}),
    "grid": Net(positions),
    "einops": Net(rearranged),
    "inherits": Net(lambda conv, x: conv(x), Inherits(3, 8, 3, 2, 1)),
    "vector": Net(lambda conv, x: conv(x).mean((2, 3))),
    "own-kernel": Net(lambda conv, x: F.conv2d(x, conv.weight, stride=2)),
    "normalises": Net(lambda conv, x: conv((x - 0.4) / 0.2)),
    "bfloat16": Net(lambda conv, x: conv(x)).to(torch.bfloat16),
}

REFUSED = {
    "empty": (Net(lambda conv, x: [x[:, :0], conv(x)]), r"output \[0\] is empty, \(2, 0, 64, 64\)"),
    "loss": (
        Net(lambda conv, x: {"map": conv(x), "loss": conv(x).mean()}),
        r"output \['loss'\] is a single number",
    ),
    "losses": (
        Net(lambda conv, x: (conv(x), conv(x).mean((1, 2, 3)))),
        r"output \[1\] is \(2,\) for 2 images",
    ),
    "grid": (Net(lambda conv, x: [conv(x), conv(x)[:1]]), r"output \[1\] is \(1, 8, 32, 32\) for 2 images"),
    "views": (Net(lambda conv, x: torch.cat(conv(x).chunk(2), 1)), r"output itself is \(1, 16, 32, 32\)"),
    "text": (Net(lambda conv, x: [conv(x), "map"]), r"output \[1\] is of type str"),
    "nothing": (Net(lambda conv, x: [None]), "it returns nothing"),
    "forward": (
        Net(lambda c, x: c(x), OwnForward(3, 8, 3, 2, 1)),
        r"'conv' \(OwnForward\).*@register_rule\(OwnForward\)",
    ),
    "conv-forward": (Net(lambda c, x: c(x), OwnConvForward(3, 8, 3)), r"@register_rule\(OwnConvForward\)"),
    "transposed": (
        nn.Sequential(nn.Conv2d(3, 3, 1), OwnTransposed(3, 3, 2, 2)),
        r"\(OwnTransposed\) is a ConvTranspose2d.*@register_rule",
    ),
    "lazy": (nn.Sequential(nn.LazyConv2d(8, 3)), "has lazy layers without weights"),
    "batch": (Net(lambda conv, x: conv(x).reshape(len(x), 8, 32, 32)), "cannot be inflated exactly"),
    "float32": (Net(lambda conv, x: F.conv2d(conv(x), torch.ones(8, 8, 1, 1))), "cannot run in float64"),
    "raises": (Net(lambda conv, x: conv(x)[len(x) + 70]), "takes no"),
}


@pytest.mark.parametrize("name", EXACT)
def test_is_exact(name):
    report = inflate(EXACT[name]).report
    assert report.exactness.exact
    assert len(report.levels) == len(report.exactness.levels)


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_in_one_line(name):
    net, message = REFUSED[name]
    with pytest.raises(Medi3dError, match=message) as caught:
        inflate(net)
    assert "\n" not in str(caught.value)


def normed(norm, **options):
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1))
    net[0], net[2] = norm(net[0], **options), norm(net[2], **options)
    return net


NORMS = {
    "weight": nn.utils.parametrizations.weight_norm,
    "spectral": nn.utils.parametrizations.spectral_norm,
    "old weight": nn.utils.weight_norm,
    "old spectral": nn.utils.spectral_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NORMS)
def test_parametrized_weights_are_baked_in_and_the_network_keeps_them(name, training, channels):
    net = normed(NORMS[name]).train(training)
    image = torch.randn(2, 3, 16, 16)
    before, keys = copy.deepcopy({k: v.clone() for k, v in net.state_dict().items()}), set(net.state_dict())
    expected = net.eval()(image)
    net.train(training)
    net3d = inflate(net, in_channels=channels)
    assert net3d.report.exactness.exact
    assert set(net.state_dict()) == keys
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.equal(net.eval()(image), expected)
    assert {"0.weight", "2.weight"} <= dict(net3d.network.named_parameters()).keys()
    if channels == 3:
        torch.testing.assert_close(net3d.eval()(image.unsqueeze(2))[:, :, 0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "forward",
    [
        lambda conv, x: conv((x - x.new_tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1)) / 0.2),
        lambda conv, x: conv(torch.cat([x[:, :2], x[:, 2:]], 1)[:, [2, 1, 0]]),
    ],
    ids=["normalised", "reordered"],
)
def test_channels_that_a_stem_cannot_take_are_told(forward):
    with pytest.raises(ShapeError, match=r"cannot take 1 channel\(s\): use in_channels=3 and repeat"):
        inflate(Net(forward), in_channels=1)
    assert inflate(Net(forward)).report.exactness.exact


class Wide(nn.Module):
    """Positions for images of 64×48 pixels alone."""

    def __init__(self):
        super().__init__()
        self.conv, self.position = nn.Conv2d(1, 8, 8, 8), nn.Parameter(torch.randn(1, 8, 8, 6))

    def forward(self, x):
        return [self.conv(x) + self.position]


def test_images_that_are_not_square():
    with pytest.raises(SourceError, match=r"give size=\(height, width\)"):
        inflate(Wide())
    with pytest.raises(SourceError, match=r"takes no \(2, 1, 48, 64\) image"):
        inflate(Wide(), size=(48, 64))
    net3d = inflate(Wide(), size=(64, 48))
    assert net3d.report.exactness.size == (64, 48)
    assert net3d.strides == [(8, 8, 8)]
    assert verify(Wide(), inflate(Wide(), size=(64, 48)), size=(64, 48)).max_rel_error > 1e-3  # other weights
    assert create_segmenter(Wide(), num_classes=2, size=(64, 48))(torch.zeros(1, 1, 9, 64, 48)).shape[2:] == (
        9,
        64,
        48,
    )


def test_one_class_is_one_channel():
    encoder = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1))
    net = Net(lambda conv, x: [conv(x)], encoder)
    assert create_segmenter(net, num_classes=1)(torch.zeros(1, 1, 8, 8, 8)).shape == (1, 1, 8, 8, 8)
    assert create_classifier(net, num_classes=1)(torch.zeros(2, 1, 8, 8, 8)).shape == (2, 1)
    with pytest.raises(ShapeError, match="num_classes is 0"):
        create_classifier(net, num_classes=0)


def shared_cases():
    if not SHARED.is_file():
        return {}
    spec = importlib.util.spec_from_file_location("shared_networks", SHARED)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    conv = lambda kind: lambda *a: kind(*a)  # noqa: E731
    made = {
        name: value
        for name, value in vars(found).items()
        if isinstance(value, type)
        and issubclass(value, nn.Module)
        and name[0] != "_"
        and not issubclass(value, nn.Conv2d)
    }
    made |= {name: getattr(found, name) for name in ("lazy_net", "weight_normed", "spectral_normed")}
    made |= {
        f"unet-{m}": lambda m=m: found.UNetInterpolate(m, size=True)
        for m in ("nearest", "bilinear", "bicubic")
    }
    made["own-norm"] = lambda: found.Small(conv=lambda *a: found.ConvWithNorm(*a, norm=nn.BatchNorm2d(a[1])))
    made["own-std"] = lambda: found.Small(conv=conv(found.OwnStdConv))
    made["own-same"] = lambda: found.Small(conv=lambda i, o, k, s, p: found.StaticSame(i, o, k, s))
    made["group"] = lambda: found.Small(norm=lambda c: nn.GroupNorm(4, c))
    made["strided-function"] = lambda: found.FunctionalConvNet(2)
    return made


SHARED_CASES = shared_cases()


@pytest.mark.skipif(not SHARED_CASES, reason=f"no networks of users at {SHARED}")
@pytest.mark.parametrize("name", SHARED_CASES or ["none"])
def test_shared_networks_are_right_or_refused(name):
    for use in (
        inflate,
        lambda net: inflate(net, in_channels=1),
        lambda net: create_segmenter(net, num_classes=2),
    ):
        try:
            made = use(SHARED_CASES[name]())
        except Medi3dError:  # any other error is a defect
            continue
        if hasattr(made, "report"):
            assert made.report.exactness.exact
        else:
            assert made.eval()(torch.zeros(1, 1, 9, 32, 32)).shape == (1, 2, 9, 32, 32)

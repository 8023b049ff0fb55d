"""Encoders, segmenters and classifiers: weights arrive, everything learns, plain MONAI scripts run."""

import copy

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from medi3d.errors import ConfigError, PlanError, ShapeError, SourceError, WeightsError
from medi3d.inflation.network import build
from medi3d.inflation.plan import KernelPlan
from medi3d.inflation.verify import verify
from medi3d.models.encoders import create_encoder
from medi3d.models.networks import NetworkSettings, create_classifier, create_network, create_segmenter
from medi3d.models.segmenter import HEADS
from medi3d.models.sources import build_source

SMALL = ["timm:test_resnet", "timm:test_efficientnet", "timm:test_convnext", "timm:test_byobnet"]
PLANS = {
    "isotropic": KernelPlan.isotropic(),
    "planar": KernelPlan.planar(),
    "thick slices": KernelPlan.from_spacing((5, 1, 1)),
}


def unproven(source, plan="isotropic", levels=None, in_channels=1):
    """An encoder without its proof, which costs most of the time."""
    plan = PLANS.get(plan) or KernelPlan.named(plan)
    return build(build_source(source, levels=levels), plan, in_channels=in_channels)[0]


def unzeroed(net):
    """Residual branches that start at zero let nothing through to their weights: start them elsewhere."""
    for parameter in net.parameters():
        if not parameter.detach().any():
            nn.init.normal_(parameter)
    return net


@pytest.fixture(scope="module")
def encoder():
    return create_encoder("timm:test_resnet", levels=3)


# -- every parameter learns, every size passes


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("source", SMALL)
def test_every_parameter_of_a_segmenter_learns(source, plan):
    net = unzeroed(create_segmenter(unproven(source, plan), num_classes=3, deep_supervision=True)).train()
    answers = net(torch.randn(1, 1, 9, 40, 37))
    sum(answer.square().mean() for answer in answers).backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert all(p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("source", [*SMALL, "unet"])
def test_every_parameter_of_a_classifier_learns(source):
    encoder = create_encoder("unet") if source == "unet" else unproven(source)
    net = unzeroed(create_classifier(encoder, num_classes=3, dropout=0)).train()
    net(torch.randn(2, 1, 8, 64, 64)).square().mean().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None] == []
    assert net.head[-1].weight.grad.any()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("source", [*SMALL, "unet", "inception_v1_fine", "timm:mobilenetv3_small_050"])
@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_any_size_passes(source, training, head):
    encoder = create_encoder("unet") if source == "unet" else unproven(source)
    net = create_segmenter(encoder, num_classes=2, head=head).train(training)
    for size in [(35, 50, 36), (5, 5, 5), (16, 16, 16), (1, 33, 9)]:
        assert net(torch.randn(1, 1, *size)).shape == (1, 2, *size)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("plan", PLANS)
@torch.no_grad()
def test_thick_slices_pass(plan, head):
    net = create_segmenter(unproven("timm:test_resnet", plan), num_classes=2, head=head)
    assert net(torch.randn(2, 1, 7, 45, 64)).shape == (2, 2, 7, 45, 64)


@torch.no_grad()
def test_volumes_of_a_batch_do_not_touch_each_other(encoder):
    net = create_segmenter(encoder, num_classes=2).eval()
    volumes = torch.randn(2, 1, 12, 20, 17)
    torch.testing.assert_close(net(volumes)[1:], net(volumes[1:]), rtol=1e-4, atol=1e-5)


# -- deep supervision, shapes that are refused


@pytest.mark.parametrize(
    ("head", "coarser"),
    [("convolution", [(8, 16, 12), (4, 8, 6)]), ("subpixel", [(4, 8, 6)])],
    ids=HEADS,
)
def test_deep_supervision_is_a_list_in_training_alone(encoder, head, coarser):
    net = create_segmenter(encoder, num_classes=3, deep_supervision=True, head=head)
    volume = torch.randn(1, 1, 16, 32, 24)
    answers = net.train()(volume)
    assert [tuple(a.shape[2:]) for a in answers] == [(16, 32, 24), *coarser]
    assert net.eval()(volume).shape == (1, 3, 16, 32, 24)
    assert isinstance(create_segmenter(encoder, num_classes=3).train()(volume), torch.Tensor)


@pytest.mark.parametrize("shape", [(1, 2, 8, 8, 8), (1, 8, 8, 8), (1, 1, 0, 8, 8), (0, 1, 8, 8, 8)], ids=str)
@pytest.mark.parametrize("source", ["test_resnet", "unet"])
@pytest.mark.parametrize("create", [create_segmenter, create_classifier], ids=["segmenter", "classifier"])
def test_what_is_no_volume_of_these_channels_is_refused(encoder, create, source, shape):
    net = create(create_encoder("unet") if source == "unet" else encoder, num_classes=2)
    with pytest.raises(ShapeError, match="takes"):
        net(torch.zeros(shape))


@pytest.mark.parametrize("create", [create_segmenter, create_classifier], ids=["segmenter", "classifier"])
def test_no_class_is_refused(encoder, create):
    with pytest.raises(ShapeError, match="num_classes is 0"):
        create(encoder, num_classes=0)


def test_options_of_a_source_are_refused_beside_an_encoder(encoder):
    with pytest.raises(SourceError, match=r"options \['weights'\] belong to a source"):
        create_segmenter(encoder, num_classes=2, weights="timm")


# -- a plain MONAI script


def test_segmenter_drops_into_a_plain_monai_script():
    """MONAI's own engine, loss and inferer; of medi3d the network alone."""
    from ignite.engine import Events
    from monai.engines import SupervisedTrainer
    from monai.inferers import SlidingWindowInferer
    from monai.losses import DiceCELoss

    network = create_segmenter("timm:test_efficientnet", num_classes=3, in_channels=1, levels=3)
    before = copy.deepcopy(network.state_dict())
    cases = [{"image": torch.randn(1, 1, 16, 24, 24), "label": torch.randint(3, (1, 1, 16, 24, 24))}] * 2
    losses = []
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=cases,
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.05),
        loss_function=DiceCELoss(to_onehot_y=True, softmax=True),
    )
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: losses.append(e.state.output[0]["loss"]))
    trainer.run()
    assert len(losses) == 2
    assert losses[1] < losses[0]
    assert any(not torch.equal(v, before[k]) for k, v in network.state_dict().items())
    with torch.no_grad():
        answer = SlidingWindowInferer(roi_size=(16, 16, 16), overlap=0.25)(
            torch.randn(1, 1, 20, 33, 27), network.eval()
        )
    assert answer.shape == (1, 3, 20, 33, 27)


# -- from scratch, a network of one's own


@pytest.mark.parametrize("profile", ["mean", "centre", "repeat"])
@torch.no_grad()
def test_kernels_from_scratch_differ_along_depth_and_keep_the_variance(profile):
    """On noise the activations of each level are about as wide as those of the 2D network."""
    flat = timm.create_model("test_resnet", features_only=True, out_indices=(0, 1, 2)).eval()
    deep = create_encoder("timm:test_resnet", in_channels=3, profile=profile, levels=3).eval()
    kernel = next(p for p in deep.parameters() if p.dim() == 5 and p.shape[2] > 1)
    assert not torch.allclose(kernel[:, :, 0], kernel[:, :, 1])
    image, volume = torch.randn(2, 3, 64, 64), torch.randn(1, 3, 32, 64, 64)
    for expected, found in zip(flat(image), deep(volume), strict=True):
        assert 0.5 < float(found.std() / expected.std()) < 2


class Mine(nn.Module):
    def __init__(self):
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 6, 3, 2, 1)

    def forward(self, x):
        x = self.fine(x)
        return [x, self.coarse(x)]


@pytest.mark.parametrize("change", [{"profile": "centre"}, {"weights": "file"}], ids=["profile", "weights"])
def test_the_decoder_starts_the_same_whatever_fills_the_encoder(change, tmp_path):
    if "weights" in change:
        file = tmp_path / "encoder.safetensors"
        save_file(build_source("timm:test_resnet", levels=2).state_dict(), file)
        change = {"weights": f"file:{file}"}
    networks = []
    for changed in ({}, change):
        torch.manual_seed(5)
        settings = NetworkSettings(source="timm:test_resnet", levels=2, **changed)
        networks.append(create_network(settings, "segmentation", 2))
    one, other = (network.state_dict() for network in networks)
    differing = {name.split(".")[0] for name in one if not torch.equal(one[name], other[name])}
    assert differing == {"encoder"}


def test_a_network_of_ones_own_keeps_its_weights():
    net = Mine()
    encoder = create_encoder(net, in_channels=3)
    assert verify(net, encoder).exact
    torch.testing.assert_close(encoder.network.fine.weight.sum(2), net.fine.weight)
    assert encoder.report.source == "Mine"
    assert encoder.report.weights == {"name": "none", "licences": []}


def test_weights_for_a_network_of_ones_own_leave_it_as_it_was(tmp_path):
    net, other = Mine(), Mine()
    before = copy.deepcopy(net.state_dict())
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    encoder = create_encoder(net, weights=f"file:{tmp_path / 'other.safetensors'}", in_channels=3)
    assert verify(other, encoder).exact
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("name", ["conv", "logits"])
def test_a_network_that_gives_no_list_of_maps_is_refused(name):
    net = {"conv": nn.Conv2d(1, 2, 3, 2), "logits": timm.create_model("test_resnet")}[name]
    with pytest.raises(SourceError, match="must return a list of feature maps"):
        create_encoder(net)


# -- pretrained weights


@pytest.fixture
def published(shared, monkeypatch):
    monkeypatch.setenv("MEDI3D_WEIGHTS_PATH", str(shared / "weights"))


def tensors(network):
    return {k for k in network.state_dict() if not k.endswith("num_batches_tracked")}


@pytest.mark.parametrize("levels", [None, 3], ids=["all levels", "3 levels"])
def test_imagenet_fills_the_whole_encoder(published, levels):
    weights = "imagenet/efficientnet-lite0"
    encoder = create_encoder("timm:tf_efficientnet_lite0", weights=weights, levels=levels)
    report = encoder.report.weights
    counts = report["counts"]
    assert report["name"] == weights
    assert counts["fresh"] == 0
    assert report["adapted"] == ["conv_stem.weight"]
    assert counts["matched"] + counts["inflated"] + 1 == len(tensors(encoder.network))
    kernels = {k: v.shape[2] for k, v in encoder.network.state_dict().items() if v.dim() == 5}
    assert set(report["inflated"]) == {k for k, taps in kernels.items() if taps > 1} - {"conv_stem.weight"}


@pytest.mark.parametrize("source", ["inception_v1", "inception_v1_fine"], ids=["stem 2", "stem 1"])
@pytest.mark.parametrize("plan", ["isotropic", "video"])
def test_kinetics_fills_i3d_and_the_medical_variant(published, source, plan):
    encoder = create_encoder(source, weights="kinetics400/i3d-rgb", plan=plan, levels=2)
    counts = encoder.report.weights["counts"]
    assert encoder.strides[0][1] == (2 if source == "inception_v1" else 1)
    assert (counts["fresh"], counts["inflated"], encoder.report.weights["fraction"]) == (0, 0, 1)
    assert encoder.report.weights["adapted"] == ["Conv3d_1a_7x7.conv.weight"]
    assert counts["matched"] + 1 == len(tensors(encoder.network))
    kernel = encoder.network.Conv3d_2c_3x3.conv.weight
    assert not torch.allclose(kernel[:, :, 0], kernel[:, :, 1], atol=1e-3)  # trained along time, not spread


def test_2d_weights_of_a_file_are_inflated(tmp_path):
    flat = build_source("timm:test_resnet", levels=2)
    save_file(flat.state_dict(), tmp_path / "mine.safetensors")
    encoder = create_encoder("timm:test_resnet", weights=f"file:{tmp_path / 'mine.safetensors'}", levels=2)
    assert encoder.report.weights["counts"]["fresh"] == 0
    assert encoder.report.weights["counts"]["inflated"] > 0
    flat = adapt(flat)
    assert verify(flat, encoder).exact


def adapt(flat):
    """The 2D network for grey images: the sum over RGB."""
    stem = next(m for m in flat.modules() if isinstance(m, nn.Conv2d))
    stem.weight = nn.Parameter(stem.weight.detach().sum(1, keepdim=True))
    stem.in_channels = 1
    return flat


@torch.no_grad()
def test_3d_weights_of_a_file_come_back_as_they_were(tmp_path):
    first = create_encoder("timm:test_resnet", levels=2).eval()
    save_file(first.network.state_dict(), tmp_path / "mine.safetensors")
    again = create_encoder(
        "timm:test_resnet", weights=f"file:{tmp_path / 'mine.safetensors'}", levels=2
    ).eval()
    volume = torch.randn(1, 1, 9, 16, 16)
    for expected, found in zip(first(volume), again(volume), strict=True):
        assert torch.equal(expected, found)


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        ("timm:test_resnet", {"weights": "kinetics400/i3d-rgb"}, WeightsError, "has no place|fills"),
        ("inception_v1", {"weights": "imagenet/efficientnet-lite0"}, WeightsError, "fills|has no place"),
        ("inception_v1", {"weights": "kinetics400/i3d"}, WeightsError, "did you mean kinetics400/i3d-rgb"),
        ("inception_v1", {"weights": "timm"}, SourceError, "timm"),
        ("unet", {"weights": "timm"}, SourceError, "lean U-Net has no pretrained weights"),
        ("timm:resnet81", {}, SourceError, "near: .*resnet18"),
        ("timm:test_resnet", {"levels": 0}, SourceError, "at least 1 level, not 0"),
        ("timm:test_resnet", {"plan": "cubic"}, PlanError, "no plan 'cubic'"),
        ("timm:test_resnet", {"profile": "sum"}, PlanError, "unknown depth profile"),
        ("timm:test_resnet", {"in_channels": 0}, ShapeError, "at least 1 input channel"),
        (Mine(), {"levels": 1}, SourceError, "levels"),
        (Mine(), {"weights": "timm"}, SourceError, "timm"),
    ],
    ids=lambda value: str(value)[:30] if not isinstance(value, nn.Module) else "mine",
)
def test_what_does_not_fit_is_refused_in_one_line(published, source, options, error, message):
    with pytest.raises(error, match=message) as refusal:
        create_encoder(source, **options)
    assert "\n" not in str(refusal.value)


# -- levels, the lean baseline, configs


def test_the_first_levels_can_be_used_alone():
    assert unproven("timm:test_resnet", levels=2).strides == unproven("timm:test_resnet").strides[:2]
    assert create_encoder("unet", levels=2).strides == [(2, 2, 2), (4, 4, 4)]


def test_the_lean_baseline_is_a_unet_of_three_levels():
    net = create_segmenter("unet", num_classes=3, in_channels=2)
    assert net.encoder.strides == [(2, 2, 2), (4, 4, 4), (8, 8, 8)]
    assert net(torch.randn(1, 2, 20, 21, 22)).shape == (1, 3, 20, 21, 22)
    assert sum(p.numel() for p in net.parameters()) < 2e6


def test_a_config_builds_what_it_says():
    settings = NetworkSettings(
        "timm:test_resnet", levels=2, in_channels=2, deep_supervision=True, decoder_channels=[8, 8]
    )
    net = create_network(settings, "segmentation", 4)
    assert [head.weight.shape[:2] for head in net.heads] == [(4, 8), (4, 8)]
    assert net.encoder.in_channels == 2
    classifier = create_network(NetworkSettings("unet", dropout=0.1), "classification", 5)
    assert classifier(torch.randn(2, 1, 16, 16, 16)).shape == (2, 5)
    assert classifier.head[0].p == 0.1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("in_channels", 0),
        ("norm", "layer"),
        ("head", "linear"),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("levels", 0),
    ],
)
def test_impossible_settings_are_refused_by_name(key, value):
    with pytest.raises(ConfigError, match=f"network.{key} is {value!r}"):
        NetworkSettings(**{key: value})


def test_an_unknown_task_is_refused():
    with pytest.raises(ConfigError, match="task is 'detection'"):
        create_network(NetworkSettings("unet"), "detection", 2)


@pytest.mark.parametrize("source", ["inception_v1", "timm:tf_efficientnet_lite0"])
def test_features_stay_in_place_whatever_the_size(source):
    """TensorFlow's "same" would move them between odd and even sizes: an odd volume is padded first."""
    network = create_segmenter(source, num_classes=2, levels=2).eval()
    volume = torch.randn(1, 1, 23, 21, 19)
    padded = torch.nn.functional.pad(volume, (0, 1, 0, 3, 0, 1), mode="replicate")  # multiples of 4
    with torch.no_grad():
        torch.testing.assert_close(network(volume), network(padded)[..., :23, :21, :19])
        moved, kept = network.encoder(volume)[0], network.encoder(padded)[0]
    assert not torch.allclose(moved[..., 2:8, 2:8, 2:8], kept[..., 2:8, 2:8, 2:8], atol=1e-3)

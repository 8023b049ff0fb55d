"""Volumetric weights: each key map against the published architecture, built here with random weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medi3d.errors import ShapeError, SourceError, WeightsError
from medi3d.models.encoders import create_encoder
from medi3d.models.networks import create_segmenter
from medi3d.weights.catalogue import find_weights, get_row, list_weights
from medi3d.weights.keymaps import MEDICALNET_DEPTHS, get_keymap
from medi3d.weights.load import load_weights
from tests.weights.references import (
    ReferenceBlock,
    ReferenceNnUNet,
    assert_same,
    published,
    randomised,
)

MEDICALNET = [row for row in list_weights() if row.name.startswith("medicalnet/")]
UNETS = [get_row("modelsgenesis/chest_ct"), get_row("suprem/unet")]


class ReferenceMedicalNet(nn.Module):
    """Stem of stride 2, max-pool, four stages of stride 1, 2, 1, 1 and dilation 1, 1, 2, 4, and a head."""

    def __init__(self, depth, blocks):
        super().__init__()
        self.conv1 = nn.Conv3d(1, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm3d(64)
        bottleneck, channels = depth >= 50, 64
        for stage, (count, stride, dilation) in enumerate(
            zip(blocks, (1, 2, 1, 1), (1, 1, 2, 4), strict=True)
        ):
            layer, width = nn.Sequential(), 64 << stage
            for i in range(count):
                layer.append(
                    ReferenceBlock(
                        channels, width, bottleneck, depth in (18, 34), 1 if i else stride, dilation
                    )
                )
                channels = 4 * width if bottleneck else width
            self.add_module(f"layer{stage + 1}", layer)
        self.conv_seg = nn.Sequential(nn.Conv3d(channels, 2, 1))

    def forward(self, x):
        stem = F.relu(self.bn1(self.conv1(x)))
        first = self.layer1(F.max_pool3d(stem, 3, 2, 1))
        return [stem, first, self.layer4(self.layer3(self.layer2(first)))]


BLOCKS = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


@pytest.mark.parametrize("depth", [10, 18, 50])
@torch.no_grad()
def test_medicalnet_equals_the_published_architecture(depth, folder):
    reference = randomised(ReferenceMedicalNet(depth, BLOCKS[depth]))
    row = get_row(f"medicalnet/resnet{depth}")
    published(reference, folder / row.file)
    encoder = create_encoder(row.source, weights=row.name).eval()
    volume = torch.randn(1, 1, 17, 24, 31)
    assert_same(encoder(volume), reference(volume))
    weights = encoder.report.weights
    assert weights["fraction"] == 1
    assert weights["dropped"] == ["conv_seg.0.weight", "conv_seg.0.bias"]
    assert weights["counts"]["matched"] + len(weights["dropped"]) == sum(
        not key.endswith("num_batches_tracked") for key in reference.state_dict()
    )


@pytest.mark.parametrize("depth", MEDICALNET_DEPTHS)
def test_each_medicalnet_table_names_what_the_encoder_has(depth):
    with torch.device("meta"):
        encoder = create_encoder(f"medicalnet:resnet{depth}")
    assert set(get_keymap(f"medicalnet_resnet{depth}").table) == set(encoder.state_dict())


@pytest.mark.parametrize(
    ("depth", "millions"),
    [(10, 14.36), (18, 32.99), (34, 63.31), (50, 46.21), (101, 85.31), (152, 117.51), (200, 126.74)],
)
def test_medicalnets_have_the_published_number_of_parameters(depth, millions):
    with torch.device("meta"):
        encoder = create_encoder(f"medicalnet:resnet{depth}")
    tensors = encoder.state_dict().values()  # its README counts the statistics of norms as well
    assert sum(tensor.numel() for tensor in tensors) / 1e6 == pytest.approx(millions, abs=0.0051)


class ReferenceUnit(nn.Module):
    def __init__(self, before, after):
        super().__init__()
        self.conv1 = nn.Conv3d(before, after, 3, padding=1)
        self.bn1 = nn.BatchNorm3d(after)

    def forward(self, x):
        norm = self.bn1  # its statistics are always those of the batch
        return F.relu(F.batch_norm(self.conv1(x), None, None, norm.weight, norm.bias, True))


class ReferenceUNet(nn.Module):
    """The U-Net of Models Genesis and SuPreM; of the decoder what a checkpoint needs to have one."""

    def __init__(self):
        super().__init__()
        for name, before, after in (("64", 1, 64), ("128", 64, 128), ("256", 128, 256), ("512", 256, 512)):
            stage = nn.Module()
            stage.ops = nn.Sequential(ReferenceUnit(before, after // 2), ReferenceUnit(after // 2, after))
            self.add_module(f"down_tr{name}", stage)
        self.up_tr64 = nn.Module()
        self.up_tr64.up_conv = nn.ConvTranspose3d(4, 4, 2, 2)
        self.out_tr = nn.Module()
        self.out_tr.final_conv = nn.Conv3d(4, 1, 1)

    def forward(self, x):
        maps = []
        for name in ("64", "128", "256", "512"):
            maps.append(getattr(self, f"down_tr{name}").ops(F.max_pool3d(maps[-1], 2) if maps else x))
        return maps


def lps_to_dhw(x):
    """(x to left, y to posterior, z to superior) -> (D, H, W)."""
    return x.permute(0, 1, 4, 3, 2)


def ras_to_dhw(x):
    """(x to right, y to anterior, z to superior) -> (D, H, W)."""
    return x.permute(0, 1, 4, 3, 2).flip(3, 4)


@pytest.mark.parametrize(
    ("row", "wrapper", "prefix", "axes"),
    [
        (UNETS[0], "state_dict", "module.", lps_to_dhw),
        (UNETS[0], "state_dict", "", lps_to_dhw),
        (UNETS[1], "net", "module.backbone.", ras_to_dhw),
    ],
    ids=["genesis", "genesis bare", "suprem"],
)
@torch.no_grad()
def test_the_unet_equals_the_published_architecture_on_its_own_axes(row, wrapper, prefix, axes, folder):
    reference = randomised(ReferenceUNet())
    published(reference, folder / row.file, wrapper, prefix)
    encoder = create_encoder("unet3d", weights=row.name, contract=False).eval()
    volume = torch.randn(2, 1, 32, 16, 24)
    assert_same(encoder(axes(volume)), [axes(x) for x in reference(volume)])
    assert encoder.report.weights["counts"] == {
        "matched": 32,
        "inflated": 0,
        "adapted": 0,
        "fresh": 0,
        "dropped": len(reference.state_dict()) - 32,
    }


@torch.no_grad()
def test_prompts_of_suprem_are_dropped_and_nothing_else(folder):
    row, extra = UNETS[1], {"organ_embedding": torch.zeros(2), "controller.weight": torch.zeros(2)}
    state = {f"backbone.{key}": value for key, value in ReferenceUNet().state_dict().items()}
    torch.save({"net": state | extra}, folder / row.file)
    assert create_encoder("unet3d", weights=row.name).report.weights["fraction"] == 1
    torch.save({"net": state | {"swinViT.weight": torch.zeros(2)}}, folder / row.file)
    with pytest.raises(WeightsError, match=r"swinViT\.weight of the file has no place in the network"):
        create_encoder("unet3d", weights=row.name)


@torch.no_grad()
def test_ct_in_medi3ds_range_is_brought_to_the_published_one(folder):
    row = UNETS[0]
    published(randomised(ReferenceUNet()), folder / row.file)
    ours = create_encoder("unet3d", weights=row.name).eval()
    theirs = create_encoder("unet3d", weights=row.name, contract=False).eval()
    hu = torch.randint(-1000, 1001, (1, 1, 16, 16, 16)).float()
    assert_same(ours(hu / 1000), theirs((hu + 1000) / 2000))


@pytest.mark.parametrize("channels", [2, 4])
@torch.no_grad()
def test_one_channel_stems_take_any_number_of_channels(channels, folder):
    row = get_row("medicalnet/resnet10")
    published(randomised(ReferenceMedicalNet(10, BLOCKS[10])), folder / row.file)
    one = create_encoder(row.source, weights=row.name, levels=1).eval()
    many = create_encoder(row.source, weights=row.name, levels=1, in_channels=channels).eval()
    assert many.report.weights["adapted"] == ["conv1.weight"]
    volume = torch.randn(1, 1, 8, 8, 8)
    assert_same(many(volume.expand(-1, channels, -1, -1, -1)), one(volume))


@pytest.mark.parametrize("kind", ["plain", "residual"])
@torch.no_grad()
def test_nnunets_encoder_equals_the_published_architecture(kind, tmp_path):
    reference = randomised(ReferenceNnUNet(kind == "residual"))
    published(reference, tmp_path / "checkpoint_final.pth", "network_weights", "")
    encoder = create_encoder(f"nnunet3d:{kind}").eval()
    report = load_weights(encoder, tmp_path / "checkpoint_final.pth", keymap="nnunet")
    assert report.fraction == 1
    assert all("all_modules" in key or key.startswith("decoder.") for key in report.dropped)
    volume = torch.randn(1, 1, 32, 32, 64)
    assert_same(encoder(volume), reference(volume))


def test_nnunets_plain_checkpoint_is_no_residual_one(tmp_path):
    published(ReferenceNnUNet(residual=False), tmp_path / "plain.pth", "network_weights", "")
    with pytest.raises(WeightsError, match=r"nothing in it fills stem\.convs\.0"):
        load_weights(create_encoder("nnunet3d:residual"), tmp_path / "plain.pth", keymap="nnunet")


@pytest.mark.parametrize("row", [*MEDICALNET, *UNETS], ids=lambda row: row.name)
def test_rows_say_where_their_file_is_published_and_what_it_expects(row, folder):
    assert row.source in ("unet3d", *(f"medicalnet:resnet{depth}" for depth in MEDICALNET_DEPTHS))
    assert row.note
    with pytest.raises(WeightsError, match=f"published at {row.url}, or put {row.file} on") as caught:
        find_weights(row)
    assert "\n" not in str(caught.value)


def test_a_missing_tensor_is_refused_unless_asked_for(folder):
    row, state = get_row("medicalnet/resnet10"), ReferenceMedicalNet(10, BLOCKS[10]).state_dict()
    del state["layer4.0.conv2.weight"]
    torch.save({"state_dict": state}, folder / row.file)
    encoder = create_encoder(row.source)
    with pytest.raises(WeightsError, match=r"nothing in it fills layer4\.0\.conv2\.weight of the network"):
        load_weights(encoder, row)
    report = load_weights(encoder, row, expect_missing=["layer4.0.conv2.*"])
    assert report.fresh == ["layer4.0.conv2.weight"]
    assert report.fraction < 1


@pytest.mark.parametrize(("into", "has"), [(18, 10), (10, 18), (50, 34)])
def test_a_checkpoint_of_another_depth_is_refused_in_one_line(into, has, folder):
    row = get_row(f"medicalnet/resnet{into}")
    with torch.device("meta"):
        names = ReferenceMedicalNet(has, BLOCKS[has]).state_dict()
    torch.save({"state_dict": {key: torch.zeros(1) for key in names}}, folder / row.file)
    before = {key: value.clone() for key, value in create_encoder(row.source, levels=1).state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        load_weights(create_encoder(row.source), row)
    assert "\n" not in str(caught.value)
    assert before


@pytest.mark.parametrize("source", ["medicalnet:resnet10", "unet3d", "r3d:resnet18"])
@pytest.mark.parametrize("size", [(9, 17, 16), (1, 5, 3)], ids=str)
def test_volumetric_encoders_make_segmenters_for_any_size(source, size):
    net = create_segmenter(source, num_classes=3, levels=3)
    assert net(torch.randn(1, 1, *size)).shape == (1, 3, *size)


@pytest.mark.parametrize(
    ("source", "count"), [("medicalnet:resnet18", 3), ("unet3d", 4), ("segresnet3d", 3), ("anatomix", 3)]
)
def test_levels_leave_no_parameter_unused(source, count):
    for levels in range(1, count + 1):
        encoder = create_encoder(source, levels=levels)
        maps = encoder(torch.randn(1, 1, 16, 16, 16))
        assert [m.shape[1] for m in maps] == encoder.out_channels
        assert [tuple(16 // s for s in m.shape[2:]) for m in maps] == encoder.strides
        sum(m.sum() for m in maps).backward()
        assert all(p.grad is not None for p in encoder.parameters())


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        ("medicalnet:resnet19", {}, SourceError, "near: medicalnet:resnet1"),
        ("unet3", {}, SourceError, "near: .*unet3d"),
        ("unet3d", {"weights": "timm"}, SourceError, "weights 'timm' are for"),
        ("unet3d", {"levels": 5}, SourceError, "levels is 5: unet3d has 4 feature maps"),
        ("unet3d", {"in_channels": 0}, ShapeError, "at least 1 input channel, not 0"),
        ("unet3d", {"weights": "medicalnet/resnet11"}, WeightsError, "did you mean medicalnet/resnet10"),
    ],
    ids=["depth", "name", "timm", "levels", "channels", "weights"],
)
def test_bad_input_is_refused_in_one_line(source, options, error, message):
    with pytest.raises(error, match=message) as caught:
        create_encoder(source, **options)
    assert "\n" not in str(caught.value)


def test_volumes_that_do_not_fit_are_refused():
    encoder = create_encoder("unet3d")
    with pytest.raises(ShapeError, match=r"takes \(B, 1, D, H, W\) .* not \(1, 2, 16, 16, 16\)"):
        encoder(torch.zeros(1, 2, 16, 16, 16))
    with pytest.raises(ShapeError, match=r"\(8, 8, 8\) voxels is too small"):
        encoder(torch.zeros(1, 1, 8, 8, 8))

"""Each key map against the published architecture, narrow and with random weights: every key is accounted for
and the maps are the same.

References are the published package where it installs beside ours (MONAI; dynamic-network-architectures and
pytorchvideo if they are there), otherwise `references.py`, rebuilt from the published definition.
"""

import copy
from functools import partial

import pytest
import torch
from monai.networks.nets import SegResNetDS, SwinUNETR
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet

from medi3d.errors import ShapeError
from medi3d.models.encoders import create_encoder
from medi3d.models.volumetric.inflated import Merlin
from medi3d.models.volumetric.resnets import R3D, IrCSN
from medi3d.models.volumetric.swin import SwinEncoder
from medi3d.models.volumetric.unets import Anatomix, NnUNet3d, SegRes
from medi3d.weights.keymaps import IRCSN_DEPTHS, R3D_DEPTHS, get_keymap
from medi3d.weights.keymaps.resnet import BLOCKS
from medi3d.weights.load import load_weights
from tests.weights.references import (
    ReferenceAnatomix,
    ReferenceCSN,
    ReferenceMerlin,
    ReferenceNnUNet,
    ReferenceR3D,
    assert_same,
    randomised,
)

NARROW = (4, 8, 12, 16, 20, 20)
LESS = {18: (2, 1, 1, 2), 50: (1, 2, 1, 1)}


def filled(encoder, state, keymap, folder, dropped=()):
    """`encoder` with the published tensors of `state`, by way of a file; all but `dropped` must be used."""
    torch.save({"state_dict": state, "epoch": 3}, folder / "published.pth")
    report = load_weights(encoder.filled, folder / "published.pth", keymap=keymap)
    assert report.fraction == 1
    counted = {key for key in state if not key.endswith("num_batches_tracked")}
    left = {key for key in report.dropped if not key.endswith("num_batches_tracked")}
    assert len(counted) == len(left) + len(report.matched) + len(report.adapted)
    assert left == {key for key in counted if any(key.startswith(part) or part in key for part in dropped)}
    return encoder.eval()


@pytest.mark.parametrize("keymap", ["openmind", "nnunet"])
@torch.no_grad()
def test_openminds_resenc_is_nnunets_residual_encoder(keymap, tmp_path):
    reference = randomised(ReferenceNnUNet(True, NARROW))
    state = dict(reference.state_dict())
    if keymap == "openmind":  # what the pretext tasks add
        state |= dict.fromkeys(PRETEXT, torch.zeros(1))
    encoder = NnUNet3d(True, features=NARROW)
    filled(encoder, state, keymap, tmp_path, ("decoder.", *COPIES, *PRETEXT))
    volume = torch.randn(1, 1, 32, 32, 64)
    assert_same(encoder(volume), reference(volume))


COPIES = ("all_modules",)
PRETEXT = (
    *("projector.layer1.0.weight", "architecture.encoder.stages.0.blocks.0.conv1.conv.weight"),
    *("mask_tokens.0", "densify_norms.0.weight", "rotation_proj_head.weight", "recon_proj_head.0.weight"),
)


@torch.no_grad()
def test_totalsegmentators_plain_unet_sees_its_own_axes(tmp_path):
    reference = randomised(ReferenceNnUNet(False, NARROW))
    encoder = filled(
        NnUNet3d(False, features=NARROW),
        reference.state_dict(),
        "totalsegmentator",
        tmp_path,
        ("decoder.", *COPIES),
    )
    zyx_of_ras = torch.randn(1, 1, 32, 33, 65)  # sizes that a stride of two leaves symmetric
    assert_same(encoder(zyx_of_ras.flip(3, 4)), [x.flip(3, 4) for x in reference(zyx_of_ras)])


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@torch.no_grad()
def test_nnunets_own_package_agrees(residual, tmp_path):
    unet = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    count = {"n_blocks_per_stage": (1, 3, 4, 6, 6, 6)} if residual else {"n_conv_per_stage": 2}
    reference = randomised(
        (unet.ResidualEncoderUNet if residual else unet.PlainConvUNet)(
            input_channels=1,
            n_stages=6,
            features_per_stage=NARROW,
            conv_op=nn.Conv3d,
            kernel_sizes=3,
            strides=[1, 2, 2, 2, 2, 2],
            **count,
            num_classes=3,
            n_conv_per_stage_decoder=1 if residual else 2,
            conv_bias=True,
            norm_op=nn.InstanceNorm3d,
            norm_op_kwargs={"eps": 1e-5, "affine": True},
            nonlin=nn.LeakyReLU,
            nonlin_kwargs={"inplace": True},
        )
    )
    keymap = "openmind" if residual else "nnunet"
    encoder = NnUNet3d(residual, features=NARROW)
    filled(encoder, reference.state_dict(), keymap, tmp_path, ("decoder.", *COPIES))
    volume = torch.randn(1, 1, 32, 32, 64)
    assert_same(encoder(volume), reference.encoder(volume))


@pytest.mark.parametrize("depth", LESS)
@torch.no_grad()
def test_r3d_equals_the_published_architecture(depth, tmp_path):
    reference = randomised(ReferenceR3D(depth >= 50, LESS[depth], 8))
    encoder = R3D(depth, 3, widths=(8, 16, 32, 64), blocks=LESS[depth])
    filled(encoder, reference.state_dict(), f"r3d_resnet{depth}", tmp_path, ("fc.",))
    clip = torch.randn(1, 3, 16, 48, 40)
    assert_same(encoder(clip), reference(clip))


@torch.no_grad()
def test_ircsn_equals_the_published_architecture(tmp_path):
    reference = randomised(ReferenceCSN(LESS[50], 8))
    encoder = IrCSN(50, 3, widths=(8, 16, 32, 64), blocks=LESS[50])
    filled(encoder, reference.state_dict(), "mmaction_ircsn50", tmp_path, ("cls_head.",))
    clip = torch.randn(1, 3, 8, 48, 40)
    assert_same(encoder(clip), reference(clip))


@torch.no_grad()
def test_ircsn_equals_pytorchvideos_of_the_same_tensors():
    csn = pytest.importorskip("pytorchvideo.models.csn")
    reference = randomised(
        csn.create_csn(stem_dim_out=8, stem_pool=nn.MaxPool3d, head_pool_kernel_size=(1, 2, 2))
    )
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.eps = 1e-3  # the weights' own; pytorchvideo takes no other than 1e-5 in its blocks
    encoder = IrCSN(50, 3, widths=(8, 16, 32, 64)).eval()
    ours, theirs = encoder.state_dict(), list(reference.state_dict().values())[:-2]  # the head's two
    in_their_order = sorted(ours, key=shortcut_first)
    encoder.load_state_dict(dict(zip(in_their_order, theirs, strict=True)))
    clip, answers = torch.randn(1, 3, 8, 64, 64), []
    x = reference.blocks[0].activation(reference.blocks[0].norm(reference.blocks[0].conv(clip)))
    answers.append(x)
    x = reference.blocks[0].pool(x)
    for stage in reference.blocks[1:5]:
        x = stage(x)
        answers.append(x)
    assert_same(encoder(clip), answers)


def shortcut_first(name):
    """Where pytorchvideo registers a tensor: of a block first the shortcut, convolution and norm by turns."""
    parts = name.split(".")
    if not parts[0].startswith("layer"):
        return (0, 0, 0)
    unit = 0 if parts[2] == "downsample" else int(parts[2][-1])
    return (int(parts[0][-1]), int(parts[1]), unit)


@pytest.mark.parametrize("prefix", ["encode_image.i3_resnet.", ""], ids=["CLIP", "five years"])
@torch.no_grad()
def test_merlin_equals_the_published_architecture_on_its_own_axes(prefix, tmp_path):
    net2d = ResNet(Bottleneck, [1, 2, 1, 1])
    reference = randomised(ReferenceMerlin(copy.deepcopy(net2d)))
    state = {prefix + key: value for key, value in reference.state_dict().items()}
    heads = ("classifier.", "contrastive_head.")
    if prefix:
        state |= {"encode_text.linear_layer.weight": torch.zeros(2), "logit_scale": torch.ones([])}
        heads = (*heads, "encode_text.", "logit_scale")
    encoder = filled(Merlin(net2d=net2d), state, "merlin", tmp_path, heads)
    volume = torch.randn(1, 1, 40, 32, 24)  # (x, y, z) in RAS
    answers = [x.permute(0, 1, 2, 4, 3).flip(3, 4) for x in reference(volume)]
    assert_same(encoder(volume.permute(0, 1, 4, 3, 2).flip(3, 4)), answers)


@torch.no_grad()
def test_our_inflation_of_a_resnet_from_its_centre_is_merlins():
    net2d = ResNet(Bottleneck, [1, 2, 1, 1]).eval()
    for norm in net2d.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(std=0.1)
            norm.running_var.uniform_(0.5, 1.5)
    ours, reference = Merlin(net2d=copy.deepcopy(net2d)).eval(), ReferenceMerlin(copy.deepcopy(net2d)).eval()
    volume = torch.randn(1, 1, 40, 32, 24)
    answers = [x.permute(0, 1, 2, 4, 3).flip(3, 4) for x in reference(volume)]
    assert_same(ours(volume.permute(0, 1, 4, 3, 2).flip(3, 4)), answers)


@pytest.mark.parametrize("whole", [True, False], ids=["SegResNetDS", "SegResEncoder"])
@torch.no_grad()
def test_ct_fms_encoder_is_monais(whole, tmp_path):
    reference = randomised(SegResNetDS(init_filters=8, blocks_down=SegRes.BLOCKS, dsdepth=4, out_channels=3))
    state = (reference if whole else reference.encoder).state_dict()
    encoder = filled(SegRes(width=8), state, "ct_fm", tmp_path, ("up_layers.",))
    volume = torch.randn(1, 1, 32, 16, 48)
    assert_same(encoder(volume), reference.encoder(volume))


@torch.no_grad()
def test_vocos_encoder_is_monais_on_its_own_axes(tmp_path):
    reference = randomised(SwinUNETR(1, 3, feature_size=12, use_v2=True))
    state, decoder = reference.state_dict(), ("decoder", "out.")
    filled(SwinEncoder(12), state, "voco", tmp_path, decoder)  # as VoComni's
    state = {key: tensor for key, tensor in state.items() if not key.startswith(decoder)}
    encoder = filled(SwinEncoder(12), state, "voco", tmp_path)  # as those of self-supervision
    seen = {}
    for number in range(1, 6):  # each decoder block is shown what comes from below, and a map of the encoder
        block = getattr(reference, f"decoder{number}")
        block.register_forward_pre_hook(lambda _, x, number=number: seen.__setitem__(number, x))
    volume = torch.randn(1, 1, 32, 32, 64)  # (x, y, z) in RAS
    reference(volume)
    answers = [*(seen[number][1] for number in range(1, 6)), seen[5][0]]
    turned = volume.permute(0, 1, 4, 3, 2).flip(3, 4)
    assert_same(encoder(turned), [x.permute(0, 1, 4, 3, 2).flip(3, 4) for x in answers])


@pytest.mark.parametrize("dev", [False, True], ids=["anatomix", "dev"])
@torch.no_grad()
def test_anatomix_equals_the_published_architecture(dev, tmp_path):
    downs = 5 if dev else 4
    reference = randomised(ReferenceAnatomix(downs, 2, dev))
    decoder = tuple(f"model.{number}." for number in range(reference.ups[0], len(reference.model)))
    encoder = Anatomix(width=2, downs=downs, dev=dev)
    filled(encoder, reference.state_dict(), "anatomix_dev" if dev else "anatomix", tmp_path, decoder)
    volume = torch.randn(1, 1, 64, 64, 80)
    assert_same(encoder(volume), reference(volume))


ON_META = {
    **{f"r3d_resnet{depth}": f"r3d:resnet{depth}" for depth in R3D_DEPTHS},
    **{f"mmaction_ircsn{depth}": f"ircsn:resnet{depth}" for depth in IRCSN_DEPTHS},
    "ct_fm": "segresnet3d",
    "anatomix": "anatomix",
    "anatomix_dev": "anatomix:dev",
}


@pytest.mark.parametrize(("keymap", "source"), ON_META.items(), ids=ON_META)
def test_each_table_names_what_the_full_encoder_has(keymap, source):
    with torch.device("meta"):
        encoder = create_encoder(source)
    counters = {key for key in encoder.state_dict() if key.endswith("num_batches_tracked")}
    assert set(get_keymap(keymap).table.values()) | counters == set(encoder.state_dict())


def test_the_tables_of_voco_and_merlin_name_what_the_full_encoders_have():
    assert set(get_keymap("voco").table.values()) == set(SwinEncoder(12).state_dict())
    net2d = ResNet(Bottleneck, list(BLOCKS[152])).state_dict()
    assert set(get_keymap("merlin").table.values()) == {key for key in net2d if not key.startswith("fc.")}


PARAMETERS = {  # in millions, as published, and the source that has as many
    "ircsn:resnet50": (13.131152 - 400 * 2049e-6, "mmaction2, metafile.yml, less the head"),
    "ircsn:resnet152": (29.703568 - 400 * 2049e-6, "mmaction2, metafile.yml, less the head"),
    "segresnet3d": (77.76, "the file's 311 MB"),
}


@pytest.mark.parametrize("source", PARAMETERS)
def test_encoders_have_the_published_number_of_parameters(source):
    with torch.device("meta"):
        encoder = create_encoder(source, in_channels=3 if "resnet3d" not in source else 1)
    millions, _ = PARAMETERS[source]
    assert encoder.report.parameters / 1e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize(("downs", "width", "dev", "millions"), [(4, 16, False, 6), (5, 32, True, 94)])
def test_the_rebuilt_anatomix_has_the_published_number_of_parameters(downs, width, dev, millions):
    with torch.device("meta"):
        whole = ReferenceAnatomix(downs, width, dev)
    assert round(sum(p.numel() for p in whole.parameters()) / 1e6) == millions


NARROWED = {
    "r3d": partial(R3D, 18, widths=(4, 8, 12, 16)),
    "ircsn": partial(IrCSN, 50, widths=(4, 8, 12, 16), blocks=(1, 1, 1, 1)),
    "swin": partial(SwinEncoder, 12),
}


@pytest.mark.parametrize("build", NARROWED.values(), ids=NARROWED)
def test_levels_leave_no_parameter_unused(build):
    for levels in (1, 2, 4):
        encoder = build(levels=levels)
        maps = encoder(torch.randn(1, 1, 16, 16, 32))
        assert [m.shape[1] for m in maps] == encoder.out_channels
        assert [tuple(map(int.__floordiv__, (16, 16, 32), m.shape[2:])) for m in maps] == encoder.strides
        sum(m.sum() for m in maps).backward()
        assert all(p.grad is not None for p in encoder.parameters())


@pytest.mark.parametrize(("build", "size"), [(SwinEncoder, 32), (Anatomix, 31)], ids=["swin", "anatomix"])
def test_volumes_that_are_too_small_are_refused(build, size):
    encoder = build(12) if build is SwinEncoder else build(width=2)
    with pytest.raises(ShapeError, match=f"{size}, {size}.* voxels is too small for .* needs 3[23] voxels"):
        encoder(torch.zeros(1, 1, size, size, size))


@torch.no_grad()
def test_a_contract_of_rgb_shows_grey_volumes_three_times():
    encoder = create_encoder("r3d:resnet18", weights="kinetics700/r3d18", levels=1, read_weights=False)
    assert encoder.conv1.in_channels == 3
    volume = torch.linspace(-1, 1, 4 * 8 * 8).view(1, 1, 4, 8, 8)
    mean, std = torch.tensor([0.4345, 0.4051, 0.3775]), torch.tensor([0.2768, 0.2713, 0.2737])
    shown = ((volume + 1) / 2 - mean.view(3, 1, 1, 1)) / std.view(3, 1, 1, 1)
    assert torch.allclose(encoder.normaliser(volume), shown, atol=1e-6)
    assert encoder(volume)[0].shape == (1, 64, 4, 4, 4)

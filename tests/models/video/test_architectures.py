"""The video networks: as large as published, exact where they are inflated, and equal to others' code."""

import pytest
import torch
from torch import nn
from torchvision.models.video import r2plus1d_18, swin3d_t

from medi3d.errors import ShapeError, SourceError
from medi3d.inflation.fold import Call, Fold
from medi3d.inflation.plan import DepthLayer
from medi3d.inflation.rules import Rule
from medi3d.models.networks import NetworkSettings, create_classifier, create_network
from medi3d.models.video import PUBLISHED, VIDEO
from medi3d.models.video.figure2 import C3D
from medi3d.models.video.transformers import MViT, TimeEmbedding, TimeEmbeddingRule

FIVE = ("convnet_lstm", "c3d", "two_stream", "fused_two_stream", "two_stream_i3d")
HEAVY = ("c3d", "p3d", "timesformer_base", "video_swin_tiny", "mvit_base", "two_stream_i3d", "r50_nonlocal")
"""Over a second each; the light ones keep watch over what all share."""
NAMES = [pytest.param(name, marks=[pytest.mark.slow] if name in HEAVY else []) for name in VIDEO]


def clip_for(name, batch=1, classes=None):
    """The smallest clip that the network takes: frames of 64×64 where it leaves the choice."""
    facts = PUBLISHED[name]
    size = facts.size if name in ("c3d", "mvit_base") else 64
    frames = 8 if name in ("i3d", "p3d", "r2plus1d_18", "two_stream_i3d", "convnet_lstm") else facts.frames
    return torch.randn(batch, facts.channels, frames, size, size)


def encoders(network):
    parts = network.encoder if isinstance(network.encoder, nn.ModuleList) else [network.encoder]
    parts = [part for whole in parts for part in (whole, *whole.children())]
    return [part for part in parts if hasattr(part, "report")]


def test_every_network_has_its_facts():
    assert set(VIDEO) == set(PUBLISHED)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_as_large_as_published_and_names_classes(name):
    network = create_classifier(name, num_classes=400).eval()
    millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    assert millions == pytest.approx(PUBLISHED[name].parameters, rel=0.03 if name in FIVE else 0.02)
    with torch.inference_mode():
        logits = network(clip_for(name))
    assert logits.shape == (1, 400)
    assert logits.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in VIDEO if name != "mvit_base"])
def test_it_is_exact_on_boring_clips_when_it_starts(name):
    proofs = [part.report.exactness for part in encoders(create_classifier(name, num_classes=2, proof=True))]
    assert proofs
    assert all(proof.exact for proof in proofs), [proof.failure for proof in proofs]


@pytest.mark.parametrize("name", ["x3d_m", "convnet_lstm", "r50_i3d"])
def test_everything_learns_in_bfloat16_too(name):
    network = create_classifier(name, num_classes=3).train()
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(clip_for(name, batch=2))
    logits.float().square().sum().backward()
    still = [key for key, parameter in network.named_parameters() if parameter.grad is None]
    assert not still


@torch.inference_mode()
def test_r2plus1d_is_torchvisions():
    theirs = r2plus1d_18(num_classes=4).eval()
    ours = create_classifier("r2plus1d_18", num_classes=4).eval()
    fill(ours, theirs, theirs.state_dict().items())
    clip = torch.randn(1, 3, 8, 32, 32)
    assert torch.allclose(ours(clip), theirs(clip), rtol=1e-4, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize(
    "frames", [8, pytest.param(32, marks=pytest.mark.slow)], ids=["one window", "shifted"]
)
def test_video_swin_is_torchvisions(frames):
    theirs, ours = swin3d_t(num_classes=4).eval(), create_classifier("video_swin_tiny", num_classes=4).eval()
    ordered = []
    for key, tensor in theirs.state_dict().items():
        if "relative_position_index" in key:
            continue
        if key.endswith("reduction.weight"):  # timm has the norm of a merging first
            held = (key, tensor)
            continue
        ordered.append((key, tensor))
        if key.endswith(".norm.bias") and key.startswith("features"):
            ordered.append(held)
    fill(ours, theirs, ordered)
    clip = torch.randn(1, 3, frames, 224, 224)
    assert torch.allclose(ours(clip), theirs(clip), rtol=1e-3, atol=1e-4)


def fill(ours, theirs, ordered):
    """Give `ours` the tensors of another's network, in their order, and its zeros around the clip."""
    keys = list(ours.state_dict())
    ordered = list(ordered)
    assert len(keys) == len(ordered)
    state = {
        key: tensor.view(ours.state_dict()[key].shape) for key, (_, tensor) in zip(keys, ordered, strict=True)
    }
    ours.load_state_dict(state)
    for rule in ours.modules():
        if isinstance(rule, Rule):
            object.__setattr__(rule.depth, "padding", "zeros")


def test_frames_are_told_apart_once_their_embedding_has_learnt():
    fold = Fold()
    embedding = TimeEmbeddingRule(TimeEmbedding(8, 6, prefix=1), DepthLayer(), fold, "mean")
    tokens = torch.randn(2 * 4, 5, 6)
    with fold.running(Call(batch=2)):
        assert torch.equal(embedding(tokens), tokens)
        nn.init.normal_(embedding.weight)
        change = (embedding(tokens) - tokens).view(2, 4, 5, 6)
    assert not change[:, :, 0].any()  # the class token
    assert torch.allclose(change[0], change[1], atol=1e-5)
    assert torch.allclose(change[0, :, 1], embedding.weight.detach()[::2], atol=1e-5)  # 4 frames of 8


@pytest.mark.parametrize("name", ["r50_i3d", pytest.param("timesformer_base", marks=pytest.mark.slow)])
def test_weights_of_timm_bring_their_input_contract(name):
    network = create_classifier(name, num_classes=2, weights="timm", read_weights=False)
    assert network.encoder.normaliser is not None
    assert create_classifier(name, num_classes=2).encoder.normaliser is None


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("x3d_m", {"weights": "timm"}, "x3d_m is trained from scratch"),
        ("r50_i3d", {"plan": "video"}, "has no option plan"),
        ("two_stream", {"in_channels": 4}, "two_stream takes 5 channels, RGB and flow, not 4"),
        ("two_stream_i3d", {"weights": "kinetics400/i3d-rgb"}, "takes RGB\\+FLOW"),
        ("i3d", {"weights": "timm"}, "'timm' are for sources timm:NAME"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_what_it_cannot_do_is_said(name, options, message):
    with pytest.raises(SourceError, match=message):
        create_classifier(name, num_classes=2, **options)


@pytest.mark.parametrize(
    ("build", "size"),
    [(lambda: C3D(nn.Identity(), 2, 0.5), 112), (lambda: MViT(2, 3, 0.5), 224)],
    ids=["c3d", "mvit_base"],
)
def test_frames_of_a_size_that_it_was_not_made_for_are_refused(build, size):
    with pytest.raises(ShapeError, match=f"{size}x{size}, not"):
        build()(torch.zeros(1, 3, 16, 96, 96))


def test_a_config_names_a_network_and_leaves_its_plan_to_it():
    settings = NetworkSettings(source="x3d_m", in_channels=3)
    assert create_network(settings, "classification", 2).encoder.plan.name == "x3d_m"
    with pytest.raises(SourceError, match="its kernel plan are its own"):
        create_network(NetworkSettings(source="x3d_m", in_channels=3, plan="video"), "classification", 2)
    with pytest.raises(SourceError, match="unknown source"):
        create_network(NetworkSettings(source="x3d_m"), "segmentation", 2)

"""The five architectures of the I3D paper's Figure 2: what they see of a clip, and what they answer."""

import pytest
import torch
from torch import nn

from medi3d.errors import ShapeError
from medi3d.models.networks import create_classifier
from medi3d.models.video.figure2 import (
    C3D,
    ConvNetLSTM,
    FlowStack,
    FusedTwoStream,
    MiddleFrame,
    TwoStream,
    frames_of,
    stacks_of,
)
from medi3d.models.video.published_classifier import build_published_classifier
from medi3d.models.video.registry import of_any_length, over_windows


class Seen(nn.Module):
    """An encoder that writes down what it is shown, and gives its mean brightness as four features."""

    def __init__(self):
        super().__init__()
        self.out_channels, self.clips = [4], []

    def forward(self, clip):
        self.clips.append(clip)
        return [clip.mean(dim=1, keepdim=True).expand(-1, 4, -1, -1, -1)]


class Fixed(nn.Module):
    """An encoder that gives the same maps whatever it is shown."""

    def __init__(self, maps):
        super().__init__()
        self.maps = maps

    def forward(self, clip):
        return self.maps


def numbered(frames, channels=1):
    """A clip whose every pixel is its frame's number, plus a hundred for each channel."""
    clip = torch.arange(frames).float().view(1, 1, frames, 1, 1)
    return clip + 100 * torch.arange(channels).view(1, channels, 1, 1, 1)


def test_the_lstm_sees_every_fifth_frame_and_answers_at_each():
    network = ConvNetLSTM(Seen(), 3, dropout=0.0)
    assert network.train()(numbered(25).repeat(2, 1, 1, 1, 1)).shape == (2, 3, 5)
    assert network.encoder.clips[0][0].flatten().tolist() == [0, 5, 10, 15, 20]


def test_the_lstms_answer_is_that_of_its_last_step():
    network = ConvNetLSTM(Seen(), 3, dropout=0.0).eval()
    clip = torch.randn(2, 1, 20, 2, 2)
    answer = network(clip)
    network.training = True  # only the flag: batch norm stays as it is
    assert torch.allclose(network(clip)[:, :, -1], answer)


def test_a_stack_is_one_image_and_its_frame_the_middle_one():
    assert frames_of(numbered(20)).flatten().tolist() == [5, 15]
    stacks = stacks_of(numbered(20, channels=2))
    assert stacks.shape == (1, 20, 2, 1, 1)
    assert stacks[0, :4, 0].flatten().tolist() == [0, 100, 1, 101]  # u and v of each frame side by side
    assert stacks[0, :2, 1].flatten().tolist() == [10, 110]


@pytest.mark.parametrize(
    ("network", "channels", "windows"),
    [
        (MiddleFrame(Seen(), 2), 3, 25),
        (FlowStack(Seen(), 2), 2, 25),
        (FusedTwoStream(Seen(), 2), 5, 5),
    ],
    ids=["two-stream RGB", "two-stream flow", "fused"],
)
def test_ten_seconds_are_covered_as_in_table_1(network, channels, windows):
    network.eval()(torch.randn(1, channels, 250, 2, 2))
    assert len(network.encoder.clips) == windows


@pytest.mark.parametrize(("length", "starts"), [(16, [0]), (17, [0, 1]), (40, [0, 12, 24]), (32, [0, 16])])
def test_windows_cover_a_clip_evenly(length, starts):
    seen = []

    def classify(window):
        seen.append(int(window[0, 0, 0]))
        return window.mean(dim=2).flatten(1)

    over_windows(classify, numbered(length), 16)
    assert seen == starts


@pytest.mark.parametrize(("length", "windows"), [(1, [1]), (512, [512]), (513, [512, 512])])
def test_memory_for_a_clip_has_a_bound(length, windows):
    seen = []

    def classify(window):
        seen.append(window.shape[2])
        return window.mean(dim=2).flatten(1)

    of_any_length(torch.zeros(1, 2, length, 1, 1), classify)
    assert seen == windows


def test_a_clip_shorter_than_a_window_is_refused():
    with pytest.raises(ShapeError, match=r"sees 16 frames at once, the clip has 3: set data.frames to 16"):
        over_windows(lambda window: window, numbered(3), 16)


@pytest.mark.parametrize("add", [True, False])
def test_streams_answer_apart_in_training_and_together_after(add):
    network = TwoStream(MiddleFrame(Seen(), 2, dropout=0.0), FlowStack(Seen(), 2, dropout=0.0), add=add)
    clip = torch.randn(2, 5, 10, 2, 2)
    rgb, flow = network.train()(clip)
    together = network.eval()(clip)
    assert torch.allclose(together, (rgb + flow) * (1 if add else 0.5))
    assert len(network.encoder) == 2
    assert not any(key.startswith("encoder") for key in network.state_dict())


def test_c3d_says_that_it_needs_a_batch():
    network = C3D(nn.Identity(), 2, dropout=0.5).train()
    with pytest.raises(ShapeError, match=r"training\.batch_size to 2"):
        network(torch.zeros(1, 3, 16, 112, 112))


def test_i3d_averages_what_its_published_pool_would_see_of_small_frames():
    network = create_classifier("i3d", num_classes=3).eval()
    features = torch.randn(1, 1024, 3, 2, 2)
    network.encoder = Fixed([features])
    weight, bias = network.head.network.Conv3d_0c_1x1.weight, network.head.network.Conv3d_0c_1x1.bias
    pooled = features.mean(dim=(3, 4))  # (1, 1024, 3)
    expected = ((pooled[..., :-1] + pooled[..., 1:]) / 2).mean(dim=2) @ weight.flatten(1).t() + bias
    assert torch.allclose(network(None), expected, atol=1e-5)


@pytest.fixture
def weights(shared, monkeypatch):
    monkeypatch.setenv("MEDI3D_WEIGHTS_PATH", str(shared / "weights"))


@pytest.mark.parametrize("classes", [400, 8])
def test_published_weights_fill_the_head_where_its_classes_fit(weights, classes):
    published, _ = build_published_classifier("kinetics400/i3d-rgb")
    network = create_classifier("i3d", num_classes=classes, weights="kinetics400/i3d-rgb")
    theirs = published.network.state_dict()
    assert all(
        torch.equal(tensor, theirs[key]) for key, tensor in network.encoder.network.state_dict().items()
    )
    head = network.head.network.Conv3d_0c_1x1.weight
    same = head.shape == theirs["Logits.Conv3d_0c_1x1.weight"].shape
    assert same is (classes == 400)
    assert not same or torch.equal(head, theirs["Logits.Conv3d_0c_1x1.weight"])
    assert network.encoder.normaliser is not None


@pytest.mark.slow
@torch.inference_mode()
def test_i3d_answers_as_the_published_network(weights):
    published, _ = build_published_classifier("kinetics400/i3d-rgb")
    network = create_classifier("i3d", num_classes=400, weights="kinetics400/i3d-rgb").eval()
    clip = torch.rand(1, 3, 24, 224, 224) * 2 - 1
    assert torch.allclose(network(clip), published(clip).mean(dim=2), rtol=1e-4, atol=1e-4)


def test_two_streams_take_weights_for_each(weights):
    network = create_classifier("two_stream_i3d", num_classes=4, weights="kinetics400/i3d-rgb+none")
    alone = create_classifier("i3d", num_classes=4, weights="kinetics400/i3d-rgb")
    kernel = "network.Conv3d_1a_7x7.conv.weight"
    assert torch.equal(network.rgb.encoder.state_dict()[kernel], alone.encoder.state_dict()[kernel])
    assert network.flow.encoder.state_dict()[kernel].shape[1] == 2


@pytest.mark.parametrize("name", ["two_stream", "fused_two_stream"])
@pytest.mark.parametrize("channels", [2, 3])
def test_one_stream_alone_takes_its_own_channels(name, channels):
    network = create_classifier(name, num_classes=3, in_channels=channels).eval()
    frames = 50 if name == "fused_two_stream" else 10
    with torch.inference_mode():
        assert network(torch.randn(1, channels, frames, 32, 32)).shape == (1, 3)
    both = sum(p.numel() for p in create_classifier(name, num_classes=3).parameters())
    assert sum(p.numel() for p in network.parameters()) < both

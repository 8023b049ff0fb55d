"""Calls of one network do not see each other, and nothing of a call outlives it or is guessed."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
import torch.nn.utils.prune
from torch import nn
from torch.utils.checkpoint import checkpoint

from medi3d.errors import ShapeError, SourceError
from medi3d.inflation.fold import Fold
from medi3d.inflation.network import build, describe_layers, inflate
from medi3d.inflation.plan import KernelPlan

JOINT = KernelPlan(name="joint", statistics="volume")
WINDOWS = KernelPlan(name="windows", attention_form="windows", attention=2)


def pyramid():
    """Strided convolution, pool, squeeze and norm over the volume: all that asks for the batch."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, 2, 1), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, 2, 1)
    )


def swin():
    return timm.create_model(
        "swin_tiny_patch4_window7_224",
        features_only=True,
        img_size=64,
        window_size=4,
        strict_img_size=False,
        embed_dim=6,
        depths=(2, 2),
        num_heads=(2, 2),
        out_indices=(0, 1),
    )


NETWORKS = {"joint": (pyramid, JOINT), "windows": (swin, WINDOWS)}


def made(name):
    make, plan = NETWORKS[name]
    return build(make(), plan)[0].double().eval()


def tensors(output):
    return output if isinstance(output, list) else [output]


@pytest.mark.parametrize(("name", "calls"), [("joint", 1000), ("windows", 40)])
@torch.no_grad()
def test_calls_in_four_threads_with_mixed_batches_answer_as_alone(name, calls):
    net3d, channels = made(name), 1 if name == "joint" else 3
    side = 16 if name == "joint" else 64
    volumes = [torch.randn(b, channels, 12 // b, side, side).double() for b in (1, 2, 3, 6)]
    alone = [tensors(net3d(volume)) for volume in volumes]

    @torch.no_grad()
    def wrong(number):
        found = tensors(net3d(volumes[number % 4]))
        return not all(torch.allclose(f, a) for f, a in zip(found, alone[number % 4], strict=True))

    with ThreadPoolExecutor(4) as threads:
        assert sum(threads.map(wrong, range(calls))) == 0


def test_replicas_with_an_uneven_last_batch_answer_as_alone():
    """What DataParallel does with a batch of 5 on two devices: copies that share the fold, in threads."""
    net3d = made("joint")
    batch = torch.randn(5, 1, 4, 16, 16, dtype=torch.float64)
    replicas = [net3d._replicate_for_data_parallel() for _ in range(2)]
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda pair: pair[0](pair[1]), zip(replicas, batch.split(3), strict=True)))
    torch.testing.assert_close(torch.cat(found), net3d(batch))


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not"])
def test_a_foreign_checkpoint_inside_is_refused_and_one_around_is_exact(reentrant):
    net3d = made("joint")
    volume = torch.randn(2, 1, 8, 16, 16, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(net3d(volume).square().sum(), volume)
    whole = checkpoint(net3d, volume, use_reentrant=reentrant)
    net3d(volume[:1])  # another batch in between
    whole.square().sum().backward()
    torch.testing.assert_close(volume.grad, expected[0], rtol=0, atol=0)
    inner = net3d.network[4].forward
    net3d.network[4].forward = lambda x: checkpoint(inner, x, use_reentrant=reentrant)
    out = net3d(volume)
    with pytest.raises(ShapeError, match="checkpoint_activations"):
        out.sum().backward()


def test_a_part_that_is_computed_again_during_another_call_is_refused():
    """The call that is running then is not the one that the part belongs to."""
    net3d = made("joint")
    inner = net3d.network[4].forward
    net3d.network[4].forward = lambda x: checkpoint(inner, x, use_reentrant=False)
    out = net3d(torch.randn(2, 1, 8, 16, 16, dtype=torch.float64))
    handle = net3d.network[0].register_forward_hook(lambda *_: out.sum().backward())
    with pytest.raises(ShapeError, match="outside of the network's forward"):
        net3d(torch.randn(1, 1, 8, 16, 16, dtype=torch.float64))
    handle.remove()


def test_a_switch_for_checkpoints_of_timms_is_refused_in_one_line():
    net = timm.create_model("test_resnet", features_only=True)
    net3d = build(net, KernelPlan.isotropic())[0]
    net3d.network.set_grad_checkpointing(True)
    with pytest.raises(ShapeError) as refused:
        sum(x.sum() for x in net3d(torch.randn(2, 3, 32, 32, 32))).backward()
    assert "\n" not in str(refused.value)


def test_a_layer_alone_has_no_batch():
    net3d = made("joint")
    net3d(torch.randn(2, 1, 8, 16, 16).double())
    with pytest.raises(ShapeError, match="number of volumes is unknown"):
        net3d.network[4](torch.randn(8, 4, 8, 8).double())
    with pytest.raises(ShapeError):
        _ = Fold().batch


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_an_encoder_survives_pickle_and_copy(name):
    net3d, channels = made(name), 1 if name == "joint" else 3
    volume = torch.randn(2, channels, 4, 64, 64, dtype=torch.float64)
    expected = tensors(net3d(volume))
    for twin in (pickle.loads(pickle.dumps(net3d)), copy.deepcopy(net3d)):
        assert twin.fold is not net3d.fold
        assert all(torch.equal(f, e) for f, e in zip(tensors(twin(volume)), expected, strict=True))


def seen_shapes(module, shapes):
    return module.register_forward_hook(lambda m, args, out: shapes.append(tuple(out.shape)))


@pytest.mark.parametrize("number", [0, 1, 3], ids=["replaced", "kept", "wrapped"])
def test_hooks_of_the_given_network_are_kept(number):
    net, shapes = pyramid(), []
    seen_shapes(net[number], shapes)
    net[number].register_forward_hook(lambda m, args, out: 2 * out)
    net3d = inflate(net)
    shapes.clear()
    net3d(torch.randn(2, 1, 8, 16, 16))
    assert shapes == [{0: (8, 4, 8, 8), 1: (8, 4, 8, 8), 3: (4, 4, 4, 4)}[number]]


def test_a_hook_that_makes_the_weight_is_refused_in_one_line():
    net = pyramid()
    nn.utils.prune.random_unstructured(net[0], "weight", 0.5)
    with pytest.raises(SourceError, match="bake") as refused:
        inflate(net)
    assert "\n" not in str(refused.value)


def test_the_given_network_is_not_changed():
    class Counting(nn.Sequential):
        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    net = nn.Sequential(Counting(nn.Conv2d(1, 2, 3)), nn.BatchNorm2d(2))
    net[0].register_buffer("calls", torch.zeros(()))
    net.train()
    net[1].eval()  # a norm kept frozen
    before = copy.deepcopy(net.state_dict())
    inflate(net)
    assert (net.training, net[0].training, net[1].training) == (True, True, False)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_lazy_layers_are_refused_and_stay_lazy():
    net = nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU())
    with pytest.raises(SourceError, match="lazy"):
        inflate(net)
    assert isinstance(net[0], nn.LazyConv2d)


@pytest.mark.parametrize("side", [32, 64, 96, 128])
@torch.no_grad()
def test_windows_are_counted_in_each_call(side):
    """As many are in the batch as the image has; those of the proof's image mean nothing elsewhere."""
    net = swin().double().eval()
    net3d, image = build(net, KernelPlan.isotropic())[0], torch.randn(2, 3, side, side, dtype=torch.float64)
    for found, expected in zip(net3d(image.unsqueeze(2).repeat(1, 1, 5, 1, 1)), net(image), strict=True):
        torch.testing.assert_close(found, expected.unsqueeze(2).expand_as(found))
    assert {layer.rule for layer in describe_layers(net3d) if "attn" in layer.name} == {"AttentionRule"}

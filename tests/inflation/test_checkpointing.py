"""Activations computed again give what kept ones give, to the last bit, and are fewer."""

import copy
import pickle

import pytest
import timm
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from medi3d import create_classifier, create_segmenter
from medi3d.errors import SourceError
from medi3d.inflation.checkpointing import CheckpointedBlock, blocks, checkpoint_activations
from medi3d.inflation.network import build
from medi3d.inflation.plan import KernelPlan
from medi3d.models.inception import InceptionV1

SMALL_VIT = {
    "img_size": 64,
    "patch_size": 8,
    "embed_dim": 12,
    "depth": 2,
    "num_heads": 2,
    "dynamic_img_size": True,
    "out_indices": (0, 1),
    "proj_drop_rate": 0.3,
    "drop_path_rate": 0.3,
}
SOURCES = {
    "resnet18": lambda: timm.create_model(
        "test_resnet", features_only=True, out_indices=(0, 1, 2), drop_path_rate=0.5
    ),
    "convnext": lambda: timm.create_model("test_convnext", features_only=True, drop_path_rate=0.5),
    "densenet": lambda: timm.create_model(
        "densenet121", features_only=True, out_indices=(0, 1), block_config=(3, 2), growth_rate=4
    ),
    "vit": lambda: timm.create_model("vit_tiny_patch16_224", features_only=True, **SMALL_VIT),
    "inception": lambda: InceptionV1(("Conv3d_1a_7x7", "Mixed_3b")),
}


def encoder_of(name):
    torch.manual_seed(5)
    return build(SOURCES[name](), KernelPlan.isotropic(), in_channels=1)[0].double().train()


def train(network, batches, run=None):
    """Two passes of unequal batches in one graph: gradients, and the state behind them."""
    torch.manual_seed(7)
    loss = torch.zeros(())
    for volume in batches:
        out = (run or network)(volume)
        for x in out if isinstance(out, list) else [out]:
            loss = loss + (x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)).sum()
    loss.backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return gradients, dict(network.named_buffers()), torch.rand(3)


def assert_same(found, expected):
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-12, atol=0)
    assert torch.equal(found[2], expected[2])  # the generator went as far


def batches(depth=4, side=32):
    torch.manual_seed(3)
    return [torch.randn(b, 1, depth, side, side, dtype=torch.float64) for b in (3, 1)]


@pytest.mark.parametrize("name", SOURCES)
def test_gradients_statistics_and_draws_are_those_of_plain_training(name):
    plain = encoder_of(name)
    checkpointed = checkpoint_activations(copy.deepcopy(plain))
    assert any(isinstance(module, CheckpointedBlock) for module in checkpointed.modules())
    assert_same(train(checkpointed, batches()), train(plain, batches()))


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not"])
def test_blocks_inside_of_a_checkpoint_of_the_callers_are_exact(reentrant):
    plain = encoder_of("convnext")  # it has no running statistics, which such a checkpoint moves twice
    nested = checkpoint_activations(copy.deepcopy(plain))

    def run(volume):
        return checkpoint(lambda x: tuple(nested(x)), volume.requires_grad_(), use_reentrant=reentrant)[-1]

    expected = train(plain, batches(), lambda volume: plain(volume)[-1])
    assert_same(train(nested, batches(), run), expected)


class Two(nn.Module):
    """A pyramid of two blocks."""

    def __init__(self):
        super().__init__()
        wide = [(3, 2), (2, 4)]
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o), nn.ReLU(True), nn.Conv2d(o, o, 1))
            for i, o in wide
        )

    def forward(self, x):
        first = self.blocks[0](x)
        return [first, self.blocks[1](first)]


@pytest.mark.parametrize("depth", [1, 5])
@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_a_whole_segmenter_is_exact(norm, depth):
    torch.manual_seed(5)
    encoder = build(nn.Sequential(Two()), KernelPlan.isotropic(), in_channels=1)[0]
    plain = create_segmenter(encoder, num_classes=2, norm=norm, channels=(3, 3)).double().train()
    checkpointed = checkpoint_activations(copy.deepcopy(plain))
    decoder = [module for module in checkpointed.decoder.modules() if isinstance(module, CheckpointedBlock)]
    assert len(decoder) == len(plain.decoder.join) + plain.decoder.has_input_branch
    assert_same(train(checkpointed, batches(depth, 12)), train(plain, batches(depth, 12)))


def test_networks_that_are_3d_from_the_start_and_classifiers_are_exact():
    torch.manual_seed(5)
    plain = create_classifier("unet", num_classes=2, dropout=0.5, levels=2).double().train()
    checkpointed = checkpoint_activations(copy.deepcopy(plain))
    assert_same(train(checkpointed, batches(8, 8)), train(plain, batches(8, 8)))


def kept(network, volume):
    """Bytes that autograd keeps for the backward pass, parameters apart."""
    own = {p.untyped_storage().data_ptr() for p in (*network.parameters(), *network.buffers())}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = network(volume)
    del out
    return sum(storages.values())


@pytest.mark.parametrize(("name", "share"), [("resnet18", 0.6), ("convnext", 0.2), ("vit", 0.5)])
def test_less_is_kept(name, share):
    plain = encoder_of(name)
    volume = batches()[0]
    before = kept(plain, volume)
    checkpoint_activations(plain)
    assert kept(plain, volume) < share * before
    checkpoint_activations(plain, enabled=False)
    assert kept(plain, volume) == before


def test_a_checkpointed_encoder_pickles_and_keeps_its_names():
    plain = encoder_of("vit")
    keys = list(plain.state_dict())
    checkpointed = checkpoint_activations(checkpoint_activations(plain))  # twice is once
    assert list(checkpointed.state_dict()) == keys
    twin = pickle.loads(pickle.dumps(checkpointed))
    assert [type(m).__name__ for m in twin.modules()] == [type(m).__name__ for m in checkpointed.modules()]
    volume = batches()[0]
    assert torch.equal(twin.eval()(volume)[-1], checkpointed.eval()(volume)[-1])


def test_a_network_without_blocks_is_refused():
    with pytest.raises(SourceError, match="no blocks"):
        checkpoint_activations(nn.Sequential(nn.Conv3d(1, 2, 3), nn.ReLU()))


def test_a_block_that_changes_its_input_is_refused():
    """Its input, as it is kept, would no longer be what it was given."""
    block = nn.Sequential(nn.ReLU(inplace=True), nn.Conv3d(2, 2, 1), nn.Conv3d(2, 2, 1))
    net = checkpoint_activations(nn.Sequential(nn.Conv3d(1, 2, 1), block))
    with pytest.raises(SourceError, match="in place"):
        net(torch.randn(1, 1, 2, 2, 2))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: timm.create_model("resnet18"), [f"layer{s}.{b}" for s in (1, 2, 3, 4) for b in (0, 1)]),
        (
            lambda: InceptionV1(("Mixed_3c",)),
            ["Conv3d_1a_7x7", "Conv3d_2b_1x1", "Conv3d_2c_3x3", "Mixed_3b", "Mixed_3c"],
        ),
    ],
    ids=["resnet18", "inception"],
)
def test_blocks_are_those_of_the_papers(make, expected):
    net = make()
    paths = {module: path for path, module in net.named_modules()}
    assert [paths[block] for block in blocks(net)] == expected

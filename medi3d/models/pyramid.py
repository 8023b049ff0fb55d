"""Feature maps of a classification network: the last map at each resolution, found by tracing it once.

torchvision and MONAI publish networks that end in logits. Their computation is traced symbolically
(`torch.fx`) and run on one image; the encoder's maps are the last map `(N, C, H, W)` between blocks at each
stride. What comes after the last one, the pooling and the classifier, is cut off. Parameters keep the names
that the library gave them, so that its published state dicts fit.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn

from medi3d.errors import SourceError

IMAGE_SIZE = 128
"""Height and width of the image that is traced, in pixels: two positions remain at stride 64."""

BLOCKS = frozenset(
    {
        *("BasicBlock", "Bottleneck", "CNBlock", "_DenseBlock", "_Transition"),
        *("FusedMBConv", "InvertedResidual", "_InvertedResidual", "MBConv", "ResBottleneckBlock"),
        *("MBConvBlock", "ResNetBlock", "ResNetBottleneck"),
    }
)
"""Classes of torchvision and MONAI that are kept whole: maps are taken between blocks, never inside one,
where a strided block has already widened the output of the block before it."""

_POOLS_TO_FIXED_SIZE = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


def extract_pyramid(net2d: nn.Module, levels: int | None = None) -> nn.Module:
    """The part of a classification network that returns its feature maps as a list, fine to coarse.

    Steps that run only in training must lie inside blocks or modules without children: the network is
    traced in evaluation mode.

    Args:
        net2d: takes `(N, C, H, W)`; put into evaluation mode and modified.
        levels: number of maps to return, from the finest; later layers are dropped; None: all.

    Raises:
        SourceError: it cannot be traced, or its maps are not a pyramid of `(N, C, H, W)`.
    """
    name = type(net2d).__name__
    graph, root = _trace(net2d.eval(), name)
    maps = _last_map_of_each_stride(
        fx.GraphModule(root, graph, class_name=name), _input_channels(net2d, name)
    )
    if len(maps) < 2 or any(coarse != 2 * fine for fine, coarse in pairwise(maps)):
        raise SourceError(
            f"{name} has no feature maps (N, C, H, W) that halve from stage to stage (strides {list(maps)}): "
            "it is not an image encoder"
        )
    if levels is not None and levels > len(maps):
        raise SourceError(f"levels is {levels}: {name} has {len(maps)} feature maps")
    for node in graph.nodes:
        if node.op == "output":
            graph.erase_node(node)
            break
    graph.output(list(maps.values())[:levels])
    graph.eliminate_dead_code()
    pyramid = fx.GraphModule(root, graph, class_name=name)
    pyramid.delete_all_unused_submodules()
    return pyramid.train()


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is kept whole."""
        childless = next(m.children(), None) is None
        return childless or type(m).__name__ in BLOCKS or super().is_leaf_module(m, module_qualified_name)


def _trace(net2d: nn.Module, name: str) -> tuple[fx.Graph, nn.Module]:
    tracer = _Tracer()
    try:
        graph = tracer.trace(net2d)
    except Exception as error:  # control flow on values; the network's own code may raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SourceError(f"{name} cannot be traced for its feature maps: {reason}") from error
    root = tracer.root
    assert isinstance(root, nn.Module)
    return graph, root


def _input_channels(net2d: nn.Module, name: str) -> int:
    for layer in net2d.modules():
        if isinstance(layer, nn.Conv2d):
            return layer.in_channels
    raise SourceError(f"{name} has no 2D convolution")


@torch.no_grad()
def _last_map_of_each_stride(module: fx.GraphModule, channels: int) -> dict[int, fx.Node]:
    """Strides 1, 2, 4, ... in the order of execution while they grow, each with its last node."""
    recorder = _Recorder(module)
    image = torch.zeros(1, channels, IMAGE_SIZE, IMAGE_SIZE)
    try:
        recorder.run(image)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise SourceError(f"{type(module).__name__} takes no {tuple(image.shape)} image: {reason}") from error
    maps: dict[int, fx.Node] = {}
    for node, shape in recorder.shapes.items():
        if len(shape) != 4:
            continue
        height, width = shape[2:]
        if height != width or height < 2 or IMAGE_SIZE % height:
            continue
        stride = IMAGE_SIZE // height
        if stride >= max(maps, default=1):
            maps[stride] = node
    return maps


class _Recorder(fx.Interpreter):
    """Runs a traced network and records the shape of every map."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[fx.Node, torch.Size] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one step; the input, and the output of pools to a fixed size, are not recorded."""
        result = super().run_node(n)
        fixed = n.op == "call_module" and isinstance(self.fetch_attr(str(n.target)), _POOLS_TO_FIXED_SIZE)
        if isinstance(result, Tensor) and n.op in ("call_module", "call_function") and not fixed:
            self.shapes[n] = result.shape
        return result

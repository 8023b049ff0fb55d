"""The base class of rules, and the registry from a layer's type to its rule."""

from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from medi3d import torchvision_shim
from medi3d.axes import to_pair
from medi3d.errors import SourceError
from medi3d.inflation.fold import Fold
from medi3d.inflation.kernels import Exactness
from medi3d.inflation.plan import ALL_SLICES, DepthLayer, Kind

torchvision_shim.install()  # before timm, which imports torchvision
from timm.layers import (  # noqa: E402
    AvgPool2dSame,
    Conv2dSame,
    ScaledStdConv2dSame,
    StdConv2dSame,
)
from timm.layers.pool2d_same import MaxPool2dSame  # noqa: E402

_TENSORFLOW_SAME = (Conv2dSame, StdConv2dSame, ScaledStdConv2dSame, MaxPool2dSame, AvgPool2dSame)

Geometry = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
"""Kernel, stride and dilation of a layer as (height, width)."""


class Rule(nn.Module):
    """The 3D twin of one 2D layer, running on folded tensors.

    Subclasses describe what the 2D layer does in-plane (`geometry_of`), keep its parameters under
    the same names, and implement `forward`.
    """

    kind: ClassVar[Kind] = "conv"

    def __init__(self, layer: nn.Module, depth: DepthLayer, fold: Fold, profile: str) -> None:
        super().__init__()
        self.depth = depth
        self.fold = fold
        self.profile = profile
        self.multiplicity = 1
        padding = getattr(layer, "padding", 0)
        self.padded = any(padding) if isinstance(padding, (tuple, list)) else padding not in (0, "valid")
        self.same = isinstance(layer, _TENSORFLOW_SAME) and getattr(layer, "same_pad", True)
        self.kernel_2d, self.stride_2d, self.dilation_2d = self.geometry_of(layer)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module; function calls inside it are left to the rule."""
        if self.fold.caller is None:
            return super().__call__(*args, **kwargs)
        with self.fold.quiet():
            return super().__call__(*args, **kwargs)

    @classmethod
    def of(
        cls, layer: nn.Module, depth: DepthLayer, fold: Fold, profile: str, channels: int | None = None
    ) -> "Rule":
        """The module that takes the layer's place.

        Args:
            channels: new number of input channels, where `layer` is the network's first.
        """
        first = {} if channels is None else {"channels": channels}
        return cls(layer, depth, fold, profile, **first)

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        """Whether this rule applies to this layer of its type; if not, the layer stays unchanged."""
        return True

    @classmethod
    def under(cls, layer: nn.Module, depth: DepthLayer) -> "type[Rule] | None":
        """The rule for the layer where the plan asks for `depth`; None: the layer stays unchanged.

        Raises:
            PlanError: the layer cannot do what the plan asks for.
        """
        return cls

    def settle(self, network: nn.Module, path: str) -> None:
        """Inspect or change the surrounding modules, once the rule is in place at `path`.

        Raises:
            PlanError: they are not what the rule needs.
        """

    def flat_state(self) -> dict[str, Tensor]:
        """Parameters of the 2D layer that this one equals on boring volumes, if not its own."""
        return {}

    @classmethod
    def geometry_of(cls, layer: nn.Module) -> Geometry:
        """In-plane kernel, stride and dilation of the 2D layer."""
        conv: Any = layer
        return to_pair(conv.kernel_size), to_pair(conv.stride), to_pair(getattr(conv, "dilation", 1))

    @property
    def exact_on(self) -> Exactness:
        """The volumes on which, by design, each slice of the output is what the 2D layer gives for it.

        A step along depth drops slices, and layers differ in which ones.
        """
        return "any" if self.depth.kernel == self.depth.stride == 1 else "boring"

    @property
    def learnt(self) -> bool:
        """Whether training has changed the layer so that it no longer equals any 2D layer."""
        return False

    def extra_repr(self) -> str:
        """Kernel and stride as (depth, height, width), for `print(network)`."""
        kernel, stride = (self.depth.kernel, *self.kernel_2d), (self.depth.stride, *self.stride_2d)
        return f"kernel={kernel}, stride={stride}, depth_padding={self.depth.padding}"

    def depth_padding(self, slices: int) -> tuple[int, int]:
        """Slices to add before and after, for ceil(slices / stride) output positions.

        They are split like the layer's in-plane padding: TensorFlow's "same" halves
        the total, torch starts half a kernel early, and a layer without padding starts inside.
        """
        if self.depth.padding == "valid":
            return 0, 0
        reach = (self.depth.kernel - 1) * self.depth.dilation + 1
        positions = -(-slices // self.depth.stride)
        total = (positions - 1) * self.depth.stride + reach - slices
        if self.same:
            leading = max(total, 0) // 2
        elif self.padded or self.depth.stride == 1:
            leading = (reach - 1) // 2
        else:
            leading = max(reach - self.depth.stride, 0) // 2
        if torch.compiler.is_compiling() and not self.same:
            total = reach - 1  # the same for every depth; an incomplete step may remain at the end
        return leading, total - leading


_RULES: dict[type[nn.Module], type[Rule]] = {}
_ATTENTION: dict[str, type[Rule]] = {}


def register_attention_rule(form: str) -> Callable[[type[Rule]], type[Rule]]:
    """Class decorator: this rule is for attention of that form, see `KernelPlan.attention_form`.

    `joint` applies to every layer with timm's switch for torch's attention, `fused_attn`; `joint-all` too,
    over all slices; the others apply to layers that they fit.
    """

    def register(rule: type[Rule]) -> type[Rule]:
        _ATTENTION[form] = rule
        return rule

    return register


def attention_rule(depth: DepthLayer) -> type[Rule]:
    """The rule for the form of attention that a plan asks for."""
    everywhere = depth.attention_form == "joint" and depth.kernel == ALL_SLICES
    return _ATTENTION["joint-all" if everywhere else depth.attention_form]


_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks"),
    *("_state_dict_hooks", "_state_dict_pre_hooks"),
    *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)


def move_hooks(layer: nn.Module, rule: Rule) -> None:
    """Move the hooks of the replaced layer to its rule; they see folded tensors.

    Raises:
        SourceError: a hook computes the layer's weight, which has another shape in the rule.
    """
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, (WeightNorm, SpectralNorm, BasePruningMethod)):
            raise SourceError(
                f"a hook ({type(hook).__name__}) computes its weight: bake it in first, with "
                "remove_weight_norm, remove_spectral_norm (torch.nn.utils) or torch.nn.utils.prune.remove"
            )
    for name in _HOOKS:
        own = getattr(layer, name)
        setattr(rule, name, own)
        setattr(layer, name, type(own)())  # the rule may keep the layer and call it
    rule._is_full_backward_hook = layer._is_full_backward_hook


def adopt(layer: nn.Module, new: type[nn.Module]) -> None:
    """Make `layer` an instance of `new` too, in place; methods of `new` come before its own."""
    kind: Any = type(layer)
    unnamed: Any = new  # for the type checker: a cache needs hashable arguments
    layer.__class__ = _joined(unnamed, kind)


def own_type(rule: Rule) -> type[Rule]:
    """The rule's class as written in the source, without the classes joined to it."""
    written = (kind for kind in type(rule).__mro__ if "_origins" not in vars(kind))
    return next(kind for kind in written if issubclass(kind, Rule))


@cache
def _joined(new: Any, own: Any) -> Any:
    """The class that derives from both. No module defines it, so `pickle` rebuilds it from its parts."""

    def reduce(layer: Any, protocol: Any) -> Any:
        _, _, *state = super(joined, layer).__reduce_ex__(protocol)
        return _blank, joined._origins, *state

    origins = (new, *getattr(own, "_origins", (own,)))
    members = {"__reduce_ex__": reduce, "_origins": origins}
    joined: Any = type(f"{new.__name__}_{own.__name__}", (new, own), members)
    return joined


def _blank(*origins: Any) -> nn.Module:
    """An empty layer of joined classes, the layer's own last, for `pickle` to fill."""
    kind = origins[-1]
    for new in reversed(origins[:-1]):
        kind = _joined(new, kind)
    blank: nn.Module = kind.__new__(kind)
    return blank


def register_rule(*types: type[nn.Module]) -> Callable[[type[Rule]], type[Rule]]:
    """Class decorator: this rule inflates layers of these types and of their subclasses."""

    def register(rule: type[Rule]) -> type[Rule]:
        _RULES.update(dict.fromkeys(types, rule))
        return rule

    return register


def registered_type(layer: nn.Module) -> type[nn.Module]:
    """The type for which the rule of `layer` was registered: its own, or the nearest base class."""
    return next((base for base in type(layer).__mro__ if base in _RULES), type(layer))


def find_rule(layer: nn.Module) -> type[Rule] | None:
    """The rule for a layer: that of its own type, else of the nearest base class; None where none fits."""
    for base in type(layer).__mro__:
        if base in _RULES and _RULES[base].fits(layer):
            return _RULES[base]
    return _ATTENTION["joint"] if hasattr(layer, "fused_attn") else None

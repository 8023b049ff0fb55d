"""Inflate a whole 2D network: trace it, put the rules in, prove the result."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from medi3d.axes import DEPTH, Triple
from medi3d.errors import InexactError, PlanError, ShapeError, SourceError
from medi3d.inflation.exactness import TOLERANCE, ExactnessReport
from medi3d.inflation.fold import Fold
from medi3d.inflation.image_sizes import ImageSizes, find_depth_multiple
from medi3d.inflation.kernels import EXACTNESS, PROFILES, Exactness
from medi3d.inflation.pacing import NetworkPacing, paced
from medi3d.inflation.plan import KernelPlan
from medi3d.inflation.reach import Level, measure_levels
from medi3d.inflation.rules import (
    Caller,
    FunctionalCalls,
    Rule,
    TubeletRule,
    call_rule,
    find_rule,
    hoist,
    let_call,
)
from medi3d.inflation.rules.base import move_hooks, own_type
from medi3d.inflation.rules.counting import count_items
from medi3d.inflation.source import baked, check_outputs, refuse_own_forward
from medi3d.inflation.tracing import BATCH, Trace, copy_of, trace
from medi3d.inflation.verify import verify


@dataclass(frozen=True)
class InflatedLayer:
    """One row of the report: kernels and strides as (depth, height, width)."""

    name: str
    kernel_2d: tuple[int, int]
    kernel_3d: tuple[int, int, int]
    """Along depth, 0 means all slices (attention)."""
    stride_3d: tuple[int, int, int]
    padding: str
    rule: str


@dataclass
class InflationReport:
    """The result of `inflate`, with its proof."""

    plan: KernelPlan
    profile: str
    layers: list[InflatedLayer]
    levels: list[Level]
    parameters: int
    exactness: ExactnessReport
    exact_by_nature: bool
    """False for a profile or plan that cannot equal the 2D network on boring volumes."""
    exact_on: Exactness = "boring"
    """Volumes on which every layer with depth equals its 2D layer; never if profile or training broke it."""
    source: str = ""
    weights: dict[str, Any] = field(default_factory=dict)

    @property
    def max_rel_error(self) -> float:
        """Worst max|3D − 2D| / max|2D| over levels and depth positions, float64."""
        return self.exactness.max_rel_error

    def to_dict(self) -> dict[str, Any]:
        """The contents of `medi3d inflate --json`."""
        return {
            "source": self.source,
            "plan": self.plan.to_dict(),
            "profile": self.profile,
            "layers": [asdict(layer) for layer in self.layers],
            **self._proof(),
            "exact_by_nature": self.exact_by_nature,
            "exact_on": self.exact_on,
            "parameters": self.parameters,
            "weights": self.weights,
        }

    def _proof(self) -> dict[str, Any]:
        proof = self.exactness.to_dict()
        for row, level in zip(proof["levels"], self.levels, strict=False):
            row["receptive_field_voxels"] = list(level.reach)
        return proof


class Inflated(nn.Module):
    """A 2D network that runs on volumes: `(B, C, D, H, W)` in, its outputs with depth unfolded.

    Feature maps `(B·D', C, H', W')` of the 2D network come out as `(B, C, D', H', W')`, vectors as
    `(B, C, D')`. `network` is the 2D network with rules in place of some layers; parameters keep
    their names, and kernels have one more axis.
    """

    report: InflationReport
    normaliser: nn.Module | None
    """Maps the data's range and channels to those that the weights expect; the proof leaves it out."""
    sizes: ImageSizes | None
    """Sizes that the 2D network takes: other volumes are padded, and maps cropped; None: unknown."""
    built_for: int | None
    """Height and width of the images that `build_source` built the 2D network for; None: its default."""

    def __init__(
        self,
        network: nn.Module,
        fold: Fold,
        seen: Trace,
        in_channels: int,
        plan: KernelPlan,
        profile: str,
        calls: dict[str, Rule] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.calls = nn.ModuleList((calls or {}).values())
        self.call_paths = list(calls or {})
        self.own_calls = {
            (call.function, call.number): rule
            for path, rule in (calls or {}).items()
            if not (call := seen.calls[path]).module
        }
        self.fold = fold
        self.in_channels = in_channels
        self.image_channels = seen.channels
        self.plan = plan
        self.profile = profile
        self.normaliser = None
        self.sizes = self.built_for = None
        self.traced_size = max(seen.size)
        self.levels, self.deepest = measure_levels(self, fold, seen.size)

    @property
    def out_channels(self) -> list[int]:
        """Channels of each output."""
        return [level.channels for level in self.levels]

    @property
    def strides(self) -> list[Triple]:
        """Voxels of the input per position of each output, as (depth, height, width)."""
        return [level.stride for level in self.levels]

    def forward(self, volume: Tensor) -> Any:
        """Run on `(B, C, D, H, W)`.

        Raises:
            ShapeError: the input is not 5-D, is empty, or has another number of channels.
        """
        if volume.dim() == 5 and volume.shape[1] != self.in_channels:
            raise ShapeError(
                f"this network takes {self.in_channels} channel(s), the input {tuple(volume.shape)} "
                f"has {volume.shape[1]}; inflate with in_channels={volume.shape[1]}"
            )
        if self.normaliser is not None:
            volume = self.normaliser(volume)
        padded = volume if self.sizes is None else self.sizes.pad(volume)
        with self.fold.folded(padded) as slices:
            outputs = self.fold.unfold(self.run_folded(slices))
        return outputs if padded is volume else self._cropped(outputs, volume.shape[DEPTH:])

    def fit_to(self, sizes: ImageSizes | None) -> None:
        """From now on, pad volumes to these sizes, and depth to the multiple that branches need."""
        self.sizes = None
        if sizes is None:
            return
        if sizes.only is not None:  # its maps have fixed sizes, which give the strides
            self.levels[:] = [_at_only_size(level, sizes.only) for level in self.levels]
        multiple = find_depth_multiple(self, sizes, self.traced_size)
        self.sizes = replace(sizes, depth_multiple=multiple)

    def _cropped(self, outputs: Any, size: Sequence[int]) -> Any:
        """Maps of a padded volume without the positions that lie entirely in the padding."""
        if not isinstance(outputs, list):
            return outputs
        return [_crop(x, size, level.stride) for x, level in zip(outputs, self.levels, strict=True)]

    def run_folded(self, slices: Tensor) -> Any:
        """Run the folded 2D network alone, on what `Fold.fold` returns; the result goes to `Fold.unfold`."""
        if not self.calls:
            return self.network(slices)
        caller = Caller(self.own_calls)
        with self.fold.calling(caller), FunctionalCalls(self.fold, caller):
            return self.network(slices)

    def rules(self) -> dict[str, Rule]:
        """Every layer and function call that works along depth, by its path."""
        layers = {path: layer for path, layer in self.network.named_modules() if isinstance(layer, Rule)}
        calls: Any = zip(self.call_paths, self.calls, strict=True)
        return {**layers, **dict(calls)}


def _at_only_size(level: Level, size: int) -> Level:
    """The level with strides from its map's size where no rule saw a step (a slice `[::2]`, a reshape)."""
    told = [
        step if extent is None or size / extent < 1.75 * step else round(size / extent)
        for step, extent in zip(level.stride[1:], level.extents, strict=True)
    ]
    return replace(level, stride=(level.stride[0], told[0], told[1]))


def _crop(x: Tensor, size: Sequence[int], stride: Triple) -> Tensor:
    depth, height, width = (-(-s // step) for s, step in zip(size, stride, strict=True))
    return x[:, :, :depth, :height, :width] if x.dim() == 5 else x


def inflate(
    net2d: nn.Module,
    plan: KernelPlan | str = "isotropic",
    *,
    profile: str = "mean",
    in_channels: int | None = None,
    allow_inexact: bool = False,
    size: int | tuple[int, int] | None = None,
) -> Inflated:
    """Turn a 2D network into a 3D one with the same outputs on boring volumes, and prove it.

    The given network is not changed. The result has `.report`.

    Args:
        net2d: takes `(N, C, H, W)`; returns a tensor, or a list or dict of them.
        plan: kernels along depth; a `KernelPlan`, a plan's name, or a YAML file.
        profile: how a kernel is spread over its taps, see `kernels.PROFILES`.
        in_channels: channels of the volumes, if not those of the images. One channel takes the sum
            of the RGB kernels.
        allow_inexact: return the network with its report even if it fails the proof.
        size: height and width of the images of the proof, in pixels, one number if they are equal; None: the
            smallest square that `net2d` takes.

    Raises:
        InexactError: the 3D network does not equal the 2D one (names the first module that differs), or
            its layers' steps along depth disagree with the depth of its outputs.
        SourceError: `net2d` takes no image, has nothing to inflate, or cannot be copied.
        PlanError: the plan or the profile is unknown, or names a layer that does not exist.
    """
    if profile not in PROFILES:
        raise PlanError(f"unknown depth profile {profile!r}: use one of {', '.join(PROFILES)}")
    plan = plan if isinstance(plan, KernelPlan) else KernelPlan.named(plan)
    inflated, seen = build(net2d, plan, profile=profile, in_channels=in_channels, size=size)
    report = prove(net2d, inflated, size=seen.size)
    exactness = report.exactness
    if not exactness.exact and report.exact_by_nature and not allow_inexact:
        raise InexactError(
            f"{type(net2d).__name__} cannot be inflated exactly with plan {plan.name!r}: "
            f"{exactness.failure or 'the outputs differ'} (worst relative error "
            f"{exactness.max_rel_error:.2g}, allowed {TOLERANCE:g})"
        )
    if exactness.exact:
        _check_depth_strides(inflated)
    return inflated


def _check_depth_strides(inflated: Inflated) -> None:
    """Check the strides along depth that the rules report against the depth of the proof's outputs."""
    if any(rule.depth.padding == "valid" for rule in inflated.rules().values()):
        return  # without padding, output depths are not depth / stride
    found = inflated.report.exactness
    for number, (level, shown) in enumerate(zip(inflated.levels, found.levels, strict=True), start=1):
        if not 1 / 1.75 < shown.stride[0] / level.stride[0] < 1.75:
            raise InexactError(
                f"level {number} of {type(inflated.network).__name__} has one position for "
                f"{shown.stride[0]} slices of {found.depth}, but its layers step by {level.stride[0]}: its "
                "stride along depth is not known"
            )


def prove(
    net2d: nn.Module, inflated: Inflated, *, size: int | tuple[int, int] | None = None
) -> InflationReport:
    """Compare an inflated network with its 2D source and keep the report as `inflated.report`."""
    return describe(inflated, verify(net2d, inflated, size=size))


def describe(inflated: Inflated, exactness: ExactnessReport | None = None) -> InflationReport:
    """The report of an inflated network, kept as `inflated.report`; unproven without `exactness`."""
    rules = list(inflated.rules().values())
    kinds = [rule.exact_on for rule in rules]
    inflated.report = InflationReport(
        plan=inflated.plan,
        profile=inflated.profile,
        layers=describe_layers(inflated),
        levels=inflated.levels,
        parameters=sum(p.numel() for p in inflated.parameters()),
        exactness=exactness or ExactnessReport(failure="not proven"),
        exact_by_nature="never" not in kinds,
        exact_on="never" if any(rule.learnt for rule in rules) else min(kinds, key=EXACTNESS.index),
    )
    return inflated.report


def build(
    net2d: nn.Module,
    plan: KernelPlan,
    *,
    profile: str = "mean",
    in_channels: int | None = None,
    size: int | tuple[int, int] | None = None,
) -> tuple[Inflated, Trace]:
    """Inflate without the proof, for `inflate` and for artifacts, which are verified on demand."""
    if in_channels is not None and in_channels < 1:
        raise ShapeError(f"a network needs at least 1 input channel, not {in_channels}")
    name, net2d = type(net2d).__name__, baked(net2d)
    seen = trace(net2d, size)
    check_outputs(net2d, seen.outputs, BATCH)
    plan.check_patterns([*seen.layers, *seen.calls])
    fold, pacing = Fold(), NetworkPacing(net2d, seen)
    network = _with_rules(net2d, plan, profile, in_channels, seen, fold, pacing)
    calls = _with_calls(network, plan, profile, seen, fold, pacing)
    for path in pacing.hoisted:
        hoist(network.get_submodule(path), fold, in_channels or seen.channels, seen.size)
    count_items(network, seen.counters, fold)
    try:
        inflated = Inflated(network, fold, seen, in_channels or seen.channels, plan, profile, calls)
    except InexactError as error:
        if in_channels in (None, seen.channels) or not seen.image_changed:
            raise
        raise ShapeError(
            f"{name} changes its image before its first convolution (normalises it, or regroups its "
            f"channels), so it cannot take {in_channels} channel(s): use in_channels={seen.channels} and "
            "repeat the channel"
        ) from error
    return inflated, seen


def _with_rules(
    net2d: nn.Module,
    plan: KernelPlan,
    profile: str,
    in_channels: int | None,
    seen: Trace,
    fold: Fold,
    pacing: NetworkPacing,
) -> nn.Module:
    """A copy of the network with rules in place of layers."""
    network = copy_of(net2d)
    uses = _uses(network)
    tied: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for path, geometry in seen.layers.items():
        layer = network.get_submodule(path)
        refuse_own_forward(path, layer)
        first = path in seen.stems
        rule_type = find_rule(layer)
        assert rule_type is not None
        if path in pacing.tubelets:
            rule_type = TubeletRule
        depth = paced(plan.layer(geometry), geometry, pacing.of(path))
        try:
            rule_type = rule_type.under(layer, depth)
            if rule_type is None:
                continue
            rule = rule_type.of(layer, depth, fold, profile, in_channels if first else None)
            if rule is not layer:
                move_hooks(layer, rule)
        except (PlanError, ShapeError, SourceError) as error:
            raise type(error)(f"layer {path!r}: {error}") from error
        rule.multiplicity = seen.multiplicity[path]
        _keep_tie(layer, rule, tied)
        rule.train(layer.training)
        for parent, name in uses[layer]:
            setattr(parent, name, rule)
        for child, places in _uses(rule).items():  # layers may now be inside a rule
            uses.setdefault(child, []).extend(places)
        network = rule if layer is network else network
        rule.settle(network, path)
    return network


def _with_calls(
    network: nn.Module, plan: KernelPlan, profile: str, seen: Trace, fold: Fold, pacing: NetworkPacing
) -> dict[str, Rule]:
    """Rules for function calls, registered with the modules that make the calls."""
    rules: dict[str, Rule] = {}
    by_module: dict[str, dict[tuple[str, int], Rule]] = {module: {} for module in seen.callers}
    for path, call in seen.calls.items():
        depth = paced(plan.layer(call.geometry), call.geometry, pacing.of(path))
        rules[path] = call_rule(call.function, call.geometry, call.options, depth, fold, profile)
        rules[path].multiplicity = call.multiplicity
        by_module[call.module][call.function, call.number] = rules[path]
    for module, calls in by_module.items():
        if rules and module:
            let_call(network.get_submodule(module), fold, calls)
    return rules


def _keep_tie(layer: nn.Module, rule: Rule, tied: dict[int, tuple[nn.Parameter, nn.Parameter]]) -> None:
    """Let layers that share one kernel share the inflated one too, if both have equal numbers of taps."""
    kernel, inflated = getattr(layer, "weight", None), getattr(rule, "weight", None)
    if layer is rule or not isinstance(kernel, nn.Parameter) or not isinstance(inflated, nn.Parameter):
        return
    _, first = tied.setdefault(id(kernel), (kernel, inflated))  # keep the kernel: its id must stay unique
    if first.shape == inflated.shape:
        rule.weight = first


def _uses(network: nn.Module) -> dict[nn.Module, list[tuple[nn.Module, str]]]:
    """Every place of each module, as parent and name; shared modules have several."""
    uses: dict[nn.Module, list[tuple[nn.Module, str]]] = {module: [] for module in network.modules()}
    for parent in network.modules():
        for name, child in parent._modules.items():
            if child is not None:
                uses[child].append((parent, name))
    return uses


def describe_layers(inflated: Inflated) -> list[InflatedLayer]:
    """One row per layer that works along depth, in the order of the network's modules."""
    return [_row(path, rule) for path, rule in inflated.rules().items() if rule.kind != "other"]


def _row(path: str, rule: Rule) -> InflatedLayer:
    return InflatedLayer(
        name=path,
        kernel_2d=rule.kernel_2d,
        kernel_3d=(rule.depth.kernel, *rule.kernel_2d),
        stride_3d=(rule.depth.stride, *rule.stride_2d),
        padding=rule.depth.padding,
        rule=own_type(rule).__name__,
    )

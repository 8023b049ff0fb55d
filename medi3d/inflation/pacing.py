"""Where the layers of one network step along depth: the tables of `families`, applied to its modules."""

from dataclasses import replace

from torch import nn

from medi3d.inflation.families import Pacing, is_held, is_hoisted, pacing_of
from medi3d.inflation.plan import DepthLayer, LayerGeometry
from medi3d.inflation.rules import SteppingRule, TubeletRule, find_rule
from medi3d.inflation.tracing import Trace, within


class NetworkPacing:
    """Which layers of a network step along depth, and which do so at its entry; see `families`."""

    def __init__(self, network: nn.Module, seen: Trace) -> None:
        modules = dict(network.named_modules())
        self.family = pacing_of(network)
        self.hoisted: set[str] = set()
        self.tubelets: set[str] = set()
        self.held = [p for p, m in modules.items() if is_held(m) or find_rule(m) is SteppingRule]
        if self.family != "entry":
            return
        for path in seen.stems:
            around = [p for p, m in modules.items() if within(path, p) and is_hoisted(m)]
            if around:
                self.hoisted.add(around[0])
            elif TubeletRule.fits(modules[path]):
                self.tubelets.add(path)
            else:
                self.hoisted.add(path)

    def of(self, path: str) -> Pacing:
        """Pacing of the layer at `path`: natural, or none."""
        if any(path != block and within(path, block) for block in self.held):
            return "none"
        at_entry = any(within(path, stem) for stem in self.hoisted | self.tubelets)
        return "natural" if self.family == "natural" or at_entry else "none"


def paced(layer: DepthLayer, geometry: LayerGeometry, pacing: Pacing) -> DepthLayer:
    """The layer's depth settings under `pacing`: without a step, patches stay in their slice."""
    if pacing == "natural" or layer.stride == 1:
        return layer
    patches = geometry.kernel == geometry.stride
    return replace(layer, stride=1, kernel=1 if patches else layer.kernel)

"""How each type of 2D layer is spread along depth: one small rule per type.

A rule is the layer's 3D twin. It takes and returns folded tensors `(B·D, C, H, W)`, and keeps the
law of inflation: where all slices of its input are equal, every slice of its output is what the
2D layer gives. Depth is always padded to "same", `D' = ceil(D / stride)`, so that branches of a
network meet with equal depth whatever their in-plane padding. Rules are found by the layer's type,
along its bases, so a subclass inherits the rule of its parent unless it has its own. The proof
(`verify`) finds mistakes in a rule. Add one for a layer of your own with `@register_rule(Type)`.
"""

from medi3d.inflation.rules.adopted import AttentionRule, MergingRule
from medi3d.inflation.rules.base import Rule, find_rule, register_rule, registered_type
from medi3d.inflation.rules.convolution import ConvRule, StdConvRule
from medi3d.inflation.rules.divided import DividedRule
from medi3d.inflation.rules.enlarging import (
    EnlargingRule,
    MaxUnpoolRule,
    SubpixelRule,
    TransposedConvRule,
    UpsampleRule,
)
from medi3d.inflation.rules.functional import WATCHED, Caller, FunctionalCalls, call_rule, let_call, read_call
from medi3d.inflation.rules.generated import GeneratedConvRule
from medi3d.inflation.rules.joint import JointAllRule
from medi3d.inflation.rules.pooling import (
    AvgPoolRule,
    BlurPoolRule,
    MaxPoolRule,
    PoolRule,
)
from medi3d.inflation.rules.statistics import OneSliceRule, SpaceNormRule, SqueezeRule, StatisticsRule
from medi3d.inflation.rules.stepping import SteppingRule
from medi3d.inflation.rules.stochastic import DropPathRule
from medi3d.inflation.rules.tubelet import TubeletRule, hoist
from medi3d.inflation.rules.windows import WindowRule

__all__ = [
    "WATCHED",
    "AttentionRule",
    "AvgPoolRule",
    "BlurPoolRule",
    "Caller",
    "ConvRule",
    "DividedRule",
    "DropPathRule",
    "EnlargingRule",
    "FunctionalCalls",
    "GeneratedConvRule",
    "JointAllRule",
    "MaxPoolRule",
    "MaxUnpoolRule",
    "MergingRule",
    "OneSliceRule",
    "PoolRule",
    "Rule",
    "SpaceNormRule",
    "SqueezeRule",
    "StatisticsRule",
    "StdConvRule",
    "SteppingRule",
    "SubpixelRule",
    "TransposedConvRule",
    "TubeletRule",
    "UpsampleRule",
    "WindowRule",
    "call_rule",
    "find_rule",
    "hoist",
    "let_call",
    "read_call",
    "register_rule",
    "registered_type",
]

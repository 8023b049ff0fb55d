"""The inflation core: kernels, plans, rules, the inflated network and its proof."""

from medi3d.inflation.exactness import ExactnessReport
from medi3d.inflation.kernels import PROFILES, adapt_channels, collapse_kernel, inflate_kernel
from medi3d.inflation.network import Inflated, InflationReport, inflate
from medi3d.inflation.plan import KernelPlan
from medi3d.inflation.rules import Rule, register_rule
from medi3d.inflation.verify import verify

__all__ = [
    "PROFILES",
    "ExactnessReport",
    "Inflated",
    "InflationReport",
    "KernelPlan",
    "Rule",
    "adapt_channels",
    "collapse_kernel",
    "inflate",
    "inflate_kernel",
    "register_rule",
    "verify",
]

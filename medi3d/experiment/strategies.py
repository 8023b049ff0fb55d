"""Which parts of a pretrained network are trained, as in Table 4 of the I3D paper (arXiv:1705.07750)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from medi3d.errors import ConfigError

STRATEGIES = {
    "original": "no pretraining: all weights start at random and all are trained",
    "fixed": "the pretrained encoder is frozen, its running statistics too; decoder and head are trained",
    "full": "pretrained, and all weights are trained",
}

CONVERSIONS = ("instance", "group")
"""Norms that can replace the encoder's batch norms."""

BATCHNORMS = ("keep", "recalibrate", "freeze", *CONVERSIONS)


@dataclass(frozen=True)
class TuningSettings:
    """How a pretrained encoder is treated while it is fine-tuned (config section `tuning`).

    Attributes:
        batchnorm: The encoder's batch norms. "keep": as pretrained, and trained; "recalibrate": with
            statistics of the target's volumes before the first step; "freeze": statistics, scale and shift
            are frozen; "instance", "group": replaced by such a norm, with the same scale and shift.
        unfreeze: Fraction of the training over which the encoder's stages are unfrozen one by one, deepest
            first; 0: all are trained from the start.
        l2_sp: Strength of the decay of the encoder's weights to their initial values, in place of weight
            decay (Li et al. 2018); 0: none.
        drift_samples: Training samples on which the drift of a pretrained encoder's activations is
            measured before the first step, for `drift.csv`; 0: none.

    Raises:
        ConfigError: a value is not allowed; the message names its key.
    """

    batchnorm: str = "keep"
    unfreeze: float = 0.0
    l2_sp: float = 0.0
    drift_samples: int = 8

    def __post_init__(self) -> None:
        if self.batchnorm not in BATCHNORMS:
            raise ConfigError(f"tuning.batchnorm is {self.batchnorm!r}: one of {', '.join(BATCHNORMS)}")
        if not 0 <= self.unfreeze <= 1:
            raise ConfigError(f"tuning.unfreeze is {self.unfreeze}: a fraction of the training, 0 to 1")
        if self.l2_sp < 0 or self.drift_samples < 0:
            key = "l2_sp" if self.l2_sp < 0 else "drift_samples"
            raise ConfigError(f"tuning.{key} is {getattr(self, key)}: 0 or more")

    def check(self, strategy: str, pretrained: bool) -> None:
        """Refuse keys that have no meaning for an encoder that is frozen or not pretrained.

        Raises:
            ConfigError: unfreeze or l2_sp is set without pretrained weights, or with another strategy than
                full.
        """
        for key in ("unfreeze", "l2_sp"):
            if getattr(self, key) and (strategy != "full" or not pretrained):
                raise ConfigError(f"tuning.{key} is for pretrained weights and strategy full, not {strategy}")


def check_strategy(name: str) -> None:
    """Refuse an unknown strategy.

    Raises:
        ConfigError: `name` is none of `STRATEGIES`.
    """
    if name not in STRATEGIES:
        raise ConfigError(f"strategy is {name!r}: one of {', '.join(STRATEGIES)}")


def frozen_parts(network: nn.Module, strategy: str) -> Sequence[nn.Module]:
    """Freeze the parts of `network` that `strategy` does not train, and return them.

    Raises:
        ConfigError: the strategy freezes the encoder, and the network has none.
    """
    check_strategy(strategy)
    if strategy != "fixed":
        return ()
    encoder = getattr(network, "encoder", None)
    if not isinstance(encoder, nn.Module):
        raise ConfigError(f"strategy fixed: {type(network).__name__} has no encoder to freeze")
    encoder.requires_grad_(False)
    return (encoder,)


def parameter_groups(
    network: nn.Module, learning_rate: float, encoder_factor: float, *, decays: bool = True
) -> list[dict[str, Any]]:
    """Trainable parameters for an optimiser: group "encoder" at its own learning rate, group "rest".

    Args:
        network: where it has an attribute `encoder`, its parameters form the first group.
        learning_rate: of the rest.
        encoder_factor: learning rate of the encoder, as a multiple of `learning_rate`.
        decays: whether the encoder has weight decay.
    """
    encoder = getattr(network, "encoder", None)
    inside = [p for p in encoder.parameters() if p.requires_grad] if isinstance(encoder, nn.Module) else []
    known = {id(p) for p in inside}
    rest = [p for p in network.parameters() if p.requires_grad and id(p) not in known]
    groups = [
        {"name": "encoder", "params": inside, "lr": learning_rate * encoder_factor},
        {"name": "rest", "params": rest, "lr": learning_rate},
    ]
    if not decays:
        groups[0]["weight_decay"] = 0.0
    return [group for group in groups if group["params"]]

"""How much of a pretrained network is trained: the ways of Table 4 of the I3D paper (arXiv:1705.07750)."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from medi3d.errors import ConfigError

STRATEGIES = {
    "original": "no pretraining: all weights start at random and all are trained",
    "fixed": "the pretrained encoder is frozen, its running statistics too; decoder and head are trained",
    "full": "pretrained, and all weights are trained",
}


def check_strategy(name: str) -> None:
    """Refuse an unknown strategy.

    Raises:
        ConfigError: `name` is none of `STRATEGIES`.
    """
    if name not in STRATEGIES:
        raise ConfigError(f"strategy is {name!r}: one of {', '.join(STRATEGIES)}")


def frozen_parts(network: nn.Module, strategy: str) -> Sequence[nn.Module]:
    """The parts of `network` that `strategy` leaves as they are; after it they ask for no gradient.

    Raises:
        ConfigError: the strategy freezes the encoder of a network that declares none.
    """
    check_strategy(strategy)
    if strategy != "fixed":
        return ()
    encoder = getattr(network, "encoder", None)
    if not isinstance(encoder, nn.Module):
        raise ConfigError(f"strategy fixed: {type(network).__name__} has no encoder that could be frozen")
    encoder.requires_grad_(False)
    return (encoder,)


def parameter_groups(network: nn.Module, learning_rate: float, encoder_factor: float) -> list[dict[str, Any]]:
    """Trainable parameters for an optimiser: group "encoder" at its own learning rate, group "rest".

    Args:
        network: where it has an attribute `encoder`, its parameters form the first group.
        learning_rate: of the rest.
        encoder_factor: learning rate of the encoder, as a multiple of `learning_rate`.
    """
    encoder = getattr(network, "encoder", None)
    inside = [p for p in encoder.parameters() if p.requires_grad] if isinstance(encoder, nn.Module) else []
    known = {id(p) for p in inside}
    rest = [p for p in network.parameters() if p.requires_grad and id(p) not in known]
    groups = [
        {"name": "encoder", "params": inside, "lr": learning_rate * encoder_factor},
        {"name": "rest", "params": rest, "lr": learning_rate},
    ]
    return [group for group in groups if group["params"]]

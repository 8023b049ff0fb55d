"""Wrappers that training programs put around a network's tensors: dictionaries, and prefixes of names.

    {"state_dict": ...}               Lightning, timm, MoCo, mmengine; "model", "net", "network_weights", ...
    {"state_dict_ema": ...}           timm's moving average: taken before the plain weights, as timm does
    {"teacher": ..., "student": ...}  DINO; the teacher is the one that is evaluated
    {"module": ...}                   DeepSpeed
    {"n_averaged": 4, "module.a": ..} torch.optim.swa_utils.AveragedModel
    module.  _orig_mod.               DistributedDataParallel, torch.compile: not part of any name

Prefixes that depend on a network's own names ("model.", "backbone.") are removed in `matching.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from medi3d.errors import WeightsError

AVERAGED = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "model_ema_state_dict", "ema_model", "params_ema"),
    *("ema", "ema_weights", "averaged_model"),
)
"""Keys of weights that are averaged over training, best first."""
PLAIN = (
    *("state_dict", "model_state_dict", "model_state", "model", "net", "network", "network_weights"),
    *("module", "weights", "params", "teacher", "student", "target_encoder", "encoder", "backbone"),
)
"""Keys of weights as training left them, best first."""
_TRAINING = ("optim", "sched", "scaler", "loss", "criterion", "callbacks", "loops", "rng", "amp")
"""Prefixes of the keys of a trainer's own state."""
_INSIDE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""Parts inserted into names wherever a module was wrapped."""
_BEFORE = "module."


@dataclass
class Unwrapped:
    """A network's tensors, and their location in the file."""

    tensors: dict[str, Tensor]
    part: str = ""
    """Keys of the dictionaries around them, joined with "/"; "": they are the file."""
    notes: list[str] = field(default_factory=list)
    """What was chosen or left out, one line each."""


def unwrap(content: Any, part: str, path: Path) -> Unwrapped:
    """The tensors in `content`; of several sets of weights that of `part`, or the best-known one.

    Raises:
        WeightsError: there are none, `part` is not in the file, or several sets are equally likely.
    """
    taken, notes = [], []
    left = part
    while isinstance(content, Mapping):
        sets = {str(k): v for k, v in content.items() if _holds_weights(v) and not _is_training(k, v)}
        key = _asked_for(left, sets)
        if key is not None:
            left = left.removeprefix(key).removeprefix("/")
        elif left and len(sets) != 1 and not _is_state(content):
            raise WeightsError(f"{path}: has no part {left!r}; it has {', '.join(sets) or 'no weights'}")
        else:
            key = _usual(sets, content, path)
        if key is None:
            break
        others = [other for other in sets if other != key]
        if others:
            why = "as asked for" if key in part.split("/") else "averaged" if key in AVERAGED else "as usual"
            also = ", ".join(map(repr, others))
            notes.append(f"{key!r} was taken ({why}); the file has {also} too: choose with #KEY")
        taken.append(key)
        content = content[key]
    tensors, more = _state(content, path)
    tensors = _clean(tensors)
    if left:
        inside = {k.removeprefix(f"{left}."): t for k, t in tensors.items() if k.startswith(f"{left}.")}
        if not inside:
            raise WeightsError(f"{path}: has no part {left!r}; its names begin with {_beginnings(tensors)}")
        if len(inside) < len(tensors):
            notes.append(f"{left!r} was taken (as asked for); left out: {len(tensors) - len(inside)} tensors")
        taken.append(left)
        tensors = _clean(inside)
    return Unwrapped(tensors, "/".join(taken), notes + more)


def _asked_for(part: str, sets: Mapping[str, Any]) -> str | None:
    fits = [key for key in sets if part == key or part.startswith(f"{key}/")]
    return max(fits, key=len, default=None)


def _usual(sets: Mapping[str, Any], content: Mapping[Any, Any], path: Path) -> str | None:
    """Which set of weights to take; None: `content` is one itself."""
    for key in (*AVERAGED, *PLAIN):
        if key in sets:
            return key
    if _is_state(content) or not sets:
        return None
    if len(sets) > 1:
        names = ", ".join(sets)
        raise WeightsError(
            f"{path}: has several sets of weights, {names}: choose with file:PATH#{next(iter(sets))}"
        )
    return next(iter(sets))


def _is_state(content: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, Tensor) and value.dim() for value in content.values())


def _holds_weights(value: Any) -> bool:
    """Whether any nested dictionary has a tensor that is not a scalar."""
    if not isinstance(value, Mapping):
        return False
    return _is_state(value) or any(_holds_weights(inside) for inside in value.values())


def _is_training(key: Any, value: Mapping[Any, Any]) -> bool:
    return "param_groups" in value or str(key).lower().lstrip("_").startswith(_TRAINING)


def _state(content: Any, path: Path) -> tuple[dict[str, Tensor], list[str]]:
    if not isinstance(content, Mapping) or (content and not _is_state(content)):
        found = [str(key) for key in content][:5] if isinstance(content, Mapping) else type(content).__name__
        raise WeightsError(f"{path}: holds {found}, not a state dict of tensors")
    tensors = {str(k): v.detach() for k, v in content.items() if isinstance(v, Tensor)}
    if not tensors:
        raise WeightsError(f"{path}: holds no tensors")
    left = {str(key): value for key, value in content.items() if not isinstance(value, Tensor)}
    nested = [key for key, value in left.items() if _holds_weights(value) and not _is_training(key, value)]
    if nested:
        raise WeightsError(f"{path}: has tensors beside {', '.join(nested[:4])}: choose with #{nested[0]}")
    shown = ", ".join([*left][:4]) + (", ..." if len(left) > 4 else "")
    return tensors, [f"left out, not tensors: {shown}"] if left else []


def _clean(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without the parts that wrapping modules inserted; unchanged if two would become equal."""
    if "n_averaged" in tensors and all(k.startswith(_BEFORE) for k in tensors if k != "n_averaged"):
        tensors = {name: tensor for name, tensor in tensors.items() if name != "n_averaged"}
    names = {name: name for name in tensors}
    for mark in _INSIDE:
        names = {name: ("." + clean).replace(f".{mark}", ".")[1:] for name, clean in names.items()}
    while names and all(clean.startswith(_BEFORE) for clean in names.values()):
        names = {name: clean.removeprefix(_BEFORE) for name, clean in names.items()}
    if len(set(names.values())) < len(names):
        return tensors
    return {names[name]: tensor for name, tensor in tensors.items()}


def _beginnings(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(list(dict.fromkeys(name.split(".")[0] for name in tensors))[:6])

"""Inflated encoders as files: tensors and everything needed to rebuild the network.

An artifact is a `.safetensors` file; its metadata holds source, plan, profile, weights row, proof
and versions as JSON text. It is never a pickle, and reading it runs no code from it.
"""

import copy
import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from medi3d.errors import WeightsError
from medi3d.files import written_aside
from medi3d.inflation.image_sizes import find_sizes, proof_size
from medi3d.inflation.network import Inflated, build, prove
from medi3d.inflation.plan import KernelPlan
from medi3d.models.contract import Normaliser
from medi3d.models.sources import build_source

FORMAT = "medi3d-encoder-1"
_NEEDED = ("source", "plan", "profile", "in_channels", "encoder_levels", "weights", "sha256")


def check_suffix(path: str | Path) -> Path:
    """Refuse a name that does not end in .safetensors.

    Raises:
        WeightsError: it does not.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise WeightsError(f"an artifact is a .safetensors file, not {path.name!r}")
    return path


def save_artifact(encoder: Inflated, path: str | Path) -> Path:
    """Write an encoder made by `create_encoder`; the file appears whole or not at all.

    Raises:
        SourceError: the encoder has no source name from which it can be built again.
        WeightsError: the file cannot be written, or its name does not end in .safetensors.
    """
    path = check_suffix(path)
    report = encoder.report.to_dict()
    build_source(report["source"], levels=1)  # refuse now what could not be loaded later
    tensors = {
        name: tensor.detach().contiguous().cpu() for name, tensor in encoder.network.state_dict().items()
    }
    description = {
        "format": FORMAT,
        "in_channels": encoder.in_channels,
        "encoder_levels": len(encoder.levels),
        "image_size": encoder.built_for,
        "sha256": _fingerprint(tensors),
        "licences": report["weights"].get("licences", []),
        "versions": {name: version(name) for name in ("medi3d", "torch", "timm")},
        **report,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as aside:
            save_file(tensors, aside, metadata={"medi3d": json.dumps(description)})
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"cannot write the artifact {path}: {error}") from error
    return path


def read_description(path: str | Path) -> dict[str, Any]:
    """The description in an artifact: source, plan, profile, levels, weights, proof, versions.

    Raises:
        WeightsError: the file is missing, damaged, or not an artifact of medi3d.
    """
    return _read(path)[0]


def load_artifact(path: str | Path) -> Inflated:
    """Rebuild the encoder of an artifact with its weights, and repeat its proof (`.report`).

    The proof compares with the file's own 2D network: each layer is the 2D layer it equals on boring volumes.

    Raises:
        WeightsError: the file is missing, damaged, or does not fit the network that it names.
        SourceError: it names a source that this installation does not have.
    """
    description, tensors = _read(path)
    built_for = description.get("image_size")
    net2d = build_source(description["source"], levels=description["encoder_levels"], size=built_for)
    sizes = find_sizes(net2d)
    plan = KernelPlan.from_dict(description["plan"])
    channels, contract = description["in_channels"], description["weights"].get("contract")
    normaliser = Normaliser.from_dict(contract, channels) if contract else None
    inside = normaliser.channels if normaliser else channels
    encoder, seen = build(
        net2d, plan, profile=description["profile"], in_channels=inside, size=proof_size(net2d, sizes, None)
    )
    ours = encoder.network.state_dict()
    wrong = [k for k in ours.keys() | tensors.keys() if k not in ours or k not in tensors]
    wrong += [k for k in ours.keys() & tensors.keys() if ours[k].shape != tensors[k].shape]
    if wrong:
        raise WeightsError(
            f"{path} does not fit {description['source']}: {len(wrong)} tensors are missing, extra or "
            f"misshapen, such as {sorted(wrong)[0]!r}"
        )
    encoder.network.load_state_dict(tensors)
    encoder.built_for = built_for
    encoder.fit_to(sizes)
    report = prove(collapse(encoder, description["source"]), encoder, size=seen.size)
    report.source, report.weights = description["source"], description["weights"]
    encoder.in_channels, encoder.normaliser = channels, normaliser
    return encoder


def collapse(encoder: Inflated, source: str) -> nn.Module:
    """The 2D network, in float64, that an encoder was inflated from."""
    flat = copy.deepcopy(build_source(source, levels=len(encoder.levels), size=encoder.built_for)).double()
    state = {name: tensor.double() for name, tensor in encoder.network.state_dict().items()}
    for path, rule in encoder.rules().items():
        state.update({f"{path}.{name}": tensor for name, tensor in rule.flat_state().items()})
    state = {name: state[name] for name in flat.state_dict()}  # without those for depth alone
    for name, parameter in flat.named_parameters():
        if parameter.shape != state[name].shape:  # the first layer, for other channels
            parameter.data = torch.empty_like(state[name])
    flat.load_state_dict(state)
    return flat


def _read(path: str | Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"no artifact at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        description = json.loads(metadata.get("medi3d", "null"))
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise WeightsError(f"cannot read the artifact {path}: {error}") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise WeightsError(f"{path} is not an artifact of medi3d (`medi3d inflate --out` writes them)")
    missing = [key for key in _NEEDED if key not in description]
    if missing:
        raise WeightsError(f"{path} is damaged: its description lacks {', '.join(missing)}")
    if description["sha256"] != _fingerprint(tensors):
        raise WeightsError(f"{path} is damaged: its tensors are not those that were written")
    return description, tensors


def _fingerprint(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

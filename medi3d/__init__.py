"""medi3d: turn any pretrained 2D or video network into a 3D encoder, prove it exact, train it, compare.

    import medi3d

    encoder = medi3d.create_encoder("timm:resnet18", weights="timm", in_channels=1)
    network = medi3d.create_segmenter(encoder, num_classes=3)

Names are imported when they are first used, so `import medi3d` and `medi3d --help` are quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from medi3d import torchvision_shim

__version__ = "0.1.0"
torchvision_shim.install()  # costs nothing until torchvision is imported, by timm for example

if TYPE_CHECKING:
    from medi3d.errors import Medi3dError
    from medi3d.inflation.checkpointing import checkpoint_activations
    from medi3d.inflation.exactness import ExactnessReport
    from medi3d.inflation.network import inflate
    from medi3d.inflation.plan import KernelPlan
    from medi3d.inflation.rules import register_rule
    from medi3d.inflation.verify import verify
    from medi3d.models.artifact import load_artifact, save_artifact
    from medi3d.models.encoders import create_encoder
    from medi3d.models.networks import create_classifier, create_segmenter
    from medi3d.models.sources import list_sources
    from medi3d.weights.catalogue import list_weights
    from medi3d.weights.load import LoadReport, load_weights

_HOMES = {
    "ExactnessReport": "medi3d.inflation",
    "KernelPlan": "medi3d.inflation",
    "LoadReport": "medi3d.weights.load",
    "Medi3dError": "medi3d.errors",
    "checkpoint_activations": "medi3d.inflation.checkpointing",
    "create_classifier": "medi3d.models.networks",
    "create_encoder": "medi3d.models.encoders",
    "create_segmenter": "medi3d.models.networks",
    "inflate": "medi3d.inflation",
    "list_sources": "medi3d.models.sources",
    "list_weights": "medi3d.weights.catalogue",
    "load_artifact": "medi3d.models.artifact",
    "load_weights": "medi3d.weights.load",
    "register_rule": "medi3d.inflation",
    "save_artifact": "medi3d.models.artifact",
    "verify": "medi3d.inflation",
}

__all__ = [
    "ExactnessReport",
    "KernelPlan",
    "LoadReport",
    "Medi3dError",
    "checkpoint_activations",
    "create_classifier",
    "create_encoder",
    "create_segmenter",
    "inflate",
    "list_sources",
    "list_weights",
    "load_artifact",
    "load_weights",
    "register_rule",
    "save_artifact",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'medi3d' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]

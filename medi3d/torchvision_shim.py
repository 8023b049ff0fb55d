"""Let timm import torchvision beside a CPU-only torch.

The torchvision wheel on the package index carries operators compiled for another build of torch.
If they cannot be loaded, `import torchvision` fails with "operator torchvision::nms does not
exist", because it describes two operators that nobody has declared. Declaring their schemas is
enough: nothing here ever calls them.
"""

import importlib.util
import sys

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_library = None  # keeps the declarations alive: a torch Library unregisters when it is collected


def install() -> None:
    """Make `import torchvision`, and so `import timm`, work. Does nothing if it already works."""
    global _library
    if (
        _library is not None
        or "torchvision" in sys.modules
        or importlib.util.find_spec("torchvision") is None
    ):
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        _library = _declare_missing()


def _declare_missing():
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            library.define(schema)
    return library

#!/usr/bin/env python
"""Sliding-window prediction against MONAI's inferer and nnU-Net's predictor: time and agreement of masks.

    benchmarks/prediction.py --peers peers --weights net.pt

`peers` is a folder with nnU-Net, see `volume_rivals.py`.

All contenders take turns in one process, so other load on the machine affects all; a figure is the
median over the turns, a ratio the median of the per-turn ratios.

The same network and weights, windows, overlap 0.5, Gaussian weights, no mirroring. The network is trained
here to segment the organs of a synthetic CT (`--weights` keeps it). "medi3d" uses the precision
that `precision: auto` chooses, "medi3d in float32" that of the others on a CPU.
"""

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.table import Table
from volume_rivals import (
    Out,
    Peers,
    console,
    dice,
    network,
    nnunet_predictor,
    phantom,
    ratio,
    trained,
    turns,
    use_peers,
)

from medi3d.cli.options import write_json

app = typer.Typer(help=__doc__, pretty_exceptions_enable=False)

WINDOW = (48, 48, 48)
FILTERS = (8, 16, 32)


def predictors(
    net: torch.nn.Module, window: tuple[int, int, int]
) -> dict[str, Callable[[torch.Tensor], Any]]:
    """For each contender, a function from an image `(1, D, H, W)` to a label map, in memory."""
    import copy

    from monai.inferers import SlidingWindowInferer

    from medi3d.engine.inference import SlidingWindow, placed, predict_labels
    from medi3d.engine.precision import Precision

    ways: dict[str, Callable[[torch.Tensor], Any]] = {}
    for name, choice in (("medi3d", "auto"), ("medi3d in float32", "fp32")):
        precision = Precision.choose(choice, "cpu")
        own = placed(precision.place_network(copy.deepcopy(net)), precision)
        ways[name] = lambda image, own=own: predict_labels(image, own, SlidingWindow(window))
    for batch in (1, 4):
        inferer = SlidingWindowInferer(window, batch, 0.5, mode="gaussian")

        @torch.inference_mode()
        def monai(image: torch.Tensor, inferer: Any = inferer) -> Any:
            return inferer(image[None], net)[0].argmax(0).byte().numpy()

        ways[f"MONAI, {batch} at once"] = monai
    nnunet = nnunet_predictor(copy.deepcopy(net), window, (1.0, 1.0, 1.0))
    ways["nnU-Net"] = lambda image: (
        nnunet.predict_sliding_window_return_logits(image).argmax(0).byte().numpy()
    )
    return ways


@app.command()
def prediction(
    peers: Peers = None,
    edge: Annotated[int, typer.Option(min=64, help="Edge of the volume, voxels.")] = 120,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    weights: Annotated[
        Path | None, typer.Option(help="Weights file; trained and written if missing.")
    ] = None,
    out: Out = None,
) -> None:
    """Seconds from a volume in memory to its label map on the same grid."""
    use_peers(peers)
    image, label = phantom((edge, edge, edge))
    volume = torch.from_numpy(image / np.float32(1000))[None]
    masks: dict[str, np.ndarray] = {}
    if weights is not None and weights.exists():
        net = network(FILTERS).eval()
        net.load_state_dict(torch.load(weights))
    else:
        net = trained(FILTERS, 800)
        if weights is not None:
            torch.save(net.state_dict(), weights)
    ways = predictors(net, WINDOW)

    def run(name: str) -> None:
        masks[name] = ways[name](volume)

    seconds = turns({name: partial(run, name) for name in ways}, repeats)
    rivals = [name for name in ways if not name.startswith("medi3d")]
    faster = min(rivals, key=lambda name: statistics.median(seconds[name]["cpu"]))
    table = Table("", "s", "CPU s", "faster rival / it", "CPU", "lowest Dice with medi3d", "with the truth")
    rows = []
    for name in ways:
        figures = [statistics.median(seconds[name][kind]) for kind in ("wall", "cpu")]
        ratios = [ratio(seconds, faster, name, kind) for kind in ("wall", "cpu")]
        agreement = [dice(masks[name], other) for other in (masks["medi3d"], label)]
        rows.append({"name": name, "seconds": figures, "ratio": ratios, "dice": agreement})
        table.add_row(
            name, *(f"{n:.2f}" for n in figures + ratios), f"{agreement[0]:.4f}", f"{agreement[1]:.4f}"
        )
    write_json(out, {"edge": edge, "faster": faster, "threads": torch.get_num_threads(), "prediction": rows})
    console.print(table)


if __name__ == "__main__":
    app()

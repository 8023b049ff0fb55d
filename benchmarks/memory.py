#!/usr/bin/env python
"""Peak memory and time of medi3d and of nnU-Net, from a large scan's file to its mask file.

    benchmarks/memory.py measure --folder bench --peers peers

`peers` is a folder with nnU-Net, see `volume_rivals.py`. The scan is a synthetic CT with 6 labels; both
use the same small network. Each runs in a process of its own (Linux), which may map at most `--limit` GB;
the peak is that of the whole process, including libraries.
"""

import contextlib
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from volume_rivals import (
    ORGANS,
    Out,
    Peers,
    console,
    dice,
    network,
    nnunet_predictor,
    phantom,
    trained,
    use_peers,
)

from medi3d.cli.options import write_json

app = typer.Typer(help=__doc__, pretty_exceptions_enable=False)

WINDOW = (128, 128, 128)
FILTERS = (4, 8, 16)


def status(key: str) -> int:
    """A line of this process's status, in bytes: VmRSS is resident memory, VmHWM its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def whole_medi3d(weights: Path, scan: Path, target: Path, spacing: list[float]) -> None:
    from medi3d.datasets.images.settings import Normalisation, VolumeSettings
    from medi3d.engine.inference import SlidingWindow
    from medi3d.engine.precision import Precision
    from medi3d.prediction.predict import predict_files
    from medi3d.prediction.predictor import Predictor

    net = network(FILTERS)
    net.load_state_dict(torch.load(weights))
    precision = Precision.choose("auto", "cpu")
    settings = VolumeSettings(
        root="",
        modality="CT",
        labels={f"label {number}": number for number in ORGANS},
        spacing=spacing,
        normalisation=Normalisation("window", window=[-1000.0, 1000.0]),
    )
    net = precision.place_network(net).eval()
    one = Predictor(settings, net, SlidingWindow(WINDOW), precision, identity="bench")
    _, failed = predict_files([one], [scan], target.parent / "masks")
    assert not failed, failed
    (target.parent / "masks" / scan.name).rename(target)


def whole_nnunet(weights: Path, scan: Path, target: Path, spacing: list[float]) -> None:
    from nnunetv2.inference.export_prediction import export_prediction_from_logits
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

    net = network(FILTERS)
    net.load_state_dict(torch.load(weights))
    predictor = nnunet_predictor(net, WINDOW, spacing)
    data, _, properties = DefaultPreprocessor(verbose=False).run_case(
        [str(scan)], None, predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json
    )
    data *= 0.5  # nnU-Net's normalisation here divides by 500, the network was trained on HU / 1000
    logits = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(data)).numpy()
    export_prediction_from_logits(
        logits,
        properties,
        predictor.configuration_manager,
        predictor.plans_manager,
        predictor.dataset_json,
        str(target).removesuffix(".nii"),
        num_threads_torch=1,
    )


WHOLE = {"medi3d": whole_medi3d, "nnU-Net": whole_nnunet}


@app.command()
def measure(
    folder: Annotated[Path, typer.Option(help="Folder of scan and masks; existing files are reused.")],
    peers: Peers = None,
    shape: Annotated[tuple[int, int, int], typer.Option(help="Scan size (D, H, W).")] = (600, 512, 512),
    sides: Annotated[tuple[float, float, float], typer.Option(help="Its voxel size, mm.")] = (1.0, 0.8, 0.8),
    spacing: Annotated[float, typer.Option(help="Spacing of the network, mm; 0: the scan's.")] = 2.0,
    limit: Annotated[float, typer.Option(help="GB that a process may map.")] = 20.0,
    contenders: Annotated[str, typer.Option(help="Which to measure.")] = ",".join(WHOLE),
    out: Out = None,
) -> None:
    """Peak memory and time from a scan's file to its mask file, 6 labels."""
    import SimpleITK as sitk

    from medi3d.datasets.images.files import read_header

    grid = list(sides) if spacing == 0 else [spacing] * 3
    folder.mkdir(parents=True, exist_ok=True)
    weights, scan = folder / "weights.pt", folder / "scan.nii"
    if not scan.exists():
        torch.save(trained(FILTERS, 200).state_dict(), weights)
        image = sitk.GetImageFromArray(phantom(shape)[0])
        image.SetSpacing(sides[::-1])
        sitk.WriteImage(image, str(scan))
        del image
    for who in contenders.split(","):
        target = folder / f"{who}.nii"
        target.unlink(missing_ok=True)
        command = [
            sys.executable,
            __file__,
            "one",
            json.dumps([who, *map(str, (weights, scan, target)), grid]),
        ]
        command += ["--limit", str(limit), *(["--peers", str(peers)] if peers else [])]
        began = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        size = read_header(scan).size  # of the existing scan
        row: dict[str, Any] = {"size": size, "grid": grid, "wall": time.perf_counter() - began}
        if done.returncode:
            last = (done.stderr.strip() or f"ended with {done.returncode}").splitlines()[-1]
            row["failed"] = f"did not finish within {limit} GB: {last}"
        else:
            row |= json.loads(done.stdout.splitlines()[-1])
        write_json(folder / f"{who}.json", row)
        console.print(who, row)
    made = {who: folder / f"{who}.nii" for who in WHOLE if (folder / f"{who}.nii").exists()}
    rows = {who: json.loads((folder / f"{who}.json").read_text()) for who in made}
    if len(made) == 2:
        agreement = dice(*(sitk.GetArrayFromImage(sitk.ReadImage(str(file))) for file in made.values()))
        shares = rows["medi3d"]["peak_gb"] / rows["nnU-Net"]["peak_gb"]
        console.print(f"lowest Dice {agreement:.4f}, peak of medi3d / nnU-Net {shares:.2f}")
    write_json(out, rows)


@app.command(hidden=True)
def one(task: str, limit: float = 20.0, peers: Peers = None) -> None:
    """A contender of `memory`, in this process; its last line of output has the figures."""
    use_peers(peers)
    who, weights, scan, target, spacing = json.loads(task)
    resource.setrlimit(resource.RLIMIT_AS, (int(limit * 1e9),) * 2)
    with quiet():
        WHOLE[who](Path(weights), Path(scan), Path(target), spacing)
    print(json.dumps({"peak_gb": status("VmHWM") / 1e9, "cpu": time.process_time()}))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Send output printed inside to stderr."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


if __name__ == "__main__":
    app()

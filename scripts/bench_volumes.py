#!/usr/bin/env python
"""Preprocessing and sliding-window prediction beside nnU-Net v2, MONAI and TorchIO: time, memory, masks.

    pip install --no-deps --target peers nnunetv2==2.8.1 dynamic-network-architectures acvl-utils \\
        batchgenerators batchgeneratorsv2 "blosc2<3.8" ndindex numexpr msgpack py-cpuinfo scikit-image \\
        lazy-loader imageio tifffile imagecodecs seaborn yacs einops connected-components-3d \\
        fft-conv-pytorch graphviz dicom2nifti python-gdcm
    scripts/bench_volumes.py preprocessing --peers peers --data ../shared/data
    scripts/bench_volumes.py prediction --peers peers
    scripts/bench_volumes.py memory --peers peers

All contenders run in turns in one process, so other load on the machine meets each; a figure is the
median over the turns, a ratio the median of the ratios turn by turn. Peaks of memory are those of the
whole process, each contender in a process of its own (Linux), which may map `--limit` GB at most.

Preprocessing: each contender reads image and label from NIfTI, brings them to the same spacing and
normalises them by its own means, and writes what its training reads. medi3d makes the file of
`medi3d prepare`'s cache; nnU-Net calls `DefaultPreprocessor.run_case_save` with its default plans' functions
(cubic splines for images, linear ones for labels); MONAI and TorchIO interpolate linearly, labels by the
nearest, and save with `torch.save`.

Prediction: the same network and weights, windows, overlap 0.5, Gaussian weights, no mirroring. The
network is trained here for a few seconds to tell apart the organs of a synthetic CT. "medi3d" computes
as `precision: auto` chooses, "medi3d in float32" as the others do on a CPU.
"""

import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from medi3d.options import write_json

app = typer.Typer(help=__doc__, pretty_exceptions_enable=False)
console = Console()

ORGANS = {1: 900, 2: -700, 3: 300, 4: 150, 5: -300, 6: 600}
"""Label -> HU of the organs in the synthetic CT; its body has 0, the air around it -1000."""
NOISE = 40
WINDOW = [-1000, 1000]
WINDOWS = {"prediction": (48, 48, 48), "memory": (128, 128, 128)}
FILTERS = {"prediction": (8, 16, 32), "memory": (4, 8, 16)}
SETS = {
    "Hippocampus": ("Task04_Hippocampus", "MR", (1.0, 1.0, 1.0)),
    "Hippocampus at 0.7 mm": ("Task04_Hippocampus", "MR", (0.7, 0.7, 0.7)),
    "OpenKBP at 3 mm": ("OpenKBP_HeadNeckCT", "CT", (3.0, 3.0, 3.0)),
    "OpenKBP at 2 mm": ("OpenKBP_HeadNeckCT", "CT", (2.0, 2.0, 2.0)),
}
"""Folder under the data, modality, and spacing in mm."""

Peers = Annotated[Path | None, typer.Option(help="Folder of `pip install --target` with nnunetv2.")]
Out = Annotated[Path | None, typer.Option(help="Write every figure to this JSON file.")]


def use_peers(folder: Path | None) -> None:
    """Make nnU-Net importable: behind the environment, whose torch and numpy are used."""
    from medi3d import torchvision_shim

    torchvision_shim.install()
    if folder:
        sys.path.append(str(folder.resolve()))
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        os.environ.setdefault(name, tempfile.gettempdir())
    try:
        import nnunetv2  # noqa: F401
    except ImportError as error:
        raise SystemExit(f"bench_volumes: nnU-Net is not here ({error}); give --peers FOLDER") from error


def turns(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, list[float]]]:
    """Wall and CPU seconds of every contender, one after the other, `repeats` times after a first one."""
    seconds: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            if turn:  # the first turn prepares kernels and loads modules
                seconds[name]["wall"].append(time.perf_counter() - wall)
                seconds[name]["cpu"].append(time.process_time() - cpu)
    return seconds


def ratio(seconds: dict[str, dict[str, list[float]]], rival: str, ours: str, kind: str) -> float:
    """How many times as long the rival takes."""
    pairs = zip(seconds[rival][kind], seconds[ours][kind], strict=True)
    return statistics.median(theirs / own for theirs, own in pairs)


# Preprocessing


def nnunet_plans(spacing: Sequence[float], window: Sequence[int], modality: str) -> dict[str, Any]:
    """Plans as nnU-Net's default planner writes them, for one channel."""
    resample = "resample_data_or_seg_to_shape"
    common = {"order_z": 0, "force_separate_z": None}
    return {
        "dataset_name": "Dataset001_Bench",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {
            "0": {"mean": 0.0, "std": 500.0, "percentile_00_5": -1000.0, "percentile_99_5": 1000.0}
        },
        "configurations": {
            "3d_fullres": {
                "data_identifier": "bench",
                "preprocessor_name": "DefaultPreprocessor",
                "batch_size": 2,
                "patch_size": list(window),
                "spacing": list(spacing),
                "normalization_schemes": ["CTNormalization" if modality == "CT" else "ZScoreNormalization"],
                "use_mask_for_norm": [False],
                "resampling_fn_data": resample,
                "resampling_fn_seg": resample,
                "resampling_fn_probabilities": resample,
                "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, **common},
                "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, **common},
                "resampling_fn_probabilities_kwargs": {"is_seg": False, "order": 1, **common},
                "architecture": {},
            }
        },
    }


def nnunet_dataset(labels: int) -> dict[str, Any]:
    names = {"background": 0, **{f"label {number}": number for number in range(1, labels + 1)}}
    return {"channel_names": {"0": "image"}, "labels": names, "file_ending": ".nii"}


def preparers(
    folder: Path, data: Path, modality: str, spacing: tuple[float, float, float]
) -> dict[str, Callable[[Any], None]]:
    """Each contender's way of one case from its files to a file that training reads."""
    from dataclasses import replace

    import torchio as tio
    from monai import transforms as mt
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from medi3d.datasets.cache import cache_path, load_cached
    from medi3d.datasets.cohort import read_cohort
    from medi3d.datasets.volumes import Normalisation, VolumeSettings

    cohort = read_cohort(data)
    labels = {name: value for name, value in cohort.labels.items() if value}
    how = Normalisation("window", window=WINDOW) if modality == "CT" else Normalisation("zscore")
    settings = VolumeSettings(str(data), modality, labels, spacing=list(spacing), normalisation=how)
    settings = replace(settings, cache=str(folder / "medi3d"))
    plans = PlansManager(nnunet_plans(spacing, (64, 64, 64), modality))
    preprocessor, dataset = DefaultPreprocessor(verbose=False), nnunet_dataset(len(labels))
    keys = ["image", "label"]
    scale = (
        mt.ScaleIntensityRanged("image", *WINDOW, -1, 1, clip=True)
        if modality == "CT"
        else mt.NormalizeIntensityd("image")
    )
    monai_steps = mt.Compose(
        [
            mt.LoadImaged(keys),
            mt.EnsureChannelFirstd(keys),
            mt.Orientationd(keys, "LPS", labels=(("L", "R"), ("P", "A"), ("I", "S"))),
            mt.Spacingd(keys, pixdim=spacing[::-1], mode=("bilinear", "nearest")),
            scale,
            mt.CastToTyped(keys, (torch.float32, torch.uint8)),
        ]
    )
    tio_steps = tio.Compose(
        [
            tio.ToCanonical(),
            tio.Resample(spacing[::-1]),
            tio.RescaleIntensity((-1, 1), in_min_max=tuple(WINDOW))
            if modality == "CT"
            else tio.ZNormalization(),
        ]
    )

    def medi3d(case: Any) -> None:
        cache_path(case, settings).unlink(missing_ok=True)
        load_cached(case, settings)

    def nnunet(case: Any) -> None:
        for old in folder.glob(f"{case.name}*.b2nd"):  # nnU-Net does not write over them
            old.unlink()
        preprocessor.run_case_save(
            str(folder / case.name),
            [str(case.images[0])],
            str(case.label),
            plans,
            plans.get_configuration("3d_fullres"),
            dataset,
        )

    def monai(case: Any) -> None:
        made = monai_steps({"image": case.images[0], "label": case.label})
        torch.save({key: made[key] for key in keys}, folder / f"{case.name}.monai.pt")

    def torchio(case: Any) -> None:
        subject = tio.Subject(image=tio.ScalarImage(case.images[0]), label=tio.LabelMap(case.label))
        made = tio_steps(subject)
        torch.save({key: made[key].data for key in keys}, folder / f"{case.name}.tio.pt")

    return {"medi3d": medi3d, "nnU-Net": nnunet, "MONAI": monai, "TorchIO": torchio}


def each(way: Callable[[Any], None], cases: Sequence[Any]) -> None:
    for case in cases:
        way(case)


def per_second(row: dict[str, Any], who: str) -> str:
    """Cases per second of the clock, and of CPU time."""
    rates = [row["cases"] / statistics.median(row["seconds"][who][kind]) for kind in ("wall", "cpu")]
    return f"{rates[0]:.2f} ({rates[1]:.2f})"


@app.command()
def preprocessing(
    data: Annotated[Path, typer.Option(help="Folder of the data sets.")],
    peers: Peers = None,
    cases: Annotated[int, typer.Option(min=1, help="Of each set.")] = 6,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    sets: Annotated[str, typer.Option(help="Which sets.")] = ",".join(SETS),
    out: Out = None,
) -> None:
    """Cases per second from NIfTI to what training reads, one process, one thread each."""
    use_peers(peers)
    torch.set_num_threads(1)
    import SimpleITK as sitk

    from medi3d.datasets.cohort import read_cohort

    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    rows = []
    for name in sets.split(","):
        folder, modality, spacing = SETS[name]
        chosen = read_cohort(data / folder).cases[:cases]
        with tempfile.TemporaryDirectory() as place:
            ways = preparers(Path(place), data / folder, modality, spacing)
            seconds = turns({who: partial(each, way, chosen) for who, way in ways.items()}, repeats)
        rows.append({"set": name, "cases": len(chosen), "seconds": seconds})
        write_json(out, {"preprocessing": rows})
    table = Table("set", *(f"{who} cases/s (CPU)" for who in ways), "nnU-Net / medi3d", "CPU")
    for row in rows:
        ratios = [ratio(row["seconds"], "nnU-Net", "medi3d", kind) for kind in ("wall", "cpu")]
        table.add_row(row["set"], *(per_second(row, who) for who in ways), *(f"{one:.2f}" for one in ratios))
    console.print(table)


# Prediction


def phantom(shape: tuple[int, int, int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A synthetic CT, int16 `(D, H, W)` in HU, and its label map: a body with six organs, and noise."""
    chance = np.random.default_rng(seed)
    sides = np.array(shape)
    image, label = np.full(shape, -1000, np.int16), np.zeros(shape, np.uint8)

    def ball(centre: np.ndarray, radii: np.ndarray) -> tuple[tuple[slice, ...], np.ndarray]:
        low, high = (
            np.maximum(centre - radii, 0).astype(int),
            np.minimum(centre + radii + 1, sides).astype(int),
        )
        axes = np.ogrid[tuple(slice(*pair) for pair in zip(low, high, strict=True))]
        inside = sum(((a - c) / r) ** 2 for a, c, r in zip(axes, centre, radii, strict=True)) <= 1
        return tuple(slice(*pair) for pair in zip(low, high, strict=True)), inside

    place, inside = ball(sides / 2, sides * [0.7, 0.45, 0.45])
    image[place][inside] = 0
    for number, value in ORGANS.items():
        centre = sides * (0.5 + 0.28 * chance.uniform(-1, 1, 3))
        place, inside = ball(centre, sides * chance.uniform(0.08, 0.15, 3))
        image[place][inside], label[place][inside] = value, number
    for plane in image:
        plane += (NOISE * chance.standard_normal(plane.shape, np.float32)).astype(np.int16)
    return image, label


def network(filters: Sequence[int]) -> torch.nn.Module:
    """The network that all share: a small U-Net of nnU-Net's kind."""
    from monai.networks.nets import DynUNet

    torch.manual_seed(0)
    return DynUNet(3, 1, len(ORGANS) + 1, [3, 3, 3], [1, 2, 2], [2, 2], filters=filters, norm_name="batch")


def trained(filters: Sequence[int], steps: int = 150) -> torch.nn.Module:
    """`network` after a few seconds on a small phantom."""
    net = network(filters)
    image, label = phantom((64, 64, 64), seed=1)
    volume = torch.from_numpy(image / 1000).float()[None, None]
    target = torch.from_numpy(label).long()[None]
    steepest = torch.optim.Adam(net.parameters(), 5e-3)
    for step in range(steps):
        z, y, x = np.random.default_rng(step).integers(0, 32, 3)
        cut = (slice(None), slice(z, z + 32), slice(y, y + 32), slice(x, x + 32))
        loss = torch.nn.functional.cross_entropy(net(volume[:, *cut]), target[cut])
        steepest.zero_grad()
        loss.backward()
        steepest.step()
    return net.eval()


def predictors(
    net: torch.nn.Module, window: tuple[int, int, int]
) -> dict[str, Callable[[torch.Tensor], Any]]:
    """Each contender's way from an image `(1, D, H, W)` to a label map, in memory."""
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


def nnunet_predictor(net: torch.nn.Module, window: Sequence[int], spacing: Sequence[float]) -> Any:
    """nnU-Net's predictor around any network."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    plans = PlansManager(nnunet_plans(spacing, window, "CT"))
    predictor = nnUNetPredictor(
        tile_step_size=0.5,
        use_mirroring=False,
        perform_everything_on_device=False,
        device=torch.device("cpu"),
        allow_tqdm=False,
    )
    configuration, dataset = plans.get_configuration("3d_fullres"), nnunet_dataset(len(ORGANS))
    predictor.manual_initialization(net, plans, configuration, [net.state_dict()], dataset, "", None)
    return predictor


def dice(first: np.ndarray, second: np.ndarray) -> float:
    """The lowest Dice of the labels that either has."""
    pairs = [(first == number, second == number) for number in ORGANS]
    sums = [(float((a & b).sum()), float(a.sum() + b.sum())) for a, b in pairs]
    return min(2 * both / either for both, either in sums if either)


@app.command()
def prediction(
    peers: Peers = None,
    edge: Annotated[int, typer.Option(min=64, help="Of the volume, voxels.")] = 120,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    out: Out = None,
) -> None:
    """Seconds from a volume in memory to its label map on the same grid."""
    use_peers(peers)
    image, label = phantom((edge, edge, edge))
    volume = torch.from_numpy(image / np.float32(1000))[None]
    masks: dict[str, np.ndarray] = {}
    ways = predictors(trained(FILTERS["prediction"]), WINDOWS["prediction"])

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


# Memory


def status(key: str) -> int:
    """A line of this process's status, in bytes: VmRSS is resident memory, VmHWM its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def whole_medi3d(weights: Path, scan: Path, target: Path, spacing: list[float]) -> None:
    from medi3d.datasets.volumes import Normalisation, VolumeSettings
    from medi3d.engine.inference import SlidingWindow
    from medi3d.engine.precision import Precision
    from medi3d.transfer.prediction import predict_files
    from medi3d.transfer.predictor import Predictor

    net = network(FILTERS["memory"])
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
    one = Predictor(None, net, SlidingWindow(WINDOWS["memory"]), precision, identity="bench")  # type: ignore[arg-type]
    _, failed = predict_files([one], [settings], [scan], target.parent / "masks")
    assert not failed, failed
    (target.parent / "masks" / scan.name).rename(target)


def whole_nnunet(weights: Path, scan: Path, target: Path, spacing: list[float]) -> None:
    from nnunetv2.inference.export_prediction import export_prediction_from_logits
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

    net = network(FILTERS["memory"])
    net.load_state_dict(torch.load(weights))
    predictor = nnunet_predictor(net, WINDOWS["memory"], spacing)
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
def memory(
    folder: Annotated[Path, typer.Option(help="For the scan and the masks; what is there is used again.")],
    peers: Peers = None,
    shape: Annotated[tuple[int, int, int], typer.Option(help="Of the scan (D, H, W).")] = (600, 512, 512),
    sides: Annotated[tuple[float, float, float], typer.Option(help="Of its voxels, mm.")] = (1.0, 0.8, 0.8),
    spacing: Annotated[float, typer.Option(help="Of the network's grid, mm; 0: that of the scan.")] = 2.0,
    limit: Annotated[float, typer.Option(help="GB that a process may map at most.")] = 20.0,
    contenders: Annotated[str, typer.Option(help="Which to measure.")] = ",".join(WHOLE),
    out: Out = None,
) -> None:
    """Peak memory and time from a scan's file to the file of its mask, 6 labels."""
    import SimpleITK as sitk

    from medi3d.datasets.files import read_header

    grid = list(sides) if spacing == 0 else [spacing] * 3
    folder.mkdir(parents=True, exist_ok=True)
    weights, scan = folder / "weights.pt", folder / "scan.nii"
    if not scan.exists():
        torch.save(trained(FILTERS["memory"]).state_dict(), weights)
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
        size = read_header(scan).size  # of the scan that is there
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
    """A contender of `memory`, in this process; its last line of output says what it took."""
    use_peers(peers)
    who, weights, scan, target, spacing = json.loads(task)
    resource.setrlimit(resource.RLIMIT_AS, (int(limit * 1e9),) * 2)
    with quiet():
        WHOLE[who](Path(weights), Path(scan), Path(target), spacing)
    print(json.dumps({"peak_gb": status("VmHWM") / 1e9, "cpu": time.process_time()}))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What is printed inside goes to stderr."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


if __name__ == "__main__":
    app()

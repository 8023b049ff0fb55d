"""Shared by the benchmarks of volumes: nnU-Net, the timing of turns, a synthetic CT and a network for it.

nnU-Net is not a dependency; it is installed without its own dependencies, in a separate folder:

    pip install --no-deps --target peers nnunetv2==2.8.1 dynamic-network-architectures acvl-utils \\
        batchgenerators batchgeneratorsv2 "blosc2<3.8" ndindex numexpr msgpack py-cpuinfo scikit-image \\
        lazy-loader imageio tifffile imagecodecs seaborn yacs einops connected-components-3d \\
        fft-conv-pytorch graphviz dicom2nifti python-gdcm
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console

console = Console()

ORGANS = {1: 900, 2: -700, 3: 300, 4: 150, 5: -300, 6: 600}
"""Label -> HU of the organs in the synthetic CT; its body has 0, the air around it -1000."""
NOISE = 20

Peers = Annotated[Path | None, typer.Option(help="Folder of `pip install --target` with nnunetv2.")]
Out = Annotated[Path | None, typer.Option(help="Write every figure to this JSON file.")]


def use_peers(folder: Path | None) -> None:
    """Make nnU-Net importable, after the environment, so that its torch and numpy are used."""
    from medi3d import torchvision_shim

    torchvision_shim.install()
    if folder:
        sys.path.append(str(folder.resolve()))
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        os.environ.setdefault(name, tempfile.gettempdir())
    try:
        import nnunetv2  # noqa: F401
    except ImportError as error:
        raise SystemExit(f"nnU-Net is not installed ({error}); give --peers FOLDER") from error


def turns(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, list[float]]]:
    """Wall and CPU seconds of every contender, in turns, `repeats` times after a warm-up."""
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
    """Time of the rival divided by ours."""
    pairs = zip(seconds[rival][kind], seconds[ours][kind], strict=True)
    return statistics.median(theirs / own for theirs, own in pairs)


def nnunet_plans(spacing: Sequence[float], window: Sequence[int], modality: str) -> dict[str, Any]:
    """Plans in the form of nnU-Net's default planner, for one channel."""
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


def nnunet_predictor(net: torch.nn.Module, window: Sequence[int], spacing: Sequence[float]) -> Any:
    """nnU-Net's predictor with any network."""
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
    """The network that all contenders use: a small U-Net like nnU-Net's."""
    from monai.networks.nets import DynUNet

    torch.manual_seed(0)
    return DynUNet(3, 1, len(ORGANS) + 1, [3, 3, 3], [1, 2, 2], [2, 2], filters=filters, norm_name="batch")


def trained(filters: Sequence[int], steps: int) -> torch.nn.Module:
    """`network`, trained for `steps` steps on phantoms, in the fastest precision.

    It trains on small whole phantoms first, since batch norms that see one organ at a time lose its HU. Then
    norms are frozen, patches are cut from larger phantoms, and background has the same weight as organs, so
    that borders become sharp.
    """
    from medi3d.engine.precision import Precision

    precision = Precision.choose("auto", "cpu")
    net = precision.place_network(network(filters))
    small, large = ([phantom((side,) * 3, seed) for seed in range(1, 9)] for side in (48, 96))
    share = torch.tensor([0.02] + [1.0] * len(ORGANS))  # most of a scan is background
    steepest = torch.optim.Adam(net.parameters())
    for phase, (scans, highest, weights) in enumerate(((small, 0.01, share), (large, 0.004, None))):
        schedule = torch.optim.lr_scheduler.OneCycleLR(steepest, highest, steps // 2, pct_start=0.1)
        net.train(phase == 0)
        for step in range(steps // 2):
            images, labels = batch(scans, np.random.default_rng([phase, step]))
            with precision.autocast():
                logits = net(precision.place(images))
            steepest.zero_grad()
            torch.nn.functional.cross_entropy(logits.float(), labels, weights).backward()
            steepest.step()
            schedule.step()
    plain = network(filters)  # without the changes of `place_network`
    plain.load_state_dict(net.state_dict())
    return plain.eval()


def batch(
    scans: Sequence[tuple[np.ndarray, np.ndarray]], chance: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two patches of 48 voxels a side: images, normalised for the network, and labels."""
    pairs = []
    for which in chance.choice(len(scans), 2, replace=False):
        low = [chance.integers(0, extent - 48, endpoint=True) for extent in scans[which][0].shape]
        cut = tuple(slice(start, start + 48) for start in low)
        pairs.append([torch.from_numpy(array[cut]) for array in scans[which]])
    images, labels = (torch.stack(arrays) for arrays in zip(*pairs, strict=True))
    return images[:, None] / 1000, labels.long()


def dice(first: np.ndarray, second: np.ndarray) -> float:
    """The lowest Dice over the labels in either map."""
    pairs = [(first == number, second == number) for number in ORGANS]
    sums = [(float((a & b).sum()), float(a.sum() + b.sum())) for a, b in pairs]
    return min(2 * both / either for both, either in sums if either)

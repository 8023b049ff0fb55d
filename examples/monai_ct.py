"""Segment head-and-neck CT with plain MONAI; the two lines of medi3d are marked.

    python examples/monai_ct.py --root ../shared/data/OpenKBP_HeadNeckCT --steps 500

The cohort is OpenKBP (data/cards/openkbp.md) in the layout of the Medical Segmentation Decathlon; any
other CT in that layout works. It prints the Dice of the held-out cases. With --plain the network is MONAI's
own U-Net from scratch: the baseline for medi3d, all else equal.
"""

import argparse
import json
import logging
import time
from pathlib import Path

import numpy
import torch
from ignite.engine import Engine, Events
from monai.data import CacheDataset, DataLoader, Dataset, load_decathlon_datalist
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import MeanDice, StatsHandler, ValidationHandler, from_engine
from monai.inferers import SlidingWindowInferer
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from monai.transforms import (
    AsDiscreted,
    Compose,
    EnsureChannelFirstd,
    EnsureTyped,
    LoadImaged,
    Orientationd,
    RandCropByPosNegLabeld,
    ScaleIntensityRanged,
    SpatialPadd,
)
from monai.utils import set_determinism

import medi3d  # medi3d, line 1


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder with dataset.json")
    parser.add_argument(
        "--weights", default=None, help="kinetics400/i3d-rgb, file:PATH, ...; default: from scratch"
    )
    parser.add_argument("--plain", action="store_true", help="MONAI's own U-Net instead")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--cpu-seconds", type=float, default=0.0, help="ends training early; 0: no limit")
    parser.add_argument("--cases", type=int, default=0, help="total number of cases; 0: all")
    parser.add_argument("--held-out", type=int, default=15, help="cases for validation")
    parser.add_argument("--patch", type=int, nargs=3, default=[64, 64, 64], help="depth, height, width")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--validate-every", type=int, default=250)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=None, help="write the Dice scores to this file")
    return parser.parse_args()


def transforms(patch: list[int], *, training: bool) -> Compose:
    keys = ("image", "label")
    steps = [
        LoadImaged(keys),
        EnsureChannelFirstd(keys),
        Orientationd(keys, axcodes="SPL", labels=None),  # depth, height, width
        ScaleIntensityRanged("image", a_min=-160, a_max=240, b_min=-1, b_max=1, clip=True),
    ]
    if training:
        steps += [
            SpatialPadd(keys, spatial_size=patch),
            RandCropByPosNegLabeld(keys, label_key="label", spatial_size=patch, pos=3, neg=1, num_samples=1),
        ]
    return Compose([*steps, EnsureTyped(keys)])


def main() -> None:
    args = options()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    set_determinism(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    listing = args.root / "dataset.json"
    labels = json.loads(listing.read_text())["labels"]
    cases = load_decathlon_datalist(listing, True, "training")[: args.cases or None]
    order = numpy.random.default_rng(0).permutation(len(cases))  # as configs/segmentation/openkbp_i3d.yaml
    held, kept = ([cases[i] for i in part] for part in (order[: args.held_out], order[args.held_out :]))

    if args.plain:  # as in MONAI's tutorial spleen_segmentation_3d
        network = UNet(3, 1, len(labels), (16, 32, 64, 128, 256), (2, 2, 2, 2), num_res_units=2, norm="batch")
    else:
        network = medi3d.create_segmenter(  # medi3d, line 2
            "inception_v1", weights=args.weights, levels=4, num_classes=len(labels)
        )
    network = network.to(device)

    batches = DataLoader(
        CacheDataset(kept, transforms(args.patch, training=True), progress=False),
        batch_size=args.batch_size,
        shuffle=True,
    )
    after = Compose(
        [
            AsDiscreted("pred", argmax=True, to_onehot=len(labels)),
            AsDiscreted("label", to_onehot=len(labels)),
        ]
    )
    evaluator = SupervisedEvaluator(
        device=device,
        val_data_loader=DataLoader(Dataset(held, transforms(args.patch, training=False))),
        network=network,
        inferer=SlidingWindowInferer(args.patch, sw_batch_size=2, overlap=0.25, mode="gaussian"),
        postprocessing=after,
        key_val_metric={
            "dice": MeanDice(include_background=False, output_transform=from_engine(["pred", "label"]))
        },
        val_handlers=[StatsHandler(output_transform=lambda _: None)],
    )
    trainer = SupervisedTrainer(
        device=device,
        max_epochs=-(-args.steps // max(1, len(batches))),
        train_data_loader=batches,
        network=network,
        optimizer=torch.optim.AdamW(network.parameters(), lr=args.learning_rate, weight_decay=0.01),
        loss_function=DiceCELoss(include_background=False, to_onehot_y=True, softmax=True),
        train_handlers=[
            ValidationHandler(args.validate_every, evaluator, epoch_level=False),
            StatsHandler(tag_name="loss", output_transform=from_engine("loss", first=True)),
        ],
    )
    begun = time.process_time()

    def end(engine: Engine) -> None:
        used_up = args.cpu_seconds and time.process_time() - begun >= args.cpu_seconds
        if used_up or engine.state.iteration >= args.steps:
            engine.terminate()

    trainer.add_event_handler(Events.ITERATION_COMPLETED, end)
    trainer.run()
    used, steps = time.process_time() - begun, trainer.state.iteration
    evaluator.run()
    dice = evaluator.state.metrics["dice"]
    each = evaluator.state.metric_details["dice"].nanmean(dim=0).tolist()  # (cases, organs), NaN: absent
    organs = dict(zip([labels[number] for number in sorted(labels, key=int)][1:], each, strict=True))
    print(f"mean Dice of {len(held)} cases after {steps} steps, {used:.0f} CPU s: {dice:.4f}")
    print(", ".join(f"{organ} {value:.4f}" for organ, value in organs.items()))
    if args.json is not None:
        found = {"dice": dice, "organs": organs, "steps": steps, "cpu_seconds": used, "cases": len(cases)}
        args.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()

"""Rows of networks trained on volumes."""

from medi3d.weights.keymaps import MEDICALNET_DEPTHS
from medi3d.weights.rows.row import InputContract, WeightsRow

NC_ND = "no commercial use; no sharing of derivatives, such as fine-tuned weights; attribution required"
BY = "attribution required"
_UNIT = {"mean": (0.0,), "std": (1.0,)}
"""Intensities from 0 to 1, not centred."""


def _medicalnet(depth: int, datasets: int) -> "WeightsRow":
    more = datasets == 23
    return WeightsRow(
        name=f"medicalnet/resnet{depth}{'-23' if more else ''}",
        source=f"medicalnet:resnet{depth}",
        description=f"MedicalNet: 3D ResNet-{depth} trained to segment {datasets} sets of CT and MR volumes",
        licence="MIT",
        paper="Chen et al. 2019, arXiv:1904.00625",
        dimensions=3,
        keymap=f"medicalnet_resnet{depth}",
        file=f"resnet_{depth}{'_23dataset' if more else ''}.pth",
        url=f"https://huggingface.co/TencentMedicalNet/MedicalNet-Resnet{depth} , github Tencent/MedicalNet",
        note="each volume is normalised by the mean and std of its voxels above 0: no fixed range",
    )


_OPENMIND = {
    "mae": ("MAE", "masked autoencoding"),
    "volumefusion": ("VF", "VolumeFusion"),
    "simclr": ("SimCLR", "SimCLR"),
    "voco": ("VoCo", "VoCo"),
    "s3d": ("S3D", "SparK in 3D"),
    "swinunetr": ("SwinUNETR", "SwinUNETR's three tasks"),
}
# Of checkpoint_final.pth (491,198,606 bytes), as two projects that use it state independently.
_OPENMIND_MAE = "7a847af785635335c00e711d16ff4d225d86ecd5992b14c059df2b520e3ee933"


def _openmind(task: str) -> WeightsRow:
    letters, method = _OPENMIND[task]
    folder = f"ResEncL-OpenMind-{letters}"
    return WeightsRow(
        name=f"openmind/resencl-{task}",
        source="nnunet3d:residual",
        description=f"OpenMind: ResEnc-L pretrained on 114,000 head MR volumes by {method}",
        licence="CC-BY-4.0",
        conditions=BY,
        paper="Wald et al. 2024, arXiv:2412.17041",
        dimensions=3,
        keymap="openmind",
        file=f"{folder}/checkpoint_final.pth",
        sha256=_OPENMIND_MAE if task == "mae" else None,
        size=491_198_606 if task == "mae" else None,
        url=f"https://huggingface.co/AnonRes/{folder}",
        note="MR; each volume minus its mean, divided by its std, background included; 1 mm; patches of 160",
    )


_TOTALSEGMENTATOR = {
    291: ("organs", "part1_organs_1559subj"),
    292: ("vertebrae", "part2_vertebrae_1532subj"),
    293: ("cardiac", "part3_cardiac_1559subj"),
    294: ("muscles", "part4_muscles_1559subj"),
    295: ("ribs", "part5_ribs_1559subj"),
}


def _totalsegmentator(number: int) -> WeightsRow:
    part, name = _TOTALSEGMENTATOR[number]
    folder = f"Dataset{number}_TotalSegmentator_{name}"
    trainer = "nnUNetTrainerNoMirroring__nnUNetPlans__3d_fullres"
    releases = "https://github.com/wasserth/TotalSegmentator/releases/download"
    return WeightsRow(
        name=f"totalsegmentator/{part}",
        source="nnunet3d:plain",
        description=f"TotalSegmentator v2, 1.5 mm, {part}: nnU-Net's plain U-Net; its encoder",
        licence="Apache-2.0",
        paper="Wasserthal et al. 2023, arXiv:2208.05868",
        dimensions=3,
        keymap="totalsegmentator",
        file=f"{folder}/{trainer}/fold_0/checkpoint_final.pth",
        url=f"{releases}/v2.0.0-weights/{folder}.zip",
        note="CT; clipped and normalised by the numbers in the archive's plans.json; 1.5 mm; kernels are "
        "turned from (z, y, x) in RAS to (D, H, W); where H or W is even at a level, its strided grid starts "
        "one voxel later than in nnU-Net",
    )


_MERLIN = {
    "clip": (
        "i3_resnet_clinical_longformer_best_clip_04-02-2024_23-21-36_epoch_99.pt",
        "15,331 abdominal CTs, their reports and diagnoses",
    ),
    "five-year": (
        "resnet_clinical_longformer_five_year_disease_prediction.pt",
        "then to predict diseases within five years",
    ),
}


def _merlin(kind: str) -> WeightsRow:
    file, trained = _MERLIN[kind]
    return WeightsRow(
        name=f"merlin/{kind}",
        source="merlin",
        description=f"Merlin's image encoder, an inflated ResNet-152 trained on {trained}",
        licence="MIT",
        paper="Blankemeier et al. 2024, arXiv:2406.06512",
        dimensions=3,
        contract=InputContract(**_UNIT, channels="HU", size=224),
        keymap="merlin",
        file=file,
        url="https://huggingface.co/stanfordmimi/Merlin",
        note="CT; HU window -1000 to 1000; 3 x 1.5 x 1.5 mm; the encoder turns the axes, (z, x, y) in RAS",
    )


_VOCO_SIZES = {"b": 48, "l": 96, "h": 192}


def _voco(size: str, whole: bool) -> WeightsRow:
    letter = size.upper()
    trained = "by contrasting crops and by pseudo-labels" if whole else "by contrasting crops"
    return WeightsRow(
        name=f"{'vocomni' if whole else 'voco'}/swinunetr-{size}",
        source=f"swinunetr3d:{_VOCO_SIZES[size]}",
        description=f"VoCo {letter}: SwinUNETR-V2 pretrained on 160,000 CTs {trained}; its encoder",
        licence="Apache-2.0",
        paper="Wu et al. 2024, arXiv:2402.17300, arXiv:2410.09890",
        dimensions=3,
        contract=InputContract(**_UNIT, channels="HU", size=96),
        keymap="voco",
        file=f"VoComni_{letter}.pt" if whole else f"VoCo_{letter}_SSL_head.pt",
        url="https://huggingface.co/Luffy503/VoCo",
        note="CT; HU window -175 to 250 (chests: -1000 to 500); the encoder turns the axes, (x, y, z) in RAS",
    )


_CT_FM = {
    "encoder": ("ct_fm_feature_extractor", "MIT (of the repository); the model card names none"),
    "segresnet": ("ct_fm_segresnet", "Apache-2.0"),
}


def _ct_fm(kind: str) -> WeightsRow:
    folder, licence = _CT_FM[kind]
    return WeightsRow(
        name=f"ct-fm/{kind}",
        source="segresnet3d",
        description=f"CT-FM ({folder}): SegResNet's encoder pretrained on 148,000 CTs by contrasting crops",
        licence=licence,
        paper="Pai et al. 2025, arXiv:2501.09001",
        dimensions=3,
        contract=InputContract(**_UNIT, channels="HU", size=160),
        keymap="ct_fm",
        file=f"{folder}/model.safetensors",
        url=f"https://huggingface.co/project-lighter/{folder}",
        note="CT; HU window -1024 to 2048; its axes (SPL) are like ours",
    )


_ANATOMIX = {
    "anatomix": ("anatomix", "anatomix", "6 M parameters as a whole"),
    "dev": ("anatomix-dev", "anatomix:dev", "94 M parameters as a whole, experimental"),
}


def _anatomix(kind: str) -> WeightsRow:
    file, source, size = _ANATOMIX[kind]
    return WeightsRow(
        name=f"anatomix/{kind}",
        source=source,
        description=f"anatomix ({size}): U-Net pretrained on synthetic volumes; its encoder",
        licence="MIT",
        paper="Dey et al. 2024, arXiv:2411.02372",
        dimensions=3,
        contract=InputContract(**_UNIT, channels="grey", size=128),
        keymap="anatomix_dev" if kind == "dev" else "anatomix",
        file=f"{file}.pth",
        url="https://huggingface.co/neeldey/anatomix",
        note="any modality, each volume scaled to 0 to 1; trained on no anatomical axes",
    )


ROWS = (
    *(_medicalnet(depth, 8) for depth in MEDICALNET_DEPTHS),
    *(_medicalnet(depth, 23) for depth in (10, 18, 34, 50)),
    WeightsRow(
        name="modelsgenesis/chest_ct",
        source="unet3d",
        description="Models Genesis: U-Net that learnt to restore 623 chest CTs; its encoder",
        licence="see the repository, which names patents",
        paper="Zhou et al. 2019, arXiv:1908.06912",
        dimensions=3,
        contract=InputContract(mean=(0.0,), std=(1.0,), channels="HU", size=64),
        keymap="models_genesis",
        file="Genesis_Chest_CT.pt",
        url="https://github.com/MrGiovanni/ModelsGenesis",
        note="CT; HU window -1000 to 1000; kernels are turned from (x, y, z) in LPS to (D, H, W)",
    ),
    WeightsRow(
        name="suprem/unet",
        source="unet3d",
        description="SuPreM: U-Net trained to segment 2100 abdominal CTs; its encoder",
        licence="CC BY-NC-ND 4.0",
        conditions=NC_ND,
        paper="Li et al. 2024, arXiv:2501.11253",
        dimensions=3,
        contract=InputContract(mean=(0.0,), std=(1.0,), channels="HU", size=96),
        keymap="suprem_unet",
        file="supervised_suprem_unet_2100.pth",
        url="https://huggingface.co/MrGiovanni/SuPreM",
        note="CT; HU window -175 to 250; 1.5 mm; kernels are turned from (x, y, z) in RAS to (D, H, W)",
    ),
    *(_openmind(task) for task in _OPENMIND),
    *(_totalsegmentator(number) for number in _TOTALSEGMENTATOR),
    *(_merlin(kind) for kind in _MERLIN),
    *(_voco(size, whole) for whole in (False, True) for size in _VOCO_SIZES),
    *(_ct_fm(kind) for kind in _CT_FM),
    *(_anatomix(kind) for kind in _ANATOMIX),
)

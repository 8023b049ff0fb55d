"""Lists of clips in their published formats: medi3d's CSV, UCF101, HMDB51, Kinetics, and a folder per class.

Each reader gives rows with "path" (absolute, or relative to the list), "class", and where the list gives them
"label", "group" and "split".
"""

import csv
import re
from collections.abc import Iterator
from pathlib import Path

from medi3d.datasets.clips.frames import PICTURE_SUFFIXES
from medi3d.errors import DataError

CLIP_SUFFIXES = (".mp4", ".avi", ".gif", ".mov", ".mkv", ".webm")
Row = dict[str, str]
_HMDB_PARTS = {"0": "unused", "1": "training", "2": "validation"}
_KINETICS_COLUMNS = ("label", "youtube_id", "time_start", "time_end")
_KINETICS_BESIDE = ("validate.csv", "val.csv")


def read_rows(root: Path, videos: Path | None) -> list[Row]:
    """Read the rows of a list; its name and first line determine the format.

    Args:
        root: a folder with a folder per class; medi3d's or Kinetics' CSV (`validate.csv` or `val.csv`
            beside a `train.csv` is read with it); UCF101's `trainlist01.txt`, with its `testlist01.txt` and
            `classInd.txt` beside it; or HMDB51's lists of one split, as `FOLDER/*_test_split1.txt`.
        videos: the folder in which the clips lie; None: beside the list.

    Raises:
        DataError: the list does not exist, or is in none of these formats.
    """
    at = videos or root.parent
    if root.is_dir():
        return list(_folders(root))
    if re.fullmatch(r"\*_test_split\d\.txt", root.name):
        return list(_hmdb(root, at))
    if root.is_file() and re.fullmatch(r"trainlist\d+\.txt", root.name):
        return list(_ucf(root, at))
    if root.is_file() and root.suffix.lower() == ".csv":
        rows = _csv_rows(root)
        if rows and "youtube_id" in rows[0]:
            return list(_kinetics(root, rows, at))
        return _ours(root, rows, at)
    raise DataError(
        f"{root}: no such list of clips; give a .csv list, UCF101's trainlist01.txt, HMDB51's "
        "*_test_split1.txt, or a folder with a folder per class"
    )


def _folders(root: Path) -> Iterator[Row]:
    """Rows of CLASS/CLIP; a clip is a file or a folder of pictures."""
    for path in sorted(root.glob("*/*")):
        if path.suffix.lower() in CLIP_SUFFIXES or (path.is_dir() and _has_pictures(path)):
            yield {"path": str(path), "class": path.parent.name}


def _has_pictures(folder: Path) -> bool:
    return any(path.suffix.lower() in PICTURE_SUFFIXES for path in folder.iterdir())


def _ours(path: Path, rows: list[Row], videos: Path) -> list[Row]:
    for number, row in enumerate(rows, start=2):
        missing = [column for column in ("path", "class") if not row.get(column)]
        if missing:
            raise DataError(f"{path}, line {number}: no {' and no '.join(missing)}")
    return [{**row, "path": str(videos / row["path"])} for row in rows]


def _ucf(path: Path, videos: Path) -> Iterator[Row]:
    """Rows of lines `CLASS/NAME.avi 1`; the test list has no number."""
    numbered = [line.split() for line in _lines(path.with_name("classInd.txt"))]
    if not all(len(parts) == 2 and parts[0].isdigit() for parts in numbered):
        raise DataError(f"{path.with_name('classInd.txt')}: lines must be a number and a class")
    labels = {name: int(number) - 1 for number, name in numbered}
    test = path.with_name(path.name.replace("train", "test"))
    for file, split in ((path, "training"), (test, "validation")):
        for line in _lines(file):
            name, *number = line.split()
            class_name = name.split("/")[0]
            if class_name not in labels or (number and number != [str(labels[class_name] + 1)]):
                raise DataError(f"{file}: {line!r} does not fit the classes of classInd.txt")
            label = str(labels[class_name])
            yield {"path": str(videos / name), "class": class_name, "label": label, "split": split}


def _hmdb(pattern: Path, videos: Path) -> Iterator[Row]:
    """Rows of the files CLASS_test_split1.txt, with lines `NAME.avi 1`: 1 training, 2 test, 0 neither."""
    for file in sorted(pattern.parent.glob(pattern.name)):
        class_name = re.sub(r"_test_split\d\.txt$", "", file.name)
        for line in _lines(file):
            name, _, part = line.strip().rpartition(" ")
            if not name or part not in _HMDB_PARTS:
                raise DataError(f"{file}: {line!r} is not a clip followed by 0, 1 or 2")
            path = videos / class_name / name.strip()
            yield {"path": str(path), "class": class_name, "split": _HMDB_PARTS[part]}


def _kinetics(path: Path, rows: list[Row], videos: Path) -> Iterator[Row]:
    """Rows of the columns label, youtube_id, time_start, time_end, split; clips of one video are one group.

    Files are named ID_000010_000020.mp4 (seconds, as the usual download scripts do) or ID.mp4, in the folder
    of the split, the class, both, or none.
    """
    beside = [path.with_name(name) for name in _KINETICS_BESIDE] if path.name == "train.csv" else []
    for file in (path, *(other for other in beside if other.is_file())):
        for number, row in enumerate(rows if file == path else _csv_rows(file), start=2):
            missing = [column for column in _KINETICS_COLUMNS if not row.get(column)]
            if missing:
                raise DataError(f"{file}, line {number}: no {' and no '.join(missing)}")
            split = row.get("split") or file.stem
            clip = _find_kinetics(videos, row, split, f"{file}, line {number}")
            yield {"path": str(clip), "class": row["label"], "group": row["youtube_id"], "split": split}


def _find_kinetics(videos: Path, row: Row, split: str, where: str) -> Path:
    try:
        seconds = "_".join(f"{int(float(row[column])):06d}" for column in ("time_start", "time_end"))
    except ValueError as error:
        raise DataError(f"{where}: time_start and time_end must be seconds") from error
    class_folder = row["label"].replace(" ", "_")
    folders = [videos / split / row["label"], videos / split / class_folder, videos / split]
    folders += [videos / row["label"], videos / class_folder, videos]
    names = [f"{row['youtube_id']}{part}{suffix}" for part in (f"_{seconds}", "") for suffix in CLIP_SUFFIXES]
    found = (folder / name for folder in folders if folder.is_dir() for name in names)
    return next((path for path in found if path.is_file()), videos / names[0])


def _csv_rows(path: Path) -> list[Row]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not a CSV list ({error})") from error


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error

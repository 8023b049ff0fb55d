"""Settings of clips: location, frames, size, split."""

from dataclasses import dataclass

from medi3d.errors import ConfigError

STREAMS = {"rgb": 3, "flow": 2, "both": 5}
"""Input streams and their channels: red, green, blue; flow to the right and down; or all of these."""


@dataclass(frozen=True)
class ClipSettings:
    """A set of clips and how they are processed (config section)."""

    root: str = ""
    """CSV list (path, class; optional label, group, split), a folder with a folder per class, or a published
    list: UCF101's trainlist01.txt, HMDB51's FOLDER/*_test_split1.txt, Kinetics' train.csv"""
    videos: str = ""
    """folder of the clips of a list; empty: the list's own"""
    streams: str = "rgb"
    """rgb | flow | both: 3, 2 or 5 channels, pictures first"""
    rate: float = 0
    """frames per second to sample (I3D: 25); 0: the frames as stored"""
    skip_damaged: bool = False
    """leave out clips that are missing or cannot be decoded, each named in the log; else they are errors"""
    flow_cache: str = ""
    """folder in which computed flow is kept; empty: medi3d's cache"""
    frames: int = 64
    """frames of a clip in a training sample; shorter clips are looped"""
    stride: int = 1
    """use every n-th frame, such as 2 for SlowFast's 32 × 2; flow is still that between stored frames"""
    side: int = 256
    """pixels of the shorter side to which frames are resized"""
    crop: int = 224
    """side of the square crop, in pixels"""
    flip: bool = True
    """mirror half of the training clips, at random; switch off if classes differ by left and right"""
    validation_groups: int = 1
    """groups (clips of one scene) of each class to hold out, if the list names no split"""
    split_seed: int = 0
    """seed of the draw of these groups"""
    folds: int = 0
    """number of cross-validation folds, groups kept whole; 0 holds out `validation_groups` instead"""
    fold: int = 0
    """number of the validation fold, 0 to folds - 1; the others train"""

    def __post_init__(self) -> None:
        for key in ("frames", "stride", "side", "crop"):
            if getattr(self, key) < 1:
                raise ConfigError(f"data.{key} is {getattr(self, key)}: it must be 1 or more")
        if self.streams not in STREAMS:
            raise ConfigError(f"data.streams is {self.streams!r}: use one of {', '.join(STREAMS)}")
        if not 0 <= self.rate <= 1000:
            raise ConfigError(f"data.rate is {self.rate}: frames per second, or 0 for the frames as stored")
        if self.crop > self.side:
            raise ConfigError(f"data.crop is {self.crop}, larger than data.side {self.side}")
        if self.validation_groups < 0:
            raise ConfigError(f"data.validation_groups is {self.validation_groups}: it must be 0 or more")
        if self.folds < 0 or self.folds == 1 or not 0 <= self.fold < max(self.folds, 1):
            raise ConfigError(
                f"data.folds is {self.folds}, data.fold {self.fold}: two folds or more (0: none), from 0 on"
            )

    @property
    def channels(self) -> int:
        """Channels of a sample."""
        return STREAMS[self.streams]

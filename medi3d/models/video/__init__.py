"""Networks that classify clips, by name: the five of the I3D paper and their followers."""

from medi3d.models.video import figure2, residual, transformers, x3d  # each registers its networks
from medi3d.models.video.published import PUBLISHED, Published
from medi3d.models.video.registry import VIDEO, create_video

__all__ = ["PUBLISHED", "VIDEO", "Published", "create_video", "figure2", "residual", "transformers", "x3d"]

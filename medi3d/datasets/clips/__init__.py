"""Videos: frames, optical flow, lists, splits."""

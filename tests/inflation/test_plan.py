"""Kernel plans: what each says of a layer, and what it refuses."""

import math
from pathlib import Path

import pytest

from medi3d.errors import PlanError
from medi3d.inflation.plan import DepthLayer, KernelPlan, LayerGeometry, Override
from medi3d.inflation.tracing import trace
from medi3d.models.inception import InceptionV1Classifier

PLANS = Path(__file__).parents[2] / "configs" / "plans"


def conv(kernel=3, stride=1, at=1.0, path="stage.conv", kind="conv", ordinal=0):
    return LayerGeometry(path, kind, (kernel, kernel), (stride, stride), (1, 1), at, ordinal)


SHIPPED = {
    "isotropic": KernelPlan.isotropic(),
    "video": KernelPlan.video(),
    "planar": KernelPlan.planar(),
    "thick_slices": KernelPlan.from_spacing((10, 1.5, 1.5)),
}


@pytest.mark.parametrize("file", sorted(PLANS.glob("*.yaml")), ids=lambda f: f.stem)
def test_shipped_yaml_is_the_plan_that_it_says(file):
    assert KernelPlan.from_yaml(file) == SHIPPED[file.stem]


def test_isotropic_is_as_in_plane():
    assert KernelPlan.isotropic().layer(conv(7, 2)) == DepthLayer(7, 2, 1, "replicate")


def test_planar_keeps_slices_apart():
    assert KernelPlan.planar().layer(conv(7, 2)) == DepthLayer(1, 1, 1, "replicate")


def test_video_holds_the_first_two_max_pools_and_pads_with_zeros():
    plan = KernelPlan.video()
    paces = [plan.layer(conv(3, 2, kind="max_pool", ordinal=n)) for n in range(3)]
    assert [(p.kernel, p.stride) for p in paces] == [(1, 1), (1, 1), (3, 2)]
    assert plan.layer(conv(7, 2)).padding == "zeros"
    assert plan.layer(conv(7, 1, path="Logits.avg_pool")) == DepthLayer(2, 1, 1, "valid")


@pytest.mark.parametrize(
    ("spacing", "kernels", "strides"),
    [
        ((1, 1, 1), [3, 3, 3, 3], [2, 2, 2, 2]),
        ((2.5, 1, 1), [1, 3, 3, 3], [1, 2, 2, 2]),
        ((5, 1, 1), [1, 1, 3, 3], [1, 1, 2, 2]),
        ((10, 1.5, 1.5), [1, 1, 3, 3], [1, 1, 2, 2]),
        ((0.5, 1, 1), [3, 3, 3, 3], [2, 2, 2, 2]),
    ],
    ids=str,
)
def test_spacing_holds_depth_back_until_voxels_are_cubes(spacing, kernels, strides):
    plan = KernelPlan.from_spacing(spacing)
    layers = [plan.layer(conv(3, 2, at=2**level)) for level in range(4)]
    assert [layer.kernel for layer in layers] == kernels
    assert [layer.stride for layer in layers] == strides


def test_branches_meet_whatever_their_steps():
    """One step of 4 and two steps of 2 cover the same slices."""
    for dz in (1, 2, 3, 5, 9):
        plan = KernelPlan.from_spacing((dz, 1, 1))
        direct = plan.layer(conv(4, 4)).stride
        assert direct == plan.layer(conv(2, 2)).stride * plan.layer(conv(2, 2, at=2)).stride


def test_fps_of_i3d_is_the_video_plan_on_every_layer_of_i3d():
    layers = trace(InceptionV1Classifier()).layers.values()
    paced, video = KernelPlan.from_fps(25), KernelPlan.video()
    assert [paced.layer(layer) for layer in layers] == [video.layer(layer) for layer in layers]


@pytest.mark.parametrize(
    ("fps", "steps"),
    [
        (100, [1, 2, 4, 8, 16, 32]),
        (50, [1, 2, 4, 4, 8, 16]),
        (30, [1, 2, 2, 2, 4, 8]),
        (25, [1, 2, 2, 2, 4, 8]),
        (12.5, [1, 1, 1, 1, 2, 4]),
        (5, [1, 1, 1, 1, 1, 2]),
        (1, [1, 1, 1, 1, 1, 1]),
    ],
    ids=str,
)
def test_fps_keeps_the_pace_in_milliseconds(fps, steps):
    plan = KernelPlan.from_fps(fps)
    assert [plan.depth_stride_at(2**level) for level in range(6)] == steps
    through_layers = [plan.layer(conv(3, 2, at=2**level)).stride for level in range(5)]
    assert math.prod(through_layers) == steps[-1]


def test_fps_holds_pools_and_patches_and_keeps_the_kernels_of_convolutions():
    plan = KernelPlan.from_fps(25)
    held = {"at": 2, "stride": 2}
    assert plan.layer(conv(3, kind="max_pool", **held)).kernel == 1
    assert plan.layer(conv(2, **held)).kernel == 1
    assert plan.layer(conv(3, **held)).kernel == 3
    assert plan.layer(conv(3, kind="max_pool", at=2, stride=1)).kernel == 3


@pytest.mark.parametrize("fps", [0, -1, float("nan"), 1e9])
def test_impossible_frame_rates_are_refused(fps):
    with pytest.raises(PlanError, match="give frames per second"):
        KernelPlan.from_fps(fps)


def test_overrides_win_by_name():
    plan = KernelPlan("mine", overrides=(Override("stem.*", kernel=1, stride=1),))
    assert plan.layer(conv(7, 2, path="stem.conv")).kernel == 1
    assert plan.layer(conv(7, 2, path="stage.conv")).kernel == 7


def test_override_changes_only_what_a_layer_has():
    """A broad pattern reaches attention and statistics too: they have no stride."""
    plan = KernelPlan("mine", overrides=(Override("*", kernel=5, stride=4, statistics="volume"),))
    attention, norm, drop = (plan.layer(conv(1, kind=kind)) for kind in ("attention", "statistics", "other"))
    assert (attention.kernel, attention.stride, attention.statistics) == (5, 1, "volume")
    assert (norm.kernel, norm.stride, norm.statistics) == (1, 1, "volume")
    assert (drop.kernel, drop.stride) == (1, 1)
    assert plan.layer(conv(3)) == DepthLayer(5, 4)


def test_plan_survives_yaml(tmp_path):
    import yaml

    overrides = (Override("a", kernel=3, optional=True), Override("b", statistics="volume"))
    mine = KernelPlan("mine", spacing=(5, 1, 1), overrides=overrides)
    forms = KernelPlan("forms", attention="all", attention_form="divided", statistics="volume")
    for plan in (mine, forms, KernelPlan.from_fps(12.5)):
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(plan.to_dict()))
        assert KernelPlan.from_yaml(tmp_path / "mine.yaml") == plan


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kernal: 3", "unknown key 'kernal'"),
        ("kernel: 0", "kernel is 0; use 'in-plane' or an integer >= 1"),
        ("kernel: three", "kernel is 'three'"),
        ("padding: mirror", "padding is 'mirror'"),
        ("spacing: [1, 1]", "give three sizes"),
        ("spacing: [0, 1, 1]", "give three sizes above 0 mm"),
        ("{spacing: [1, 1, 1], fps: 25}", "either space or time"),
        ("attention: most", "attention is 'most'; use an odd integer >= 1, or 'all'"),
        ("{attention: all, attention_form: windows}", "attention is 'all'; use an integer >= 1"),
        ("attention_form: axial", "attention_form is 'axial'; use one of joint, windows, divided"),
        ("statistics: batch", "statistics is 'batch'; use one of slice, volume"),
        ("overrides: [{pattern: a, statistics: batch}]", "'a': statistics is 'batch'"),
        ("overrides: [{kernel: 3}]", "pattern"),
        ("overrides: [{pattern: a, kernel: -1}]", "kernel is -1"),
        ("overrides: [7]", "must be keys and values"),
        ("[1, 2]", "must be keys and values"),
        ("{", "cannot read the plan"),
    ],
    ids=lambda v: v[:20],
)
def test_malformed_plans_are_refused(tmp_path, text, message):
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(PlanError, match=message):
        KernelPlan.named(tmp_path / "plan.yaml")


def test_unknown_plan_lists_the_known():
    with pytest.raises(PlanError, match="no plan 'cubic': use isotropic, video, planar or the path"):
        KernelPlan.named("cubic")

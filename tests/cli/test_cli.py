"""The commands on networks and weights: what they write, what they print, and how they end."""

import json
import re
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from medi3d.cli import entry as cli
from medi3d.models import sources as registry

LAYER = {"name", "kernel_2d", "kernel_3d", "stride_3d", "padding", "rule"}
LEVEL = {"channels", "stride", "max_rel_error", "border_rel_error", "receptive_field_voxels"}
REPORT = {
    *("source", "plan", "profile", "layers", "levels"),
    *("max_rel_error", "mixes_depth", "can_mix_depth", "parameters", "weights"),
}


@pytest.fixture
def made(medi3d, tmp_path):
    """An artifact and the report of its inflation."""
    paths = tmp_path / "net.safetensors", tmp_path / "reports" / "r.json"
    code, out, err = medi3d(
        "inflate", "timm:test_resnet", "--isotropic", "--out", paths[0], "--json", paths[1]
    )
    assert (code, err) == (0, "")
    return paths[0], json.loads(paths[1].read_text()), out


def test_a_row_shows_the_conditions_of_its_licence(medi3d):
    code, out, err = medi3d("weights", "show", "suprem/unet")
    assert (code, err) == (0, "")
    assert all(word in out for word in ("CC BY-NC-ND 4.0", "conditions", "no commercial use"))


def test_inflate_then_verify_then_inspect(medi3d, made, tmp_path):
    path, report, out = made
    assert "exact: the 3D network equals the 2D one" in out
    assert str(path) in out.replace("\n", "")
    code, out, err = medi3d("verify", path, "--json", tmp_path / "v.json")
    assert (code, err) == (0, "")
    assert json.loads((tmp_path / "v.json").read_text())["max_rel_error"] <= 1e-9
    code, out, err = medi3d("inspect", path, "--size", 32, "--json", tmp_path / "i.json")
    assert (code, err) == (0, "")
    seen = json.loads((tmp_path / "i.json").read_text())
    assert (seen["parameters"], seen["plan"]) == (report["parameters"], report["plan"])
    assert not list(tmp_path.rglob(".tmp*"))


def test_the_report_has_the_promised_keys(made):
    report = made[1]
    assert set(report) >= REPORT
    assert set(report) - REPORT <= {"proof", "exact_by_nature", "exact_on"}
    assert all(set(row) == LAYER for row in report["layers"])
    assert all(set(row) == LEVEL for row in report["levels"])
    assert report["source"] == "timm:test_resnet"
    assert report["max_rel_error"] == max(level["max_rel_error"] for level in report["levels"]) <= 1e-9
    assert report["mixes_depth"] is True
    assert [level["stride"] for level in report["levels"]] == [[s] * 3 for s in (2, 4, 8, 16, 32)]


def test_thick_slices_show_receptive_fields_in_millimetres(medi3d):
    code, out, _ = medi3d("inspect", "timm:test_resnet", "--spacing", "5,1,1", "--size", 32)
    assert code == 0
    assert "(mm)" in out
    assert "195×167×167" in out  # 39 slices of 5 mm at the deepest level


def test_clips_show_receptive_fields_in_milliseconds(medi3d, tmp_path):
    code, out, _ = medi3d("inspect", "timm:test_resnet", "--fps", "12.5", "--size", 32)
    assert code == 0
    assert re.search(r"\(ms\).*\b7×11×11 │ +560\b", out, re.DOTALL)  # 7 frames of 80 ms
    path = tmp_path / "net.safetensors"
    assert "(ms)" in medi3d("inflate", "timm:test_byobnet", "--fps", 25, "--out", path)[1]
    assert "(ms)" in medi3d("inspect", path, "--size", 32)[1]  # of its own plan
    assert "(mm)" in medi3d("inspect", path, "--size", 32, "--spacing", "1,1,1")[1]


def test_both_reports_give_the_receptive_field_under_one_name(medi3d, made, tmp_path):
    medi3d("inspect", made[0], "--size", 32, "--json", tmp_path / "i.json")
    seen, inflated = json.loads((tmp_path / "i.json").read_text()), made[1]
    for key in ("channels", "stride", "receptive_field_voxels"):
        assert [level[key] for level in seen["levels"]] == [level[key] for level in inflated["levels"]]


def test_the_cost_of_the_proof_is_printed(made):
    proof = made[1]["proof"]
    assert 0 < proof["forward_seconds"] < proof["seconds"]
    printed = re.search(r"proof took ([\d.]+) s, ([\d.]+) s of it", " ".join(made[2].split()))
    assert [float(printed[1]), float(printed[2])] == pytest.approx(
        [proof["seconds"], proof["forward_seconds"]], abs=0.06
    )


@pytest.mark.parametrize(
    ("plan", "mixes"), [("planar", False), ("isotropic", True)], ids=["planar", "isotropic"]
)
def test_inflate_says_whether_slices_mix(medi3d, tmp_path, plan, mixes):
    code, out, _ = medi3d("inflate", "timm:test_byobnet", "--plan", plan, "--json", tmp_path / "r.json")
    assert code == 0
    assert ("NOT mixed" in out) is not mixes
    assert json.loads((tmp_path / "r.json").read_text())["mixes_depth"] is mixes


def test_the_known_mistake_is_said_to_be_inexact_and_does_not_verify(medi3d, tmp_path):
    path = tmp_path / "net.safetensors"
    code, out, _ = medi3d("inflate", "timm:test_byobnet", "--profile", "repeat", "--out", path)
    assert code == 0
    assert "inexact by nature" in out
    code, out, err = medi3d("verify", path)
    assert code == 1
    assert "inexact by nature" in out
    assert "is not exact" in err


class Deaf(nn.Module):
    """It has a convolution, and takes no image."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, image):
        raise ValueError("wants words,\nnot images")


@pytest.fixture
def bad_files(tmp_path, monkeypatch):
    """What the arguments of `WRONG` name."""
    (tmp_path / "damaged.safetensors").write_bytes(b"not a file of tensors")
    save_file({"weight": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    torch.save(Deaf().state_dict(), tmp_path / "deaf.pt")
    (tmp_path / "plan.yaml").write_text("overrides: [{pattern: layer9.*, kernel: 1}]")
    (tmp_path / "key.yaml").write_text("kernels: 3")
    monkeypatch.setattr(registry, "_SOURCES", dict(registry._SOURCES))
    registry.register_source("deaf", "for these tests")(lambda levels: Deaf())
    return tmp_path


TINY = ["inflate", "timm:test_resnet"]
WRONG = {
    "near source": (["inflate", "torchvision:resnet19"], "near: .*resnet18"),
    "no library": (["inflate", "keras:resnet18"], "unknown source 'keras:resnet18': use timm:NAME"),
    "no image": (["inflate", "deaf"], r"Deaf takes no \(2, 3, S, S\) image .*: wants words,"),
    "no such layer": ([*TINY, "--plan", "{tmp}/plan.yaml"], r"'layer9.\*', but no layer has that name"),
    "unknown key": ([*TINY, "--plan", "{tmp}/key.yaml"], "unknown key 'kernels'"),
    "inflate no channel": ([*TINY, "--in-channels", "0"], "at least 1 input channel, not 0"),
    "inflate minus channels": ([*TINY, "--in-channels", "-3"], "at least 1 input channel, not -3"),
    "weights of another architecture": (
        [*TINY, "--weights", "file:{tmp}/deaf.pt"],
        "deaf.pt: conv.weight, conv.bias of the file has no place in the network",
    ),
    "no weights file": ([*TINY, "--weights", "file:{tmp}/none.pt"], "none.pt: no such weights file"),
    "no frames": ([*TINY, "--fps", "0"], "fps is 0.0; give frames per second"),
    "unknown source": (["inflate", "timm:resnet81"], "near: .*resnet18"),
    "lean baseline": (["inflate", "unet"], "3D from the start"),
    "unknown plan": (["inflate", "timm:test_resnet", "--plan", "cubic"], "no plan 'cubic'"),
    "unknown profile": (["inflate", "timm:test_resnet", "--profile", "sum"], "unknown depth profile 'sum'"),
    "spacing of zero": (["inspect", "timm:test_resnet", "--spacing", "0,1,1"], "above 0 mm"),
    "no channel": (["inspect", "timm:test_resnet", "--in-channels", "0"], "at least 1 input channel"),
    "wrong suffix": (["inflate", "timm:test_byobnet", "--out", "{tmp}/net.pt"], "is a .safetensors file"),
    "unknown weights": (["weights", "show", "kinetics400/i3d"], "did you mean kinetics400/i3d-rgb"),
    "weights of another": (["inflate", "inception_v1", "--weights", "timm"], "timm:NAME"),
    "missing artifact": (["verify", "{tmp}/none.safetensors"], "no artifact at"),
    "foreign artifact": (["verify", "{tmp}/foreign.safetensors"], "not an artifact of medi3d"),
    "damaged artifact": (["inspect", "{tmp}/damaged.safetensors"], "cannot read the artifact"),
    "missing clip": (["classify", "{tmp}/none.gif", "--weights", "kinetics400/i3d-rgb"], "none.gif"),
    "file as folder": (
        ["weights", "list", "--json", "{tmp}/damaged.safetensors/r.json"],
        r"r\.json: cannot be written",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_an_expected_error_is_one_line_and_exit_code_1(medi3d, bad_files, arguments, message):
    code, _, err = medi3d(*(argument.format(tmp=bad_files) for argument in arguments))
    assert code == 1
    assert err.startswith("medi3d: ")
    assert err.count("\n") == 1
    assert re.search(message, err)


@pytest.mark.parametrize(
    "arguments",
    [
        ["inflate", "{}", "--isotropic"],
        ["inflate", "{}", "--plan", "planar"],
        ["inflate", "{}", "--spacing", "5,1,1"],
        ["inflate", "{}", "--fps", "25"],
        ["inflate", "{}", "--profile", "mean"],
        ["inspect", "{}", "--plan", "isotropic"],
    ],
    ids=lambda arguments: " ".join(arguments[::2]),
)
def test_an_artifact_keeps_its_own_plan(medi3d, made, arguments):
    code, _, err = medi3d(*(argument.format(made[0]) for argument in arguments))
    assert code == 1
    assert re.fullmatch(rf"medi3d: the artifact .* has its own .*: leave out {arguments[2]}, .*\n", err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inflate", "inception_v1", "--weights", "kinetics400/i3d-rgb"], "are not on this machine"),
        ([*TINY, "--out", "net.pt"], "is a .safetensors file"),
    ],
    ids=["weights", "name of the artifact"],
)
def test_what_is_missing_is_told_before_the_proof(medi3d, monkeypatch, tmp_path, arguments, message):
    monkeypatch.setenv("MEDI3D_WEIGHTS_PATH", "")
    monkeypatch.setenv("MEDI3D_CACHE", str(tmp_path))
    monkeypatch.setattr("medi3d.models.encoders.inflate", None)  # calling it would be another error
    code, _, err = medi3d(*arguments)
    assert code == 1
    assert message in err


USAGE = {
    "unknown command": ["infalte"],
    "unknown option": ["inflate", "timm:test_resnet", "--isotrop"],
    "no source": ["inflate"],
    "two plans": ["inflate", "timm:test_resnet", "--isotropic", "--plan", "video"],
    "two numbers": ["inspect", "timm:test_resnet", "--spacing", "5,1"],
    "no number": ["inspect", "timm:test_resnet", "--spacing", "a,b,c"],
    "two paces": ["inspect", "timm:test_resnet", "--spacing", "5,1,1", "--fps", "25"],
    "channels in words": ["inflate", "timm:test_resnet", "--in-channels", "one"],
    "no top": ["classify", "clip.gif", "--weights", "kinetics400/i3d-rgb", "--top", "0"],
}


@pytest.mark.parametrize("arguments", USAGE.values(), ids=USAGE)
def test_wrong_usage_is_exit_code_2(medi3d, arguments):
    assert medi3d(*arguments)[0] == 2


def test_debug_shows_where_an_error_came_from(monkeypatch):
    from medi3d.errors import WeightsError

    monkeypatch.setattr(sys, "argv", ["medi3d", "--debug", "weights", "show", "none"])
    with pytest.raises(WeightsError):
        cli.main()


def test_weights_are_listed_and_shown(medi3d, tmp_path):
    code, out, _ = medi3d("weights", "list", "--json", tmp_path / "w.json")
    assert code == 0
    assert {"imagenet/efficientnet-lite0", "kinetics400/i3d-rgb"} <= set(
        json.loads((tmp_path / "w.json").read_text())
    )
    code, out, _ = medi3d("weights", "show", "kinetics400/i3d-rgb", "--json", tmp_path / "s.json")
    shown = json.loads((tmp_path / "s.json").read_text())
    assert code == 0
    assert shown["sha256"] in re.sub(r"[\s│]", "", out)
    assert shown["licence"].startswith("MIT")


def test_the_process_ends_with_the_code_and_one_line():
    """Through the interpreter, as a user's shell sees it."""
    command = [sys.executable, "-m", "medi3d", "weights", "show", "none"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_the_version_is_said(medi3d):
    assert medi3d("--version") == (0, f"medi3d {version('medi3d')}\n", "")


def test_names_that_users_copy_are_never_cut(medi3d):
    _, out, _ = medi3d("weights", "list")
    assert all(name in out for name in ("kinetics400/i3d-rgb-imagenet", "imagenet/efficientnet-lite0"))
    _, out, _ = medi3d("inspect", "timm:test_resnet", "--size", 32)
    assert "…" not in out
    assert "layer4.0.downsample.0" in out

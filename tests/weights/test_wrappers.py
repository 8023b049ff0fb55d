"""Out of what training programs put around a network's tensors comes the right set, and it is said which."""

import pytest
import torch

from medi3d.errors import WeightsError
from medi3d.weights.files import read_weights

RIGHT = {"a.weight": torch.ones(2, 3), "a.bias": torch.ones(2)}
WRONG = {name: torch.zeros_like(tensor) for name, tensor in RIGHT.items()}


def prefixed(prefix, tensors=RIGHT):
    return {prefix + name: tensor for name, tensor in tensors.items()}


KINDS = {
    "alone": RIGHT,
    "timm": {"state_dict": WRONG, "state_dict_ema": RIGHT, "epoch": 3, "metric": 0.9},
    "torchvision's reference": {
        "model": WRONG,
        "model_ema": {"n_averaged": torch.tensor(3), **prefixed("module.")},
    },
    "ddp": prefixed("module."),
    "compiled": prefixed("_orig_mod."),
    "compiled, then ddp": prefixed("module._orig_mod."),
    "ddp, then compiled": prefixed("_orig_mod.module."),
    "a compiled part": {
        "_orig_mod.a._orig_mod.weight": RIGHT["a.weight"],
        "_orig_mod.a.bias": RIGHT["a.bias"],
    },
    "deepspeed": {"module": RIGHT, "ds_version": "0.14", "optimizer": {"state": {0: {"x": torch.ones(2)}}}},
    "lightning": {
        "state_dict": RIGHT,
        "optimizer_states": [{"state": {}, "param_groups": []}],
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}},
        "loops": {"fit_loop": {"state_dict": {}}},
    },
    "dino": {"student": WRONG, "teacher": RIGHT, "dino_loss": {"center": torch.zeros(1, 4)}},
    "swa": {"n_averaged": torch.tensor(4), **prefixed("module.")},
    "nnunet": {
        "network_weights": RIGHT,
        "optimizer_state": {"param_groups": [], "state": {}},
        "_best_ema": 0.8,
    },
    "nested": {"checkpoint": {"model_state_dict": prefixed("module."), "optimizer": {"param_groups": []}}},
    "a name of one's own": {"my_network": RIGHT, "step": 7},
    "numbers beside": {**RIGHT, "epoch": 3},
}


@pytest.mark.parametrize("content", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("wrapped", [False, True], ids=["", "wrapped again"])
def test_the_right_tensors_come_out_under_their_own_names(tmp_path, content, wrapped):
    torch.save({"state_dict": content} if wrapped else content, tmp_path / "w.pt")
    torch.testing.assert_close(read_weights(tmp_path / "w.pt").tensors, RIGHT)


@pytest.mark.parametrize("kind", ["timm", "torchvision's reference", "dino"])
def test_of_several_sets_the_one_taken_is_said_and_can_be_chosen(tmp_path, kind):
    torch.save(KINDS[kind], tmp_path / "w.pt")
    content = read_weights(tmp_path / "w.pt")
    other = {"timm": "state_dict", "dino": "student"}.get(kind, "model")
    (note,) = content.notes
    assert f"'{content.part}' was taken" in note
    assert f"the file has '{other}'" in note
    chosen = read_weights(tmp_path / "w.pt", other)
    assert (chosen.part, chosen.tensors["a.bias"].sum()) == (other, 0)


def test_a_part_may_be_the_beginning_of_names(tmp_path):
    torch.save({"state_dict": {**prefixed("module.q."), **prefixed("module.k.", WRONG)}}, tmp_path / "w.pt")
    torch.testing.assert_close(read_weights(tmp_path / "w.pt", "state_dict/k").tensors, WRONG)
    torch.testing.assert_close(read_weights(tmp_path / "w.pt", "q").tensors, RIGHT)


@pytest.mark.parametrize(
    ("content", "part", "message"),
    [
        (
            {"first": RIGHT, "second": WRONG},
            "",
            r"several sets .* first, second: choose with file:PATH#first",
        ),
        (KINDS["timm"], "ema", "has no part 'ema'; it has state_dict, state_dict_ema"),
        (RIGHT, "b", "has no part 'b'; its names begin with a"),
        ({**RIGHT, "inner": {"more": RIGHT}}, "", "has tensors beside inner: choose with #inner"),
    ],
    ids=["several", "no such key", "no such names", "mixed"],
)
def test_what_is_not_clear_is_refused(tmp_path, content, part, message):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=message):
        read_weights(tmp_path / "w.pt", part)

import torch
from safetensors.torch import save_file
from torchvision.models.video import r2plus1d_18

from medi3d.models.networks import create_classifier
from medi3d.weights.load import load_weights


def test_r2plus1d_of_torchvision_fills_the_encoder_of_ours(tmp_path):
    theirs = r2plus1d_18().eval()
    save_file(theirs.state_dict(), tmp_path / "theirs.safetensors")
    encoder = create_classifier("r2plus1d_18", num_classes=2).encoder
    report = load_weights(encoder, tmp_path / "theirs.safetensors", keymap="torchvision_r2plus1d_18")
    assert (report.fraction, report.dropped) == (1, ["fc.bias", "fc.weight"])
    ours = dict(encoder.network.named_parameters())
    assert len(ours) == len(list(theirs.parameters())) - 2
    assert torch.equal(ours["layer2.0.conv1.temporal.weight"], theirs.layer2[0].conv1[0][3].weight)

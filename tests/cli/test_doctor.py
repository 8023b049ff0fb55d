"""The doctor finds what is here, and says what is not."""

from medi3d.cli import doctor


def test_every_finding_can_be_read_and_the_operators_work():
    findings = doctor.examine()
    assert all(set(finding) == {"what", "found", "good"} for finding in findings)
    by_name = {finding["what"]: finding for finding in findings}
    assert by_name["torch"]["found"].startswith("2.")
    assert by_name["cpu: 3D operators, bf16 with channels last"]["good"] is True
    assert any(name.startswith("weights kinetics400") for name in by_name)


def test_missing_weights_come_with_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("MEDI3D_WEIGHTS_PATH", str(tmp_path))
    monkeypatch.setenv("MEDI3D_CACHE", str(tmp_path))
    found = {finding["what"]: finding["found"] for finding in doctor.examine()}
    assert "run `medi3d weights fetch kinetics400/i3d-rgb`" in found["weights kinetics400/i3d-rgb"]

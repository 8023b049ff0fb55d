"""Weights of a hub, here a small server: pinned, cached, and every way to fail in one line."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from safetensors.torch import save
from torch import nn

from medi3d.errors import WeightsError
from medi3d.weights.catalogue import get_row
from medi3d.weights.load import load_weights

COMMIT, OLDER = "c" * 40, "0" * 40
TENSORS = {"weight": torch.full((2, 3, 1, 1), 5.0), "bias": torch.ones(2)}
OLD_TENSORS = {name: tensor * 0 for name, tensor in TENSORS.items()}
WEIGHTS = save(TENSORS)
CARD = b"---\nlicense: mit\n---\n# A network\n"
CONFIG = {"pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, 96, 96]}}
REPOSITORIES = {
    "org/timm": {
        "model.safetensors": WEIGHTS,
        "pytorch_model.bin": b"x",
        "config.json": json.dumps(CONFIG).encode(),
        "README.md": CARD,
    },
    "org/one": {"README.md": CARD, "net.pth": WEIGHTS},
    "org/many": {"a.safetensors": WEIGHTS, "b.safetensors": WEIGHTS, "c.bin": b"x"},
    "org/none": {"README.md": b"read"},
    "org/gated": {"model.safetensors": WEIGHTS},
    "org/folders": {"unet/model.safetensors": WEIGHTS, "vae/model.safetensors": WEIGHTS},
}


class Hub(BaseHTTPRequestHandler):
    """What `model_info` and `hf_hub_download` ask for."""

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        self.server.asked.append(f"{self.command} {self.path}")
        parts = self.path.split("?")[0].strip("/").split("/")
        is_info = parts[:2] == ["api", "models"]
        repo = "/".join(parts[2:4] if is_info else parts[:2])
        rest = parts[4:] if is_info else parts[2:]
        files = REPOSITORIES.get(repo)
        if files is None:
            return self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})
        revision = rest[1] if len(rest) > 1 else "main"
        commit = {"main": COMMIT, COMMIT: COMMIT, "v1": OLDER, OLDER: OLDER}.get(revision)
        if commit is None:
            return self.reply(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if is_info:
            siblings = [{"rfilename": name} for name in files]
            info = {
                "id": repo,
                "sha": commit,
                "siblings": siblings,
                "tags": [],
                "cardData": {"license": "mit"},
            }
            return self.reply(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
        if repo == "org/gated":
            return self.reply(403, b"", {"X-Error-Code": "GatedRepo"})
        content = files.get("/".join(rest[2:]))
        if content is None:
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        content = save(OLD_TENSORS) if commit == OLDER and content is WEIGHTS else content
        etag = hashlib.sha256(content).hexdigest()
        return self.reply(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": commit})

    def reply(self, status, content, headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked = []
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize(
    ("name", "file", "commit"),
    [
        ("hf:org/timm", "model.safetensors", COMMIT),
        ("hf:org/timm@v1", "model.safetensors", OLDER),
        (f"hf:org/timm@{OLDER}", "model.safetensors", OLDER),
        ("hf:org/one", "net.pth", COMMIT),
        ("hf:org/many/b.safetensors", "b.safetensors", COMMIT),
        ("hf:org/folders@main/vae/model.safetensors", "vae/model.safetensors", COMMIT),
    ],
)
def test_weights_are_fetched_and_pinned_by_their_commit(hub, name, file, commit):
    network = nn.Conv2d(3, 2, 1)
    report = load_weights(network, name)
    repo = name.removeprefix("hf:").split("@")[0].split("/")[:2]
    assert report.weights == f"hf:{'/'.join(repo)}@{commit}/{file}"
    assert report.licences == [f"{report.weights}: {'mit' if repo[1] in ('timm', 'one') else 'unknown'}"]
    expected = OLD_TENSORS if commit == OLDER else TENSORS
    torch.testing.assert_close(dict(network.state_dict()), expected)


def test_the_repository_says_what_input_its_weights_expect(hub):
    contract = get_row("hf:org/timm").contract
    assert (contract.mean, contract.std, contract.size) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 96)
    assert get_row("hf:org/one").contract is None


@pytest.mark.parametrize("way", ["offline", "no connection", "pinned"])
def test_what_was_fetched_is_in_the_cache(hub, monkeypatch, way):
    pinned = get_row("hf:org/timm")
    hub.asked.clear()
    if way == "offline":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if way == "no connection":
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    again = get_row(pinned.name if way == "pinned" else "hf:org/timm")
    assert again == pinned
    assert hub.asked == []


REFUSED = {
    "repository": ("hf:org/nothing", "the hub has no repository org/nothing, or it is private"),
    "revision": ("hf:org/one@v9", "org/one has no revision 'v9'"),
    "file": ("hf:org/one/other.pth", "has no file 'other.pth'; its weights: net.pth"),
    "several": (
        "hf:org/many",
        "has several weights files: a.safetensors, b.safetensors; choose with",
    ),
    "none": ("hf:org/none", "has no weights file: none ends in"),
    "gated": ("hf:org/gated", "access to org/gated must be granted"),
    "name": ("hf:org", "is not a name on the hub: use hf:ORG/NAME"),
}


@pytest.mark.parametrize(("name", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_the_hub_does_not_give_is_said_in_one_line(hub, name, message):
    with pytest.raises(WeightsError, match=message) as refusal:
        get_row(name)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("HF_HUB_OFFLINE", "1", "is not in the cache"),
        ("HF_ENDPOINT", "http://127.0.0.1:9", "no connection"),
    ],
)
def test_without_the_hub_and_the_cache_it_is_said_in_one_line(hub, monkeypatch, variable, value, message):
    monkeypatch.setenv(variable, value)
    with pytest.raises(WeightsError, match=message) as refusal:
        get_row("hf:org/timm")
    assert "\n" not in str(refusal.value)


def test_a_damaged_cache_is_not_used(hub):
    path = get_row("hf:org/timm").file
    with open(path, "r+b") as file:
        file.seek(-1, 2)
        file.write(b"!")
    with pytest.raises(WeightsError, match="damaged, its SHA-256 is not the hub's"):
        get_row("hf:org/timm")

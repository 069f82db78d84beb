"""Weights from the Hub, by the real client, from a Hub on loopback; every process is fresh."""

import hashlib
import importlib.util
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import huggingface_hub
import pytest
from conftest import REPO, own_environment
from hub_server import Hub

from timm_ulsam.pretrained import recorded_digests

NAME = "mobilenetv2_ulsam.tin200_96"
FOLDER = REPO / "weights" / NAME
DIGEST = recorded_digests()[NAME]
# older clients give up at a lost connection and keep the beginning, never as the file, to go on from there
RESUMES_LATER = int(huggingface_hub.__version__.split(".")[0]) < 1
SCRIPT = """
import json, sys, torch, timm
from pathlib import Path
from huggingface_hub.constants import HF_HUB_CACHE
x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
def logits(name, **kwargs):
    with torch.inference_mode():
        return timm.create_model(name, pretrained=True, **kwargs).eval()(x).double().tolist()
def error(name):
    try:
        logits(name)
    except Exception as error:
        return str(error)
def cached():
    found = Path(HF_HUB_CACHE).glob("models--*/[bs]*/**/*")  # blobs and snapshots, links to nothing too
    return [path.name for path in found if path.is_symlink() or path.is_file()]
def print_json(*values):
    print(json.dumps(values))
"""


@pytest.fixture(scope="module")
def expected():
    import timm
    import torch

    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return timm.create_model(f"local-dir:{FOLDER}", pretrained=True).eval()(x).double().tolist()


@pytest.fixture
def hub():
    """Has the weights at `timm-ulsam` and at another organization."""
    with Hub() as hub:
        hub.put(f"timm-ulsam/{NAME}", FOLDER)
        hub.put(f"someone/{NAME}", FOLDER)
        yield hub


def fresh(hub, tmp_path, *argv, **env):
    environment = {
        **own_environment(),
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "*",
        **env,
    }
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, *argv], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


def run(hub, tmp_path, code, **env):
    return json.loads(fresh(hub, tmp_path, "-c", SCRIPT + code, **env).stdout)


def test_published_weights_load_by_their_hub_name_and_then_without_a_network(tmp_path, expected):
    with Hub() as hub:
        fresh(hub, tmp_path, "-m", "timm_ulsam", "publish", NAME, "--org", "timm-ulsam", HF_TOKEN="hf_writer")
        code = f"print_json(logits('hf-hub:timm-ulsam/{NAME}'))"
        assert run(hub, tmp_path, code) == [expected]
        assert hub.asked["GET download"] == 1
    assert run(hub, tmp_path, code, HF_HUB_OFFLINE="1") == [expected]


def test_weights_that_are_not_at_hand_come_by_their_name_in_the_zoo(hub, tmp_path, expected):
    code = f"print_json(logits('{NAME}', pretrained_cfg_overlay=dict(file=None)))"
    assert run(hub, tmp_path, code) == [expected]
    assert run(hub, tmp_path, code, HF_HUB_OFFLINE="1") == [expected]
    assert hub.asked["GET download"] == 1


def test_a_revision_is_the_one_loaded(hub, tmp_path, expected):
    repo = hub.repos[f"someone/{NAME}"]
    files = repo.resolve("main")[1]
    repo.commit("v1", files)
    repo.commit("main", {"config.json": files["config.json"]})
    assert run(hub, tmp_path, f"print_json(logits('hf-hub:someone/{NAME}@v1'))") == [expected]


def test_two_processes_at_once_both_have_the_weights(hub, tmp_path, expected):
    code = f"print_json(logits('hf-hub:someone/{NAME}'), cached())"
    with ThreadPoolExecutor() as pool:
        both = [pool.submit(run, hub, tmp_path, code) for _ in range(2)]
        found = [one.result() for one in both]
    assert [logits for logits, _ in found] == [expected, expected]
    cached = max((names for _, names in found), key=len)
    assert cached.count(DIGEST) == 1
    assert hub.asked["GET download"] >= 1


@pytest.mark.parametrize("fault", ["short download", "flip download"])
def test_a_cut_or_altered_download_is_refused_and_not_kept(fault, hub, tmp_path, expected):
    hub.faults[fault] = 2
    names = [f"hf-hub:someone/{NAME}", f"hf-hub:timm-ulsam/{NAME}"]
    code = f"n, m = {names}\nprint_json(error(n), error(m), cached(), logits(n), logits(m))"
    *messages, cached, first, second = run(hub, tmp_path, code)
    said = "is truncated or altered: at the Hub" if fault.startswith("flip") else "file should be of size"
    assert [said in message for message in messages] == [True, True], messages
    kept = {name for name in cached if name == "model.safetensors" or name.startswith(DIGEST)}
    assert kept <= ({f"{DIGEST}.incomplete"} if RESUMES_LATER else set())
    assert [first, second] == [expected, expected]


def test_a_lost_connection_is_taken_up_again(hub, tmp_path, expected):
    hub.faults["drop download"] = 1
    once_more = f"error('hf-hub:someone/{NAME}'), " if RESUMES_LATER else ""
    assert run(hub, tmp_path, f"print_json({once_more}logits('hf-hub:someone/{NAME}'))")[-1] == expected
    assert hub.asked["GET download"] == 2


def test_a_cached_file_that_was_altered_since_is_refused_and_not_kept(hub, tmp_path, expected):
    code = f"""
name = "hf-hub:someone/{NAME}"
logits(name)
messages = []
for file, old, new in (("model.safetensors", b"blocks", b"blocqs"), ("config.json", b"0.485", b"0.486")):
    blob = next(Path(HF_HUB_CACHE).rglob("snapshots/*/" + file)).resolve()
    blob.write_bytes(blob.read_bytes().replace(old, new, 1))
    messages.append([error(name), blob.name, blob.exists()])
print_json(messages, logits(name))
"""
    messages, again = run(hub, tmp_path, code)
    for message, digest, exists in messages:
        assert f"is truncated or altered: at the Hub its digest is {digest}" in message
        assert not exists
    assert again == expected


@pytest.mark.parametrize("how", ["", "@main", "another tag in config.json"])
def test_other_weights_under_the_name_of_the_zoo_are_refused(hub, tmp_path, how):
    repo = hub.repos[f"timm-ulsam/{NAME}"]
    revision = how if how.startswith("@") else ""
    content = hub.large[DIGEST]
    other = content[:-1] + bytes([content[-1] ^ 1])
    digest = hashlib.sha256(other).hexdigest()
    hub.large[digest] = other
    files = {**repo.resolve("main")[1], "model.safetensors": digest}
    if how == "another tag in config.json":
        config = json.loads(files["config.json"])
        config["pretrained_cfg"]["tag"] = "other"
        files["config.json"] = json.dumps(config).encode()
    repo.commit("main", files)
    message, cached = run(hub, tmp_path, f"print_json(error('hf-hub:timm-ulsam/{NAME}{revision}'), cached())")
    assert f"expected SHA-256 {DIGEST}, found {digest}. It is no longer in the cache" in message
    assert digest not in cached


def test_a_file_stays_in_the_cache_where_the_record_of_digests_is_what_lacks(hub, tmp_path):
    code = f"""
import os
os.environ["TIMM_ULSAM_WEIGHTS"] = "nowhere"
print_json(error('hf-hub:timm-ulsam/{NAME}'), cached())
"""
    message, cached = run(hub, tmp_path, code)
    assert "cannot read the digests of the weights in" in message
    assert DIGEST in cached


def test_a_repository_without_safetensors_is_refused(hub, tmp_path):
    repo = hub.repos[f"someone/{NAME}"]
    files = dict(repo.resolve("main")[1])
    files["pytorch_model.bin"] = files.pop("model.safetensors")
    repo.commit("main", files)
    message = run(hub, tmp_path, f"print_json(error('hf-hub:someone/{NAME}'))")[0]
    assert f"someone/{NAME} holds no model.safetensors, and nothing else is loaded" in message
    assert not hub.asked["GET download"]


@pytest.mark.transformers
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed: [dev]")
def test_transformers_gives_the_same_logits(hub, tmp_path, expected):
    code = f"""
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained("someone/{NAME}").eval()
with torch.inference_mode():
    print_json(model(x).logits.double().tolist(), model.config.id2label[0])
"""
    assert run(hub, tmp_path, code) == [expected, "n01443537"]

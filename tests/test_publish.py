import subprocess
import sys

import pytest
from conftest import REPO, own_environment
from hub_server import Hub

from timm_ulsam.pretrained import recorded_digests

NAME = "mobilenetv2_ulsam.tin200_96"
MODEL = f"timm-ulsam/{NAME}"
FILES = ["README.md", "config.json", "model.safetensors"]


@pytest.fixture
def hub():
    with Hub() as hub:
        yield hub


@pytest.fixture
def publish(hub, tmp_path):
    """Run `timm-ulsam publish` in a process of its own, against the server."""

    def run(*argv, org="timm-ulsam", name=NAME, cwd=tmp_path, **env):
        environment = {
            **own_environment(),
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_TOKEN": "hf_writer",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "*",
            **env,
        }
        command = [sys.executable, "-m", "timm_ulsam", "publish", name, "--org", org, *argv]
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)

    return run


def writes(hub):
    return {what: n for what, n in hub.asked.items() if what.split()[1] in ("create", "branch", "upload", "commit")}


def refused(done):
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("timm-ulsam: error: ")
    return done.stderr


def test_the_repository_is_the_folder(hub, publish):
    done = publish()
    assert done.returncode == 0, done.stderr
    added = ", ".join(f"add {path}" for path in FILES)
    assert (
        done.stdout == f"{MODEL}: new repository, {added}; {hub.url}/{MODEL}/commit/{hub.repos[MODEL].refs['main']}\n"
    )
    files = hub.files(MODEL)
    del files[".gitattributes"]  # the Hub's own
    assert files == {path: (REPO / "weights" / NAME / path).read_bytes() for path in FILES}
    assert not hub.repos[MODEL].private
    assert len(hub.repos[MODEL].commits) == 2


def test_an_unchanged_repository_is_not_committed_to(hub, publish):
    publish()
    before = writes(hub)
    done = publish()
    assert (done.returncode, done.stdout) == (0, f"{MODEL}: unchanged\n")
    assert writes(hub) == before


def test_only_what_changed_is_committed_and_what_does_not_belong_is_deleted(hub, publish):
    publish()
    repo = hub.repos[MODEL]
    repo.commit("main", {**repo.resolve("main")[1], "README.md": b"another", "pytorch_model.bin": b"pickle"})
    before = writes(hub)
    done = publish()
    assert "add README.md, delete pytorch_model.bin; http" in done.stdout
    assert sorted(hub.files(MODEL)) == [".gitattributes", *FILES]
    assert writes(hub) == {**before, "POST commit": 2}


def test_an_interrupted_publication_shows_nothing_and_resumes(hub, publish):
    hub.faults["drop commit"] = 1
    message = refused(publish())
    assert f"cannot publish {MODEL} as writer: cannot reach {hub.url}" in message
    assert list(hub.files(MODEL)) == [".gitattributes"]
    done = publish()
    assert done.returncode == 0, done.stderr
    assert sorted(hub.files(MODEL)) == [".gitattributes", *FILES]
    assert writes(hub)["PUT upload"] == 1


def test_a_refused_upload_says_so(hub, publish):
    hub.faults["refuse upload"] = 99
    assert "no permission (Request has expired)" in refused(publish())
    assert list(hub.files(MODEL)) == [".gitattributes"]


def test_what_came_out_other_than_it_was_sent_is_noticed(hub, publish):
    hub.faults["alter commit"] = 1
    assert f"error: {MODEL} at " in (message := refused(publish()))
    assert " does not hold what was uploaded: http" in message
    assert publish().stdout.startswith(f"{MODEL}: add README.md; ")


def test_a_dry_run_changes_nothing(hub, publish):
    done = publish("--dry-run")
    assert done.stdout == f"{MODEL}: new repository, {', '.join(f'add {path}' for path in FILES)} (dry run)\n"
    publish()
    hub.repos[MODEL].commit("main", {**hub.repos[MODEL].resolve("main")[1], "README.md": b"another"})
    before = writes(hub)
    assert publish("--dry-run").stdout == f"{MODEL}: add README.md (dry run)\n"
    assert publish("--dry-run", "--revision", "next").stdout == f"{MODEL}: add README.md (dry run)\n"
    assert writes(hub) == before


def test_private_is_for_new_repositories(hub, publish):
    publish("--private")
    assert hub.repos[MODEL].private
    assert publish("--private").stdout == f"{MODEL}: unchanged\n"
    hub.repos[MODEL].private = False
    assert f"{MODEL} is public, and --private is for new" in refused(publish("--private"))


def test_a_revision_is_a_branch_and_leaves_the_main_one_alone(hub, publish):
    done = publish("--revision", "v2")
    assert done.returncode == 0, done.stderr
    assert list(hub.files(MODEL)) == [".gitattributes"]
    assert sorted(hub.files(MODEL, "v2")) == [".gitattributes", *FILES]
    assert publish("--revision", "v2").stdout == f"{MODEL}: unchanged\n"


def test_a_pull_request_is_opened_once(hub, publish):
    hub.tokens["hf_guest"] = ["guest"]
    publish("--create-pr", "--revision", "main")
    assert sorted(hub.files(MODEL, "refs/pr/1")) == [".gitattributes", *FILES]
    assert list(hub.files(MODEL)) == [".gitattributes"]
    again = publish("--create-pr", HF_TOKEN="hf_guest")
    assert again.stdout == f"{MODEL}: proposed already, {hub.url}/{MODEL}/discussions/1\n"
    assert publish("--create-pr", "--revision", "main").stdout == again.stdout
    hub.repos[MODEL].commit("v2", {})
    other = publish("--create-pr", "--revision", "v2")  # the proposal above is not for this branch
    assert other.stdout.endswith(f"; {hub.url}/{MODEL}/discussions/2\n"), other.stderr
    assert "has no revision 'v9'" in refused(publish("--create-pr", "--revision", "v9"))


def test_who_may_not_write_may_open_a_pull_request(hub, publish):
    publish()
    hub.repos[MODEL].commit("main", {**hub.repos[MODEL].resolve("main")[1], "README.md": b"another"})
    assert "no permission (Forbidden" in refused(publish(HF_TOKEN="hf_reader"))
    done = publish("--create-pr", HF_TOKEN="hf_reader")
    assert done.stdout.endswith(f"add README.md; {hub.url}/{MODEL}/discussions/1\n"), done.stderr


@pytest.mark.parametrize(
    ("env", "org", "message"),
    [
        (dict(HF_TOKEN=""), "timm-ulsam", "no token for {url}: set HF_TOKEN, or log in with `hf auth login`"),
        (dict(HF_TOKEN="hf_unknown"), "timm-ulsam", "the token is not valid"),
        (dict(HF_TOKEN="hf_reader"), "timm-ulsam", "as reader: the token has no permission (You don't have the rights"),
        ({}, "someone-else", "cannot publish someone-else/" + NAME + " as writer: the token has no permission"),
        ({}, "no/org", "cannot publish no/org/" + NAME),
        (dict(HF_ENDPOINT="http://127.0.0.1:9"), "timm-ulsam", "cannot reach http://127.0.0.1:9 ("),
        (dict(HF_HUB_OFFLINE="1"), "timm-ulsam", "cannot reach {url} ("),
    ],
)
def test_what_stands_in_the_way_is_said_in_one_line(env, org, message, hub, publish):
    assert message.format(url=hub.url) in refused(publish(org=org, **env))
    assert not hub.repos


@pytest.mark.parametrize("name", ["mobilenetv2_ulsam.in99", "mobilenetv2_ulsam", "facts", "../weights/" + NAME])
def test_weights_that_are_not_here_are_refused(name, hub, publish):
    assert f"holds no weights {name!r}; accepted: " in refused(publish(name=name))
    assert not hub.asked


def test_a_digest_that_does_not_match_is_refused_before_anything_is_sent(hub, publish, checkout):
    file = checkout / "weights" / NAME / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    message = refused(publish(cwd=checkout, PYTHONPATH=str(checkout)))
    assert recorded_digests()[NAME] in message
    assert "Nothing was published." in message
    assert not hub.asked


def test_a_card_that_names_another_repository_is_refused(hub, publish, checkout):
    card = checkout / "weights" / NAME / "README.md"
    card.write_text(
        card.read_text(encoding="utf-8").replace(f'"{NAME}"', f'"hf-hub:timm-ulsam/{NAME}"'), encoding="utf-8"
    )
    message = refused(publish(org="someone", cwd=checkout, PYTHONPATH=str(checkout)))
    assert f"loads it from timm-ulsam, not from someone: timm-ulsam card {NAME} --org someone" in message
    assert not hub.asked
    assert publish("--dry-run", cwd=checkout, PYTHONPATH=str(checkout)).returncode == 0


def test_a_folder_with_anything_else_in_it_is_refused(hub, publish, checkout):
    (checkout / "weights" / NAME / "pytorch_model.bin").write_bytes(b"pickle")
    message = refused(publish(cwd=checkout, PYTHONPATH=str(checkout)))
    assert "and nothing else; it holds README.md, config.json, model.safetensors, pytorch_model.bin" in message
    assert not hub.asked

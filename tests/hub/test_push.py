"""A push uploads the folder with its card, goes on where it stopped, and never says the token."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
from tests.hub_standin import Hub

import lightgptq
from lightgptq.cli.app import run
from lightgptq.errors import CheckpointError, HubError, UsageError

SECRET = "hf_thisisasecretthatnobodymaysee"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def local(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def test_everything_arrives(hub: Hub, checkpoint: Path) -> None:
    assert len(list(checkpoint.glob("*.safetensors"))) > 2
    result = lightgptq.push_to_hub(checkpoint, "org/name", token=hub.token)
    assert result.new_card
    assert hub.repos["org/name"]["main"] == local(checkpoint)
    assert "README.md" in local(checkpoint)
    assert result.url is not None
    assert result.url.startswith(hub.endpoint)
    assert not hub.private


def test_a_private_repository_and_a_branch(hub: Hub, checkpoint: Path) -> None:
    lightgptq.push_to_hub(checkpoint, "org/name", token=hub.token, private=True, revision="four-bits")
    assert hub.private == {"org/name"}
    assert hub.repos["org/name"]["four-bits"] == local(checkpoint)
    assert hub.repos["org/name"]["main"] == {}


def test_an_interrupted_upload_sends_only_what_is_missing(hub: Hub, checkpoint: Path) -> None:
    """The second shard is refused once: then nothing is committed, and no other shard is sent a second time."""
    shards = [sha256(path) for path in sorted(checkpoint.glob("*.safetensors"))]
    hub.refuse, hub.refusals = shards[1], 1
    with pytest.raises(HubError, match="goes on where it stopped"):
        lightgptq.push_to_hub(checkpoint, "org/name", token=hub.token)
    assert hub.repos["org/name"]["main"] == {}
    first = len(hub.uploads())
    assert set(hub.objects) == set(shards) - {shards[1]}
    lightgptq.push_to_hub(checkpoint, "org/name", token=hub.token)
    assert hub.uploads()[first:] == [shards[1]]
    assert hub.repos["org/name"]["main"] == local(checkpoint)


def test_a_second_push_changes_nothing(hub: Hub, checkpoint: Path) -> None:
    lightgptq.push_to_hub(checkpoint, "org/name", token=hub.token)
    sent, commits = len(hub.uploads()), sum("/commit/" in request for request in hub.requests)
    result = lightgptq.push_to_hub(checkpoint, "org/name", token=hub.token)
    assert not result.new_card
    assert len(hub.uploads()) == sent
    assert sum("/commit/" in request for request in hub.requests) == commits


def test_a_card_that_is_there_is_the_users(hub: Hub, checkpoint: Path) -> None:
    (checkpoint / "README.md").write_text("mine")
    assert not lightgptq.push_to_hub(checkpoint, "org/name", token=hub.token).new_card
    assert hub.repos["org/name"]["main"]["README.md"] == b"mine"
    assert lightgptq.push_to_hub(checkpoint, "org/name", token=hub.token, rewrite_card=True).new_card
    assert hub.repos["org/name"]["main"]["README.md"] != b"mine"


def test_unfinished_work_and_hidden_files_stay_here(hub: Hub, checkpoint: Path) -> None:
    (checkpoint / ".secret").write_text("x")
    (checkpoint / "x.partial").mkdir()
    (checkpoint / "x.partial" / "journal.jsonl").write_text("x")
    lightgptq.push_to_hub(checkpoint, "org/name", token=hub.token)
    assert not any("partial" in name or name.startswith(".") for name in hub.repos["org/name"]["main"])


def test_a_dry_run_only_writes_the_card(
    hub: Hub, checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = local(checkpoint)
    assert run(["push", str(checkpoint), "org/name", "--dry-run", "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == {
        "card": str(checkpoint / "README.md"),
        "new_card": True,
        "url": None,
    }
    after = local(checkpoint)
    assert after.pop("README.md").startswith(b"---")
    assert after == before
    assert hub.requests == []


def test_the_command_line_pushes(hub: Hub, checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["push", str(checkpoint), "org/name", "--base-model", "meta-llama/Llama-3.2-1B"]
    assert run([*arguments, "--license", "llama3.2", "--token", hub.token]) == 0
    captured = capfd.readouterr()
    assert hub.token not in captured.out + captured.err
    card = hub.repos["org/name"]["main"]["README.md"].decode()
    assert "base_model: meta-llama/Llama-3.2-1B" in card
    assert "license: llama3.2" in card


@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_the_token_is_never_said(
    debug: list[str], hub: Hub, checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Not even when the server repeats it in its refusal and the traceback is shown."""
    hub.echo = True
    assert run(["push", str(checkpoint), "org/name", "--token", SECRET, *debug]) == 1
    captured = capfd.readouterr()
    assert "<token>" in captured.err
    assert SECRET not in captured.out + captured.err
    assert ("Traceback" in captured.err) is bool(debug)


def test_the_token_from_the_environment_is_never_said(
    hub: Hub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    hub.echo = True
    assert run(["push", str(checkpoint), "org/name", "--debug"]) == 1
    captured = capfd.readouterr()
    assert any("repos/create" in request for request in hub.requests)
    assert SECRET not in captured.out + captured.err


def test_without_a_token_nothing_is_asked(hub: Hub, checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="hf auth login"):
        lightgptq.push_to_hub(checkpoint, "org/name")
    assert hub.requests == []


def test_a_hub_that_cannot_be_reached(checkpoint: Path) -> None:
    with pytest.raises(HubError, match="org/name"):
        lightgptq.push_to_hub(checkpoint, "org/name", token="hf_x", endpoint="http://127.0.0.1:1")


def test_what_is_no_checkpoint_is_not_pushed(
    hub: Hub, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="no GPTQ checkpoint"):
        lightgptq.push_to_hub(model_folder("llama"), "org/name", token=hub.token)
    with pytest.raises(UsageError, match="no such folder"):
        lightgptq.push_to_hub(tmp_path / "nowhere", "org/name", token=hub.token)
    assert hub.requests == []


def test_a_pushed_checkpoint_loads_from_the_hub(hub: Hub, checkpoint: Path) -> None:
    lightgptq.push_to_hub(checkpoint, "org/name", token=hub.token, revision="four-bits")
    model = lightgptq.load("org/name", revision="four-bits")
    want, have = lightgptq.load(checkpoint).state_dict(), model.state_dict()
    assert want.keys() == have.keys()
    assert all(bool((want[name] == have[name]).all()) for name in want)


def test_the_client_is_not_told_to_store_the_token(hub: Hub, checkpoint: Path) -> None:
    lightgptq.push_to_hub(checkpoint, "org/name", token=hub.token)
    assert not Path(huggingface_hub.constants.HF_TOKEN_PATH).exists()

"""Models are uploaded to the Hub; failures are reported in one sentence."""

import time
from pathlib import Path

import pytest

from hub_requests import FILES, MODEL, PROMPT_SECONDS, REPO, WEIGHTS, load, one_sentence
from hub_server import HubServer
from levit_flax.hub import HubError, HubUnreachableError, _push


def test_push_creates_the_repository_and_uploads_the_named_files_only(hub: HubServer, directory: Path) -> None:
    hub.tokens.add("hf_writer")

    url = _push(directory, REPO, files=(*FILES, *WEIGHTS), token="hf_writer", private=True)

    assert url == f"{hub.url}/{REPO}"
    repository = hub.repositories[REPO]
    assert repository.token == "hf_writer"
    assert repository.commits[repository.branches["main"]].keys() == {"config.json", "flax_model.safetensors"}
    assert load(token="hf_writer").revision == repository.branches["main"]


def test_push_to_a_branch_of_a_repository_that_exists(hub: HubServer, directory: Path) -> None:
    hub.tokens.add("hf_writer")
    before = hub.add(REPO, MODEL)
    hub.add(REPO, {}, branch="next")

    _push(directory, REPO, files=FILES, token="hf_writer", revision="next")

    branches = hub.repositories[REPO].branches
    assert branches["main"] == before
    assert hub.repositories[REPO].commits[branches["next"]].keys() == {"config.json"}


def test_push_without_an_owner_goes_to_the_owner_of_the_token(hub: HubServer, directory: Path) -> None:
    hub.tokens.add("hf_writer")

    assert _push(directory, "tiny", files=FILES, token="hf_writer") == f"{hub.url}/someone/tiny"
    assert hub.repositories.keys() == {"someone/tiny"}


@pytest.mark.parametrize(("token", "status"), [(None, 401), ("hf_wrong", 401), ("hf_reader", 403)])
def test_push_without_the_right_to_write(hub: HubServer, directory: Path, token: str | None, status: int) -> None:
    hub.tokens.add("hf_reader")
    hub.readers.add("hf_reader")

    with pytest.raises(HubError, match=rf"refused access to levit/tiny \(HTTP {status}, .*\)\. Log in with") as error:
        _push(directory, REPO, files=FILES, token=token)
    one_sentence(error)


def test_push_to_a_missing_branch(hub: HubServer, directory: Path) -> None:
    hub.tokens.add("hf_writer")

    with pytest.raises(HubError, match="levit/tiny has no revision next: expected a branch"):
        _push(directory, REPO, files=FILES, token="hf_writer", revision="next")


def test_push_without_network(no_network: str, directory: Path) -> None:
    started = time.monotonic()
    with pytest.raises(
        HubUnreachableError, match=rf"The connection to the Hub at {no_network} failed \(.*refused.*\)\.$"
    ):
        _push(directory, REPO, files=FILES, token="hf_writer")
    assert time.monotonic() - started < PROMPT_SECONDS


def test_push_without_files_raises(hub: HubServer, directory: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no files to upload: expected model\.onnx, found config\.json,"):
        _push(directory, REPO, files=("model.onnx",))
    with pytest.raises(FileNotFoundError, match=r"nowhere has no files to upload: expected a directory\."):
        _push(directory / "nowhere", REPO, files=FILES)
    assert hub.requests == []

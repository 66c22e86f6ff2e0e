"""Models are found in directories, on the Hub and in its cache; failures are reported in one sentence."""

import errno
import json
import logging
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, constants

from hub_requests import FILES, MODEL, PROMPT_SECONDS, REPO, WEIGHTS, load, one_sentence, use_hub
from hub_server import HubServer
from levit_flax import VARIANTS
from levit_flax.hub import _PUBLISHED, HubError, HubUnreachableError, _HubOptions, _push, _resolve, _Resolved

SHARDED = {
    "config.json": b"{}",
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    ).encode(),
    "model-00001-of-00002.safetensors": b"one",
    "model-00002-of-00002.safetensors": b"two",
    "model-00003-of-00003.safetensors": b"left over from an older upload",
}


def names(resolved: _Resolved) -> set[str]:
    return {path.name for path in resolved.directory.iterdir()}


# --- names ---


@pytest.mark.parametrize("prefix", ["hf-hub:", "hf_hub:"])
def test_prefixes_of_timm_are_removed(hub: HubServer, prefix: str) -> None:
    hub.add(REPO, MODEL)
    assert load(prefix + REPO).repo_id == REPO


def test_prefix_of_a_directory_is_removed(directory: Path) -> None:
    assert load(f"local-dir:{directory}").directory == directory


def test_names_of_published_models_are_hub_ids(hub: HubServer) -> None:
    assert {name: f"facebook/{name}" for name in VARIANTS} == _PUBLISHED
    hub.add("facebook/levit-128S", MODEL)
    assert load("levit-128S").repo_id == "facebook/levit-128S"


def test_source_of_another_type_raises() -> None:
    with pytest.raises(TypeError, match="The source of a model must be a str or a path, found NoneType"):
        load(None)  # type: ignore[arg-type]


# --- folders and other names of weights ---


def test_subfolder_of_a_directory(directory: Path) -> None:
    options = _HubOptions(subfolder=directory.name)
    found = _resolve(directory.parent, weights=WEIGHTS, files=FILES, options=options)
    assert found.directory == directory and found.weights == directory / "flax_model.safetensors"
    with pytest.raises(FileNotFoundError, match="nowhere is not a model directory"):
        _resolve(directory.parent, weights=WEIGHTS, options=_HubOptions(subfolder="nowhere"))


def test_subfolder_of_a_repository(hub: HubServer) -> None:
    hub.add(REPO, {f"best/{name}": content for name, content in SHARDED.items()})
    found = _resolve(REPO, weights=WEIGHTS, files=FILES, options=_HubOptions(subfolder="best"))
    assert found.directory.name == "best" and found.revision == found.directory.parent.name
    assert len(names(found)) == len(SHARDED) - 1  # without the shard that the index does not name
    cached = _resolve(REPO, weights=WEIGHTS, files=FILES, options=_HubOptions(subfolder="best", local_files_only=True))
    assert cached == found


def test_only_weight_file_of_another_name_is_found(hub: HubServer, tmp_path: Path) -> None:
    hub.add(REPO, {"config.json": b"{}", "epoch_300.pth": b"weights"})
    found = load(REPO).weights
    assert found is not None and found.name == "epoch_300.pth" and found.read_bytes() == b"weights"
    (tmp_path / "best.ckpt").write_bytes(b"weights")
    assert load(tmp_path).weights == tmp_path / "best.ckpt"
    (tmp_path / "last.ckpt").write_bytes(b"weights")
    with pytest.raises(FileNotFoundError, match=r"is not a model directory: .* found .*best\.ckpt"):
        load(tmp_path)


# --- a local directory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [REPO, f"./{REPO}", Path(REPO)])
def test_a_local_directory_wins_over_a_repository_of_the_same_name(hub: HubServer, source: str | Path) -> None:
    hub.add(REPO, MODEL)
    directory = Path(REPO)
    directory.mkdir(parents=True)
    for name in ("pytorch_model.bin", "flax_model.safetensors"):
        (directory / name).write_bytes(b"local")

    assert load(source) == _Resolved(directory, directory / "flax_model.safetensors", None, None)
    assert hub.requests == []


def test_a_home_directory_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_network: str) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "config.json").write_bytes(b"{}")

    assert _resolve("~", files=FILES) == _Resolved(tmp_path, None, None, None)


def test_local_directory_without_weights_lists_its_files(tmp_path: Path) -> None:
    for name in ("config.json", "notes.txt"):
        (tmp_path / name).touch()

    with pytest.raises(FileNotFoundError) as error:
        load(tmp_path)
    text = one_sentence(error)
    assert text.startswith(
        f"{tmp_path} is not a model directory: expected flax_model.safetensors or model.safetensors or "
    )
    assert text.endswith(", found config.json, notes.txt, work.")


def test_file_as_a_source_raises(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()

    with pytest.raises(
        NotADirectoryError,
        match=r"The model .*model\.safetensors is a file: expected a model directory or a Hub repository\.",
    ):
        load(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    "source",
    [
        "./levit",
        "../levit",
        "/levit",
        "~/levit",
        "levit/",
        "out/levit/best",
        "out\\levit",
        "levit-128S.pth",
        "levit/pytorch_model.bin",
        "levit/model.safetensors",
        "levit 128S",
        "levit--128S",
        Path("facebook/levit-128S"),
    ],
)
def test_names_that_can_only_be_paths_never_reach_the_network(hub: HubServer, source: str | Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"The model .* does not exist: expected a directory, or a Hub repository"
    ):
        load(source)
    assert hub.requests == []


# --- downloads --------------------------------------------------------------------------------------------------------


def test_a_repository_is_downloaded_at_its_commit(hub: HubServer, cache: Path) -> None:
    sha = hub.add(REPO, MODEL)

    resolved = load()

    assert (resolved.repo_id, resolved.revision) == (REPO, sha)
    assert resolved.weights is not None and resolved.weights.read_bytes() == MODEL["model.safetensors"]
    assert resolved.directory.is_relative_to(cache)


def test_only_one_kind_of_weights_is_downloaded(hub: HubServer) -> None:
    hub.add(REPO, MODEL)

    assert names(load()) == {"config.json", "model.safetensors"}
    assert sorted(hub.downloads()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("repo_id", "chosen"),
    [
        ("facebook/levit-128S", "model.safetensors"),
        ("timm/levit_128s.fb_dist_in1k", "model.safetensors"),
        ("timm/levit_conv_384.fb_dist_in1k", "pytorch_model.bin"),
        ("levit", "flax_model.safetensors"),
    ],
)
def test_the_families_of_repositories(hub: HubServer, repo_id: str, chosen: str) -> None:
    preferred = WEIGHTS.index(chosen)
    hub.add(repo_id, dict.fromkeys((*WEIGHTS[preferred:], *FILES, "README.md"), b""))

    resolved = load(repo_id)
    assert resolved.weights is not None
    assert names(resolved) == {chosen, *FILES} and resolved.weights.name == chosen


def test_the_processor_alone_downloads_no_weights(hub: HubServer) -> None:
    hub.add(REPO, MODEL | {"preprocessor_config.json": b"{}"})

    resolved = _resolve(REPO, files=("preprocessor_config.json",))
    assert resolved.weights is None and names(resolved) == {"preprocessor_config.json"}


def test_a_sharded_checkpoint_brings_the_shards_that_its_index_names(hub: HubServer) -> None:
    hub.add(REPO, SHARDED)

    resolved = load()

    assert resolved.weights is not None and resolved.weights.name == "model.safetensors.index.json"
    assert names(resolved) == SHARDED.keys() - {"model-00003-of-00003.safetensors"}
    assert names(load(local_files_only=True)) == names(resolved)


def test_damaged_index_raises(hub: HubServer) -> None:
    hub.add(REPO, SHARDED | {"model.safetensors.index.json": b"[]"})

    with pytest.raises(HubError, match=r"model\.safetensors\.index\.json is not the index of a sharded checkpoint"):
        load()


def test_cached_files_are_not_downloaded_again(hub: HubServer) -> None:
    hub.add(REPO, MODEL)
    first = load()
    hub.requests.clear()

    assert load() == first
    assert hub.downloads() == []


def test_a_new_commit_is_seen(hub: HubServer) -> None:
    hub.add(REPO, MODEL)
    old = load()
    new = hub.add(REPO, MODEL | {"model.safetensors": b"better"})

    resolved = load()
    assert resolved.revision == new != old.revision
    assert resolved.weights is not None and resolved.weights.read_bytes() == b"better"


def test_a_revision_is_a_branch_or_a_commit_hash(hub: HubServer) -> None:
    old = hub.add(REPO, MODEL)
    other = hub.add(REPO, {"pytorch_model.bin": b"other"}, branch="refs/pr/1")
    hub.add(REPO, MODEL | {"config.json": b"{ }"})

    assert load(revision="refs/pr/1").revision == other
    assert load(revision=old).revision == old
    assert load(revision="refs/pr/1", local_files_only=True).revision == other


def test_interrupted_download_resumes(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)  # only whole chunks are kept
    hub.add(REPO, MODEL)
    hub.cut.add("model.safetensors")

    resolved = load()

    assert resolved.weights is not None and resolved.weights.read_bytes() == MODEL["model.safetensors"]
    half = len(MODEL["model.safetensors"]) // 2
    ranges = [r.range for r in hub.requests if r.method == "GET" and r.path.endswith("model.safetensors")]
    assert ranges == [None, f"bytes={half}-"]


def test_a_token_opens_a_private_repository(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(REPO, MODEL, token="hf_secret")

    load(token="hf_secret")
    assert {request.authorization for request in hub.requests} == {"Bearer hf_secret"}
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert load().repo_id == REPO


# --- the Hub says no --------------------------------------------------------------------------------------------------


def test_wrong_token_raises(hub: HubServer) -> None:
    hub.add(REPO, MODEL)

    with pytest.raises(HubError, match=r"The Hub refused access to levit/tiny \(HTTP 401, .*\)\. Log in with") as error:
        load(token="hf_wrong")
    assert "hf_wrong" not in one_sentence(error)


@pytest.mark.parametrize("token", ["", "hf_secret\n", "hf_sécret"])
def test_a_token_that_cannot_be_one_is_not_shown(hub: HubServer, directory: Path, token: str) -> None:
    hub.add(REPO, MODEL)

    with pytest.raises(HubError, match=r"^The token is invalid: expected printable ASCII characters without spaces\.$"):
        load(token=token)
    with pytest.raises(HubError, match=r"^The token is invalid: expected printable ASCII characters without spaces\.$"):
        _push(directory, REPO, files=FILES, token=token)
    assert hub.requests == []


@pytest.mark.parametrize("token", [None, "hf_other"])
def test_missing_or_private_repository_raises(hub: HubServer, token: str | None) -> None:
    hub.add("levit/private", MODEL, token="hf_secret")
    hub.tokens.add("hf_other")

    for repo_id in ("levit/private", "levit/missing"):
        with pytest.raises(HubError, match=f"{repo_id} is neither a local directory nor a Hub repository") as error:
            load(repo_id, token=token)
        one_sentence(error)


def test_gated_repository_raises(hub: HubServer) -> None:
    hub.add(REPO, MODEL, gated=True)

    with pytest.raises(HubError, match=f"levit/tiny is gated. Request access at {hub.url}/levit/tiny") as error:
        load()
    one_sentence(error)


def test_missing_revision_raises(hub: HubServer) -> None:
    hub.add(REPO, MODEL)

    with pytest.raises(
        HubError, match=r"levit/tiny has no revision v9: expected a branch, a tag or a commit hash"
    ) as error:
        load(revision="v9")
    one_sentence(error)


def test_repository_without_weights_lists_its_files(hub: HubServer) -> None:
    hub.add(REPO, {"config.json": b"{}"} | {f"{i:02}.onnx": b"" for i in range(20)})

    with pytest.raises(
        HubError, match=r"The Hub repository levit/tiny has no LeViT model: expected flax_model\.safetensors or"
    ) as error:
        load()
    assert one_sentence(error).endswith("found " + ", ".join(f"{i:02}.onnx" for i in range(12)) + " and 9 more.")
    assert hub.downloads() == []


def test_unwritable_cache_raises(hub: HubServer, tmp_path: Path) -> None:
    hub.add(REPO, MODEL)
    (tmp_path / "file").touch()

    with pytest.raises(
        HubError, match=r"could not be read or written on this machine \(.*Not a directory.*\)\. Check free"
    ):
        load(cache_dir=tmp_path / "file")


@pytest.mark.parametrize(
    ("raised", "kind", "text"),
    [
        (
            RuntimeError("CAS service error\nTimer expired"),
            HubUnreachableError,
            "RuntimeError: CAS service error Timer",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            HubError,
            r"No space left on device\)\. Check free space",
        ),
    ],
)
def test_download_that_fails_midway_raises(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, raised: Exception, kind: type[HubError], text: str
) -> None:
    def fail(*args: Any, **options: Any) -> str:
        raise raised

    hub.add(REPO, MODEL)
    monkeypatch.setattr(HfApi, "snapshot_download", fail)

    with pytest.raises(HubError, match=text) as error:
        load()
    assert type(error.value) is kind
    one_sentence(error)


# --- no Hub -----------------------------------------------------------------------------------------------------------


def test_no_network_raises_promptly(no_network: str, cache: Path) -> None:
    started = time.monotonic()
    with pytest.raises(HubUnreachableError) as error:
        load()

    assert time.monotonic() - started < PROMPT_SECONDS
    text = one_sentence(error)
    assert re.match(rf"The connection to the Hub at {no_network} failed \(\w+: .*Connection refused.*\)\. ", text)
    assert f"The cache {cache} does not have all files of levit/tiny. Check the network, or pass a local" in text


def test_a_hub_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        use_hub(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(HubUnreachableError, match=r"failed \(\w*Timeout: .*timed out"):
            load()
    assert time.monotonic() - started < PROMPT_SECONDS


@pytest.mark.parametrize("status", [200, 429, 503])
def test_a_hub_that_is_out_of_order(hub: HubServer, status: int) -> None:
    hub.status = status  # 200 without JSON is what the login page of a public network answers

    with pytest.raises(HubUnreachableError, match=rf"Hub at {hub.url} .* The cache .* Check the network") as error:
        load()
    one_sentence(error)


def test_without_network_the_cache_serves(
    hub: HubServer, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    hub.add(REPO, MODEL)
    online = load()
    request.getfixturevalue("no_network")

    with caplog.at_level(logging.WARNING, logger="levit_flax.hub"):
        assert load() == online
    assert f"Loading {REPO} from the cache, commit {online.revision}." in caplog.text


def test_offline_the_cache_serves(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(REPO, MODEL)
    online = load()
    hub.requests.clear()

    assert load(local_files_only=True) == online
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load() == online
    assert hub.requests == []


@pytest.mark.parametrize("local_files_only", [True, False])
def test_offline_and_not_in_the_cache(
    hub: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch, local_files_only: bool
) -> None:
    hub.add(REPO, MODEL)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", not local_files_only)

    with pytest.raises(HubError) as error:
        load(revision="v1", local_files_only=local_files_only)
    assert one_sentence(error).startswith(
        f"The cache {cache} does not have all files of levit/tiny at revision v1, and offline mode is on. Load it once"
    )
    assert hub.requests == []


@pytest.mark.parametrize("missing", ["weights", "shard"])
def test_offline_and_only_a_part_in_the_cache(hub: HubServer, missing: str) -> None:
    hub.add(REPO, SHARDED)
    if missing == "weights":
        _resolve(REPO, files=FILES)
    else:
        (load().directory / "model-00002-of-00002.safetensors").unlink()

    with pytest.raises(HubError, match="does not have all files of levit/tiny, and offline mode is on"):
        load(local_files_only=True)


def test_the_environment_variables_of_huggingface_hub_are_obeyed(hub: HubServer, tmp_path: Path) -> None:
    sha = hub.add(REPO, MODEL)
    root = Path(__file__).parents[2]
    command = [sys.executable, root / "tests" / "programs" / "resolve_revision.py", REPO]

    def run(**variables: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(root)} | variables
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert run(HF_ENDPOINT=hub.url).stdout.strip() == sha
    hub.requests.clear()
    assert run(HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1").stdout.strip() == sha
    assert hub.requests == []


def test_importing_the_module_does_not_import_huggingface_hub() -> None:
    program = Path(__file__).parents[1] / "programs" / "import_hub.py"
    subprocess.run([sys.executable, program], env=os.environ | {"PYTHONPATH": str(program.parents[2])}, check=True)

"""Names and paths -> directories, against a hub on this machine (tests/support/fake_hub.py)."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from groupvit_common.checkpoints import hub
from groupvit_common.errors import CheckpointError, InputError
from tests.support.fake_hub import FakeHub, point_to

MODEL_FILES = ("config.json", "model.safetensors")
FILES = {"config.json": b"{}", "model.safetensors": b"weights", "pytorch_model.bin": b"pickle", "tf_model.h5": b"hdf"}
INDEX = json.dumps(
    {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
).encode()
SHARDED = {
    "config.json": b"{}",
    "model.safetensors.index.json": INDEX,
    "model-00001-of-00002.safetensors": b"one",
    "model-00002-of-00002.safetensors": b"two",
    "pytorch_model.bin": b"pickle",
}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A hub that huggingface_hub takes for the real one, and an empty cache."""
    with FakeHub() as fake:
        point_to(fake.url, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        yield fake
        huggingface_hub.close_session()


def resolve(name: object, patterns=MODEL_FILES, required=MODEL_FILES, **location: object) -> Path:
    return hub.resolve(name, patterns=patterns, required=required, location=hub.HubLocation(**location))


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# -- directories --


def test_a_directory_wins_over_a_name_of_the_hub(tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    for name in MODEL_FILES:
        (tmp_path / "org" / "name" / name).write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name") == Path("org/name")
    assert resolve(Path("org"), subfolder="name") == Path("org/name")


def test_a_sharded_directory_counts_as_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_bytes(INDEX)
    assert resolve(tmp_path) == tmp_path


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"config.json": ""}, r"no model\.safetensors; it has config\.json$"),
        ({"model.safetensors": ""}, r"no config\.json; it has model\.safetensors"),
        (
            {"config.json": "", "pytorch_model.bin": ""},
            r"pytorch_model\.bin \(PyTorch pickle\).*groupvit convert",
        ),
        ({"config.json": "", "tf_model.h5": ""}, r"tf_model\.h5 \(TensorFlow\).*groupvit convert"),
        ({}, "it has no files"),
    ],
)
def test_a_directory_without_the_files_says_what_it_has(tmp_path, files, says):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=says):
        resolve(tmp_path)


@pytest.mark.parametrize(
    "name", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all", "../nowhere", "nowhere", "a/b/c", "C:\\models\\x", ""]
)
def test_a_path_that_does_not_exist_is_not_looked_up(server, name):
    with pytest.raises(CheckpointError, match="there is no directory"):
        resolve(name)
    assert server.requests == []


def test_a_file_is_not_a_directory(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"x")
    with pytest.raises(CheckpointError, match="is a file"):
        resolve(path)
    with pytest.raises(CheckpointError, match="no such subfolder"):
        resolve(tmp_path, subfolder="fp16")


@pytest.mark.parametrize("name", ["org/na me", "org/--x", "org/name.git", "org/x..y"])
def test_an_impossible_name(server, name):
    with pytest.raises(CheckpointError, match="neither a directory nor a possible name"):
        resolve(name)
    assert server.requests == []


def test_a_name_of_another_type():
    with pytest.raises(InputError, match="got NoneType"):
        resolve(None)


# -- downloads --


def test_only_what_is_needed_is_downloaded_and_a_second_use_costs_one_head(server):
    server.add("org/name", FILES)
    directory = resolve("org/name")
    assert names(directory) == set(MODEL_FILES)
    assert (directory / "model.safetensors").read_bytes() == b"weights"
    server.take_requests()
    assert resolve("org/name") == directory
    assert server.take_requests() == ["HEAD /org/name/resolve/main/config.json"]


def test_shards_take_the_place_of_a_single_file(server):
    server.add("org/name", SHARDED)
    directory = resolve("org/name")
    assert names(directory) == set(SHARDED) - {"pytorch_model.bin"}
    server.take_requests()
    assert resolve("org/name") == directory
    assert server.take_requests() == ["HEAD /org/name/resolve/main/config.json"]


def test_a_single_file_is_preferred_to_shards(server):
    server.add("org/name", {**SHARDED, "model.safetensors": b"weights"})
    assert names(resolve("org/name")) == set(MODEL_FILES)


def test_a_shard_that_the_repository_lacks(server):
    server.add("org/name", {name: c for name, c in SHARDED.items() if "00002-of" not in name})
    with pytest.raises(CheckpointError, match="lacks model-00002-of-00002"):
        resolve("org/name")


def test_optional_files_are_asked_for_once(server):
    server.add("org/name", {"tokenizer.json": b"{}"})
    wanted = ("added_tokens.json", "tokenizer.json", "vocab.json")
    directory = hub.resolve("org/name", patterns=wanted)
    assert names(directory) == {"tokenizer.json"}
    server.take_requests()
    assert hub.resolve("org/name", patterns=wanted) == directory
    assert server.take_requests() == ["HEAD /org/name/resolve/main/added_tokens.json"]


def test_a_commit_hash_costs_nothing_once_cached(server):
    commit = server.add("org/name", FILES).branches["main"]
    directory = resolve("org/name", revision=commit)
    server.take_requests()
    assert resolve("org/name", revision=commit) == directory
    assert server.take_requests() == []


def test_a_branch_that_moved_is_followed(server):
    repository = server.add("org/name", FILES)
    old = resolve("org/name")
    repository.commit({**FILES, "model.safetensors": b"better"})
    new = resolve("org/name")
    assert (old / "model.safetensors").read_bytes() == b"weights"
    assert (new / "model.safetensors").read_bytes() == b"better"
    # The cache knows too, for the next use offline.
    assert resolve("org/name", local_files_only=True) == new
    # Back again: nothing to download, yet offline use must follow.
    repository.commit(FILES)
    repository.branches["main"] = old.name
    assert resolve("org/name") == old
    assert resolve("org/name", local_files_only=True) == old


def test_revisions_and_subfolders(server):
    repository = server.add("org/name", FILES)
    repository.commit({f"half/{name}": content + b"!" for name, content in FILES.items()}, branch="refs/pr/1")
    directory = resolve("org/name", revision="refs/pr/1", subfolder="half")
    assert directory.name == "half"
    assert (directory / "model.safetensors").read_bytes() == b"weights!"
    assert resolve("org/name", revision="refs/pr/1", subfolder="half", local_files_only=True) == directory
    with pytest.raises(CheckpointError, match=r"folder 'none'.*it has no files"):
        resolve("org/name", revision="refs/pr/1", subfolder="none")


def test_one_file(server, tmp_path):
    server.add("org/name", FILES)
    assert (resolve("org/name", ["config.json"], ["config.json"]) / "config.json").read_bytes() == b"{}"
    with pytest.raises(CheckpointError, match=r"has no preprocessor_config\.json"):
        resolve("org/name", ["preprocessor_config.json"], ["preprocessor_config.json"])


def test_a_cache_of_ones_own(server, tmp_path):
    server.add("org/name", FILES)
    directory = resolve("org/name", cache_dir=tmp_path / "mine")
    assert directory.is_relative_to(tmp_path / "mine")
    assert not (tmp_path / "cache").exists()
    assert resolve("org/name", cache_dir=tmp_path / "mine", local_files_only=True) == directory


def test_a_damaged_download_can_be_forced_again(server):
    server.add("org/name", FILES)
    weights = resolve("org/name") / "model.safetensors"
    weights.write_bytes(b"damaged")
    assert (resolve("org/name") / "model.safetensors").read_bytes() == b"damaged"
    assert (resolve("org/name", force_download=True) / "model.safetensors").read_bytes() == b"weights"


# -- what goes wrong --


def test_a_missing_repository(server):
    with pytest.raises(CheckpointError, match=r"no repository of that name.*or it is private") as caught:
        resolve("org/nowhere")
    assert isinstance(caught.value.__cause__, huggingface_hub.errors.RepositoryNotFoundError)


def test_a_gated_repository_names_its_page(server):
    server.add("org/name", FILES, token="hf_reader")
    with pytest.raises(CheckpointError, match=f"is gated: accept its conditions at {server.url}/org/name"):
        resolve("org/name")
    with pytest.raises(CheckpointError, match="is gated"):
        resolve("org/name", token="hf_other")
    directory = resolve("org/name", token="hf_reader")
    # What is cached is there without the token, as with huggingface_hub.
    assert resolve("org/name") == directory


def test_a_missing_revision(server):
    server.add("org/name", FILES)
    with pytest.raises(CheckpointError, match="'org/name' has no revision 'v9'"):
        resolve("org/name", revision="v9")
    with pytest.raises(CheckpointError, match="has no revision '0000"):
        resolve("org/name", revision="0" * 40)


def test_a_repository_of_other_formats(server):
    server.add("org/name", {"config.json": b"{}", "pytorch_model.bin": b"", "tf_model.h5": b""})
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin \(PyTorch pickle\).*tf_model\.h5.*refs/pr/"):
        resolve("org/name")
    assert not any("GET /org/name/resolve" in request and "config" not in request for request in server.requests)


@pytest.mark.parametrize("subfolder", ["", "deep/er"])
def test_safetensors_in_the_conversion_bots_pull_request(server, monkeypatch, subfolder):
    at = f"{subfolder}/" if subfolder else ""
    pickled = {f"{at}config.json": b"{}", f"{at}pytorch_model.bin": b""}
    repository = server.add("org/name", pickled)
    repository.commit({**pickled, f"{at}model.safetensors": b"a stranger's"}, branch="refs/pr/2")
    repository.commit({**pickled, f"{at}model.safetensors": b"the bot's"}, branch="refs/pr/3")
    repository.pull_requests = {2: "someone", 3: "SFconvertbot"}
    directory = resolve("org/name", subfolder=subfolder)
    assert (directory / "model.safetensors").read_bytes() == b"the bot's"
    # An explicit revision is taken at its word.
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        resolve("org/name", revision="main", subfolder=subfolder)
    # Offline it is found again.
    server.take_requests()
    assert resolve("org/name", subfolder=subfolder, local_files_only=True) == directory
    assert server.take_requests() == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve("org/name", subfolder=subfolder) == directory


def test_no_conversion_is_taken_from_a_stranger(server):
    repository = server.add("org/name", {"config.json": b"{}", "pytorch_model.bin": b""})
    repository.commit({"model.safetensors": b"a stranger's"}, branch="refs/pr/2")
    repository.pull_requests = {2: "someone"}
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        resolve("org/name")


def test_a_missing_config(server):
    server.add("org/name", {"model.safetensors": b"weights"})
    with pytest.raises(CheckpointError, match=r"'org/name' on the hub has no config\.json; it has model\.safetensors$"):
        resolve("org/name")


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_hub_out_of_order(server, status):
    server.add("org/name", FILES)
    server.status = status
    with pytest.raises(CheckpointError, match=f"HTTP {status}"):
        resolve("org/name")
    server.status = None
    directory = resolve("org/name")
    server.status = status
    assert resolve("org/name") == directory


def test_an_index_that_leaves_its_directory(server):
    index = json.dumps({"weight_map": {"a": "../../secret.safetensors"}}).encode()
    server.add("org/name", {"config.json": b"{}", "model.safetensors.index.json": index})
    with pytest.raises(CheckpointError, match="beside the index"):
        resolve("org/name")


def test_offline(server, monkeypatch):
    server.add("org/name", FILES)
    for keywords in ({"local_files_only": True}, {}):
        if not keywords:
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(CheckpointError, match=r"not in the local cache.*downloads are off"):
            resolve("org/name", **keywords)
    assert server.take_requests() == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    directory = resolve("org/name")
    server.take_requests()
    assert resolve("org/name", local_files_only=True) == directory
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve("org/name") == directory
    assert server.take_requests() == []


def test_offline_with_a_part_of_the_shards(server):
    server.add("org/name", SHARDED)
    directory = resolve("org/name")
    (directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"not in the local cache \(model\.safetensors\)"):
        resolve("org/name", local_files_only=True)


def test_an_unreachable_host_is_not_tried_again_and_again(server, monkeypatch):
    server.add("org/name", FILES)
    directory = resolve("org/name")
    point_to(f"http://127.0.0.1:{closed_port()}", monkeypatch)
    # Waiting between attempts is what takes huggingface_hub 23 seconds.
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("waited for a host that cannot be reached"))
    assert resolve("org/name") == directory
    for revision in (None, "0" * 40):
        with pytest.raises(CheckpointError, match=r"cannot be reached.*check the connection"):
            resolve("org/other", revision=revision)


def test_a_download_that_breaks_off(server, monkeypatch):
    monkeypatch.setattr(
        "time.sleep", lambda _: None
    )  # huggingface_hub waits before it takes up a broken download again
    server.add("org/name", {**FILES, "model.safetensors": b"w" * 1000})
    resolve("org/name", patterns=["config.json"], required=())
    server.cut = 10
    with pytest.raises(CheckpointError, match=f"{server.url} cannot be reached|cannot be downloaded"):
        resolve("org/name")
    server.cut = None
    assert (resolve("org/name") / "model.safetensors").read_bytes() == b"w" * 1000


def test_environment_variables_reach_a_fresh_process(server, tmp_path):
    server.add("org/name", FILES)
    code = (
        "from groupvit_common import hub; print(hub.resolve('org/name', patterns=['config.json'])); "
        "import sys; assert not {'torch', 'tensorflow'} & set(sys.modules)"
    )
    environment = {
        **os.environ,
        "HF_ENDPOINT": server.url,
        "HF_HUB_CACHE": str(tmp_path / "other"),
        "NO_PROXY": "127.0.0.1",
    }
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code], env={**environment, **extra}, capture_output=True, text=True, check=True
        ).stdout
        for extra in ({}, {"HF_HUB_OFFLINE": "1"})
    ]
    assert outputs[0] == outputs[1] != ""


# -- push --


def saved(directory: Path, files: dict[str, bytes]) -> Path:
    directory.mkdir(exist_ok=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return directory


def test_push_and_get_back(server, tmp_path):
    directory = saved(tmp_path / "model", {"config.json": b"{}", "model.safetensors": b"weights", ".x.tmp": b"no"})
    url = hub.push(directory, "org/new", token=server.write_token, private=True)
    repository = server.repositories["org/new"]
    assert url == f"{server.url}/org/new/commit/{repository.branches['main']}"
    assert repository.private
    got = resolve("org/new", token=server.write_token)
    assert (got / "model.safetensors").read_bytes() == b"weights"
    assert ".x.tmp" not in repository.commits[repository.branches["main"]]


def test_push_leaves_one_model_and_everything_else(server, tmp_path):
    repository = server.add("org/name", {**SHARDED, "README.md": b"card"})
    hub.push(saved(tmp_path / "a", {"config.json": b"{ }", "model.safetensors": b"w"}), "org/name", token="hf_write")
    files = repository.commits[repository.branches["main"]]
    assert set(files) == {"config.json", "model.safetensors", "pytorch_model.bin", "README.md"}
    hub.push(saved(tmp_path / "b", {"tokenizer.json": b"{}"}), "org/name", token="hf_write")
    assert set(repository.commits[repository.branches["main"]]) == set(files) | {"tokenizer.json"}


def test_push_to_a_branch_or_as_a_pull_request(server, tmp_path):
    repository = server.add("org/name", FILES)
    before = repository.branches["main"]
    directory = saved(tmp_path / "model", {"config.json": b'{"a": 1}'})
    hub.push(directory, "org/name", use_auth_token="hf_write", revision="dev")
    assert repository.commits[repository.branches["dev"]]["config.json"] == b'{"a": 1}'
    url = hub.push(directory, "org/name", token="hf_write", create_pr=True)
    assert url == f"{server.url}/org/name/discussions/1"
    assert repository.branches["main"] == before


def test_push_that_fails_says_why(server, tmp_path, monkeypatch):
    directory = saved(tmp_path / "model", {"config.json": b"{}"})
    for token in (False, "hf_reader"):
        with pytest.raises(CheckpointError, match="pass a token with write access"):
            hub.push(directory, "org/name", token=token)
    with pytest.raises(CheckpointError, match="nothing to send"):
        hub.push(tmp_path / "nowhere", "org/name")
    with pytest.raises(CheckpointError, match="possible name"):
        hub.push(directory, "a b")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set"):
        hub.push(directory, "org/name", token="hf_write")
    point_to(f"http://127.0.0.1:{closed_port()}", monkeypatch)
    with pytest.raises(CheckpointError, match="cannot be reached"):
        hub.push(directory, "org/name", token="hf_write")

"""The command, and the examples of docs/serving.md."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import closing
from types import SimpleNamespace

import pytest

from groupvit_common import cli
from groupvit_common.serving import Client, Server, ServeSettings
from groupvit_common.serving import server as server_module
from tests.segmentation.conftest import segmenter_with_demo
from tests.serving.malformed import PHOTO
from tests.support.paths import ROOT

SECRET = "a very secret word"


def test_the_command_serves_until_it_is_told_to_end():
    """One line when it answers, one for each request without what is in it, nothing else, and no failure at the end."""
    command = [sys.executable, "-m", "groupvit_common.cli", "serve", "--port", "0", "--backend", "torch",
               "--threads", "1", "--access-log"]  # fmt: skip
    environment = {**os.environ, "GROUPVIT_API_KEY": "correct horse", "OMP_WAIT_POLICY": "PASSIVE"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        line = process.stdout.readline()
        assert re.fullmatch(r"demo is served at http://127\.0\.0\.1:\d+/ \(Ctrl-C ends it\)\n", line)
        client = Client(re.search(r"http\S+", line)[0], api_key="correct horse")
        assert client.segment(PHOTO, SECRET, include=["label_map"]).labels == (SECRET,)
        assert client.segment(PHOTO).labels[:3] == ("background", "red", "orange")
        process.send_signal(signal.SIGTERM)
        out, log = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert (process.returncode, out) == (0, "")
    assert len(log.splitlines()) == 2
    assert all(re.search(r" POST /v1/segment 200 [\d.]+ ms$", each) for each in log.splitlines())
    assert SECRET not in log


def test_what_the_command_refuses(capsys, monkeypatch):
    def fails(*arguments):
        assert cli.main(["serve", "--backend", "torch", *arguments]) == 2
        return capsys.readouterr().err

    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = str(taken.getsockname()[1])
        assert "another program listens there: choose another --port, or 0 for a free one" in fails("--port", port)
    assert "port must be 0 to 65535" in fails("--port", "70000")
    assert "given twice" in fails("--labels", "cat, cat")
    assert "at least 8 characters" in fails("--api-key", "short")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "groupvit_common.serving.server")
    assert "this command needs uvicorn, which is not installed: pip install 'groupvit[serve]'" in fails("--port", "0")


def test_who_reaches_it_without_a_key_is_said(capsys, monkeypatch):
    monkeypatch.delenv("GROUPVIT_API_KEY", raising=False)
    made = []
    fake = SimpleNamespace(run=lambda ready: None, url="")
    monkeypatch.setattr(server_module, "Server", lambda load, settings: made.append(settings) or fake)
    for arguments, warned in ((["--host", "0.0.0.0"], True), (["--host", "0.0.0.0", "--api-key", "long enough"], False),
                              ([], False)):  # fmt: skip
        assert cli.main(["serve", "--backend", "torch", *arguments]) == 0
        assert ("anybody who reaches 0.0.0.0 may use this server" in capsys.readouterr().err) == warned
    assert [each.host for each in made] == ["0.0.0.0", "0.0.0.0", "127.0.0.1"]
    assert made[0].default_background_labels.startswith("grass, ")


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
def test_the_requests_in_the_documentation(tmp_path):
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    lines = re.search(r"```sh\n(curl.*?)```", page, re.DOTALL)[1].replace("\\\n", "").splitlines()
    assert len(lines) >= 6
    (tmp_path / "photo.jpg").write_bytes(PHOTO)
    with Server({"torch": segmenter_with_demo("torch")}, ServeSettings(port=0)) as server:
        for line in lines:
            command = shlex.split(line.replace("http://127.0.0.1:8000/", server.url))
            done = subprocess.run([*command, "-s", "-f"], cwd=tmp_path, capture_output=True, text=True, check=True)
            if not line.endswith("/metrics"):
                assert "error" not in json.loads(done.stdout)
        code = re.search(r"```python\n(from groupvit_common.serving import Client.*?)```", page, re.DOTALL)[1]
        names = {}
        here = repr(str(tmp_path / "photo.jpg"))
        exec(code.replace("http://127.0.0.1:8000", server.url).replace('"photo.jpg"', here), names)
        assert names["result"].label_map.shape == (32, 48)
        code = re.search(r"```python\n(from groupvit_common.serving import Server.*?)```", page, re.DOTALL)[1]
        exec(code, {})

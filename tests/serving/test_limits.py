"""Requests that are malformed, too many, too large or too slow, and the end of a server."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from urllib.parse import urlsplit

import pytest

from groupvit_common.errors import InputError
from groupvit_common.serving import Client, ServedError, Server, ServeSettings
from groupvit_common.serving.metrics import resident_bytes
from tests.segmentation.conftest import segmenter_with_demo
from tests.serving import malformed
from tests.serving.malformed import PHOTO, as_json

SOON = 20
GOOD = as_json("/v1/classify", {"image": malformed.TEXT, "labels": "red, blue"})


def start(**settings):
    return Server({"torch": segmenter_with_demo("torch")}, ServeSettings(port=0, **settings))


@pytest.fixture(scope="module")
def server():
    with start(max_bytes=3_000_000, max_pixels=4096 * 4096) as server:
        yield server


def connect(server):
    address = urlsplit(server.url)
    return socket.create_connection((address.hostname, address.port), timeout=SOON)


def answer(connection):
    """Status and JSON of the answer on a connection; None if it is closed without one."""
    file = connection.makefile("rb")
    try:
        line = file.readline()
        if not line:
            return None, None
        headers = {}
        while (header := file.readline().strip()) and b":" in header:
            name, _, value = header.partition(b":")
            headers[name.lower()] = value.strip()
        body = file.read(int(headers.get(b"content-length", 0)))
    except ConnectionError:
        return None, None
    return int(line.split()[1]), json.loads(body) if body.startswith(b"{") else body


def exchange(server, data):
    with connect(server) as connection:
        with suppress(ConnectionError):  # refused before all of it was sent
            connection.sendall(data)
        return answer(connection)


def engine_of(server):
    return server._state.service.engines["torch"]


class Blocked:
    """Keeps the model's thread at work until it is let go."""

    def __init__(self, server):
        self._go = threading.Event()
        begun = threading.Event()
        engine_of(server).run(lambda: (begun.set(), self._go.wait(SOON)))
        assert begun.wait(SOON)

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        self._go.set()


def until(condition):
    end = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def check(server, cases):
    wrong = []
    for name, data, right in cases:
        status, body = exchange(server, data)
        # uvicorn itself refuses what is no HTTP.
        said = status == 200 or isinstance(body, bytes) or (body is not None and body["error"]["message"])
        if status not in right or not said:
            wrong.append((name, status, body))
    assert not wrong, wrong


def test_malformed_requests_get_one_sentence(server):
    every = malformed.cases()
    assert len(every) >= 300
    # The others are in the slow test; no two kinds take the same way.
    kinds = {}
    for case in every:
        kinds.setdefault(case[0].rstrip("0123456789. ").split(" cut")[0], case)
    check(server, kinds.values())
    status, body = exchange(server, GOOD)
    assert (status, {label["name"] for label in body["labels"]}) == (200, {"red", "blue"})
    assert server._state.service.memory.nbytes == server._state.active == 0


def test_sentences_say_what_to_do(server):
    def message(**fields):
        status, body = exchange(server, as_json("/v1/segment", {"image": malformed.TEXT, "labels": "cat", **fields}))
        assert status == 422
        return body["error"]["message"]

    assert message(labels=[f"w{n}" for n in range(20_000)]) == "there are 20,000 labels: give at most 1,000"
    assert message(templates="/etc/passwd").startswith("templates must be one, seven, eighty, or 1 to 100 sentences")
    assert message(image="http://127.0.0.1/x.png").endswith("no address is opened here")
    assert message(labels="a\x00b") == "a label has a control character, U+0000: leave it out"
    assert message(shorter_side=1200).startswith("these options show the model")
    assert message(temperature=1e-300).startswith("temperature must be at least 1e-06, got 1e-300")
    long = [f"{n}" * 200 for n in range(7)]
    assert message(labels=long, templates=[f"{'x' * 450}{n} {{}}" for n in range(90)]).startswith(
        "the labels and templates make"
    )
    status, body = exchange(server, as_json("/v1/embed/text", {"texts": ["x" * 2000] * 200}))
    assert body["error"]["message"].startswith("the texts make 400,000 characters to read: 250,000 are the most")
    assert message(backend="tf") == "the backend tf is not loaded: there is torch"
    status, body = exchange(server, malformed.form("/v1/images", malformed.png_bomb(30_000, 30_000)))
    assert (status, body["error"]["code"]) == (413, "too_many_pixels")
    status, body = exchange(server, malformed.form("/v1/images", bytes(3_100_000)))
    assert (status, body["error"]["code"]) == (413, "too_large")


def test_slow_senders_are_let_go():
    head = GOOD[: GOOD.index(b"\r\n\r\n") + 4]
    with start(idle_seconds=0.5, body_seconds=1, header_seconds=0.3) as server:
        with connect(server) as silent, connect(server) as half, connect(server) as no_body, connect(server) as drip:
            half.sendall(head[:30])
            no_body.sendall(head)
            drip.sendall(head)
            with suppress(ConnectionError):
                for _ in range(15):
                    drip.sendall(b" ")
                    time.sleep(0.1)
            assert answer(no_body)[0] == answer(drip)[0] == 408
            # Without a request there is nothing to answer.
            assert answer(silent) == answer(half) == (None, None)
        until(lambda: server._state.service.memory.nbytes == 0)


def test_a_full_queue_a_time_limit_and_a_client_that_waits():
    with start(max_queue=2) as server, ThreadPoolExecutor(3) as pool:
        client, settings = Client(server.url), server.settings
        with Blocked(server):
            server._state.settings = replace(settings, work_seconds=0.5)
            waiting = [pool.submit(exchange, server, GOOD) for _ in range(2)]
            assert [each.result()[0] for each in waiting] == [504, 504]
            server._state.settings = settings
            waiting = [pool.submit(exchange, server, GOOD) for _ in range(2)]
            until(lambda: server._state.active == 2)
            status, body = exchange(server, GOOD)
            assert (status, body["error"]["code"]) == (429, "busy")
            with pytest.raises(ServedError, match="as many requests as it can queue: try again in 1 s"):
                Client(server.url, tries=1).classify(PHOTO, "red")
            # One that is told to wait tries again.
            third = pool.submit(client.classify, PHOTO, "red")
            refused = 'groupvit_requests_total{method="POST",path="/v1/classify",status="429"} 3'
            until(lambda: refused in server._state.metrics.text())
        assert [each.result()[0] for each in waiting] == [200, 200]
        assert list(third.result(SOON)) == ["red"]


def test_work_of_a_client_that_went_is_dropped(server):
    done = []
    with Blocked(server):
        with connect(server) as connection:
            connection.sendall(GOOD)
            until(lambda: server._state.active == 1)
        until(lambda: server._state.active == 0)
        engine_of(server).run(lambda: done.append("next"))
    until(lambda: done)
    assert server._state.service.memory.nbytes == 0
    gone = 'groupvit_requests_total{method="POST",path="/v1/classify",status="499"}'
    until(lambda: gone in server._state.metrics.text())


def test_an_end_finishes_what_runs_and_refuses_the_rest():
    server = start()
    with server, ThreadPoolExecutor(2) as pool:
        with Blocked(server):
            running = pool.submit(exchange, server, GOOD)
            until(lambda: server._state.active == 1)
            end = pool.submit(server.stop)
            until(lambda: server._state.is_stopping)
            for path in ("/healthz", "/v1/info"):
                status, _ = exchange(server, f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
                assert status == 503
            assert exchange(server, GOOD)[1]["error"]["code"] == "stopping"
            assert not end.done()
        assert running.result()[0] == 200
        end.result(SOON)
        with pytest.raises(ConnectionError):
            connect(server)


def test_a_server_that_loads_says_so_and_what_fails_is_raised():
    go = threading.Event()

    def load():
        assert go.wait(SOON)
        raise InputError("no such model")

    server = Server(load, ServeSettings(port=0))
    runner = ThreadPoolExecutor(1).submit(server.run)
    status, body = exchange(server, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert (status, body) == (503, {"status": "loading"})
    assert exchange(server, GOOD)[1]["error"]["code"] == "loading"
    go.set()
    with pytest.raises(InputError, match="no such model"):
        runner.result(SOON)


def test_addresses_and_settings_that_cannot_be(server):
    port = urlsplit(server.url).port
    with pytest.raises(InputError, match="another program listens there: choose another --port"):
        Server({}, ServeSettings(port=port))
    with pytest.raises(InputError, match="no address of the name"):
        Server({}, ServeSettings(host="no.such.host.invalid"))
    for settings in ({"port": 70_000}, {"max_queue": 0}, {"api_key": "short"}, {"root_path": "vit/"}, {"max_bytes": -1},
                     {"cache_seconds": float("nan")}):  # fmt: skip
        with pytest.raises(InputError):
            ServeSettings(**settings)
    assert not ServeSettings(host="0.0.0.0").is_loopback
    assert ServeSettings(host="0.0.0.0").hosts == frozenset()


@pytest.mark.slow
def test_three_hundred_malformed_requests_and_thirty_clients_for_a_minute():
    """None crashes, leaks or waits for ever."""
    with start(max_queue=16, cache_bytes=20_000_000, idle_seconds=1, body_seconds=3) as server:
        client = Client(server.url, tries=100)
        for _ in range(20):
            client.segment(PHOTO, "red, green", include=["label_map", "score_map", "group_map", "stages"])
        before, end, counts = resident_bytes(), time.monotonic() + 60, {"done": 0}

        def work(number):
            labels = ["red", "green, blue", "cat|kitten, dog"][number % 3]
            name = client.add_image(PHOTO)
            while time.monotonic() < end:
                try:
                    result = client.segment(name, labels, background=0.1 * (number % 5))
                    assert len(result.labels) == 1 + labels.count(",") + 1
                    counts["done"] += 1
                except ServedError as error:
                    if error.code != "image_gone":
                        raise
                    name = client.add_image(PHOTO)

        with ThreadPoolExecutor(31) as pool:
            bad = pool.submit(check, server, [(n, d, right | {429}) for n, d, right in malformed.cases()])
            for future in [pool.submit(work, number) for number in range(30)]:
                future.result(180)
            bad.result(180)
        assert counts["done"] > 30
        until(lambda: server._state.active == 0)
        assert server._state.service.memory.nbytes == 0
        assert server._state.service.store.nbytes <= 20_000_000
        # Threads, caches and the allocator settle; a leak of what each request brings would be gigabytes.
        assert resident_bytes() - before < 300_000_000
        print(f"{counts['done']} answers; memory {before / 1e6:.0f} -> {resident_bytes() / 1e6:.0f} MB")

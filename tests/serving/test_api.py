"""The API over real HTTP: every address, both backends, and the Python client."""

import base64
import io
import json
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image

from groupvit_common.data.scenes import BACKGROUNDS, COLOURS, make_scene
from groupvit_common.errors import InputError
from groupvit_common.serving import Client, ServedError, Server, ServeSettings
from tests.segmentation.conftest import segmenter_with_demo

LABELS = "red, green|emerald, blue, yellow"
KEY = "correct horse"
# A result in JSON and PNG is the result, but for the steps of 8 bits and five digits.
EIGHT_BITS, DIGITS = 1 / 255, 1e-5


@pytest.fixture(scope="module")
def segmenters():
    return {name: segmenter_with_demo(name) for name in ("torch", "tf")}


@pytest.fixture(scope="module")
def server(segmenters):
    settings = ServeSettings(
        port=0, default_labels=", ".join(names[0] for names in COLOURS), default_background_labels=BACKGROUNDS[0][0]
    )
    with Server(segmenters, settings) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return Client(server.url)


@pytest.fixture(scope="module")
def scene():
    image = make_scene(7, 3, 1, (96, 160)).image
    return Image.fromarray(image)


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def call(server, path, body=None, *, method=None, **headers):
    """Status, headers and body of an answer; a dictionary is sent as JSON."""
    if isinstance(body, dict):
        body, headers = json.dumps(body).encode(), {"content-type": "application/json", **headers}
    request = urllib.request.Request(server.url.rstrip("/") + path, body, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


@pytest.mark.parametrize("backend", ["torch", "tf"])
@pytest.mark.parametrize(
    "options", [{}, {"assignment": "hard", "background": 0.3, "background_labels": "grass, sand"}], ids=["soft", "hard"]
)
def test_an_answer_is_the_segmenters_result(client, segmenters, scene, backend, options):
    result = client.segment(scene, LABELS, backend=backend, include=["label_map", "score_map", "group_map", "stages",
                                                                     "overlay"], **options)  # fmt: skip
    behind = options.get("background_labels", ())
    more = {name: value for name, value in options.items() if name != "background_labels"}
    segmenter = segmenters[backend].with_labels(LABELS, behind, **more)
    expected = segmenter(scene)
    np.testing.assert_array_equal(result.label_map, expected.label_map)
    np.testing.assert_array_equal(result.group_map, expected.group_map)
    assert (result.labels, result.group_labels) == (expected.labels, expected.group_labels)
    assert result.has_background == expected.has_background
    np.testing.assert_allclose(result.group_scores, expected.group_scores, atol=DIGITS)
    for one, other in zip(result.scores, expected.scores, strict=True):
        assert one.probability == pytest.approx(other.probability, abs=DIGITS)
        assert one.pixel_share == pytest.approx(other.pixel_share)
    for one, other in zip(result.stages, segmenter.details(scene).group_maps, strict=True):
        np.testing.assert_array_equal(one, other)
    assert result.overlay.size == expected.overlay().size
    if options:
        scores = expected.group_scores[expected.group_map, expected.label_map]
    else:
        scores = segmenter.pixel_scores(segmenter.prepare(scene), scene.size[::-1])
        scores = np.take_along_axis(scores, expected.label_map[None].astype(int), axis=0)[0]
    np.testing.assert_allclose(result.score_map, scores, atol=EIGHT_BITS)


def test_an_image_that_is_kept_is_segmented_again_and_again(client, server, scene):
    name = client.add_image(scene)
    whole = client.segment(scene, LABELS)
    for options in ({}, {"background": 0.5}, {"flip": True}, {"window": 64, "assignment": "hard"}, {"refine": 1}):
        result, plain = client.segment(name, LABELS, **options), client.segment(scene, LABELS, **options)
        np.testing.assert_array_equal(result.label_map, plain.label_map)
        assert (result.answer["image_id"], plain.answer["image_id"]) == (name, None)
    again = client.segment(name, LABELS, backend="tf")
    assert (again.label_map == whole.label_map).mean() > 0.99
    assert client.classify(name, LABELS) == client.classify(scene, LABELS)
    client.remove_image(name)
    with pytest.raises(ServedError, match="not kept any more: send it again") as error:
        client.segment(name, LABELS)
    assert (error.value.status, error.value.code) == (404, "image_gone")


def test_forms_and_json_take_the_same(server, scene):
    fields = {"labels": '["red", "green|emerald"]', "include": "label_map,similarity", "scales": "0.5, 1", "top_k": "2",
              "background": "", "flip": "true", "masks": "rle"}  # fmt: skip
    boundary = "groupvit"
    parts = [f'--{boundary}\r\nContent-Disposition: form-data; name="{n}"\r\n\r\n{v}\r\n' for n, v in fields.items()]
    parts.append(f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="../../etc/passwd"\r\n\r\n')
    body = "".join(parts).encode() + png(scene) + f"\r\n--{boundary}--\r\n".encode()
    status, _, form = call(server, "/v1/segment", body, **{"content-type": f"multipart/form-data; boundary={boundary}"})
    assert status == 200
    same = {"labels": ["red", "green|emerald"], "include": ["label_map", "similarity"], "scales": [0.5, 1], "top_k": 2,
            "background": None, "flip": True, "masks": "rle",
            "image": "data:image/png;base64," + base64.b64encode(png(scene)).decode()}  # fmt: skip
    status, _, plain = call(server, "/v1/segment", same)
    assert status == 200
    one, other = json.loads(form), json.loads(plain)
    del one["milliseconds"], other["milliseconds"]
    assert one == other
    assert [each["label"] for each in one["similarity"]] == ["red", "green"]


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # pycocotools'
def test_masks_are_the_label_map(client, scene):
    mask_library = pytest.importorskip("pycocotools.mask")
    expected = client.segment(scene, LABELS)
    for form in ("png", "rle", "polygons"):
        result = client.segment(scene, LABELS, masks=form)
        assert set(result.masks) == {each.name for each in expected.scores if each.pixel_share}
        for label, mask in result.masks.items():
            if form == "png":
                pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(mask))))
            elif form == "rle":
                pixels = mask_library.decode({**mask, "counts": mask["counts"].encode()})
            else:
                lengths = mask_library.merge(mask_library.frPyObjects(mask, *expected.label_map.shape))
                pixels = mask_library.decode(lengths)
            np.testing.assert_array_equal(pixels.astype(bool), expected.mask(label))


def test_classes_and_embeddings(client, segmenters, scene):
    segmenter = segmenters["torch"].with_labels(LABELS)
    found, expected = client.classify(scene, LABELS), segmenter.classify(scene)
    assert found == pytest.approx(expected)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    np.testing.assert_allclose(client.embed_image(scene), segmenter.embed_images([scene])[0], atol=DIGITS)
    texts = ["a photo of a red circle.", "grass"]
    np.testing.assert_allclose(client.embed_texts(texts, backend="tf"), segmenter.embed_texts(texts), atol=DIGITS)


def test_info_and_what_is_left_out(client, server, scene):
    info = client.info()
    assert (info["backends"], info["model"], info["needs_key"]) == (["torch", "tf"], "demo", False)
    assert info["options"]["templates"] == "one"
    assert info["limits"]["labels"] == 1000
    assert len(info["palette"]) == 16
    result = client.segment(scene)
    assert result.labels == ("background", *(names[0] for names in COLOURS))


def test_pages_and_headers(server):
    for path, kind in (("/", "text/html"), ("/docs", "text/html"), ("/docs.css", "text/css"),
                       ("/page/index.html", "text/html"), ("/openapi.json", "application/json"),
                       ("/healthz", "application/json"), ("/metrics", "text/plain"), ("/nothing", "application/json"),
                       ("/page/../settings.py", "application/json")):  # fmt: skip
        status, headers, body = call(server, path)
        assert status == (404 if path in ("/nothing", "/page/../settings.py") else 200)
        assert headers["content-type"].startswith(kind)
        assert "default-src 'none'" in headers["content-security-policy"]
        assert (headers["x-content-type-options"], headers["referrer-policy"]) == ("nosniff", "no-referrer")
        assert headers["server"] is None
        assert body
    document = json.loads(call(server, "/openapi.json")[2])
    fields = document["components"]["schemas"]["SegmentRequest"]["properties"]
    assert {"labels", "background", "refine", "image_id"} <= set(fields)
    assert all(about.get("description") for about in fields.values())
    assert call(server, "/v1/segment")[0] == 405
    status, headers, body = call(server, "/healthz", method="HEAD")
    assert (status, body) == (200, b"")
    assert headers["content-type"] == "application/json"


def test_a_fault_is_told_as_any_error(server, scene, monkeypatch):
    def broken(*unused):
        raise RuntimeError("a secret")

    monkeypatch.setattr("groupvit_common.serving.service.results.label_png", broken)
    monkeypatch.setattr("groupvit_common.serving.app.page_examples", broken)
    for path, body in (("/v1/segment", {"image": base64.b64encode(png(scene)).decode()}), ("/v1/info", None)):
        status, headers, answer = call(server, path, body)
        assert (status, json.loads(answer)["error"]["code"]) == (500, "fault")
        assert "default-src 'none'" in headers["content-security-policy"]
        assert b"secret" not in answer


def test_the_client_sends_what_the_segmenter_sees(client, segmenters, scene):
    levels = np.asarray(scene)[..., 0]
    turned = Image.open(io.BytesIO(png(scene)))
    turned.getexif()[0x0112] = 6
    for image in (Image.fromarray(levels.astype(np.uint16) * 257), levels / np.float32(255), turned):
        found = client.classify(image, LABELS, backend="torch")
        expected = segmenters["torch"].with_labels(LABELS).classify(image)
        assert found == pytest.approx(expected, abs=DIGITS)


def test_who_may_ask(segmenters, scene):
    settings = ServeSettings(port=0, api_key=KEY, cors=("https://friend.example",), root_path="/vit")
    with Server({"torch": segmenters["torch"]}, settings) as server:
        for path in ("/v1/info", "/vit/v1/info", "/metrics", "/v1/images/x"):
            status, headers, body = call(server, path)
            assert (status, json.loads(body)["error"]["code"]) == (401, "key")
            assert headers["www-authenticate"] == "Bearer"
        for given in (
            {"authorization": "Bearer wrong key"},
            {"x-api-key": KEY[:-1]},
            {"authorization": f"Basic {KEY}"},
        ):
            assert call(server, "/v1/info", **given)[0] == 401
        for given in ({"authorization": f"Bearer {KEY}"}, {"x-api-key": KEY}):
            assert call(server, "/v1/info", **given)[0] == call(server, "/vit/v1/info", **given)[0] == 200
        assert call(server, "/")[0] == call(server, "/healthz")[0] == call(server, "/docs")[0] == 200
        status, headers, _ = call(server, "/v1/info", origin="https://friend.example")
        assert (status, headers["access-control-allow-origin"]) == (401, "https://friend.example")
        with pytest.raises(ServedError, match="needs its API key"):
            Client(server.url).info()
        assert Client(server.url, api_key=KEY).segment(scene, "red").labels == ("red",)
        # A page elsewhere: neither by another name of this machine, nor with its reader's browser.
        assert json.loads(call(server, "/", host="evil.example")[2])["error"]["code"] == "host"
        keyed = {"x-api-key": KEY}
        assert call(server, "/v1/embed/text", {"texts": ["a"]}, origin="https://evil.example", **keyed)[0] == 403
        assert call(server, "/v1/embed/text", {"texts": ["a"]}, origin="http://[", **keyed)[0] == 403
        status, headers, _ = call(server, "/v1/embed/text", {"texts": ["a"]}, origin="https://friend.example", **keyed)
        assert (status, headers["access-control-allow-origin"]) == (200, "https://friend.example")
        assert call(server, "/v1/embed/text", {"texts": ["a"]}, origin=server.url.rstrip("/"), **keyed)[0] == 200


def test_what_the_client_cannot_do(client, scene, tmp_path):
    with pytest.raises(InputError, match="given twice"):
        client.segment(scene, "red, Red")
    with pytest.raises(InputError, match="there is no field 'colour'"):
        client.segment(scene, "red", colour=1)
    with pytest.raises(InputError, match="cannot be read"):
        client.segment(tmp_path / "none.png", "red")
    with pytest.raises(InputError, match="cannot be read"):
        client.segment("a-name-of-32-characters-none.png", "red")
    with pytest.raises(ServedError, match="no supported image format") as error:
        client.segment(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "red")
    assert error.value.status == 415
    # Cut at the model's context, without a warning on the server.
    assert client.classify(scene, ["one two three four five " * 8, "red"])["red"] <= 1
    with pytest.raises(InputError, match="begins with http"):
        Client("localhost:8000")
    with pytest.raises(ServedError, match="does not answer"):
        Client("http://127.0.0.1:9", tries=1).info()

"""The page of `groupvit serve`, driven in Chromium against the real server; answers are compared with `Segmenter`'s."""

from __future__ import annotations

import base64
import gzip
import io
import json
import re
import urllib.request

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from groupvit_common.data.scenes import make_scene
from groupvit_common.errors import InputError
from groupvit_common.preprocessing.prompts import parse_labels
from groupvit_common.segmentation.adapters import to_coco

pytest.importorskip("fastapi", reason="the server needs the extra: serve")
pytest.importorskip("uvicorn", reason="the server needs the extra: serve")

from groupvit_common.serving import Server, ServeSettings
from groupvit_torch import Segmenter
from tests.support.paths import ROOT

LABELS = ["red|crimson", "cyan", "green", "purple"]
BACKGROUND = ["bricks|wall", "grass"]
SIZE = (72, 96)
DESKTOP = {"width": 1280, "height": 800}
PHONE = {"width": 390, "height": 844}


@pytest.fixture(name="segmenter", scope="module")
def _segmenter():
    return Segmenter.from_pretrained("demo")


@pytest.fixture(name="server", scope="module")
def _server(segmenter):
    # A second one that labels otherwise, without another framework.
    other = segmenter.with_labels(["red"], temperature=8.0)
    settings = ServeSettings(port=0, default_labels=", ".join(LABELS), default_background_labels=", ".join(BACKGROUND))
    with Server({"torch": segmenter, "tf": other}, settings) as server:
        yield server


@pytest.fixture(name="photo", scope="module")
def _photo(tmp_path_factory):
    """A file with an image of a size of its own."""
    path = tmp_path_factory.mktemp("photos") / "scene.png"
    Image.fromarray(make_scene(11, 116, 1, SIZE).image).save(path)
    return path


def opened(pages, server, photo=None, **options):
    page = pages.open(server.url, **{"viewport": DESKTOP, "reduced_motion": "reduce"} | options)
    page.locator("body.ready").wait_for()
    if photo is not None:
        page.locator("#file").set_input_files(photo)
        settled(page)
    return page


def settled(page):
    """Waits until nothing is awaited, and it is drawn."""
    page.locator("#panes:not([aria-busy])").wait_for(state="attached")
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def expected(segmenter, photo, labels=LABELS, background_words=BACKGROUND, **options):
    return segmenter.with_labels(labels, background_words, **options)(photo)


def downloaded(page, kind):
    with page.expect_download() as caught:
        page.locator(f"#downloads button[value={kind}]").click()
    content = caught.value.path().read_bytes()
    return caught.value.suggested_filename, content


def label_map(page):
    settled(page)
    return np.asarray(Image.open(io.BytesIO(downloaded(page, "labels")[1])))


def encoded_count(server):
    """Images that went through a vision tower."""
    with urllib.request.urlopen(server.url + "metrics") as answer:
        text = answer.read().decode()
    return sum(float(each) for each in re.findall(r"^groupvit_batch_images_sum\S* (\S+)$", text, re.MULTILINE))


def chips(page):
    """The labels as they are written."""
    return [each.get_attribute("data-value") for each in page.locator("#labels li").all()]


def move_slider(page, name, value):
    page.locator(f"#{name}").fill(str(value))
    settled(page)


def point_at(page, x, y, width=SIZE[1], height=SIZE[0], pane=0):
    box = page.locator(".frame").nth(pane).bounding_box()
    page.mouse.move(box["x"] + (x + 0.5) * box["width"] / width, box["y"] + (y + 0.5) * box["height"] / height)


def test_the_page_is_small_and_asks_nobody_else(server):
    sent = 0
    for file in (path for path in (ROOT / "groupvit_common" / "serving" / "page").iterdir() if path.is_file()):
        request = urllib.request.Request(f"{server.url}page/{file.name}", headers={"Accept-Encoding": "gzip"})
        with urllib.request.urlopen(request) as answer:
            content = answer.read()
            is_packed = answer.headers["Content-Encoding"] == "gzip"
        assert (gzip.decompress(content) if is_packed else content) == file.read_bytes()
        assert is_packed == (file.suffix != ".webp")
        sent += len(content)
        if is_packed:
            addresses = re.findall(r"https?://[^\s\"')]+", file.read_text(encoding="utf-8"))
            assert {*addresses} <= {"http://www.w3.org/2000/svg"}, file.name
    assert sent < 60_000


def test_an_image_gets_its_labels_and_each_pixel_its_text(pages, server, photo, segmenter):
    page = opened(pages, server, photo)
    result = expected(segmenter, photo)
    shares = {each.name: each.pixel_share for each in result.scores}
    rows = page.locator("#legend li")
    assert rows.count() == len(result.labels)
    for row in rows.all():
        name, share = row.locator(".name").inner_text(), row.locator(".share").inner_text()
        near = round(100 * shares.pop(name))
        assert share in {f"{near}%", "<1%"} if near <= 1 else share == f"{near}%"
    assert not shares
    assert {*page.locator(".names span").all_inner_texts()} == {"red", "cyan", "green"}
    labelled = segmenter.with_labels(LABELS, BACKGROUND)
    scores = labelled.pixel_scores(labelled.prepare(photo), SIZE).max(axis=0)
    for x, y in ((48, 36), (70, 52), (17, 34), (3, 3)):
        point_at(page, x, y)
        text = page.locator("#readout strong").inner_text()
        label, score, group = re.fullmatch(r"(\S+) <?(\d+)%, group (\d+)", text).groups()
        assert label == result.labels[result.label_map[y, x]], (x, y)
        assert int(group) == result.group_map[y, x]
        # A score comes in 256 steps, and is shown in 101.
        assert int(score) == pytest.approx(100 * scores[y, x], abs=0.5 + 100 / 255)
        assert f"column {x}, row {y}" in page.locator("#readout span").inner_text().lower()
        assert page.locator("#legend li.at .name").inner_text() == label
    # The other views of the same result.
    page.get_by_label("Heat map").check()
    point_at(page, 10, 10)  # before the answer is there
    settled(page)
    details = labelled.details(photo)
    assert page.locator("#legend .name").all_inner_texts() == list(details.labels)
    page.locator("#legend .row", has_text="cyan").click()
    settled(page)
    similarity = details.similarity[details.labels.index("cyan")]
    assert float(page.locator("#high").inner_text()) == pytest.approx(float(similarity.max()), abs=0.01)
    assert float(page.locator("#low").inner_text()) == pytest.approx(float(similarity.min()), abs=0.01)
    page.get_by_label("Groups").check()
    settled(page)
    groups, counts = np.unique(details.group_maps[-1], return_counts=True)
    assert page.locator("#legend .name").all_inner_texts() == [f"Group {group}" for group in groups]
    shares = page.locator("#legend .share").all_inner_texts()
    largest = int(counts.argmax())
    assert shares[largest] == f"{round(100 * counts[largest] / counts.sum())}%"


def test_options_and_labels_change_the_map_without_encoding_again(pages, server, photo, segmenter):
    page = opened(pages, server, photo)
    before = encoded_count(server)
    options = {}
    for name, value, slider in (("background", 0.9, 0.9), ("temperature", 3.16, 0.5), ("refine", 3, 3)):
        options[name] = value
        move_slider(page, name, slider)
        np.testing.assert_array_equal(label_map(page), expected(segmenter, photo, **options).label_map, err_msg=name)
    page.get_by_label("Hard").check()
    page.locator("#top_k").fill("2")
    page.locator("#labels-input").fill("blue|azure, yellow")
    page.keyboard.press("Enter")
    page.locator("#background-labels .remove").last.click()
    options |= {"assignment": "hard", "top_k": 2}
    wanted = expected(segmenter, photo, [*LABELS, "blue|azure", "yellow"], BACKGROUND[:1], **options)
    np.testing.assert_array_equal(label_map(page), wanted.label_map)
    page.get_by_role("button", name="Reset options").click()
    wanted = expected(segmenter, photo, [*LABELS, "blue|azure", "yellow"], BACKGROUND[:1])
    np.testing.assert_array_equal(label_map(page), wanted.label_map)
    assert encoded_count(server) == before


def test_downloads_are_the_files_of_the_command(pages, server, photo, segmenter):
    page = opened(pages, server, photo)
    result = expected(segmenter, photo)
    name, overlay = downloaded(page, "overlay")
    assert name == "scene_overlay.png"
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(overlay))), np.asarray(result.overlay()))
    name, labels = downloaded(page, "labels")
    assert name == "scene_labels.png"
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(labels))), result.label_map)
    name, record = downloaded(page, "record")
    assert name == "scene_segmentation.json"
    record = json.loads(record)
    assert record.pop("request")["labels"] == LABELS
    wanted = result.to_dict()
    assert record.pop("source") == "scene.png"
    del wanted["source"]
    for own, other in zip(record["labels"], wanted["labels"], strict=True):
        assert own.pop("probability") == pytest.approx(other.pop("probability"), abs=1e-5)
    assert record == wanted
    name, data_set = downloaded(page, "coco")
    assert name == "scene_coco.json"
    coco = to_coco(result)
    coco["images"][0]["file_name"] = "scene.png"
    assert json.loads(data_set) == coco
    # What is hidden stays hidden in the view as shown; what is shown has the overlay's colours.
    page.locator("#legend li", has_text="red").locator(".row").click()
    settled(page)
    name, view = downloaded(page, "view")
    assert name == "scene_view.png"
    seen, photo_pixels = np.asarray(Image.open(io.BytesIO(view)).convert("RGB"), int), np.asarray(result.image, int)
    red, cyan = result.mask("red"), result.mask("cyan")
    np.testing.assert_array_equal(seen[red], photo_pixels[red])
    # Chromium rounds premultiplied colours.
    drawn = np.asarray(result.overlay(legend=False), int)
    np.testing.assert_allclose(seen[cyan], drawn[cyan], atol=3)


def test_it_is_used_by_keyboard_alone(pages, server, photo, segmenter):
    page = opened(pages, server)
    page.keyboard.press("Tab")
    assert page.locator(":focus").inner_text() == "Skip to labels"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.locator(":focus").inner_text().startswith("red")
    page.locator("#labels-input").focus()
    page.keyboard.type("orange,")
    page.keyboard.press("Backspace")  # the chip that was added
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Delete")  # purple; the field follows
    page.keyboard.type("blue")
    page.keyboard.press("Enter")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")  # edits it
    page.keyboard.press("End")
    page.keyboard.type("|azure")
    page.keyboard.press("Enter")
    assert chips(page) == [*LABELS[:3], "blue|azure"]
    page.locator("#examples button").first.focus()
    page.keyboard.press("Enter")
    settled(page)
    assert "example-clouds" in page.locator("figcaption").inner_text()
    assert chips(page) == ["orange|tangerine", "purple", "blue", "pink"]
    page.locator("#file").set_input_files(photo)
    settled(page)
    page.locator(".frame").focus()
    page.keyboard.press("Space")  # the middle
    page.keyboard.press("Shift+ArrowRight")
    page.keyboard.press("ArrowUp")
    text = page.locator("#readout span").inner_text()
    assert f"Column {SIZE[1] // 2 + 1}, row {SIZE[0] // 2 - 2}" in text
    page.locator("#live", has_text=f"column {SIZE[1] // 2 + 1}, row {SIZE[0] // 2 - 2}").wait_for(state="attached")
    page.keyboard.press("Escape")
    assert page.locator(".cross").is_hidden()
    # Every control has a name that a screen reader says.
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, [role=application]")]
            .filter((it) => it.checkVisibility())
            .filter((it) => !it.ariaLabel && !it.textContent.trim() && !it.labels?.length)
            .filter((it) => !it.querySelector("img[alt]"))
            .map((it) => it.outerHTML)"""
    )
    assert not nameless


@pytest.mark.parametrize("scheme", ["dark", pytest.param("light", marks=pytest.mark.slow)])
def test_it_fits_a_phone(pages, server, photo, scheme):
    page = opened(pages, server, photo, viewport=PHONE, has_touch=True, is_mobile=True, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    page.locator(".frame").tap()
    assert re.search(r"Column 4[78], row 3[56]\.", page.locator("#readout").inner_text())
    small = page.evaluate(
        """() => [...document.querySelectorAll("#panel button, #source button, #panel select")]
            .filter((it) => it.checkVisibility() && it.getBoundingClientRect().height < 44)
            .map((it) => it.outerHTML)"""
    )
    assert not small
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    lightness = sum(map(int, re.findall(r"\d+", light))) / 3
    assert lightness > 200 if scheme == "light" else lightness < 60
    page.locator("#theme").tap()
    page.locator("#theme").tap()  # automatic, light, dark
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(15, 19, 25)"


def test_errors_are_one_sentence_and_lose_nothing(pages, server, photo, segmenter, tmp_path):
    pages.allow("Failed to load resource")
    page = opened(pages, server, photo)
    readable = page.locator("figcaption").inner_text()
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image at all")
    page.locator("#file").set_input_files(bad)
    page.locator("#error").wait_for()
    assert re.fullmatch(r"[A-Z0-9].*\.", page.locator("#error-text").inner_text())
    assert page.locator("figcaption").inner_text() == readable
    page.get_by_role("button", name="Dismiss").click()
    assert page.locator("#error").is_hidden()
    # The same words twice: the server's sentence, and the labels stay.
    page.locator("#labels-input").fill("Cyan")
    page.keyboard.press("Enter")
    page.locator("#error").wait_for()
    assert "cyan" in page.locator("#error-text").inner_text().lower()
    page.keyboard.press("Backspace")
    settled(page)
    assert page.locator("#error").is_hidden()
    page.evaluate("() => dispatchEvent(new ClipboardEvent('paste', { clipboardData: new DataTransfer() }))")
    assert "no image" in page.locator("#error-text").inner_text()
    # The server keeps images for a while; one that is gone is sent again.
    with page.expect_response("**/v1/images") as caught:
        page.locator("#file").set_input_files(photo)
    settled(page)
    gone = caught.value.json()["image_id"]
    request = urllib.request.Request(f"{server.url}v1/images/{gone}", method="DELETE")
    urllib.request.urlopen(request).close()
    page.get_by_label("Hard").check()
    wanted = expected(segmenter, photo, assignment="hard")
    np.testing.assert_array_equal(label_map(page), wanted.label_map)
    assert page.locator("#error").is_hidden()


@pytest.mark.slow
def test_two_backends_side_by_side(pages, server, photo, segmenter):
    page = opened(pages, server, photo)
    page.get_by_label("Side by side").check()
    settled(page)
    assert page.locator(".pane").count() == 2
    text = page.locator("#difference-text").inner_text()
    count, total = (
        int(each.replace(",", "")) for each in re.match(r"([\d,]+) of ([\d,]+) pixels differ", text).groups()
    )
    assert total == SIZE[0] * SIZE[1]
    point_at(page, 48, 36, pane=1)
    assert re.match(r"torch: \S+ .*; tf: \S+ ", page.locator("#readout strong").inner_text())
    page.get_by_label("tf", exact=True).check()
    other = label_map(page)
    assert count == np.count_nonzero(other != expected(segmenter, photo).label_map)
    assert page.locator(".pane").count() == 1


@pytest.mark.slow
def test_a_key_is_asked_for_and_kept(pages, segmenter, photo):
    pages.allow("401")
    with Server({"torch": segmenter}, ServeSettings(port=0, api_key="open sesame", default_labels="red")) as server:
        page = pages.open(server.url, viewport=DESKTOP)
        page.locator("#key").fill("a wrong key")
        page.keyboard.press("Enter")
        page.get_by_role("heading", name="That key is not the server's").wait_for()
        page.locator("#key").fill("open sesame")
        page.keyboard.press("Enter")
        page.locator("body.ready").wait_for()
        page.reload()
        page.locator("body.ready").wait_for()
        assert page.locator("#key-dialog").is_hidden()


@pytest.mark.slow
def test_a_busy_server_is_asked_again(pages, server, photo):
    pages.allow("429|500")
    page = opened(pages, server, photo)
    refusals = [
        {"status": 429, "headers": {"Retry-After": "1"}, "json": {"error": {"code": "busy", "message": "too many"}}},
        {"status": 500, "body": "no JSON"},
    ]
    page.route("**/v1/segment", lambda route: route.fulfill(**refusals.pop(0)) if refusals else route.fallback())
    page.get_by_label("Hard").check()
    page.get_by_text("Too many. Trying again in 1 s.").first.wait_for()
    page.locator("#error").wait_for()
    assert page.locator("#error-text").inner_text() == "The server answered with status 500 and no reason."
    page.get_by_role("button", name="Try again").click()
    settled(page)
    assert page.locator("#error").is_hidden()
    assert "Labelled in" in page.locator("#status").inner_text()


@pytest.mark.slow
def test_files_are_dropped_and_pasted(pages, server, photo):
    page = opened(pages, server)
    give = """([bytes, kind]) => {
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(bytes)], `${kind}.png`, { type: "image/png" }));
        const options = { bubbles: true, cancelable: true };
        document.body.dispatchEvent(kind === "drop" ? new DragEvent("drop", { ...options, dataTransfer: data })
            : new ClipboardEvent("paste", { ...options, clipboardData: data }));
    }"""
    for kind in ("drop", "paste"):
        page.evaluate(give, [list(photo.read_bytes()), kind])
        settled(page)
        assert page.locator("figcaption").inner_text().startswith(f"{kind}.png, 96 × 72")


def test_maps_and_labels_are_read_to_the_bit(pages, server):
    page = opened(pages, server)
    rng = np.random.default_rng(1)
    images = [
        Image.fromarray(rng.integers(0, 255, (7, 13), np.uint8)),
        Image.fromarray(rng.integers(0, 65535, (5, 9), np.uint16)),
    ]
    for colours in (2, 4, 16):
        image = Image.fromarray(rng.integers(0, colours, (6, 11), np.uint8))
        image.putpalette(bytes(3 * colours))
        images.append(image)
    # Smooth, so that filters are chosen.
    images.append(Image.fromarray(np.add.outer(np.arange(40), np.arange(30)).astype(np.uint8)))
    read = """async (text) => {
        const { readIndices } = await import("/page/png.js");
        const { width, height, values } = await readIndices(text);
        return { width, height, values: [...values] };
    }"""
    for image in images:
        file = io.BytesIO()
        image.save(file, "PNG", pnginfo=PngImagePlugin.PngInfo())
        found = page.evaluate(read, base64.b64encode(file.getvalue()).decode())
        assert (found["width"], found["height"]) == image.size
        np.testing.assert_array_equal(np.reshape(found["values"], image.size[::-1]), np.asarray(image))
    # Labels are split as the package splits them.
    split = "async (text) => (await import('/page/chips.js')).split(text).parts.filter(Boolean)"
    for text in ("cat, couch|sofa, dog", 'dog|"an animal, that barks", cat', '12" record, cat', "猫，犬、鳥", "cat"):
        parts = page.evaluate(split, text)
        assert parse_labels(parts) == parse_labels(text)
    with pytest.raises(InputError):
        parse_labels("cat; dog")  # which the page takes apart
    assert page.evaluate(split, "cat; dog\nbird") == ["cat", "dog", "bird"]

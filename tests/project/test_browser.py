"""The fixtures for pages: what goes wrong in a page is noticed, and other servers are out of reach."""

from __future__ import annotations

import re

import pytest

from tests.support.browser import serving

PAGE = "<!doctype html><link rel=icon href=data:,><title>a page</title>"


@pytest.fixture(name="address", scope="module")
def _address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    (folder / "good.html").write_text(PAGE, encoding="utf-8")
    (folder / "thrown.html").write_text(PAGE + "<script>throw new Error('thrown')</script>", encoding="utf-8")
    (folder / "said.html").write_text(PAGE + "<script>console.error('said')</script>", encoding="utf-8")
    asked = "await fetch('http://example.org/x').catch(() => 0)"
    elsewhere = f"<script type=module>{asked}; document.title = 'done'</script>"
    (folder / "elsewhere.html").write_text(PAGE + elsewhere, encoding="utf-8")
    with serving(folder) as address:
        yield address


def test_what_goes_wrong_in_a_page_is_noticed(pages, address):
    page = pages.open(f"{address}/good.html", viewport={"width": 360, "height": 640})
    assert page.evaluate("innerWidth") == 360
    assert pages.faults == []
    for name in ("thrown", "said", "none"):
        page.goto(f"{address}/{name}.html")
    page.goto(f"{address}/elsewhere.html")
    page.wait_for_function("document.title === 'done'")
    with pytest.raises(AssertionError) as caught:
        pages.close()
    expected = [
        r"error of a script: thrown",
        r"console, error: said",
        r"404",
        r"asked another server: http://example\.org/x",
        r"ERR_FAILED",
    ]
    assert len(pages.faults) == len(expected)
    for pattern in expected:
        assert re.search(pattern, str(caught.value))
        pages.allow(pattern)

"""What the tests of pages take for an error in the browser."""

from __future__ import annotations

from typing import Any

import pytest

from tests.webui.conftest import Pages

pytestmark = pytest.mark.browser

ERROR = "setTimeout(() => {{ throw new Error('Unable to preload CSS for {address}') }})"


def test_style_sheets_that_a_left_page_gave_up_are_forgiven_and_missing_ones_are_not(browser: Any, url: str) -> None:
    pages = Pages(browser)
    page = pages(f"{url}/")
    missing = f"{url}/assets/there-is-none.css"
    page.evaluate("address => fetch(address).then(response => response.text())", missing)
    page.evaluate(ERROR.format(address=f"{url}/assets/some.css"))
    page.evaluate(ERROR.format(address=missing))
    page.wait_for_timeout(500)
    assert [error for error in pages.errors if "preload" in error] == [
        f"Unable to preload CSS for {url}/assets/some.css",
        f"Unable to preload CSS for {missing}",
    ]
    pages.close()
    assert [error for error in pages.errors if "preload" in error] == [f"Unable to preload CSS for {missing}"]


def test_style_sheets_that_a_lost_server_did_not_send_are_forgiven_where_that_was_meant(browser: Any, url: str) -> None:
    for is_meant in (False, True):
        pages = Pages(browser)
        page = pages(f"{url}/")
        page.context.route("**/some.css", lambda route: route.abort("connectionrefused"))
        page.evaluate("address => fetch(address).catch(() => null)", f"{url}/assets/some.css")
        page.evaluate(ERROR.format(address=f"{url}/assets/some.css"))
        page.wait_for_timeout(500)
        if is_meant:
            pages.forgive_lost_connections()
        pages.close()
        assert any("preload" in error for error in pages.errors) != is_meant

"""The page of `rome explore` in a real browser: run with `make test-browser`."""

from __future__ import annotations

import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest
from PIL import Image

from helpers.tiny_runs import save_run
from rome.report.explore import open_explorers

pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.filterwarnings("ignore:::(?!rome)"),  # Gradio's own and its servers'
]

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
WAIT = 20_000


class Open(NamedTuple):
    """A page, and what the browser saw meanwhile."""

    page: Any
    console: list[str]
    requests: list[str]
    scheme: str
    """``light`` or ``dark``, as the browser prefers."""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where a page for two runs, one of them with experts, is served."""
    from rome.report.explore.page import application, build, listen, server

    folder = tmp_path_factory.mktemp("runs")
    runs = [save_run(folder / "rome"), save_run(folder / "plain", experts=None)]
    with listen("127.0.0.1", None) as listening:
        host, port = listening.getsockname()[:2]
        app = application(build(open_explorers(runs, "cpu")), host, port)
        serving = server(app)
        thread = threading.Thread(target=serving.run, args=([listening],), daemon=True)
        thread.start()
        yield f"http://{host}:{port}"
        serving.should_exit = True
        thread.join(10)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("needs chromium on the PATH, or its path in CHROMIUM")
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield launched
        launched.close()


@pytest.fixture(params=["light"])
def opened(request: pytest.FixtureRequest, browser: Any, address: str) -> Iterator[Open]:
    """The page, answered; afterwards it must have said nothing in the console and asked no other host."""
    context = browser.new_context(viewport={"width": 1360, "height": 1000}, color_scheme=request.param)
    page = context.new_page()
    seen = Open(page, [], [], request.param)
    page.on("console", lambda message: message.type == "error" and seen.console.append(message.text))
    page.on("pageerror", lambda error: seen.console.append(str(error)))
    page.on("request", lambda asked: seen.requests.append(asked.url))
    page.goto(address)
    page.wait_for_selector("#experts .card", timeout=WAIT)
    yield seen
    hosts = {urlsplit(url).netloc for url in seen.requests if not url.startswith(("data:", "blob:"))}
    context.close()
    assert seen.console == []
    assert hosts == {urlsplit(address).netloc}


def picture(page: Any, which: str, card: int = 0) -> str:
    """The source of a picture: ``natural``, ``attacked``, ``delta``, or a ``map``."""
    source: str = page.locator(".cards").nth(int(which == "map")).locator(f"img.{which}").nth(card).get_attribute("src")
    return source


def changes(page: Any, read: Any, act: Any) -> Any:
    """Do something and wait for what is read to differ from before."""
    before = read()
    act()
    end = time.monotonic() + WAIT / 1000
    while read() == before:
        assert time.monotonic() < end, "nothing changed"
        page.wait_for_timeout(30)
    return read()


@pytest.mark.parametrize("opened", ["light", "dark"], indirect=True)
def test_the_page_loads_without_errors_and_asks_no_other_host(opened: Open) -> None:
    page = opened.page
    assert page.locator("#attack .card").count() == 2
    heights = {page.locator("#attack .card").nth(i).bounding_box()["height"] for i in (0, 1)}
    assert len(heights) == 1
    assert page.locator("#experts .gate").count() == 4
    assert "no experts" in page.locator("#experts .card").nth(1).inner_text()
    colour = page.evaluate("getComputedStyle(document.querySelector('.card')).backgroundColor")
    assert colour == {"light": "rgb(255, 255, 255)", "dark": "rgb(26, 30, 34)"}[opened.scheme]


def test_an_attack_changes_the_picture(opened: Open) -> None:
    page = opened.page
    assert picture(page, "attacked") != picture(page, "natural")
    page.get_by_role("radio", name="natural").check()
    page.wait_for_selector("text=No attack.", timeout=WAIT)
    assert picture(page, "attacked") == picture(page, "natural")
    assert not page.locator("#eps").is_visible()
    l2 = changes(page, lambda: picture(page, "attacked"), page.get_by_role("radio", name="L2").check)
    assert l2 != picture(page, "natural")
    assert l2 != picture(page, "attacked", 1)  # each run is attacked on itself
    assert page.locator("#eps input, #eps textarea").input_value() == "0.35"


def test_the_radius_may_be_written_as_a_fraction(opened: Open) -> None:
    page = opened.page
    eps = page.locator("#eps input, #eps textarea")
    facts = page.locator("#attack .facts").first
    eps.fill("8/255")
    changes(page, facts.inner_text, lambda: eps.press("Enter"))
    assert "of at most 0.0314" in facts.inner_text()
    eps.fill("8/2x5")
    eps.press("Enter")
    page.wait_for_selector("#said .bad", timeout=WAIT)
    assert "such as 0.03 or 8/255" in page.locator("#said .message").inner_text()
    assert "of at most 0.0314" in facts.inner_text()


def test_the_slider_and_the_text_of_the_radius_agree(opened: Open) -> None:
    page = opened.page
    eps, slide = page.locator("#eps input, #eps textarea"), page.locator("#slide input[type=range]")
    facts = page.locator("#attack .facts").first
    slide.focus()
    changes(page, facts.inner_text, lambda: page.keyboard.press("ArrowRight"))
    assert eps.input_value() == slide.input_value() == "0.101"
    eps.fill("0.2")
    changes(page, facts.inner_text, lambda: eps.press("Enter"))
    assert slide.input_value() == "0.2"


def test_a_typed_number_of_steps_counts(opened: Open) -> None:
    page = opened.page
    facts = page.locator("#attack .facts").first
    page.locator("#steps input[type=number]").fill("3")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('#attack .facts').innerText.includes(', 3 steps')", timeout=WAIT)
    assert "APGD, 3 steps" in facts.inner_text()


@pytest.mark.parametrize("opened", ["light", "dark"], indirect=True)
def test_the_chosen_threat_can_be_read_under_the_pointer(opened: Open) -> None:
    label = opened.page.locator("#threat label.selected")
    label.hover()
    opened.page.wait_for_timeout(300)
    ink, back = (label.evaluate(f"each => getComputedStyle(each).{which}") for which in ("color", "backgroundColor"))
    brightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, back)]
    assert abs(brightness[0] - brightness[1]) > 300


def test_gates_that_are_clicked_show_their_layer_and_attack_nothing_again(opened: Open) -> None:
    page = opened.page
    before = picture(page, "attacked")
    assert page.locator("#experts img.map").count() == 2 * 2, "each of two experts, natural and attacked"
    panel = page.locator("#experts .gate").first
    assert panel.get_attribute("aria-pressed") == "false"
    changes(page, lambda: picture(page, "map"), panel.click)
    assert "expert in blocks.0.attn.qkv" in page.locator("#experts").inner_text()
    assert page.locator("#experts .gate").first.get_attribute("aria-pressed") == "true"
    assert picture(page, "attacked") == before


def test_the_address_holds_the_question(opened: Open) -> None:
    page = opened.page
    page.get_by_role("radio", name="L2").check()
    page.wait_for_selector("text=L2 size", timeout=WAIT)
    eps = page.locator("#eps input, #eps textarea")
    eps.fill("0.5")
    eps.press("Enter")
    changes(page, lambda: picture(page, "natural"), page.get_by_role("button", name="Next").click)
    changes(page, lambda: picture(page, "map"), page.locator("#experts .gate").first.click)
    page.wait_for_function("location.search.includes('blocks.0')", timeout=WAIT)
    shown = [picture(page, which) for which in ("natural", "attacked", "map")]
    page.goto(page.url)
    page.wait_for_selector("#experts .card", timeout=WAIT)
    assert [picture(page, which) for which in ("natural", "attacked", "map")] == shown
    assert eps.input_value() == "0.5"
    assert page.locator("#number input").input_value() == "1"
    page.goto(page.url.partition("?")[0] + "?image=x&threat=L3&eps=none&steps=many&layer=nowhere")
    page.wait_for_selector("#said .bad", timeout=WAIT)
    assert "not 'none'" in page.locator("#said .message").inner_text()


def test_colours_of_maps_are_those_of_their_scale_and_classes_have_one_order(opened: Open) -> None:
    page = opened.page
    order = page.locator("#attack .card").evaluate_all(
        "cards => cards.map(card => [...card.querySelectorAll('tbody th')].map(th => th.innerText).join())"
    )
    assert len(order) == 2
    assert len(set(order)) == 1
    for part in ("#experts img.map", "#experts .scale div"):
        assert page.locator(part).first.evaluate("each => getComputedStyle(each).opacity") == "1"


def test_test_images_are_turned_over(opened: Open) -> None:
    page = opened.page
    first = picture(page, "natural")
    following = changes(page, lambda: picture(page, "natural"), page.get_by_role("button", name="Next").click)
    assert picture(page, "natural", 1) == following
    back = changes(page, lambda: picture(page, "natural"), page.get_by_role("button", name="Previous").click)
    assert back == first
    changes(page, lambda: picture(page, "natural"), page.get_by_role("button", name="Random").click)
    number = page.locator("#number input")
    number.fill("3")
    changes(page, lambda: picture(page, "natural"), lambda: number.press("Enter"))
    assert "Test image 3 of 0 to 39" in page.locator("#said .message").inner_text()
    number.fill("9999")
    page.wait_for_selector("#said .bad", timeout=WAIT)
    assert "no test image 9999; choose from 0 to 39" in page.locator("#said .message").inner_text()


def test_an_upload_is_attacked_and_a_bad_one_gets_a_message(opened: Open, tmp_path: Path) -> None:
    page = opened.page
    chooser = page.locator("input[type=file]")
    Image.effect_noise((60, 40), 80).convert("RGBA").save(tmp_path / "photo.png")
    before = changes(page, lambda: picture(page, "natural"), lambda: chooser.set_input_files(tmp_path / "photo.png"))
    said = page.locator("#said .message").inner_text()
    assert "photo.png: 60 x 40 RGBA, cropped to the central 40 x 40, resized to 8 x 8, converted to gray." in said
    assert "attacks are against the model's prediction" in said
    (tmp_path / "text.png").write_text("hello")
    chooser.set_input_files(tmp_path / "text.png")
    page.wait_for_selector("#said .bad", timeout=WAIT)
    assert "text.png cannot be read as an image" in page.locator("#said .message").inner_text()
    assert picture(page, "natural") == before
    (tmp_path / "empty.png").touch()
    changes(page, page.locator("#said .message").inner_text, lambda: chooser.set_input_files(tmp_path / "empty.png"))
    assert "empty.png is empty" in page.locator("#said .message").inner_text()


def test_a_phone_needs_no_sideways_scrolling(opened: Open) -> None:
    page = opened.page
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    heads = page.locator(".confidences thead th").evaluate_all("all => all.map(th => th.scrollWidth - th.clientWidth)")
    assert len(heads) == 6
    assert max(heads) <= 0, "none is cut"
    boxes = [page.locator("#attack .card").nth(i).bounding_box() for i in (0, 1)]
    assert boxes[0]["x"] == boxes[1]["x"]  # one above the other
    assert boxes[0]["width"] > 330


@pytest.mark.parametrize("width", [1360, 390])
def test_gates_stay_inside_the_card_of_a_run_without_the_chosen_layer(browser: Any, width: int, tmp_path: Path) -> None:
    """Runs beside each other with experts in different layers: one has no map, but gates all the same."""
    from rome.report.explore import rendering

    names = {"qkv": ["qkv"], "proj": ["proj"]}
    runs = [save_run(tmp_path / name, experts__layers=layers) for name, layers in names.items()]
    explorers = open_explorers(runs, "cpu")
    image, label = explorers[0].test_image(0)
    layer = explorers[1].layers[0]
    answers = [each.look(image, layer=layer, label=label) for each in explorers]
    assert "no experts in blocks.0.attn.proj" in answers[0].missing
    css = (Path(rendering.__file__).parent / "page.css").read_text()
    page = browser.new_page(viewport={"width": width, "height": 1000})
    page.set_content(f"<!doctype html><style>{css}</style>{rendering.experts(answers)}")
    cards = page.locator(".card").evaluate_all(
        "cards => cards.map(card => card.getBoundingClientRect().bottom -"
        " Math.max(...[...card.querySelectorAll('*')].map(part => part.getBoundingClientRect().bottom)))"
    )
    page.close()
    assert len(cards) == 2
    assert min(cards) >= 0


def test_the_server_ends_while_a_page_is_open(browser: Any, tmp_path: Path) -> None:
    from rome.report.explore.page import application, build, listen, server

    with listen("127.0.0.1", None) as listening:
        host, port = listening.getsockname()[:2]
        explorers = open_explorers([save_run(tmp_path / "run", experts=None)], "cpu")
        serving = server(application(build(explorers), host, port))
        thread = threading.Thread(target=serving.run, args=([listening],), daemon=True)
        thread.start()
        page = browser.new_page()
        page.goto(f"http://{host}:{port}")
        page.wait_for_selector("#attack .card", timeout=WAIT)
        serving.should_exit = True
        thread.join(WAIT / 1000)
        page.close()
        assert not thread.is_alive()


def test_a_port_that_is_taken_gets_one_line(address: str) -> None:
    from rome.core.errors import UserError
    from rome.report.explore.page import listen

    port = urlsplit(address).port
    with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1 port {port}") as raised:
        listen("127.0.0.1", port)
    assert "\n" not in str(raised.value)
    with listen("127.0.0.1", None) as other:
        assert other.getsockname()[1] != port

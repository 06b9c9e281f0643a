"""The page at / in a browser: type, click, see the list reorder; what goes wrong is said; nobody else is asked."""

import itertools
import re
import threading
from types import SimpleNamespace

import pytest
from looks import FAINT
from servers import serving

from flexrec.serving.ranker import Ranker
from flexrec.serving.refused import Refused

for package in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(package, reason="the extra 'serve'")


@pytest.fixture
def opened(browser, url):
    """Opens the page and keeps what it says and asks for."""
    contexts = []

    def open_page(width=1440, scheme="light", at=url, ready=True, **options):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **options)
        contexts.append(context)
        page = context.new_page()
        page.said, page.asked, page.bodies = [], [], []
        page.on("console", lambda message: page.said.append(message.text))
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("request", lambda request: request.method == "POST" and page.bodies.append(request.post_data_json))
        page.goto(at)
        if ready:
            page.get_by_text("Ranked 12 items").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()


def order(page, which=0):
    return page.locator(f"#list-{which} > li .title").all_text_contents()


def ranked(ranker, page):
    """The titles of what the ranker answers to the page's last requests."""
    answers = ranker.rank(page.bodies[-1])
    return [[ranker.items[one["id"]].title for one in answer["ranking"]] for answer in answers]


def settled(page):
    """Wait until what was asked for is there and has stopped moving."""
    page.wait_for_load_state("networkidle")
    page.locator("#rank:not([aria-busy])").wait_for()
    page.wait_for_timeout(550)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_how_it_looks(opened, url, width, scheme):
    page = opened(width, scheme)
    settled(page)
    assert page.said == []
    assert {request for request in page.asked if not request.startswith((url, "data:"))} == set()
    assert page.evaluate("document.documentElement.scrollWidth") == width, "nothing sticks out"
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) > 384) == (scheme == "light")
    assert page.evaluate(FAINT) == [], "text is at least 4.5 times as light, or dark, as what is behind it"
    unnamed = page.evaluate(
        """[...document.querySelectorAll('input, select, textarea, button')].filter(one => one.getClientRects().length
        && !(one.labels && one.labels.length) && !one.textContent.trim() && !one.getAttribute('aria-label')).length"""
    )
    assert unnamed == 0
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3')].map(one => Number(one.tagName[1]))")
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"


def test_lists_are_those_of_the_ranker(opened, ranker):
    page = opened()
    user = page.locator("#users button[aria-pressed=true] span").first.text_content()
    first, second = page.bodies[-1]
    assert (first["need"], second["need"]) == ("interest", "trend")
    assert first["user"] == second["user"] == user
    assert len(first["candidates"]) == 12
    assert [order(page, 0), order(page, 1)] == ranked(ranker, page)
    had = page.locator("#had li").all_text_contents()
    assert [re.sub(r" \((not )?liked\)$", "", title) for title in had] == [
        ranker.items[event["id"]].title for event in ranker.users[user]
    ]
    why = page.locator("#list-0 > li .why").first.text_content()
    assert "at its rank" in why
    best = next(item for item in ranker.items.values() if item.title == order(page)[0])
    assert all(topic in why for topic in best.topics)


def test_words_and_users_change_the_order(opened):
    page = opened()
    before = order(page)
    page.select_option("#need-0", label="trend")
    settled(page)
    assert order(page) == order(page, 1)
    page.select_option("#need-0", label="in your own words …")
    page.get_by_label("In your own words").first.fill("Something about what is on the rise, for once")
    page.get_by_role("button", name="Rank", exact=True).click()
    settled(page)
    words = order(page)
    assert words != before
    assert sorted(words) == sorted(before)
    assert "Something about" in page.locator("#lists h3").first.text_content()
    page.select_option("#need-0", label="interest")
    settled(page)
    assert order(page) == before
    page.get_by_label("Search a user by id").fill("2")
    settled(page)
    page.locator("#users button").nth(1).click()
    settled(page)
    assert order(page) != before
    assert page.said == []


def test_rows_move_to_their_places_where_that_is_wanted(opened):
    for motion, moves in (("no-preference", True), ("reduce", False)):
        page = opened(reduced_motion=motion)
        settled(page)
        with page.expect_response("**/rank"):
            page.select_option("#need-0", label="trend")
        page.locator("#lists h3").first.get_by_text("trend").wait_for()
        assert bool(page.evaluate("document.getAnimations().length")) == moves


def test_a_typed_history_counts(opened, ranker, dataset):
    page = opened()
    titles, ids = dataset.catalogue.titles[20:23], dataset.catalogue.ids[20:23]
    page.get_by_label("Or type a history, oldest first").fill("\n".join([titles[0], ids[1], titles[2]]))
    page.get_by_role("button", name="Rank", exact=True).click()
    settled(page)
    assert page.locator("#had li").all_text_contents() == list(titles)
    assert [body["history"] for body in page.bodies[-1]] == [list(ids)] * 2
    assert "user" not in page.bodies[-1][0]
    assert [order(page, 0), order(page, 1)] == ranked(ranker, page)
    page.get_by_label("Or type a history, oldest first").fill("Nobody ever heard of it")
    page.get_by_role("button", name="Rank", exact=True).click()
    alert = page.get_by_role("alert")
    alert.filter(has_text="is neither an id nor a title").wait_for()
    page.locator("#users button").first.click()
    settled(page)
    assert alert.text_content() == ""


def test_candidates_are_drawn_searched_and_removed(opened, dataset):
    page = opened()
    before = order(page)
    added = next(title for title in dataset.catalogue.titles if title not in before)
    page.get_by_label("Or search an item to add").fill(added)
    page.locator("#items button").first.click()
    settled(page)
    assert sorted(order(page)) == sorted([*before, added])
    page.get_by_role("button", name=f"Remove {added}", exact=True).click()
    settled(page)
    assert order(page) == before
    page.get_by_label("How many to draw").fill("5")
    page.get_by_role("button", name="Draw from the catalogue").click()
    settled(page)
    assert len(order(page)) == len(order(page, 1)) == 5
    page.get_by_role("button", name="Remove all").click()
    page.get_by_role("button", name="Rank", exact=True).click()
    page.get_by_role("alert").filter(has_text="There is nothing to rank").wait_for()
    page.select_option("#need-1", label="nothing")
    page.get_by_role("button", name="Draw from the catalogue").click()
    settled(page)
    assert page.locator("#lists ol").count() == 1


def test_what_goes_wrong_is_said_in_words(opened, ranker):
    broken = threading.Event()

    def rank(requests):
        if broken.is_set():
            raise Refused(500, "no")
        return ranker.rank(requests)

    names = ("items", "users", "needs", "info", "id_titled", "score")
    failing = SimpleNamespace(**{name: getattr(ranker, name) for name in names}, rank=rank)
    with serving(failing) as address:
        page = opened(at=address)
        broken.set()
        page.get_by_role("button", name="Rank", exact=True).click()
        page.get_by_role("alert").filter(has_text="the ranker failed at this request").wait_for()
        broken.clear()
        page.get_by_role("button", name="Rank", exact=True).click()
        settled(page)
        assert page.get_by_role("alert").text_content() == ""
        page.select_option("#need-0", label="explore (not trained on)")
        page.get_by_text("the run was not trained on the need 'explore'").wait_for()
        page.select_option("#need-0", label="in your own words …")
        page.get_by_role("button", name="Rank", exact=True).click()
        page.get_by_role("alert").filter(has_text="Say in words").wait_for()
        page.select_option("#need-0", label="interest")
        settled(page)
    page.get_by_role("button", name="Rank", exact=True).click()
    page.get_by_role("alert").filter(has_text="The server does not answer").wait_for()


HOSTILE = "<img src=x onerror=alert(1)><b>bold</b>"


def test_titles_are_text(opened, served, dataset):
    from flexrec.data import Catalogue

    names = tuple(f"{HOSTILE} {n}" for n in range(70))
    ranker = Ranker(served, Catalogue(dataset.catalogue.ids, names, tuple((HOSTILE,) for _ in names)))
    with serving(ranker) as address:
        page = opened(at=address)
        settled(page)
        assert page.locator("#lists img").count() == page.locator("#had img").count() == 0
        assert order(page)[0].startswith("<img")
        assert page.said == []

"""The report of runs: what stands on the page, that it holds on its own, and how it looks in a browser."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from looks import FAINT, colors_of

from flexrec.cli import main
from flexrec.evaluation.statistics import relative_change
from flexrec.experiment.report.charts import (
    MINUS,
    NONE,
    Line,
    Row,
    averaged,
    bar_chart,
    interval_chart,
    line_chart,
    number,
)
from flexrec.experiment.report.figures import figures_of
from flexrec.experiment.report.page import write_report
from flexrec.experiment.report.read import Record
from flexrec.experiment.results import Results
from flexrec.experiment.run_folder import RunFolder
from flexrec.profiling import PARTS

NEEDS = ("interest", "cheap & <good>")
HOSTILE = "<script>alert('title')</script>"
USERS = np.repeat(np.arange(12), 2)


def step(n, **more):
    ranks = {f"reward/rank_{k}": 0.5 / k + 0.001 * n for k in range(1, 11)}
    weights = {"weight/p10": 0.25, "weight/p50": 1.125, "weight/p90": 1.75}
    parts = {f"seconds/{part}": 0.001 * (len(part) + 100 * (n == 1)) for part in PARTS}
    at = {"stage": "reinforcement", "step": n, "steps": n + 5, "seconds": 2.0 * n}
    return {**at, "loss": 0.1, "reward": 0.5 + n / 100, "entropy": 1.0, **ranks, **weights, **parts, **more}


def point(of, n, steps, mean):
    means = {need: {"ndcg@5": mean} for need in NEEDS}
    intervals = {need: {"ndcg@5": [mean - 0.0625, mean + 0.0625]} for need in NEEDS}
    at = {"stage": "evaluation", "of": of, "step": n, "steps": steps, "seconds": 1.0 * steps}
    return {**at, "means": means, "intervals": intervals}


@pytest.fixture
def make(tmp_path):
    def run(name, *, better=0.0, options=(), steps=40, fingerprint="same", **more):
        folder = tmp_path / name
        folder.mkdir()
        rng = np.random.default_rng(0)
        start = {"base": 0.25, "warm start": 0.5, "trained": 0.625 + better, "random": 0.125, "item-knn": 0.375}
        per_list = {
            system: {need: {"ndcg@5": np.clip(rng.normal(mean, 0.01, len(USERS)), 0, 1)} for need in NEEDS}
            for system, mean in start.items()
        }
        results = Results(USERS, per_list, {"format": 3.0, "reinforcement": 80.0, "total": 100.0})
        results.critic = {"pairs": 400, "rmse": 0.125}
        config = {"metric": "ndcg@10", "credit": "swap", "output": str(folder), "seed": 0, **dict(options)}
        RunFolder(folder).write_results(config, results)
        (folder / "experiment.json").write_text(json.dumps(config))
        about = {"name": "simulated", "items": 800, "train": 4500, "test": 24, "fingerprint": fingerprint, "notes": []}
        (folder / "data.json").write_text(json.dumps(about))
        log = [point("format", 0, 0, 0.125), point("format", 5, 5, 0.25)]
        log += [step(n, **more) for n in range(1, steps + 1)]
        log.append(point("reinforcement", steps, steps + 5, 0.625))
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
        items = [{"id": str(n), "title": f"Item {n}", "topics": ["jazz"], "gain": 1 / (n + 1)} for n in range(4)]
        of_need = {"wording": "What I like", "metric": "ndcg@5", "value": 0.75, "ranking": items[::-1], "best": items}
        history = [
            {"title": HOSTILE, "topics": [], "liked": True},
            {"title": "A bore", "topics": [], "liked": False},
            {"title": "Who knows", "topics": [], "liked": None},
        ]
        shown = {
            "users": [{"user": "u7", "query": "", "history": history, "needs": dict.fromkeys(NEEDS, of_need)}],
            "answers": {"answers": 32, "valid": 0.875, "missing": 0.0625, "repeated": 0.25, "unknown": 0.5},
            "critic": {
                "intervals": [{"level": level, "inside": level + 0.03} for level in (0.1, 0.5, 0.9)],
                "bins": [{"predicted": p, "interest": p - 0.05, "pairs": 40} for p in (0.1, 0.5, 0.9)],
            },
        }
        (folder / "report.json").write_text(json.dumps(shown))
        return folder

    return run


def page_of(folder, *more):
    assert main(["report", str(folder), *map(str, more)]) == 0
    return (folder / "report.html").read_text(encoding="utf-8")


class Outline(HTMLParser):
    """Headings, links, ids and what would be fetched."""

    def __init__(self, page):
        super().__init__()
        self.headings, self.ids, self.links, self.fetched, self.charts = [], [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given["href"]] if tag == "a" else []
        self.fetched += [given[name] for name in ("src", "srcset", "data", "action") if name in given]
        self.fetched += [given["href"]] if tag == "link" else []
        self.charts += [given] if tag == "svg" else []


def figures_by_name(folder):
    return {figure.name: figure for figure in figures_of(Record.read(folder))}


def test_a_run_has_every_figure_with_its_numbers(make):
    folder = make("first", kl=0.25, clip_fraction_low=0.0625, clip_fraction_high=0.125)
    figures = figures_by_name(folder)
    assert list(figures) == [
        "rankers", "curves", "reward-by-rank", "critic", "reinforcement", "weights", "seconds", "answers"
    ]  # fmt: skip
    for figure in figures.values():
        assert figure.charts
        assert figure.rows
        assert all(len(row) == len(figure.header) for row in figure.rows), figure.name
    page = page_of(folder)
    for figure in figures.values():
        assert figure.title in page
        for row in figure.rows:
            assert all(cell in page for cell in row if not set(cell) & set("&<>'\"")), row


def test_rankers_are_compared_in_pairs(make):
    folder = make("first")
    results = Record.read(folder).results
    change = results.compare("trained", "item-knn", "interest")
    row = next(row for row in figures_by_name(folder)["rankers"].rows if row[:2] == ["interest", "item-knn"])
    assert row[3] == f"{results.per_list['item-knn']['interest']['ndcg@5'].mean():.3f}"
    assert row[5:] == [
        f"+{change.difference:.3f}",
        f"+{change.difference_low:.3f} to +{change.difference_high:.3f}",
        "< 0.001",
    ]


def test_numbers_of_the_log_arrive(make):
    figures = figures_by_name(make("first", clip_fraction_low=0.0625, clip_fraction_high=0.125))
    by_rank = figures["reward-by-rank"].rows
    assert by_rank[0][:3] == ["1", "0.5010", "0.2510"]
    assert by_rank[-1][:3] == ["40", "0.5400", "0.2900"]
    steps = dict(zip(figures["reinforcement"].header, figures["reinforcement"].rows[-1], strict=True))
    assert steps["Share that is clipped"] == "0.1875"
    assert steps["Metric of sampled rankings"] == "0.9000"
    assert "KL to the start" not in steps
    assert "no KL is measured" in figures["reinforcement"].text
    assert figures["weights"].rows[0] == ["1", "0.250", "1.125", "1.750"]
    assert ["step", "backward", "8 ms"] in figures["seconds"].rows, "the median: the first step loads"
    assert ["stage", "reinforcement", "80.0 s"] in figures["seconds"].rows
    assert ["format", "5", "0.250", "0.188 to 0.312"] in [row[1:] for row in figures["curves"].rows]
    assert ["interval", "50 %", "53.0 %", ""] in figures["critic"].rows
    assert ["read as it stands", "88 %"] in figures["answers"].rows


def test_the_page_holds_on_its_own(make):
    page = page_of(make("first"))
    outline = Outline(page)
    assert outline.fetched == ["data:,"]
    assert "url(" not in page
    assert "@import" not in page
    assert len(outline.ids) == len(set(outline.ids))
    assert {link[1:] for link in outline.links if link.startswith("#")} <= set(outline.ids)
    assert all(link.startswith("#") for link in outline.links)
    assert outline.headings[0] == 1
    assert all(b - a <= 1 for a, b in zip(outline.headings, outline.headings[1:], strict=False)), "no level is left out"
    assert all(chart["role"] == "img" and len(chart["aria-label"]) > 10 for chart in outline.charts)


def test_text_of_a_catalogue_is_text(make):
    page = page_of(make("first"))
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "cheap &amp; &lt;good&gt;" in page


def test_users_have_their_lists_and_history(make):
    page = page_of(make("first"))
    assert re.search(r'class="liked">&lt;script', page)
    assert re.search(r'class="disliked">A bore \(not liked\)', page)
    assert re.search(r"<li>Who knows</li>", page)
    first = page.index("Item 3</span>") if "Item 3</span>" in page else page.index("Item 3")
    assert first < page.index("Item 0"), "the ranking comes before the best order"
    assert 'style="width:25%"' in page, "the fourth is worth a quarter of the best"


def test_runs_are_compared_with_the_first_list_by_list(make, tmp_path):
    folders = [
        make("first"),
        make("second", better=0.0625, options={"credit": "rank"}),
        make("other", fingerprint="not"),
    ]
    page = tmp_path / "compared.html"
    assert main(["report", *map(str, folders), "--output", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    one, two = (Record.read(folder).results.per_list["trained"]["interest"]["ndcg@5"] for folder in folders[:2])
    change = relative_change(two, one, clusters=USERS)
    said = (
        f"second on interest: +{change.difference:.3f} [+{change.difference_low:.3f}, +{change.difference_high:.3f}], p"
    )
    assert said in text
    assert "other: other test lists than those of first, so that nothing can be paired" in text
    of_credit = re.search(r"--credit</th>(.*?)</tr>", text).group(1)
    assert re.findall(r'data-of="(\w+)"><span class="word">(\w+)</span></td>', of_credit) == [
        ("first", "swap"),
        ("second", "rank"),
        ("other", "swap"),
    ]
    assert "--output</th>" not in text.partition("<h2 id=")[0]
    assert len(set(Outline(text).ids)) == len(Outline(text).ids)


def test_an_old_run_has_a_report_of_what_is_there(make):
    folder = make("old")
    (folder / "report.json").unlink()
    (folder / "data.json").unlink()
    old = ("stage", "step", "steps", "seconds", "loss", "reward", "entropy", "of", "means")
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    (folder / "log.jsonl").write_text(
        "".join(json.dumps({k: v for k, v in line.items() if k in old}) + "\n" for line in lines)
    )
    assert list(figures_by_name(folder)) == ["rankers", "curves", "reinforcement", "seconds"]
    assert "Who ranks best" in page_of(folder)


def test_a_run_that_is_not_finished_is_shown_as_far_as_it_went(make):
    folder = make("killed", reward=None)
    for name in ("metrics.json", "per_list.npz", "report.json"):
        (folder / name).unlink()
    log = (folder / "log.jsonl").read_text().splitlines(keepends=True)
    (folder / "log.jsonl").write_text("".join(log[:12]) + log[12][:30])
    page = page_of(folder)
    assert "This run is not finished" in page
    assert "Reward by rank" in page
    assert "nan" not in page.lower().replace("explain", "")


def test_what_is_no_run_is_said_in_a_line(tmp_path, make, capsys):
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "is not the folder of a run" in capsys.readouterr().err
    folder = make("first")
    (folder / "per_list.npz").write_bytes(b"no archive")
    assert main(["report", str(folder)]) == 2
    assert "per_list.npz is damaged" in capsys.readouterr().err


def test_pictures_of_every_chart(make, tmp_path):
    pytest.importorskip("resvg_py", reason="the extra 'report'")
    folder = make("first")
    assert write_report([folder], tmp_path / "page.html", tmp_path / "figures") == [
        f"13 pictures are in {tmp_path / 'figures'}"
    ]
    pictures = sorted((tmp_path / "figures").glob("*.png"))
    assert len(pictures) == sum(len(figure.charts) for figure in figures_by_name(folder).values())
    assert all(picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 2000 for picture in pictures)


SAID = [(0.81949, "0.819"), (-0.0001, "0.000"), (-12.34, f"{MINUS}12.3"), (3400.2, "3400"), (float("nan"), NONE)]


def test_options_are_whole_on_a_phone(make, browser, tmp_path):
    """No word is cut by the edge of a table, and none is broken that has room on a line."""
    needs = ["interest", "0.7 interest + 0.3 explore", "something-that-is-of-my-own"]
    folders = [
        make("first", options={"needs": needs, "model": "somebody/Language-Model-0.5B-Instruct"}),
        make("second-with-sequence-rewards", options={"baselines": ["item-knn", "user-knn", "sequence_grpo"]}),
    ]
    write_report(folders, tmp_path / "page.html")
    page = browser.new_page(viewport={"width": 390, "height": 900})
    page.goto((tmp_path / "page.html").as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert page.locator(".wide").count() >= 3
    assert page.evaluate(CUT) == []
    assert page.evaluate(BROKEN) == []
    assert "first" in page.evaluate("document.querySelector('.wide td').dataset.of")
    shown = page.evaluate("getComputedStyle(document.querySelector('.wide td'), '::before').content")
    assert shown not in ("none", "normal"), "each value says whose it is"
    page.close()


# Tables of values in words whose box would have to be pushed aside to see all of them.
CUT = """[...document.querySelectorAll('.wide')].map(one => one.closest('.scroll'))
  .filter(one => one.scrollWidth > one.clientWidth + 1).map(one => one.getAttribute('aria-label'))"""

# Words on more than one line that are no longer than a line.
BROKEN = """[...document.querySelectorAll('.wide td')].flatMap(cell =>
  [...cell.querySelectorAll('.word')].filter(word => {
  const ruler = word.cloneNode(true);
  Object.assign(ruler.style, {position: 'absolute', whiteSpace: 'nowrap', maxWidth: 'none'});
  cell.append(ruler);
  const [width, height] = [ruler.offsetWidth, ruler.offsetHeight];
  ruler.remove();
  return word.offsetHeight > height + 2 && width <= cell.clientWidth;
}).map(word => word.textContent))"""


@pytest.mark.parametrize(("value", "said"), SAID)
def test_numbers_are_short(value, said):
    assert number(value) == said


def test_charts_of_next_to_nothing():
    assert line_chart([Line("a", [], [])], label="nothing", x_label="step") == ""
    assert "<circle" in line_chart([Line("a", [3], [0.5])], label="one point", x_label="step")
    flat = interval_chart([Row("a", 0.5, float("nan"), float("nan"))], label="one user: no interval")
    assert "nan" not in flat
    assert "nan" not in bar_chart([Row("a", 0.0)], label="nothing")


def test_names_at_the_ends_of_lines_do_not_lie_on_each_other():
    drawn = line_chart([Line(str(n), [0, 1], [0.5, 0.5 + n / 1000]) for n in range(5)], label="five", x_label="step")
    places = sorted(float(y) for y in re.findall(r'y="([\d.]+)" font-weight="600"', drawn))
    assert len(places) == 5
    assert min(np.diff(places)) >= 12
    assert places[-1] <= 170


def test_long_lines_are_averaged():
    x, y = averaged(list(range(1000)), [float(n % 2) for n in range(1000)])
    assert len(x) == len(y) == 200
    assert x[0] == 2
    assert set(y) <= {0.4, 0.6}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_the_page_in_a_browser(make, browser, tmp_path, width, scheme):
    write_report([make("first", kl=0.25), make("second", options={"credit": "rank"})], tmp_path / "page.html")
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto((tmp_path / "page.html").as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert page.evaluate("document.documentElement.scrollWidth") == width, "nothing sticks out"
    assert page.evaluate(CLIPPED) == [], "every text of a drawing lies inside of it"
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) > 384) == (scheme == "light")
    assert page.evaluate(FAINT) == [], "text is at least 4.5 times as light, or dark, as what is behind it"
    # Rendered: of the picture of a figure, many pixels are not the background.
    (tmp_path / "shot.png").write_bytes(page.locator("figure svg").first.screenshot())
    assert len(colors_of(tmp_path / "shot.png", context)) > 10, "a chart has colours"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    context.close()


# Texts of drawings that stick out of them by more than a pixel or two.
CLIPPED = """[...document.querySelectorAll('figure svg')].flatMap(svg => {
  const box = svg.getBoundingClientRect();
  return [...svg.querySelectorAll('text')].filter(text => {
    const own = text.getBoundingClientRect();
    return own.left < box.left - 2 || own.right > box.right + 2 || own.top < box.top - 2 || own.bottom > box.bottom + 2;
  }).map(text => text.textContent);
})"""

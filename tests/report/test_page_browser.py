"""report.html in a real browser, from disk: no request, no error, readable by everyone, sorting and filters work."""

import shutil

import pytest
from report_doubles import TASKS, capability, write_run

from trace_hydra.collect import collect
from trace_hydra.report.groups import Member
from trace_hydra.report.page import report_page, run_page

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra dev)")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# A browser is no Python package: the lock cannot bring one.
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")

# Contrast of every text with what is behind it (WCAG 2.1), for elements that hold text of their own.
CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const parse = css => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = css; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].map(part => part / 255);
  };
  const luminance = ([r, g, b]) => [r, g, b].map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = element => {
    for (let one = element; one; one = one.parentElement) {
      const colour = parse(getComputedStyle(one).backgroundColor);
      if (colour[3] > 0.99) return colour;
    }
    return [1, 1, 1, 1];
  };
  const found = [];
  for (const one of document.querySelectorAll("body *")) {
    const own = [...one.childNodes].some(node => node.nodeType === 3 && node.data.trim());
    const unseen = ["SCRIPT", "STYLE", "title", "desc", "OPTION"].includes(one.tagName) || !one.getClientRects().length;
    if (!own || unseen) continue;
    const style = getComputedStyle(one);
    const ink = parse(one instanceof SVGElement ? style.fill : style.color);
    const [high, low] = [luminance(ink), luminance(ground(one))].sort((a, b) => b - a);
    const ratio = (high + 0.05) / (low + 0.05);
    found.push([ratio, one.tagName + "." + one.getAttribute("class") + " " + one.textContent.trim().slice(0, 40)]);
  }
  return found.sort((a, b) => a[0] - b[0]);
}"""


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def opened(browser):
    """Open a file; whatever it asks for, says or throws fails the test."""
    contexts = []

    def show(path, **options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, "offline": True, **options})
        contexts.append(context)
        page = context.new_page()
        seen = {"requests": [], "said": []}
        page.on("request", lambda request: seen["requests"].append(request.url))
        page.on("console", lambda message: seen["said"].append(message.text))
        page.on("pageerror", lambda error: seen["said"].append(str(error)))
        page.goto(path.as_uri())
        assert seen == {"requests": [path.as_uri()], "said": []}
        page.seen = seen
        return page

    yield show
    for context in contexts:
        assert all(len(page.seen["requests"]) == 1 and not page.seen["said"] for page in context.pages)
        context.close()


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser") / "run"
    results = write_run(folder, rows=20, loss=0.08, capability=capability(failed=True))
    path = folder / "report.html"
    path.write_bytes(run_page(results, folder).encode())
    return path, results


@pytest.fixture(scope="module")
def set_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser-set")
    for method, loss in (("steady", 0.01), ("leaky", 0.09), ("middling", 0.05)):
        for seed in range(4):
            write_run(folder / f"{method}-{seed}", method=method, seed=seed, loss=loss, rows=8, tasks=TASKS[:4],
                      capability=capability() if method != "leaky" else {})  # fmt: skip
    found = collect(folder)
    members = [Member(run, folder / run.folder) for run in found.runs]
    path = folder / "report.html"
    path.write_bytes(report_page(members, found.left_out, title="A sweep", where=folder).encode())
    return path, {member.run.folder: member.run.results for member in members}


def test_the_numbers_on_the_page_are_those_of_results_json(run_file, opened):
    path, results = run_file
    page = opened(path)
    for key in ("op", "bwt", "forgetting"):
        said = page.inner_text(f"li[data-key={key}] .big").replace("−", "-")
        assert float(said) == round(results[key], 2)
    cells = page.eval_on_selector_all(
        "#matrix tbody tr", "rows => rows.map(row => [...row.cells].slice(1).map(cell => cell.innerText))"
    )
    expected = [["–" if cell is None else f"{cell:.2f}" for cell in row] for row in results["matrix"]]
    assert [[cell.split("\n")[0].replace("not scored", "") for cell in row] for row in cells] == expected


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("which", ["run_file", "set_file"])
def test_every_text_has_enough_contrast(which, scheme, opened, request):
    path, _ = request.getfixturevalue(which)
    page = opened(path, color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    found = page.evaluate(CONTRAST)
    assert len(found) > 300
    assert [one for one in found if one[0] < 4.5] == []
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (dark == "rgb(255, 255, 255)") == (scheme == "light")


@pytest.mark.parametrize("which", ["run_file", "set_file"])
@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_is_never_wider_than_the_screen(which, width, opened, request):
    """What is wider (tables, figures) scrolls within itself and can be reached by keyboard."""
    path, _ = request.getfixturevalue(which)
    page = opened(path, viewport={"width": width, "height": 800})
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    wider = page.evaluate(
        "[...document.querySelectorAll('main *')].filter(one => one.scrollWidth > one.clientWidth + 1 &&"
        " ['auto', 'scroll'].includes(getComputedStyle(one).overflowX)).map(one => one.tabIndex)"
    )
    assert all(place == 0 for place in wider) and (width > 1000 or wider)


def test_tables_are_sorted_by_keyboard_with_missing_numbers_last(set_file, opened):
    path, results = set_file
    page = opened(path)

    def column(name: str) -> list[str]:
        return page.evaluate(
            "name => { const heads = [...document.querySelectorAll('#runs thead .label')].map(one => one.textContent);"
            "return [...document.querySelectorAll('#runs tbody tr')].map(row => "
            "row.cells[heads.indexOf(name)].dataset.value ?? '') }",
            name,
        )

    button = page.get_by_role("button", name="OP", exact=True).last
    button.focus()
    page.keyboard.press("Enter")
    head = page.locator("#runs th", has=button)
    assert head.get_attribute("aria-sort") == "ascending"
    assert [float(one) for one in column("OP")] == sorted(one["op"] for one in results.values())
    page.keyboard.press("Space")
    assert head.get_attribute("aria-sort") == "descending"
    assert [float(one) for one in column("OP")] == sorted((one["op"] for one in results.values()), reverse=True)
    for _ in range(2):
        page.locator("#runs th button", has_text="ΔRG").click()
        assert column("ΔRG")[-4:] == [""] * 4 and "" not in column("ΔRG")[:-4]
    assert head.get_attribute("aria-sort") == "none"


def test_filters_hide_rows_and_say_how_many_are_left(set_file, opened):
    path, _ = set_file
    page = opened(path)
    section = page.locator("section[aria-labelledby=runs-heading]")
    status = section.get_by_role("status")
    assert status.inner_text() == "12 of 12 rows"
    section.get_by_label("method").select_option("leaky")
    assert status.inner_text() == "4 of 12 rows"
    section.get_by_label("Search").fill("LEAKY-2")
    assert status.inner_text() == "1 of 12 rows"
    visible = page.eval_on_selector_all(
        "#runs tbody tr", "rows => rows.filter(one => !one.hidden).map(one => one.cells[0].innerText)"
    )
    assert visible == ["leaky-2"]
    section.get_by_label("method").select_option("all")
    section.get_by_label("Search").fill("nothing like it")
    assert status.inner_text() == "0 of 12 rows"


def test_everything_can_be_reached_and_seen_by_keyboard(run_file, opened):
    """The first stop is the link to the content, which then is on screen; each stop has a visible outline."""
    path, _ = run_file
    page = opened(path)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    box = page.locator(".skip").bounding_box()
    assert box and box["x"] >= 0
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    stops = set()
    for _ in range(25):
        page.keyboard.press("Tab")
        tag, style = page.evaluate("(one => [one.tagName, getComputedStyle(one).outlineStyle])(document.activeElement)")
        stops.add(tag)
        assert tag == "BODY" or style == "solid"
    assert {"DIV", "BUTTON", "SUMMARY"} <= stops


def test_screen_readers_get_names_and_landmarks(run_file, opened):
    path, _ = run_file
    page = opened(path)
    for role, name in (("main", None), ("navigation", "Sections"), ("table", "Capability sets, scored"),
                       ("region", "Verdict"), ("img", "Scores over stages"), ("img", "Change of abilities"),
                       ("columnheader", "C-STANCE"), ("rowheader", "before")):  # fmt: skip
        found = page.get_by_role(role, name=name) if name else page.get_by_role(role)
        assert found.count() >= 1, (role, name)
    unnamed = page.evaluate("[...document.querySelectorAll('input, select, button')].filter(one => "
                            "!one.textContent.trim() && !one.labels?.length && !one.ariaLabel).length")  # fmt: skip
    assert unnamed == 0
    assert page.locator("#matrix .unscored").first.inner_text().strip().endswith("not scored")


def test_print_opens_what_is_folded(run_file, opened):
    path, _ = run_file
    page = opened(path)
    assert page.locator("details:not(.all):not([open])").count() > 0
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not(.all):not([open])").count() == 0
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator("nav").is_visible()
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details:not(.all):not([open])").count() > 0
    assert page.pdf()[:5] == b"%PDF-"


def test_nothing_moves_for_those_who_ask_for_it(run_file, opened):
    path, _ = run_file
    for motion, expected in (("reduce", "auto"), ("no-preference", "smooth")):
        page = opened(path, reduced_motion=motion)
        assert page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == expected


def test_without_script_everything_is_there(run_file, browser):
    path, _ = run_file
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(path.as_uri())
    assert page.locator("#tasks tbody tr").count() == 8 and page.locator("svg").count() == 3
    assert page.locator("details").count() > 3
    context.close()


@pytest.mark.parametrize(
    "answer", ["</script><script>document.title='hit'</script>", "<img src=x onerror=\"document.title='hit'\">"]
)
def test_hostile_answers_do_nothing(answer, tmp_path, opened):
    results = write_run(tmp_path, answer=answer, tasks=TASKS[:2], loss=0.9, rows=6)
    path = tmp_path / "report.html"
    path.write_bytes(run_page(results, tmp_path).encode())
    page = opened(path)
    assert page.title() == tmp_path.name
    assert page.locator(".quote", has_text=answer).count() > 0
    assert page.locator("img").count() == 0


def test_even_an_injected_script_would_not_run(run_file, tmp_path, browser):
    """The policy of the page: scripts other than ours, and pictures, are not loaded."""
    added = "<script>document.title='hit'</script><img src='x.png'><p id='end'>end</p></main>"
    path = tmp_path / "report.html"
    path.write_text(run_file[0].read_text().replace("</main>", added))
    page, said = browser.new_page(), []
    page.on("console", lambda message: said.append(message.text))
    page.goto(path.as_uri())
    assert page.inner_text("#end") == "end" and page.title() != "hit"
    assert len([one for one in said if "Content Security Policy" in one]) == 2
    page.close()

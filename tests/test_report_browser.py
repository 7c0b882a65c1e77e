"""The page in a real browser, where there is one: its script runs under its own policy, nothing is logged, and hostile texts stay texts."""

import os
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import report_files as files

from shiftaddvit.report import write_report
from shiftaddvit.schema import stamped

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync",
)  # fmt: skip
EVIL = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")


def dump(page, profile) -> tuple[str, str]:
    """The document after its script ran, and what the browser logged."""
    command = [BROWSER, *FLAGS, f"--user-data-dir={profile}", "--enable-logging=stderr", "--virtual-time-budget=2000", "--dump-dom", page.as_uri()]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return outcome.stdout, "\n".join(line for line in outcome.stderr.splitlines() if "CONSOLE" in line)


class Titles(HTMLParser):
    """The title and the elements that there are."""

    def __init__(self, text):
        super().__init__()
        self.title, self.tags, self.inside, self.attributes = "", [], False, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.inside = tag == "title" and not self.title
        self.tags.append(tag)
        self.attributes += [(tag, dict(attrs))]

    def handle_data(self, data):
        if self.inside:
            self.title += data

    def handle_endtag(self, tag):
        self.inside = False


def test_the_script_runs_and_the_console_stays_empty(tmp_path):
    page = tmp_path / "page.html"
    write_report([files.results(tmp_path / "results")], page, title="A test")
    document, logged = dump(page, tmp_path / "profile")
    assert logged == ""
    found = Titles(document)
    assert found.title == "A test"
    theme = next(attrs for tag, attrs in found.attributes if attrs.get("id") == "theme")
    assert "hidden" not in theme and theme["aria-label"].startswith("Switch to ")  # shown by the script alone
    assert any("chosen" in attrs.get("class", "") for tag, attrs in found.attributes if tag == "figure")  # the script drew the first layer


def test_hostile_texts_do_not_run(tmp_path):
    folder = tmp_path / "results"
    files.put(folder, "a.json", files.finetune(150, {"name": EVIL}, data=EVIL))
    pictures = [files.dispatch()["pictures"][0] | {"name": EVIL, "label": EVIL, "predicted": EVIL}]
    files.put(folder, "b.json", stamped("dispatch", files.dispatch(EVIL) | {"pictures": pictures}) | {"data": EVIL})
    page = tmp_path / "page.html"
    write_report([folder], page, title="untouched")
    document, logged = dump(page, tmp_path / "profile")
    found = Titles(document)
    assert logged == "" and found.title == "untouched" and "img" not in found.tags


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """A browser under control, where selenium and its driver are installed too."""
    webdriver = pytest.importorskip("selenium.webdriver")
    if shutil.which("chromedriver") is None:
        pytest.skip("no chromedriver is installed")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    running = webdriver.Chrome(service=webdriver.ChromeService(shutil.which("chromedriver")), options=options)
    folder = tmp_path_factory.mktemp("driven")
    page = folder / "page.html"
    write_report([files.results(folder / "results")], page, title="A test")
    running.get(page.as_uri())
    yield running
    running.quit()


def test_a_heading_sorts_and_cells_without_a_number_come_last(driver):
    sort = "return (() => { const t = document.querySelector('#ablation-1-table'); const b = [...t.querySelectorAll('button.sort')].find(b => b.textContent.includes('latency')); b.click();" \
        " const c = b.closest('th').cellIndex; return [b.closest('th').ariaSort, [...t.tBodies[0].rows].map(r => r.cells[c].dataset.value ?? null)]; })()"  # fmt: skip
    for expected in ("ascending", "descending"):
        order, values = driver.execute_script(sort)
        numbers = [float(value) for value in values if value is not None]
        assert order == expected and len(numbers) == 13 and numbers == sorted(numbers, reverse=expected == "descending")
        assert values[: len(numbers)] == [value for value in values if value is not None]


def test_another_layer_redraws_every_map(driver):
    before = driver.execute_script("return document.querySelector('.gallery .to-shift').getAttribute('d')")
    driver.execute_script("document.querySelector('.choice[data-layer=\"1\"]').click()")
    view, now, name = driver.execute_script(
        "const s = document.querySelector('.gallery svg'); return [s.getAttribute('viewBox'), s.querySelector('.to-shift').getAttribute('d'), document.querySelector('.layer-module').textContent]"
    )
    assert view == "0 0 2 2" and name == "stages.1.blocks.0.attn.qkv"
    assert now == "M1 0h1v1h-1zM0 1h1v1h-1z" != before  # digits 1|0110: the first is the class token
    assert driver.execute_script("return document.querySelector('.choice[data-layer=\"1\"]').getAttribute('aria-pressed')") == "true"


def test_the_theme_can_be_switched_and_values_are_told_on_focus(driver):
    colour = "return getComputedStyle(document.body).backgroundColor"
    first = driver.execute_script(colour)
    driver.execute_script("document.getElementById('theme').click()")
    assert driver.execute_script(colour) != first
    told = driver.execute_script(
        "document.querySelector('.mark').focus(); const t = document.getElementById('tip'); return [t.hidden, t.textContent, t.style.left]"
    )
    assert told[0] is False and "top-1" in told[1] and told[2].endswith("px")


def test_a_phone_scrolls_tables_not_the_page(driver):
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True})
    assert driver.execute_script("return document.documentElement.scrollWidth") <= 390
    assert driver.get_log("browser") == []
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_it_loads_within_a_second(driver):
    if os.getloadavg()[0] > 2 * (os.cpu_count() or 1):
        pytest.skip("the machine is busy: times say nothing")
    assert driver.execute_script("return performance.getEntriesByType('navigation')[0].loadEventEnd") < 1000

"""The page in a real browser, as a reader sees and clicks it. Skipped where there is no Chromium with its driver."""

import json
import shutil
import time

import pytest
import torch
from models.networks import torchvision_model
from test_page import EVIL, FAST, made
from torch import nn

import fxzip

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
if BROWSER is None or DRIVER is None:
    pytest.skip("no Chromium with its driver: `apt-get install chromium chromium-driver`", allow_module_level=True)


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,1100"):
        options.add_argument(argument)
    options.binary_location = BROWSER
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield found
    found.quit()


@pytest.fixture
def opened(browser, tmp_path):
    """Opens the page of a zip; what the browser has complained about in the end is an error."""

    def open_page(zipped, **options):
        zipped.report.html(tmp_path / "page.html", **options)
        browser.get_log("browser")
        browser.get((tmp_path / "page.html").as_uri())
        return browser

    yield open_page
    assert browser.get_log("browser") == []
    assert browser.execute_script("return window.hit") is None


def click(browser, box):
    """A click of the mouse on a box of the graph; returns the text of the panel."""
    browser.execute_script(
        "document.getElementById('graph').scrollIntoView({block: 'center', behavior: 'instant'});"
        "fxzip.cy.center(fxzip.cy.getElementById(arguments[0]));",
        box,
    )
    place = browser.execute_script(
        "const cy = fxzip.cy, own = cy.getElementById(arguments[0]);"
        "const box = own.renderedBoundingBox({includeLabels: false});"
        "const r = cy.container().getBoundingClientRect();"
        "return own.isParent() ? [r.left + box.x1 + 5, r.top + (box.y1 + box.y2) / 2]"
        " : [r.left + own.renderedPosition('x'), r.top + own.renderedPosition('y')]",
        box,
    )
    actions = webdriver.ActionChains(browser, duration=0)
    actions.w3c_actions.pointer_action.move_to_location(*map(round, place))
    actions.click().perform()
    time.sleep(0.05)
    return browser.execute_script("return document.getElementById('panel').textContent")


def boxes(browser):
    """Ids of the boxes and frames that are drawn."""
    return set(browser.execute_script("return fxzip.cy.nodes().map((own) => own.id())"))


def number_of(zipped, name):
    return [node.name for node in zipped.graph.nodes].index(name)


LONG = [pytest.param(name, marks=pytest.mark.slow) for name in ("plain", "automatic", "narrowed", "apart", "bert")]


@pytest.mark.parametrize("name", ["evil", "three", "stem", *LONG])
def test_all_nodes_can_be_seen(opened, name):
    zipped = made(name)
    browser = opened(zipped)
    browser.find_element("id", "open").click()
    box = browser.find_element("css selector", "#minor input")
    if box.is_displayed():
        box.click()
    assert {f"n{n}" for n in range(len(zipped.graph.nodes))} <= boxes(browser)
    colours = browser.execute_script(
        "return fxzip.cy.nodes('[!frame]').map((own) => [Number(own.id().slice(1)), own.style('background-color')])"
    )
    parts = browser.execute_script("return fxzip.data.nodes.map((node) => [node.part, node.role])")
    seen = {}
    for number, colour in colours:
        part, role = parts[number]
        if role in ("call", "value") and part != "merge":
            seen.setdefault(part.partition(" ")[2] or part, set()).add(colour)  # a stem has the colour of its head
    assert all(len(own) == 1 for own in seen.values())
    assert len(set.union(*seen.values())) == len(seen)


def test_a_click_shows_what_a_node_holds(opened):
    zipped = made("plain")
    browser = opened(zipped)
    browser.find_element("id", "open").click()
    text = click(browser, f"n{number_of(zipped, 'layer1_0_conv1')}")
    space = zipped.report["spaces"][1]
    assert space["name"] == "layer1.0.conv1.weight"
    for told in (
        "Conv2d, trunk", "modulelayer1.0.conv1", "gives2 × 8 × 8 × 8", "FLOPs147 k", "parameters576",
        f"space {space['name']}", f"kept{space['kept']}", f"correlation{space['correlation']:.3f}",
        *(f"{100 * error:.1f} % in head {k}" for k, error in enumerate(space["error"])),
    ):  # fmt: skip
        assert told in text
    head = next(n for n in zipped.graph.nodes if n.name == "layer2_0_conv1")
    text = click(browser, f"n{number_of(zipped, head.name)}")
    assert "Conv2d, head 0" in text
    assert zipped.report["nodes"][head.name]["stop"]["reason"] in text


def test_stages_open_and_close_at_a_click(opened):
    browser = opened(made("plain"))
    browser.find_element("id", "close").click()
    groups = browser.execute_script("return fxzip.data.groups.map((group) => group.path)")
    stage, before = f"g{groups.index('layer1')}", boxes(browser)
    assert stage in before
    text = click(browser, stage)
    assert "14 nodes, trunk" in text
    assert "layer1.0.conv1.weight" in text
    assert len(boxes(browser)) == len(before) + 2  # its two blocks, in a frame
    click(browser, stage)
    assert boxes(browser) == before


def test_hostile_names_are_text(opened):
    browser = opened(made("evil"))
    assert EVIL in browser.find_element("tag name", "h1").get_property("textContent")
    assert browser.execute_script("return fxzip.data.tasks[0]") == EVIL
    number = browser.execute_script("return fxzip.data.nodes.findIndex((node) => node.part === 'head 0' && node.stop)")
    browser.execute_script("fxzip.reveal(arguments[0])", number)
    assert EVIL in click(browser, f"n{number}")
    assert browser.execute_script("return document.images.length") == 0


def test_hostile_module_names_are_text(opened):
    names = ['a"b', "<script>window['hit']=1</script>", "ünï→", "it's", "class"]

    def model(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.ModuleDict({name: nn.Linear(4, 4) for name in names}), nn.Linear(4, 2))

    class Net(nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.inner, self.out = model(seed)

        def forward(self, x):
            for layer in self.inner.values():
                x = layer(x).relu()
            return self.out(x)

    zipped = fxzip.compile_zip({name: Net(n).eval() for n, name in enumerate(names)}, torch.randn(16, 4), **FAST)
    browser = opened(zipped)
    browser.find_element("id", "open").click()
    data = browser.execute_script("return fxzip.data")
    assert data["tasks"] == names
    for number, node in enumerate(data["nodes"]):
        if node["path"].startswith("inner."):
            assert f"module{node['path']}" in click(browser, f"n{number}")
    for name in names:
        assert name in browser.find_element("tag name", "table").get_property("textContent")


def test_a_search_opens_what_holds_the_node(opened):
    zipped = made("three")
    browser = opened(zipped)
    browser.find_element("id", "close").click()
    name = "layer1_1_conv2"
    assert f"n{number_of(zipped, name)}" not in boxes(browser)
    box = browser.find_element("id", "find")
    box.send_keys(name + "\n")
    assert f"n{number_of(zipped, name)}" in boxes(browser)
    assert name in browser.find_element("id", "panel").get_property("textContent")


def test_nothing_is_loaded(opened):
    browser = opened(made("three"))
    browser.get_log("performance")
    browser.refresh()
    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in sent if m["method"] == "Network.requestWillBeSent"]
    assert [url.partition(":")[0] for url in urls if not url.startswith("data:")] == ["file"]


def test_the_page_of_a_table(browser, tmp_path):
    row = {"method": EVIL, "refit": None, "cost": 1.0, "agreement": 0.9}
    rows = [row | {"until": cut, "cost": cost} for cut, cost in ((EVIL, 1.2), (None, 1.0))]
    fxzip.Table((row | {"method": "side by side"}, *rows), EVIL).html(tmp_path / "table.html", title=EVIL)
    browser.get_log("browser")
    browser.get((tmp_path / "table.html").as_uri())
    assert browser.find_element("tag name", "h1").text.startswith("</script><script>")
    assert len(browser.find_elements("css selector", "tbody tr")) == 3
    marks = browser.find_elements("css selector", "svg circle")
    assert len(marks) == 3
    assert all(mark.is_displayed() for mark in marks)
    assert browser.get_log("browser") == []
    assert browser.execute_script("return window.hit") is None


@pytest.mark.slow
def test_a_thousand_nodes_stay_usable(opened):
    layers = [[nn.Linear(4, 4), nn.ReLU()] for _ in range(260)]
    deep = nn.Sequential(*(layer for pair in layers for layer in pair))
    zipped = fxzip.side_by_side([deep, deep], torch.randn(2, 4))
    assert len(zipped.graph.nodes) > 1000
    start = time.perf_counter()
    browser = opened(zipped)
    assert len(boxes(browser)) < 60
    assert time.perf_counter() - start < 10
    assert browser.execute_script("return fxzip.cy.zoom()") > 0.3
    browser.find_element("id", "open").click()
    assert {f"n{n}" for n in range(len(zipped.graph.nodes))} <= boxes(browser)


@pytest.mark.slow
def test_what_is_too_much_to_draw_stays_closed(opened):
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.stages = nn.ModuleList(nn.ModuleList(nn.Linear(4, 4) for _ in range(24)) for _ in range(4))

        def forward(self, x):
            for stage in self.stages:
                values = [x]
                for layer in stage:
                    values.append(layer(torch.stack(values).sum(0)))
                x = values[-1]
            return x

    zipped = fxzip.side_by_side([Dense(), Dense()], torch.randn(2, 4))
    browser = opened(zipped)
    browser.find_element("id", "open").click()
    panel = browser.find_element("id", "panel")
    assert "too much to draw at once" in panel.get_property("textContent")
    assert len(boxes(browser)) < len(zipped.graph.nodes)
    number = number_of(zipped, "stages_3_23")
    browser.execute_script("fxzip.reveal(arguments[0])", number)
    assert f"n{number}" in boxes(browser)


@pytest.mark.slow
def test_the_page_of_a_resnet50(opened, tmp_path):
    models = [torchvision_model("resnet50", n, num_classes=30 + n) for n in range(2)]
    x = torch.randn(4, 3, 64, 64)
    zipped = fxzip.compile_zip(*models, x[:2], data=[x], progress=False, verify=False, method="permute", refit=None)
    browser = opened(zipped)
    assert (tmp_path / "page.html").stat().st_size < 2_000_000
    assert 10 < len(boxes(browser)) < 40
    browser.find_element("id", "open").click()
    drawn = boxes(browser)
    assert {f"n{n}" for n in range(len(zipped.graph.nodes))} <= drawn

"""The page of a zipped network: its data against the graph and the report, and what is escaped. No browser: see
`test_page_browser.py`."""

import copy
import dataclasses
import hashlib
import json
import pickle
import re
from html.parser import HTMLParser
from importlib.resources import files

import pytest
import torch
from models import randomise
from models.networks import Residual, Segmenter
from torch import nn

import fxzip
from fxzip.rewriting.module import is_unmerge, part_of, sources_of
from fxzip.rewriting.pages.charts import frontier
from fxzip.rewriting.pages.content import Point
from fxzip.rewriting.pages.grouping import MOST_AT_FIRST, MOST_SIDE_BY_SIDE, Placed, grouped
from fxzip.rewriting.report import Report
from fxzip.rewriting.stored_facts import check_facts
from fxzip.tools.pages import write_page
from fxzip.tools.table import FIXED

X = torch.randn(60, 3, 8, 8, generator=torch.Generator().manual_seed(0))
EVIL = """</script><script>window.hit=1</script><img src=x onerror="window.hit=1">"'`&amp; ü→\u2028"""
FAST = {"progress": False, "verify": False, "method": "zip", "refit": None}


def residuals(count=2):
    return [randomise(Residual(4 + k), k) for k in range(count)]


def plain():
    return fxzip.compile_zip(*residuals(), X[:2], data=[X], until="layer1", **FAST)


def evil():
    a, b = residuals()
    return fxzip.compile_zip({EVIL: a, "b": b}, X[:2], data=[X], until="layer2.0", **FAST)


def automatic():
    models = residuals()
    with torch.no_grad():
        for model in models:  # so that inputs differ in their class, and cuts in their agreement
            model.linear.bias.sub_(model(X).mean(0))
    return fxzip.compile_zip(*models, X[:2], data=[X], until="auto", min_agreement=0.3, **FAST)


def three():
    models = [*residuals(), randomise(Segmenter(5), 3)]
    return fxzip.compile_zip(dict(zip("abc", models, strict=True)), X[:2], data=[X], **FAST)


def stem():
    return fxzip.compile_zip(*residuals(), X[:2], data=[X], start="layer2", **FAST)


def narrowed():
    layers = [(nn.Linear(16, 16), nn.ReLU()) for _ in range(3)]
    models = []
    for k in range(2):
        inner = [layer for pair in copy.deepcopy(layers) for layer in pair]
        models.append(randomise(nn.Sequential(nn.Linear(4, 16), nn.ReLU(), *inner, nn.Linear(16, 3)), k))
    x = torch.randn(400, 4, generator=torch.Generator().manual_seed(0))
    return fxzip.compile_zip(
        *models, x, until="3", width="auto", max_cost=1.1, budget="flops", refit="lstsq", progress=False
    )


def apart():
    return fxzip.side_by_side(residuals(), X[:2])


def bert():
    transformers = pytest.importorskip("transformers")
    models = []
    for labels in (3, 2):
        torch.manual_seed(labels)
        config = transformers.BertConfig(
            vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
            max_position_embeddings=10, num_labels=labels,
        )  # fmt: skip
        models.append(transformers.BertForSequenceClassification(config).eval())
    ids = torch.randint(0, 20, (16, 6), generator=torch.Generator().manual_seed(0))
    return fxzip.compile_zip({"topic": models[0], "mood": models[1]}, {"input_ids": ids}, **FAST)


SLOW = {"bert": pytest.mark.slow}
MAKERS = {make.__name__: make for make in (plain, evil, automatic, three, stem, narrowed, apart, bert)}
NAMES = [pytest.param(name, marks=SLOW.get(name, ())) for name in MAKERS]
_made = {}


def made(name):
    """A zip, made once for all tests."""
    if name not in _made:
        _made[name] = MAKERS[name]()
    return _made[name]


class Parser(HTMLParser):
    """The tags of a page, and the text of the scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.text, self.inside = [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "script":
            self.scripts.append((dict(attrs), []))

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        (self.scripts[-1][1] if self.inside == "script" else self.text).append(data)


def page(zipped, tmp_path, **options):
    zipped.report.html(tmp_path / "page.html", **options)
    return Parser((tmp_path / "page.html").read_text(encoding="utf-8"))


def data_of(parsed):
    return next(json.loads("".join(text)) for attrs, text in parsed.scripts if attrs.get("id") == "data")


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", NAMES)
def test_every_node_is_on_the_page_as_the_graph_and_the_report_have_it(name, tmp_path):
    zipped = made(name)
    report = zipped.report
    data = data_of(page(zipped, tmp_path))
    nodes = list(zipped.graph.nodes)
    assert [node["name"] for node in data["nodes"]] == [node.name for node in nodes]
    assert [node["part"] for node in data["nodes"]] == [part_of(node) for node in nodes]
    assert [tuple(node["sources"]) for node in data["nodes"]] == [sources_of(node) for node in nodes]
    for own, node in zip(data["nodes"], nodes, strict=True):
        assert [data["nodes"][i]["name"] for i in own["inputs"]] == [source.name for source in node.all_input_nodes]
        assert (own["role"] == "unmerge") == is_unmerge(node)
    flops, costs = report["flops"], {}
    for own in data["nodes"]:
        costs[own["part"]] = costs.get(own["part"], 0) + own["flops"]
    assert costs.get("trunk", 0) == flops["trunk"]
    for part in ("head", "stem"):
        counted = flops.get(f"{part}s", [0] * report["models"])
        assert [costs.get(f"{part} {k}", 0) for k in range(report["models"])] == counted
    parameters = [own for own in data["nodes"] if own["part"] == "trunk"]
    assert len({own["path"] for own in parameters if own["parameters"]}) <= len(parameters)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.thinned(2)
def test_spaces_are_those_of_the_report(name, tmp_path):
    zipped = made(name)
    data = data_of(page(zipped, tmp_path))
    report = zipped.report
    shared = {space["name"]: space for space in data["spaces"] if space["head"] is None}
    assert sorted(shared) == sorted(space["name"] for space in report["spaces"])
    for known in report["spaces"]:
        own = shared[known["name"]]
        assert own["kept"] == known["kept"]
        assert own["sizes"] == known["sizes"]
        assert own["correlation"] == known["correlation"]
        assert own["errors"] == known["error"]
        assert own["legality"] == known["legality"]
    narrow = [(k, own["name"], own["kept"]) for k, head in enumerate(report.get("narrowed", [])) for own in head]
    assert sorted(narrow) == sorted((s["head"], s["name"], s["kept"]) for s in data["spaces"] if s["head"] is not None)
    for own in data["nodes"]:  # the features of a space lie along an axis of what carries it
        for space in own["spaces"]:
            kept = data["spaces"][space]
            sizes = {kept["kept"], *kept["sizes"]}
            assert own["shape"] is not None
            assert any(axis % size == 0 or size % axis == 0 for axis in own["shape"] for size in sizes)


def test_a_weight_carries_the_space_that_it_names():
    zipped = made("plain")
    spaces = [space["name"] for space in zipped.report["spaces"]]
    nodes = zipped.report["nodes"]
    assert [spaces[s] for s in nodes["layer1_0_conv1"]["spaces"]] == ["layer1.0.conv1.weight"]
    assert [spaces[s] for s in nodes["layer1_0_conv2"]["spaces"]] == ["stem.0.weight"]  # the residual stream
    assert nodes["layer1_0_conv1"]["shape"] == [2, 8, 8, 8]
    assert nodes["layer2_0_conv1"]["spaces"] == []


def test_narrowed_heads_carry_spaces_of_their_own(tmp_path):
    data = data_of(page(made("narrowed"), tmp_path))
    own = [n for n, space in enumerate(data["spaces"]) if space["head"] is not None]
    assert own
    assert all(data["spaces"][n]["errors"][0] > 0 for n in own)
    for n in own:
        carriers = {node["part"] for node in data["nodes"] if n in node["spaces"]}
        assert carriers == {f"head {data['spaces'][n]['head']}"}


@pytest.mark.slow
def test_a_narrowed_network_has_a_page(tmp_path):
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    model = randomise(nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)), 0)
    found = fxzip.narrow(model, x[:2], data=[x], max_cost=0.6, budget="flops", progress=False)
    parsed = page(found, tmp_path)
    data = data_of(parsed)
    assert [node["name"] for node in data["nodes"]] == [node.name for node in found.graph.nodes]
    text = "".join(parsed.text)
    assert found.report.headline in text
    assert "side by side" not in text.partition("The report as text")[0]
    found.save_pretrained(tmp_path / "folder")
    assert data_of(page(fxzip.load(tmp_path / "folder"), tmp_path)) == data


KINDS = {"plain": {"cut", "output"}, "three": {"differ"}, "stem": {"output"}, "apart": set()}


@pytest.mark.parametrize("name", KINDS)
def test_it_says_why_sharing_stops(name, tmp_path):
    data = data_of(page(made(name), tmp_path))
    stops = [node for node in data["nodes"] if node["stop"] is not None]
    assert {node["stop"]["kind"] for node in stops} == KINDS[name]
    assert all(node["part"].startswith("head ") for node in stops)
    for k in range(len(data["tasks"]) if KINDS[name] else 0):
        assert any(node["begins"] and node["stop"] for node in data["nodes"] if node["part"] == f"head {k}")
    for node in stops:
        if node["stop"]["kind"] == "cut":  # all that it reads is shared, or given back to it
            assert node["begins"]


def test_a_barrier_is_marked_with_its_reason(tmp_path):
    class Sorted(nn.Sequential):
        def forward(self, x):
            return self[2](torch.linalg.matrix_exp(torch.diag_embed(self[0](x))).diagonal(dim1=1, dim2=2))

    models = [randomise(Sorted(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, n)), n) for n in (2, 3)]
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    zipped = fxzip.compile_zip(*models, x, **FAST)
    reasons = {node["stop"]["reason"] for node in zipped.report["nodes"].values() if node["stop"]}
    kinds = {node["stop"]["kind"] for node in zipped.report["nodes"].values() if node["stop"]}
    assert kinds & {"barrier", "unmatched"}
    assert reasons <= {*zipped.report["cut"]["ends"].values(), *zipped.report["barriers"]}


@pytest.mark.parametrize("name", ["plain", "three", pytest.param("bert", marks=pytest.mark.slow)])
def test_it_shows_how_good_and_how_fast_the_zip_is(name, tmp_path):
    zipped = made(name)
    text = re.sub(r"\s+", " ", "".join(page(zipped, tmp_path).text))
    report = zipped.report
    assert report.headline in text
    seconds = report["latency"]
    assert f"{seconds['zipped'] / seconds['side_by_side']:.2f}× latency" in text
    heads = [] if report["agreement"] is None else report["agreement"]["heads"]
    for head in heads:
        same = head["same_class"]
        assert (f"off by {100 * head['relative_error']:.1f} %" if same is None else f"{100 * same:.1f} %") in text
    assert bool(heads) == (name != "bert")  # which has no data


def test_it_is_the_same_behind_save_and_load(tmp_path):
    zipped = made("evil")
    zipped.save_pretrained(tmp_path / "folder")
    assert data_of(page(fxzip.load(tmp_path / "folder"), tmp_path)) == data_of(page(zipped, tmp_path))


def test_nodes_added_later_are_there(tmp_path):
    models = residuals()
    sources = fxzip.PerModel([X], [X + 2])
    zipped = fxzip.compile_zip(*models, X[:2], data=sources, joint=True, **FAST)
    names = [node["name"] for node in data_of(page(zipped, tmp_path))["nodes"]]
    assert names == [node.name for node in zipped.graph.nodes]
    assert len(names) > len(zipped.report["nodes"])


def test_a_report_of_an_older_file_has_a_page(tmp_path):
    zipped = copy.deepcopy(made("plain"))
    values = {key: value for key, value in zipped.report.items() if key != "nodes"}
    values["spaces"] = [{k: v for k, v in s.items() if k not in ("sizes", "error")} for s in values["spaces"]]
    zipped.meta["fxzip_report"] = Report(values)
    data = data_of(page(zipped, tmp_path))
    assert len(data["nodes"]) == len(zipped.graph.nodes)
    assert any(group["label"] == "layer1" for group in data["groups"])


FALSE = {
    "a node that is none": lambda v: v["nodes"].update(x=5),
    "no nodes": lambda v: v.update(nodes=[1]),
    "a space that there is not": lambda v: v["nodes"]["stem_0"].update(spaces=[99]),
    "a shape of text": lambda v: v["nodes"]["stem_0"].update(shape=["2"]),
    "a stop without a reason": lambda v: v["nodes"]["stem_0"].update(stop={"kind": "cut"}),
    "an error of text": lambda v: v["spaces"][0].update(error=["0.5"]),
    "no sizes": lambda v: v["spaces"][0].update(sizes=[]),
    "folds that are none": lambda v: v["spaces"][0].update(folded=[1]),
    "a correlation of text": lambda v: v["spaces"][0].update(correlation="0.5"),
}


@pytest.mark.parametrize("change", FALSE)
def test_facts_of_a_file_that_are_none_are_refused(change):
    values = json.loads(json.dumps(made("plain").report.as_dict()))
    check_facts(values)
    FALSE[change](values)
    with pytest.raises(fxzip.LoadError, match="is not as a report has it"):
        check_facts(values)


def test_nothing_is_read_as_html(tmp_path):
    zipped = copy.deepcopy(made("evil"))
    values = json.loads(json.dumps(zipped.report.as_dict()))
    values["notes"] = [EVIL]
    values["spaces"][0]["name"] = values["spaces"][0]["reason"] = EVIL
    for node in values["nodes"].values():
        node["path"] = EVIL if node["path"] else ""
        node["stop"] = {"kind": EVIL, "reason": EVIL}
    zipped.meta["fxzip_report"] = Report(values)
    parsed = page(zipped, tmp_path)
    assert [tag for tag, _ in parsed.tags].count("script") == 4
    assert not any(tag == "img" or any(key.startswith("on") for key in attrs) for tag, attrs in parsed.tags)
    assert "".join(parsed.text).count("window.hit=1") >= 4  # it is shown as it is
    for html in (zipped._repr_html_(), zipped.report._repr_html_()):
        assert not {"script", "img"} & {tag for tag, _ in Parser(html).tags}
        assert EVIL[:20] in "".join(Parser(html).text)


def test_halves_of_surrogate_pairs_can_be_written(tmp_path):
    zipped = copy.deepcopy(made("plain"))
    zipped.meta["fxzip_report"] = zipped.report.noting("a \ud800 half")
    assert page(zipped, tmp_path).tags


def test_it_needs_no_network_and_runs_its_own_scripts_only(tmp_path):
    parsed = page(made("plain"), tmp_path)
    loads = [(tag, key, value) for tag, attrs in parsed.tags for key, value in attrs.items() if key in ("src", "href")]
    assert loads == [("link", "href", "data:,")]
    policy = next(attrs["content"] for _, attrs in parsed.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "'unsafe-inline'" not in policy.split("script-src")[1]
    assert len(re.findall("'sha256-", policy)) == 3


def test_vendored_scripts_are_as_their_table_says():
    vendor = files("fxzip.rewriting.pages") / "vendor"
    table = (vendor / "README.md").read_text()
    for name in ("cytoscape.min.js", "dagre.min.js"):
        assert hashlib.sha256((vendor / name).read_bytes()).hexdigest() in table
        assert "Permission is hereby granted" in (vendor / name.replace(".min.js", ".LICENSE")).read_text()


def test_the_frontier_of_auto_and_of_a_table(tmp_path):
    zipped = made("automatic")
    tried = zipped.report["auto"]["frontier"]
    assert zipped.report["auto"]["until"] in [own["until"] for own in tried]
    assert all(own["cost"] > 0 and len(own["agreement"]) == 2 for own in tried)
    rows = [
        {"method": "side by side", "refit": None, "until": None, "cost": 2.0, "worst": 1.0, "agreement": 1.0},
        {"method": "zip", "refit": None, "until": EVIL, "cost": 1.2, "worst": 0.9, "agreement": 0.95},
        {"method": "zip", "refit": None, "until": None, "cost": 1.0, "worst": 0.8, "agreement": 0.85},
        {"method": "weights", "refit": None, "until": None, "error": "failed"},
    ]
    parsed = page(zipped, tmp_path, table=fxzip.Table(tuple(rows)))
    marks = [attrs for tag, attrs in parsed.tags if tag == "circle"]
    assert len(tried) > 1
    assert len(marks) == 3 + len(tried)
    assert not any(tag == "img" for tag, _ in parsed.tags)


def test_the_plot_measures_agreement_whatever_columns_a_table_has(tmp_path):
    zipped = made("automatic")
    values = dict.fromkeys(FIXED) | {"cost": 1.0, "parameters": 1.0, "latency": 7.0, "agreement": 0.9, "worst": 0.8}
    table = fxzip.Table(({**values, "method": "side by side"}, {**values, "method": "zip", "max_cost": 1.2}))
    parsed = page(zipped, tmp_path, table=table)
    titles = [attrs.get("aria-label") for tag, attrs in parsed.tags if tag == "svg"]
    assert "cost against agreement of the worst head" in titles
    assert [tag for tag, _ in parsed.tags].count("circle") == 2 + len(zipped.report["auto"]["frontier"])
    text = "".join(parsed.text)
    assert "zip until heads, until ≤ 1.2 ×: 0.800 at 1.00" in text
    assert "7.000" not in text


def test_a_report_without_its_network_says_so(tmp_path):
    zipped = made("plain")
    assert zipped.report.html is not None
    alone = pickle.loads(pickle.dumps(zipped.report))
    assert alone == zipped.report
    with pytest.raises(fxzip.InputError, match=r"as `zipped\.report\.html\(path\)`"):
        alone.html(tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_a_pickled_report_does_not_hold_the_network():
    zipped = made("plain")
    assert b"EmittedModule" not in pickle.dumps(zipped.report)
    assert copy.deepcopy(zipped.report).network_ is None


def test_a_page_from_a_folder(tmp_path):
    zipped = made("plain")
    zipped.save_pretrained(tmp_path / "folder")
    write_page(tmp_path / "folder", tmp_path / "folder.html")
    write_page(zipped, tmp_path / "network.html")
    assert (tmp_path / "folder.html").read_bytes() == (tmp_path / "network.html").read_bytes()
    with pytest.raises(fxzip.InputError, match="found one without, such as that of a single task"):
        write_page(zipped.single(0), tmp_path / "none.html")


def test_an_inspection_in_a_notebook():
    found = fxzip.inspect(residuals()[0], X[:2])
    html = found._repr_html_()
    assert all(space.name in html for space in found.spaces)
    assert f"{len(found.cuts)} cuts" in html
    spoilt = dataclasses.replace(found, notes=(EVIL,))._repr_html_()
    assert not {"script", "img"} & {tag for tag, _ in Parser(spoilt).tags}


def test_a_network_in_a_notebook():
    zipped = made("three")
    html = zipped._repr_html_()
    for told in (zipped.report.headline, *zipped.tasks, *(s["name"] for s in zipped.report["spaces"])):
        assert told in html
    single = zipped.single(0)
    assert f"{len(single.graph.nodes)} nodes, without a report" in single._repr_html_()
    bare = copy.deepcopy(zipped)
    del bare.meta["fxzip_report"]
    assert f"{len(bare.graph.nodes)} nodes, without a report" in bare._repr_html_()


def test_several_lines_at_one_cut_share_its_name():
    points = [Point(line, cut, cost, value) for line, value in (("a", 0.9), ("b", 0.5))
              for cut, cost in (("layer1", 1.5), ("heads", 1.0))]  # fmt: skip
    drawn = frontier([Point("", "side by side", 2.0, 1.0), *points])
    assert [(line.name, [(mark.point.label, mark.named) for mark in line.marks]) for line in drawn.lines] == [
        ("a", [("heads", False), ("layer1", False)]), ("b", [("heads", True), ("layer1", True)]),
    ]  # fmt: skip
    many = frontier([Point("a", str(n), float(n), 0.5, chosen=n == 3) for n in range(20)])
    assert [mark.point.label for mark in many.lines[0].marks if mark.named] == ["3"]


def test_few_boxes_are_seen_at_first_and_no_row_is_long():
    nodes = [Placed(n, f"node {n}", "trunk") for n in range(1000)]
    groups, places = grouped(nodes)
    assert len(places) == 1000
    children = [sum(group.parent == n for group in groups) for n in range(-1, len(groups))]
    inside = [sum(place == n for place in places.values()) for n in range(-1, len(groups))]
    assert max(a + b for a, b in zip(children, inside, strict=True)) <= MOST_SIDE_BY_SIDE
    opened = [n for n, group in enumerate(groups) if group.open]
    seen = inside[0] + children[0] + sum(inside[n + 1] + children[n + 1] - 1 for n in opened)
    assert seen <= MOST_AT_FIRST


def test_groups_follow_module_paths():
    paths = ["a.b.conv", "a.b.bn", "a.c.conv", "a.c.bn", "", "d.only"]
    nodes = [Placed(n, path, "trunk", path=tuple(path.split(".")[:-1])) for n, path in enumerate(paths)]
    groups, places = grouped(nodes)
    assert [(group.path, group.parent) for group in groups] == [("a", -1), ("a.b", 0), ("a.c", 0)]
    assert places == {0: 1, 1: 1, 2: 2, 3: 2, 4: -1, 5: -1}

"use strict";
// Draws the graph of a zipped network. Stages are closed or open; what is seen is laid out by dagre, drawn by Cytoscape.
(function () {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { nodes, groups, spaces, tasks, hues } = data;
  const open = groups.map((group) => group.open);
  const members = groups.map(() => []);
  const minor = document.querySelector("#minor input"); // whether what has to do with sizes only is drawn
  document.getElementById("minor").hidden = !nodes.some((node) => node.minor);
  const tone = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const above = (number) => (number < 0 ? [] : [number, ...above(groups[number].parent)]);
  nodes.forEach((node, number) => above(node.group).forEach((group) => members[group].push(number)));

  const count = (number) => {
    for (const [size, unit] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
      if (number >= size * 0.9995) return `${(number / size).toPrecision(3)} ${unit}`;
    }
    return String(number);
  };
  const percent = (share) => `${(100 * share).toFixed(1)} %`;
  const task = (part) => Number(part.split(" ")[1]);
  const called = (part) => {
    if (part === "trunk" && tasks.length === 1) return "the network";
    if (part === "batched") return "all heads";
    const name = tasks[task(part)]; // "head 0" where tasks have no names
    return name === undefined || name === `head ${task(part)}` ? part : `${part.split(" ")[0]} of ${name}`;
  };

  // ---- colours: of the parts of the report; shapes say the same

  function colours(part, role) {
    if (role === "unmerge" || role === "merge" || part === "merge") return [tone("--unmerge"), tone("--unmerge-fill")];
    if (role === "input" || role === "output" || role === "check" || role === "checks") return [tone("--soft"), tone("--faint")];
    if (part === "trunk" || part === "batched") return [tone("--trunk"), tone("--trunk-fill")];
    const hue = hues[task(part)];
    return [`hsl(${hue}, ${tone("--head-s")}, ${tone("--head-l")})`, `hsl(${hue}, ${tone("--fill-s")}, ${tone("--fill-l")})`];
  }
  const expected = (stop) => ["output", "cut", "differ"].includes(stop.kind); // others stand in the way
  const stopping = (node) => node.stop !== null && (node.begins || node.stop.kind === "barrier");

  // ---- what is seen: of every node the outermost closed group that it is in, else itself

  const pen = document.createElement("canvas").getContext("2d");
  const FONT = 'system-ui, "Segoe UI", Roboto, sans-serif';
  function wide(text, size, weight) {
    pen.font = `${weight} ${size}px ${FONT}`;
    return pen.measureText(text).width;
  }
  const short = (text, most) => (text.length > most ? `${text.slice(0, most / 2)}…${text.slice(-most / 2 + 1)}` : text);

  // "layer1.0" rather than "0"
  const full = (group) => (/^\d+$/.test(group.label) ? group.path.split(".").slice(-2).join(".") : group.label);

  function seen(number) {
    const closed = above(nodes[number].group).filter((group) => !open[group]);
    return closed.length ? `g${closed[closed.length - 1]}` : `n${number}`;
  }

  function widthsOf(node) {
    const kept = [...new Set(node.spaces.map((space) => spaces[space].kept))];
    return node.role === "call" && kept.length === 1 && node.spaces.length === 1 ? ` · ${kept[0]}` : "";
  }

  function box(id) {
    const number = Number(id.slice(1));
    const group = id[0] === "g" ? groups[number] : null;
    const node = group ? null : nodes[number];
    const inside = group ? members[number].map((n) => nodes[n]) : [node];
    const stops = Math.max(0, ...inside.filter(stopping).map((own) => (expected(own.stop) ? 1 : 2)));
    const point = group ? inside.find((own) => own.role === group.role) : node.role === "unmerge" || node.role === "merge" ? node : undefined;
    const title = point ? point.role : short(group ? full(group) : node.title, 34);
    const line = point ? point.label : group ? `${inside.length} nodes ▸` : node.label + widthsOf(node);
    const label = title === line ? title : `${title}\n${short(line, 34)}`;
    const role = group ? group.role : node.role;
    const [edge, fill] = colours(group ? group.part : node.part, role);
    const size = Math.max(wide(title, 13, 500), wide(line, 13, 500)) + 26;
    return {
      id, label, edge, fill, stops, stage: group ? 1 : 0, role, parent: parentOf(group ? group.parent : node.group),
      width: Math.round(point ? size + 46 : size), height: point ? 58 : label.includes("\n") ? 42 : 30,
    };
  }
  const parentOf = (group) => (group < 0 ? undefined : `g${group}`);

  function visible() {
    const boxes = new Map();
    const edges = new Map();
    const where = nodes.map((node, number) => (node.minor && !minor.checked ? null : seen(number)));
    where.forEach((id) => id === null || boxes.has(id) || boxes.set(id, box(id)));
    nodes.forEach((node, number) =>
      node.inputs.forEach((source) => {
        const [from, to] = [where[source], where[number]];
        if (from !== to && from !== null && to !== null) edges.set(`${from}>${to}`, { id: `${from}>${to}`, source: from, target: to });
      }));
    const frames = new Map();
    boxes.forEach((own) => {
      for (let id = own.parent; id !== undefined && !frames.has(id); id = frames.get(id).parent) {
        const group = groups[Number(id.slice(1))];
        const [edge] = colours(group.part, group.role);
        frames.set(id, { id, label: full(group), edge, frame: 1, shift: 0, parent: parentOf(group.parent) });
      }
    });
    return { boxes: [...boxes.values()], edges: [...edges.values()], frames: [...frames.values()] };
  }

  // What a layout would cost: how many rows all edges together cross. Beyond this a browser would stand still.
  const MOST = 3000;
  function fits() {
    const { boxes, edges } = visible();
    const before = new Map(boxes.map((own) => [own.id, []]));
    edges.forEach((own) => before.get(own.target).push(own.source));
    const rows = new Map();
    const row = (id) => {
      if (!rows.has(id)) {
        rows.set(id, 0); // stages may read one another
        rows.set(id, before.get(id).reduce((most, source) => Math.max(most, row(source) + 1), 0));
      }
      return rows.get(id);
    };
    boxes.forEach((own) => row(own.id));
    return edges.reduce((total, own) => total + Math.max(1, Math.abs(row(own.target) - row(own.source))), 0) <= MOST;
  }

  // Opens stages, outermost first, as far as all that is drawn fits; returns whether all of them are open.
  function openAll() {
    for (let level = groups.map((_, n) => n).filter((n) => groups[n].parent < 0); level.length; level = groups.map((_, n) => n).filter((n) => level.includes(groups[n].parent))) {
      const closed = level.filter((n) => !open[n]);
      closed.forEach((n) => { open[n] = true; });
      if (!fits()) {
        closed.forEach((n) => { open[n] = false; });
        return false;
      }
    }
    return true;
  }

  // ---- layout: dagre, with its own points for the edges, so that they go round boxes

  function laidOut({ boxes, edges, frames }) {
    const graph = new dagre.graphlib.Graph({ compound: true });
    graph.setGraph({ rankdir: "TB", nodesep: 26, ranksep: 30, edgesep: 14, marginx: 10, marginy: 10 });
    graph.setDefaultEdgeLabel(() => ({}));
    frames.forEach((own) => graph.setNode(own.id, {}));
    // dagre puts what came first to the right: backwards, heads stand in the order of the tasks
    [...boxes].reverse().forEach((own) => graph.setNode(own.id, { width: own.width, height: own.height }));
    [...frames, ...boxes].forEach((own) => own.parent !== undefined && graph.setParent(own.id, own.parent));
    [...edges].reverse().forEach((own) => graph.setEdge(own.source, own.target));
    dagre.layout(graph);
    return graph;
  }

  // A bend as Cytoscape wants it: its share of the way along the line between two boxes, and its distance from it.
  function bends(graph, { source, target }) {
    const [a, b] = [graph.node(source), graph.node(target)];
    const [dx, dy] = [b.x - a.x, b.y - a.y];
    const length = Math.hypot(dx, dy) || 1;
    const inner = graph.edge(source, target).points.slice(1, -1);
    const found = inner.map((p) => ({
      weight: ((p.x - a.x) * dx + (p.y - a.y) * dy) / (length * length),
      distance: ((p.x - a.x) * -dy + (p.y - a.y) * dx) / length,
    }));
    return found.some((own) => Math.abs(own.distance) > 2) ? found : [];
  }

  function elements() {
    const shown = visible();
    const graph = laidOut(shown);
    return [
      ...shown.frames.map((own) => ({ group: "nodes", data: own })),
      ...shown.boxes.map((own) => ({ group: "nodes", data: own, position: { x: graph.node(own.id).x, y: graph.node(own.id).y } })),
      ...shown.edges.map((own) => {
        const found = bends(graph, own);
        const bent = found.length
          ? { bent: 1, weights: found.map((p) => p.weight.toFixed(4)).join(" "), distances: found.map((p) => p.distance.toFixed(1)).join(" ") }
          : {};
        return { group: "edges", data: { ...own, ...bent } };
      }),
    ];
  }

  function style() {
    const [ink, soft, card, stop, trunk] = ["--ink", "--soft", "--card", "--stop", "--trunk"].map(tone);
    return [
      { selector: "node", style: {
        shape: "rectangle", label: "data(label)", "border-color": "data(edge)", "border-width": 1.5, color: ink, "font-size": 13, "font-family": FONT, "text-wrap": "wrap",
        "text-valign": "center", "text-max-width": 400, "line-height": 1.2, "overlay-opacity": 0 } },
      { selector: "node[width]", style: { width: "data(width)", height: "data(height)", "background-color": "data(fill)" } },
      { selector: "node[role = 'input'], node[role = 'output']", style: { shape: "round-rectangle", "corner-radius": 20 } },
      { selector: "node[role = 'unmerge'], node[role = 'merge']", style: { shape: "diamond" } },
      { selector: "node[?stage]", style: { "border-style": "double", "border-width": 4 } },
      { selector: "node[?stops]", style: { "border-style": "dashed", "border-width": 2.5 } },
      { selector: "node[stops = 2]", style: { "border-color": stop } },
      { selector: "node[?frame]", style: {
        shape: "round-rectangle", "background-color": card, "background-opacity": 0.35, "border-width": 1, "border-color": "data(edge)",
        "text-valign": "top", "text-margin-y": -1, "text-margin-x": "data(shift)", color: soft, "font-size": 12, padding: 9 } },
      { selector: "edge", style: {
        width: 1.3, "line-color": soft, "target-arrow-color": soft, "target-arrow-shape": "triangle", "arrow-scale": 0.8,
        "curve-style": "straight", opacity: 0.75, "overlay-opacity": 0 } },
      { selector: "edge[?bent]", style: {
        "curve-style": "round-segments", "segment-weights": "data(weights)", "segment-distances": "data(distances)", "segment-radii": 14,
        "edge-distances": "node-position" } },
      { selector: "node:selected", style: { "border-width": 4, "border-style": "solid", "border-color": trunk } },
      { selector: ".near", style: { "border-width": 3, "border-style": "solid" } },
    ];
  }

  const place = document.getElementById("graph");
  const cy = cytoscape({
    container: place, elements: elements(), style: style(), layout: { name: "preset" }, minZoom: 0.05, maxZoom: 3,
    boxSelectionEnabled: false, autoungrabify: true,
  });

  // Names of open stages stand over the left corner of their frames, out of the way of edges.
  function namesToTheLeft() {
    cy.nodes("[?frame]").forEach((own) => { own.data("shift", wide(own.data("label"), 12, 400) / 2 - own.outerWidth() / 2 + 2); });
  }
  namesToTheLeft();

  // ---- looking around

  function start() {
    const bounds = cy.elements().boundingBox();
    const whole = Math.min((cy.width() - 24) / bounds.w, (cy.height() - 24) / bounds.h);
    const zoom = Math.min(1, Math.max(whole, Math.min((cy.width() - 24) / bounds.w, 0.72)));
    cy.zoom(zoom);
    cy.pan({ x: cy.width() / 2 - zoom * (bounds.x1 + bounds.w / 2), y: zoom > whole ? 12 - zoom * bounds.y1 : cy.height() / 2 - zoom * (bounds.y1 + bounds.h / 2) });
  }

  function redraw(anchor) {
    const held = anchor !== undefined && cy.getElementById(anchor).nonempty() ? cy.getElementById(anchor).renderedPosition() : null;
    cy.batch(() => {
      cy.elements().remove();
      cy.add(elements());
    });
    namesToTheLeft();
    const now = anchor === undefined ? cy.collection() : cy.getElementById(anchor);
    if (held && now.nonempty()) {
      const at = now.renderedPosition();
      cy.panBy({ x: held.x - at.x, y: (now.isParent() ? held.y - at.y + Math.max(0, now.renderedHeight() / 2 - held.y + 30) : held.y - at.y) });
    }
  }

  function reveal(number) {
    above(nodes[number].group).forEach((group) => { open[group] = true; });
    if (!fits()) {
      open.fill(false);
      above(nodes[number].group).forEach((group) => { open[group] = true; });
    }
    minor.checked = minor.checked || nodes[number].minor;
    redraw();
    const found = cy.getElementById(`n${number}`);
    if (cy.zoom() < 0.6) cy.zoom(0.8);
    cy.center(found);
    cy.elements().unselect();
    found.select();
    show(`n${number}`);
  }

  function mark(space) {
    cy.nodes().removeClass("near");
    cy.nodes().filter((own) => {
      const id = own.id();
      const inside = id[0] === "g" ? members[Number(id.slice(1))] : [Number(id.slice(1))];
      return !own.isParent() && inside.some((n) => nodes[n].spaces.includes(space));
    }).addClass("near");
  }

  // ---- the panel; text only, so that no name is ever read as HTML

  const panel = document.getElementById("panel");
  function add(parent, tag, text, kind) {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (kind) made.className = kind;
    parent.append(made);
    return made;
  }
  function prose(parent, text) { // `names` as code
    const parts = text.split("`");
    if (parts.length % 2) parts.forEach((part, n) => add(parent, n % 2 ? "code" : "span", part));
    else parent.append(text);
  }
  function rows(parent, pairs) {
    const list = add(parent, "dl");
    pairs.filter(([, value]) => value !== undefined && value !== "").forEach(([name, value]) => {
      add(list, "dt", name);
      add(list, "dd", value);
    });
  }
  function why(stop) {
    const kinds = {
      barrier: "A call without a rule", unmatched: "Features that cannot be matched", output: "Here the head begins",
      differ: "The networks differ", cut: "The cut", unsound: "Sharing would not be sound",
    };
    const held = add(panel, "div", undefined, expected(stop) ? "why" : "why hard");
    add(held, "b", kinds[stop.kind] || "Not shared");
    held.append(": ");
    prose(held, stop.reason);
  }
  function about(number) {
    const space = spaces[number];
    const names = space.head === null ? tasks : [tasks[space.head]];
    add(panel, "h4", `space ${space.name}`);
    rows(panel, [
      ["had", space.sizes.length === names.length ? space.sizes.map((n, k) => `${n} in ${names[k]}`).join(", ") : space.sizes.join(", ")],
      ["kept", String(space.kept)],
      ["correlation", space.correlation === null ? "not observed" : space.correlation.toFixed(3)],
      ["variance lost", space.errors === null ? "not observed" : space.errors.map((e, k) => `${e === null ? "nothing varies" : percent(e)} in ${names[k]}`).join(", ")],
      ["may be merged", space.legality + (space.reason ? `: ${space.reason}` : "")],
      ["folded into", space.folded.length ? tasks.filter((_, k) => space.folded[k]).join(", ") || "no head" : undefined],
    ]);
  }

  function show(id) {
    panel.replaceChildren();
    const number = Number(id.slice(1));
    if (id[0] === "g") return showGroup(number);
    const node = nodes[number];
    add(panel, "h3", node.name);
    add(panel, "p", `${node.label}, ${called(node.part)}`, "what");
    rows(panel, [
      ["module", node.path], ["gives", node.shape === null ? "no tensor" : node.shape.join(" × ")],
      ["FLOPs", count(node.flops)], ["parameters", count(node.parameters)],
      ["stands for", [...new Set(node.sources)].join(", ")],
    ]);
    if (node.stop !== null) why(node.stop);
    node.spaces.forEach(about);
    if (!node.spaces.length && node.part === "trunk" && node.role === "call") add(panel, "p", "Carries no features that are merged.", "what");
  }

  function showGroup(number) {
    const group = groups[number];
    const inside = members[number].map((n) => nodes[n]);
    const sum = (key) => inside.reduce((total, node) => total + node[key], 0);
    add(panel, "h3", group.path || group.label);
    add(panel, "p", `${inside.length} nodes, ${called(group.part)}`, "what");
    rows(panel, [["FLOPs", count(sum("flops"))], ["parameters", count(sum("parameters"))]]);
    inside.filter(stopping).map((node) => node.stop).filter((stop, n, all) => all.findIndex((s) => s.reason === stop.reason) === n).forEach(why);
    const own = [...new Set(inside.flatMap((node) => node.spaces))];
    own.slice(0, 12).forEach(about);
    if (own.length > 12) add(panel, "p", `… and ${own.length - 12} more spaces`, "what");
  }

  const TOO_MUCH = "All of it open would be too much to draw at once: close other stages to open more.";

  function greet() {
    panel.replaceChildren();
    add(panel, "h3", "The whole network");
    add(panel, "p", `${nodes.length} nodes, ${groups.length} stages`, "what");
    const parts = [...new Set(nodes.map((node) => node.part))];
    rows(panel, parts.map((part) => [called(part), `${count(nodes.filter((n) => n.part === part).reduce((t, n) => t + n.flops, 0))} FLOPs`]));
    nodes.filter(stopping).map((node) => node.stop).filter((stop, n, all) => all.findIndex((s) => s.reason === stop.reason) === n).slice(0, 6).forEach(why);
  }

  cy.on("tap", "node", (event) => {
    const id = event.target.id();
    const number = Number(id.slice(1));
    cy.nodes().removeClass("near");
    show(id);
    if (id[0] === "g") {
      open[number] = !open[number];
      if (open[number] && !fits()) {
        open[number] = false;
        add(panel, "p", TOO_MUCH, "why hard");
      } else redraw(id);
    }
    cy.getElementById(id).select();
  });
  cy.on("tap", (event) => {
    if (event.target === cy) { cy.nodes().removeClass("near"); greet(); }
  });

  // ---- controls

  const press = (id, act) => document.getElementById(id).addEventListener("click", act);
  const zoomBy = (factor) => cy.zoom({ level: cy.zoom() * factor, renderedPosition: { x: cy.width() / 2, y: cy.height() / 2 } });
  press("open", () => {
    const all = openAll();
    redraw();
    cy.fit(undefined, 12);
    greet();
    if (!all) add(panel, "p", TOO_MUCH, "why hard");
  });
  press("close", () => { open.fill(false); redraw(); start(); });
  press("fit", () => cy.fit(undefined, 12));
  press("in", () => zoomBy(1.3));
  press("out", () => zoomBy(1 / 1.3));
  minor.addEventListener("change", () => redraw());
  place.parentElement.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey) event.stopPropagation(); // the page scrolls
  }, { capture: true, passive: true });
  const find = document.getElementById("find");
  nodes.forEach((node) => { const made = document.createElement("option"); made.value = node.name; document.getElementById("names").append(made); });
  find.addEventListener("change", () => {
    const number = nodes.findIndex((node) => node.name === find.value);
    const near = number >= 0 ? number : nodes.findIndex((node) => find.value && (node.name.includes(find.value) || node.path.includes(find.value)));
    if (near >= 0) reveal(near);
  });
  document.querySelectorAll("[data-space]").forEach((row) => {
    const act = () => { panel.replaceChildren(); const n = Number(row.dataset.space); about(n); mark(n); place.scrollIntoView({ behavior: "smooth", block: "nearest" }); };
    row.addEventListener("click", act);
    row.addEventListener("keydown", (event) => { if (event.key === "Enter") act(); });
  });

  function legend() {
    const list = document.getElementById("legend");
    list.replaceChildren();
    const key = (kind, [edge, fill], text) => {
      const item = add(list, "li");
      const own = add(item, "span", undefined, `key ${kind}`);
      own.style.borderColor = edge;
      own.style.backgroundColor = fill;
      item.append(text);
    };
    const parts = [...new Set(nodes.map((node) => node.part))];
    parts.filter((part) => part !== "merge").forEach((part) => key("", colours(part, "call"), called(part)));
    if (nodes.some((node) => node.role === "merge")) key("diamond", colours("merge", "merge"), "merge: features of all stems into those of the trunk");
    if (nodes.some((node) => node.role === "unmerge")) key("diamond", colours("trunk", "unmerge"), "unmerge: a head gets its own features back");
    const stops = nodes.filter(stopping).map((node) => expected(node.stop));
    if (stops.includes(true)) key("stop", [tone("--soft"), "transparent"], "the trunk ends in front of it");
    if (stops.includes(false)) key("stop", [tone("--stop"), "transparent"], "something stands in the way of sharing");
    if (groups.length) key("stage", [tone("--soft"), "transparent"], "a stage, closed");
    key("pill", colours("trunk", "input"), "input, output");
  }

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { legend(); redraw(); cy.style(style()); });
  legend();
  greet();
  start();
  window.fxzip = { cy, data, open, reveal, seen }; // for those who look closer in the console
})();

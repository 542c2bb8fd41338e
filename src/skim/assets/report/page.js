"use strict";
// The page's behaviour. What stands in the text is only ever set as textContent.
(() => {
  const $ = (id) => document.getElementById(id);
  const page = JSON.parse($("page").textContent);
  const { pieces, stride, dense, layers } = page;
  const T = pieces.length, L = layers.length, NOTHING = 127, STEPS = 4;
  const names = ["DSA", "a window", "the oracle"];
  const now = { token: 0, layer: -1, compare: "none", reads: 0 };

  // ---- what the layers read: unpacked when it is first looked at ----

  const unpacked = new Map();

  function layerData(i) {
    if (!unpacked.has(i)) unpacked.set(i, unpack(i));
    return unpacked.get(i);
  }

  async function unpack(i) {
    const packed = Uint8Array.from(atob($(`layer-${i}`).textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
    const buffer = await new Response(stream).arrayBuffer();
    const sections = [], lengths = new DataView(buffer, 0, 28);
    for (let s = 0, at = 28; s < 7; s++) {
      sections.push(new Uint8Array(buffer, at, lengths.getUint32(4 * s, true)));
      at += lengths.getUint32(4 * s, true);
    }
    const [counts, gaps, marks, denseCodes, kept, cells, readCounts] = sections;
    const offsets = new Uint32Array(T + 1), keys = new Uint32Array(marks.length), distances = numbers(gaps);
    for (let t = 0, n = 0; t < T; t++) {
      let key = t;
      for (const last = n + counts[t]; n < last; n++) keys[n] = key -= distances[n];
      offsets[t + 1] = n;
    }
    return { offsets, keys, marks, denseCodes, kept, cells, reads: numbers(readCounts) };
  }

  function numbers(bytes) {
    const found = [];
    for (let i = 0; i < bytes.length; ) {
      let value = 0, shift = 0, byte;
      do { byte = bytes[i++]; value += (byte & 127) * 2 ** shift; shift += 7; } while (byte > 127);
      found.push(value);
    }
    return found;
  }

  const weightOf = (code) => (code >= NOTHING ? 0 : 2 ** (-code / STEPS));

  /** The named keys of query t: key, read, weight, dense; `wanted` are dense attention's best, `missed` the best of them that were not read. */
  function namedKeys(data, t) {
    const found = [];
    for (let n = data.offsets[t]; n < data.offsets[t + 1]; n++) {
      const read = data.marks[n] < 128, code = data.marks[n] & 127;
      const denseCode = dense ? (data.denseCodes[n] + (read ? code : 0)) & 255 : NOTHING;
      found.push({ key: data.keys[n], read, weight: weightOf(code), dense: weightOf(denseCode) });
    }
    const byDense = found.filter((f) => f.dense > 0).sort((a, b) => b.dense - a.dense);
    for (const f of byDense.slice(0, page.wanted)) f.wanted = true;
    for (const f of byDense.filter((f) => !f.read).slice(0, page.missed)) f.missed = true;
    return found;
  }

  function keptAt(data, t) {
    const count = data.kept.length / 3, n = Math.min(count - 1, Math.floor(t / stride));
    return [0, 1, 2].map((pattern) => data.kept[pattern * count + n] / 250);
  }

  // ---- words ----

  const whole = (n) => Math.round(n).toLocaleString("en");
  const percent = (share) => (share >= 0.0995 ? `${(100 * share).toFixed(0)} %` : share >= 0.001 ? `${(100 * share).toFixed(1)} %` : `${Number((100 * share).toPrecision(1))} %`);
  const shown = (piece) => (piece === "" ? "·" : piece.replace(/\r?\n/g, "↵").replace(/[\u0000-\u0008\u000b-\u001f\u007f]/g, "�"));
  const named = (t) => `“${[...shown(pieces[t])].slice(0, 24).join("").trim() || "␣"}”`;

  function element(tag, className, text) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function svg(tag, attributes, text) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text !== undefined) made.textContent = text;
    return made;
  }

  // ---- the text ----

  const box = $("text"), spans = [];

  function writeText() {
    let line = element("p");
    line.setAttribute("role", "presentation");
    const lines = [line];
    pieces.forEach((piece, t) => {
      const span = element("span", piece === "" ? "mark" : "", shown(piece));
      span.id = `t${t}`;
      span.setAttribute("role", "option");
      span.setAttribute("aria-selected", "false");
      if (piece === "") span.setAttribute("aria-label", "rest of the character before");
      spans.push(span);
      line.append(span);
      if (piece.includes("\n") && t + 1 < T) {
        line = line.cloneNode(false);
        lines.push(line);
      }
    });
    box.append(...lines);
  }

  /** Scroll the text, and nothing else, until token t is in sight. */
  function reveal(t, middle) {
    const span = spans[t].getBoundingClientRect(), frame = box.getBoundingClientRect(), slack = 2 * span.height;
    if (middle || span.top < frame.top + slack || span.bottom > frame.bottom - slack) {
      box.scrollTop += span.top - frame.top - frame.height / (middle ? 2 : span.top < frame.top + slack ? 4 : 1.5);
    }
  }

  /** The token nearest below or above token t on the screen, `rows` lines away. */
  function vertical(t, rows) {
    const from = spans[t], x = from.offsetLeft, step = rows > 0 ? 1 : -1;
    let at = t, top = from.offsetTop, left = Math.abs(rows), best = t, distance = Infinity;
    for (at += step; at >= 0 && at < T; at += step) {
      if (Math.abs(spans[at].offsetTop - top) > 4) {
        if (left-- === 0) break;
        top = spans[at].offsetTop;
        distance = Infinity;
      }
      if (left === Math.abs(rows)) continue;
      const away = Math.abs(spans[at].offsetLeft - x);
      if (away < distance) [best, distance] = [at, away];
    }
    return best;
  }

  let lit = [];

  function light(span, className, weight) {
    span.classList.add(className);
    if (weight !== undefined) span.style.setProperty("--weight", weight.toFixed(3));
    lit.push(span);
  }

  function paintText(found) {
    for (const span of lit) {
      span.className = span.textContent === "·" ? "mark" : "";
      span.removeAttribute("style");
      span.setAttribute("aria-selected", "false");
    }
    lit = [];
    const t = now.token, strongest = Math.max(...found.filter((f) => f.read).map((f) => f.weight), 1e-9);
    for (const f of found) {
      if (f.read) light(spans[f.key], "read", Math.cbrt(f.weight / strongest)); // most of the weight often lies on one key
      else light(spans[f.key], f.missed ? "missed" : "passed");
    }
    for (const key of comparedKeys(found)) light(spans[key], "compared");
    light(spans[t], "chosen");
    spans[t].setAttribute("aria-selected", "true");
    box.setAttribute("aria-activedescendant", `t${t}`);
  }

  function comparedKeys(found) {
    if (now.compare === "window") {
      const first = now.token + 1 - now.reads;
      return Array.from({ length: now.token + 1 - first }, (_, i) => first + i);
    }
    return now.compare === "oracle" ? found.filter((f) => f.wanted).map((f) => f.key) : [];
  }

  // ---- the chosen token ----

  function fillList(id, found, figure, share) {
    const list = $(id);
    if (!list) return;
    list.replaceChildren(...(found.length ? found.map((f) => keyItem(f, figure(f), share(f))) : [element("li", "none", "none")]));
  }

  function keyItem(f, figure, share) {
    const item = element("li"), button = element("button"), words = element("bdi", "words"), bar = element("span", "bar");
    const around = (from, to) => [...pieces.slice(Math.max(0, from), to).map(shown).join("")];
    const before = around(f.key - 4, f.key), after = around(f.key + 1, f.key + 6).slice(0, 30).join("");
    const near = before.length > 12 ? before.slice(-12).join("").replace(/^\S+/, "…") : before.join("");
    words.append(near, element("b", "", around(f.key, f.key + 1).slice(0, 40).join("")), after);
    const figures = element("span", "figure");
    const away = now.token - f.key;
    figures.append(element("b", "", figure), ` · ${away ? `${whole(away)} back` : "itself"}${comparison(f)}`);
    bar.style.setProperty("--weight", Math.min(1, share).toFixed(3));
    button.type = "button";
    button.append(words, figures, bar);
    button.addEventListener("click", () => find(f.key));
    item.append(button);
    return item;
  }

  function comparison(f) {
    if (now.compare === "window") return now.token - f.key < now.reads ? " · in the window" : " · beyond the window";
    if (now.compare === "oracle") return f.wanted ? " · oracle too" : "";
    return "";
  }

  function find(key) {
    reveal(key, true);
    spans[key].classList.remove("found");
    void spans[key].offsetWidth; // starts the animation again
    light(spans[key], "found");
  }

  function describe(data, found) {
    const { token: t, reads } = now, [dsa, window, oracle] = keptAt(data, t);
    $("chosen").textContent = `Token ${whole(t + 1)}, ${named(t)}`;
    const all = reads > t, near = stride > 1 ? "about " : "";
    let said = `Layer ${layers[now.layer].number} reads ${all ? `all ${whole(reads)}` : `${whole(reads)} of ${whole(t + 1)}`} keys here`;
    if (!all) said += ` and keeps ${near}${percent(dsa)} of dense attention’s mass`;
    if (!all && now.compare === "window") said += `; a window of ${whole(reads)} keeps ${percent(window)}`;
    if (!all && now.compare === "oracle") said += `; the ${whole(reads)} best keys would keep ${percent(oracle)}`;
    const read = found.filter((f) => f.read).sort((a, b) => b.weight - a.weight), strongest = read.length ? read[0].weight : 1;
    const few = read.length < reads ? ` The ${whole(read.length)} of most weight are marked.` : "";
    $("summary").textContent = `${said}.${few}`;
    fillList("read", read.slice(0, 12), (f) => percent(f.weight), (f) => f.weight / strongest);
    const missed = found.filter((f) => f.missed).sort((a, b) => b.dense - a.dense);
    fillList("missed", missed, (f) => `${percent(f.dense)} lost`, (f) => f.dense / strongest);
    const passed = found.filter((f) => !f.read && f.weight > 0).sort((a, b) => b.weight - a.weight);
    fillList("passed", passed, (f) => `would be ${percent(f.weight)}`, (f) => f.weight / strongest);
    const swatch = $("compared-swatch");
    swatch.hidden = now.compare === "none";
    swatch.textContent = now.compare === "window" ? "in the window" : "the oracle’s best";
  }

  // ---- drawing ----

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

  function rgb(name) {
    const value = colour(name);
    return [1, 3, 5].map((i) => parseInt(value.slice(i, i + 2), 16));
  }

  /** A canvas's context, its pixels fitted to the screen's; sizes in CSS pixels. */
  function fitted(canvas, height) {
    const width = canvas.clientWidth, ratio = devicePixelRatio || 1;
    if (height) canvas.style.height = `${height}px`;
    const tall = height || canvas.clientHeight;
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(tall * ratio)) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(tall * ratio);
    }
    const context = canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, tall);
    return [context, width, tall];
  }

  function drawStrip(found) {
    const [context, width, height] = fitted($("strip")), x = (t) => ((t + 0.5) / T) * width, base = height - 8;
    context.fillStyle = colour("line");
    context.fillRect(0, base, width, 1);
    if (now.compare === "window") {
      context.fillStyle = colour("compared");
      const first = now.token + 1 - now.reads;
      context.fillRect(x(first), base, Math.max(2, x(now.token) - x(first)), 3);
    }
    const strongest = Math.max(...found.map((f) => (f.read ? f.weight : 0)), 1e-9);
    for (const f of found) {
      const tall = f.read ? 3 + (base - 3) * Math.sqrt(f.weight / strongest) : 4;
      context.fillStyle = colour(f.read ? "dsa" : f.missed ? "missed" : "passed");
      context.fillRect(x(f.key) - 1, base - tall, 2, tall);
    }
    context.fillStyle = colour("ink");
    context.fillRect(x(now.token) - 1, 0, 2, base);
    context.fillStyle = colour("soft");
    const first = (box.scrollTop / box.scrollHeight) * width;
    context.fillRect(first, height - 3, Math.max(6, (box.clientHeight / box.scrollHeight) * width), 3);
  }

  const view = { x: 0, y: 0, size: T }; // the part of the map that is seen, in tokens
  const minimap = { layer: -1, dark: null, canvas: document.createElement("canvas") };

  function mapImage(data) {
    const dark = colour("ground");
    if (minimap.layer === now.layer && minimap.dark === dark) return minimap.canvas;
    Object.assign(minimap, { layer: now.layer, dark });
    const C = Math.ceil(T / page.cell), image = new ImageData(C, C), ink = rgb("ink");
    for (let row = 0, n = 0; row < C; row++) {
      for (let column = 0; column <= row; column++, n++) {
        image.data.set([...ink, 4 * data.cells[n]], 4 * (row * C + column));
      }
    }
    minimap.canvas.width = minimap.canvas.height = C;
    minimap.canvas.getContext("2d").putImageData(image, 0, 0);
    return minimap.canvas;
  }

  function drawMap(data) {
    const canvas = $("map"), [context, width] = fitted(canvas), scale = width / view.size;
    const place = (t, from) => (t - from) * scale;
    context.imageSmoothingEnabled = false;
    const C = Math.ceil(T / page.cell), close = scale >= 2;
    context.globalAlpha = close ? 0.15 : 1;
    context.drawImage(mapImage(data), place(0, view.x), place(0, view.y), C * page.cell * scale, C * page.cell * scale);
    context.globalAlpha = 1;
    if (close) {
      const [read, passed, missed] = ["dsa", "passed", "missed"].map(colour);
      for (let t = Math.max(0, Math.floor(view.y)); t < Math.min(T, view.y + view.size); t++) {
        for (const f of namedKeys(data, t)) {
          context.globalAlpha = f.read ? 0.25 + 0.75 * Math.min(1, Math.sqrt(f.weight * 8)) : 0.6;
          context.fillStyle = f.read ? read : f.missed ? missed : passed;
          context.fillRect(place(f.key, view.x), place(t, view.y), Math.max(1, scale - 1), Math.max(1, scale - 1));
        }
      }
      context.globalAlpha = 1;
    }
    context.fillStyle = colour("focus");
    context.fillRect(0, place(now.token, view.y), Math.max(0, place(now.token + 1, view.x)), Math.max(1.5, Math.min(3, scale / 4)));
    canvas.classList.toggle("zoomed", view.size < T);
    canvas.setAttribute("aria-label", `Queries ${whole(view.y + 1)} to ${whole(Math.min(T, view.y + view.size))} by keys ${whole(view.x + 1)} to ${whole(Math.min(T, view.x + view.size))} of layer ${layers[now.layer].number}`);
  }

  function look(x, y, size) {
    view.size = Math.min(T, Math.max(Math.min(T, 24), size));
    view.x = Math.min(T - view.size, Math.max(0, x));
    view.y = Math.min(T - view.size, Math.max(0, y));
    draw("map");
  }

  /** Zoom by a factor, keeping the point at (across, down), shares of the canvas, where it is. */
  function zoom(factor, across = 0.5, down = 0.5) {
    const size = Math.min(T, Math.max(Math.min(T, 24), view.size * factor));
    look(view.x + across * (view.size - size), view.y + down * (view.size - size), size);
  }

  /** A table of numbers (or null) as colours, from none at `low` to the whole colour at `high`; row `mark` is framed. */
  function drawHeat(canvas, rows, [low, high], name, height, mark) {
    const [context, width, tall] = fitted(canvas, height), [filled, ink] = [rgb(name), colour("ink")];
    const w = width / rows[0].length, h = tall / rows.length;
    rows.forEach((row, i) => row.forEach((value, j) => {
      if (value === null) return;
      context.fillStyle = `rgba(${filled.join()},${Math.max(0, Math.min(1, (value - low) / (high - low)))})`;
      context.fillRect(j * w, i * h, w + 0.5, h + 0.5);
    }));
    context.strokeStyle = ink;
    context.strokeRect(0.5, mark * h + 0.5, width - 1, Math.max(1, h - 1));
  }

  /** An empty plot, drawn in CSS pixels; its width. */
  function cleared(plot) {
    plot.setAttribute("viewBox", `0 0 ${plot.clientWidth} ${plot.clientHeight}`);
    plot.replaceChildren();
    return plot.clientWidth;
  }

  function drawKeptLine() {
    const plot = $("kept-line"), bins = layers[now.layer].bins, left = 46, right = cleared(plot) - 12, bottom = 205, top = 34;
    const values = bins.flat().filter((v) => v !== null), low = values.length ? Math.floor(Math.min(...values, 0.95) * 10) / 10 : 0;
    const x = (i) => left + ((i + 0.5) / bins[0].length) * (right - left), y = (v) => bottom - ((v - low) / (1 - low)) * (bottom - top);
    const made = [];
    for (const level of [low, (1 + low) / 2, 1]) {
      made.push(svg("line", { class: "axis", x1: left, x2: right, y1: y(level), y2: y(level) }), svg("text", { x: left - 6, y: y(level) + 4, "text-anchor": "end" }, `${Math.round(100 * level)} %`));
    }
    for (const [share, anchor] of [[0, "start"], [0.5, "middle"], [1, "end"]]) {
      made.push(svg("text", { x: left + share * (right - left), y: bottom + 20, "text-anchor": anchor }, whole(share * T)));
    }
    const colours = ["dsa", "compared", "passed"], dashes = ["none", "7 4", "2 4"];
    bins.forEach((line, p) => {
      const points = line.map((v, i) => (v === null ? null : `${x(i).toFixed(1)},${y(v).toFixed(1)}`)).filter(Boolean);
      made.push(svg("polyline", { class: "line", points: points.join(" "), stroke: colour(colours[p]), "stroke-dasharray": dashes[p] }));
      const at = [0, 80, 190][p];
      made.push(svg("line", { class: "line", x1: at, x2: at + 26, y1: 12, y2: 12, stroke: colour(colours[p]), "stroke-dasharray": dashes[p] }), svg("text", { x: at + 32, y: 16 }, names[p]));
    });
    plot.append(...made);
  }

  function drawQuality() {
    const plot = $("quality"), lines = page.quality;
    if (!plot) return;
    const left = 76, right = cleared(plot) - 12, bottom = 205, top = 28 + 20 * Math.ceil(lines.length / 3);
    const budgets = page.budgets, all = lines.flatMap((line) => line.points.flatMap(([, mean, low, high]) => [mean, low ?? mean, high ?? mean]));
    const bend = (v) => Math.sign(v) * Math.log1p(Math.abs(v)), [least, most] = [Math.min(0, ...all.map(bend)), Math.max(...all.map(bend), 0.1)];
    const x = (i) => left + (budgets.length > 1 ? i / (budgets.length - 1) : 0.5) * (right - left), y = (v) => bottom - ((bend(v) - least) / (most - least)) * (bottom - top);
    const made = [];
    for (const tick of [0, 1, 10, 100, 1000, 10000].filter((v) => bend(v) <= most)) {
      made.push(svg("line", { class: "axis", x1: left - 10, x2: right, y1: y(tick), y2: y(tick) }), svg("text", { x: left - 16, y: y(tick) + 4, "text-anchor": "end" }, `+${tick} %`));
    }
    budgets.forEach((count, i) => made.push(svg("text", { x: x(i), y: bottom + 22, "text-anchor": i === 0 && budgets.length > 1 ? "start" : i === budgets.length - 1 && i ? "end" : "middle" }, `${whole(count)} keys`)));
    const colours = ["dsa", "compared", "passed", "missed", "soft", "focus"];
    lines.forEach((line, p) => {
      const stroke = colour(colours[p % colours.length]), dash = p < 1 ? "none" : `${2 + 2 * p} 3`, at = 105 * (p % 3), line0 = 14 + 20 * Math.floor(p / 3);
      made.push(svg("polyline", { class: "line", points: line.points.map(([b, mean]) => `${x(budgets.indexOf(b))},${y(mean)}`).join(" "), stroke, "stroke-dasharray": dash }));
      for (const [b, mean, low, high] of line.points) {
        const at = x(budgets.indexOf(b));
        if (low !== null) made.push(svg("line", { class: "line", x1: at, x2: at, y1: y(low), y2: y(high), stroke }));
        made.push(svg("circle", { cx: at, cy: y(mean), r: 4, fill: stroke }));
      }
      made.push(svg("line", { class: "line", x1: at, x2: at + 22, y1: line0, y2: line0, stroke, "stroke-dasharray": dash }), svg("text", { x: at + 27, y: line0 + 4 }, line.pattern));
    });
    plot.append(...made);
  }

  const closest = (i) => page.agreement[i].reduce((best, v, j) => (j !== i && v !== null && (best < 0 || v > page.agreement[i][best]) ? j : best), -1);

  function sayAgreement() {
    const i = now.layer, j = closest(i), { number, neighbours } = layers[i];
    const share = (value) => (value === null ? "–" : percent(value));
    const said = j < 0 ? "" : `Of the keys that layer ${number} reads, layer ${layers[j].number} reads ${percent(page.agreement[i][j])} too, more than any other; by chance it would be ${percent(page.chance)}. `;
    $("agreement-says").textContent = `${said}A query reads ${share(neighbours)} of its keys again from the query before.${neighbours === null ? " No query here sees more keys than it may read." : ""}`;
  }

  function writeTable() {
    const share = (value) => (value === null ? "–" : percent(value));
    $("layers").tBodies[0].append(...layers.map((layer, i) => {
      const row = element("tr"), head = element("th"), button = element("button", "", layer.number), j = closest(i);
      head.scope = "row";
      button.type = "button";
      button.setAttribute("aria-label", `Show layer ${layer.number}`);
      button.addEventListener("click", () => pick(now.token, i));
      head.append(button);
      const cells = [whole(layer.reads), ...layer.kept.map(share), share(layer.neighbours), j < 0 ? "–" : `${layers[j].number} (${percent(page.agreement[i][j])})`];
      row.append(head, ...cells.map((cell) => element("td", "", cell)));
      return row;
    }));
  }

  // ---- what happens ----

  let wanted = new Set(), frame = 0;

  /** Draw parts of the page ("token", "layer", "map"), together, before the next frame. */
  function draw(...parts) {
    parts.forEach((part) => wanted.add(part));
    if (!frame) frame = requestAnimationFrame(drawWanted);
  }

  async function drawWanted() {
    const parts = wanted, layer = now.layer;
    [wanted, frame] = [new Set(), 0];
    const data = await layerData(layer);
    if (layer !== now.layer) return; // another one was picked meanwhile, and drawing it is on its way
    now.reads = data.reads[now.token];
    if (parts.has("layer")) {
      for (const place of document.querySelectorAll(".layer-number")) place.textContent = layers[layer].number;
      drawKeptLine();
      drawHeat($("kept-map"), layers.map((one) => one.bins[0]), [1, page.least], "missed", Math.max(120, 8 * L), layer);
      drawHeat($("agreement"), page.agreement, [page.chance, 1], "compared", $("agreement").clientWidth, layer);
      sayAgreement();
      [...$("layers").tBodies[0].rows].forEach((row, i) => row.setAttribute("aria-current", i === layer));
    }
    if (parts.has("token")) {
      const found = namedKeys(data, now.token);
      paintText(found);
      describe(data, found);
      drawStrip(found);
    } else if (parts.has("strip")) drawStrip(namedKeys(data, now.token));
    drawMap(data);
    document.documentElement.dataset.shown = `${now.layer}:${now.token}:${now.compare}`;
  }

  function pick(token, layer = now.layer, show = true) {
    const changed = layer !== now.layer;
    now.token = Math.min(T - 1, Math.max(0, token));
    now.layer = Math.min(L - 1, Math.max(0, layer));
    $("layer").value = now.layer;
    $("layer").setAttribute("aria-valuetext", `layer ${layers[now.layer].number}`);
    $("layer-number").textContent = layers[now.layer].number;
    if (show) reveal(now.token, false);
    draw("token", ...(changed ? ["layer"] : []));
  }

  const textKeys = {
    ArrowLeft: () => pick(now.token - 1), ArrowRight: () => pick(now.token + 1),
    ArrowUp: (shift) => (shift ? pick(now.token, now.layer + 1) : pick(vertical(now.token, -1))),
    ArrowDown: (shift) => (shift ? pick(now.token, now.layer - 1) : pick(vertical(now.token, 1))),
    PageUp: () => pick(vertical(now.token, -10)), PageDown: () => pick(vertical(now.token, 10)),
    Home: () => pick(0), End: () => pick(T - 1),
  };
  const mapKeys = {
    "+": () => zoom(0.5), "=": () => zoom(0.5), "-": () => zoom(2), "0": () => look(0, 0, T),
    ArrowLeft: () => look(view.x - view.size / 8, view.y, view.size), ArrowRight: () => look(view.x + view.size / 8, view.y, view.size),
    ArrowUp: () => look(view.x, view.y - view.size / 8, view.size), ArrowDown: () => look(view.x, view.y + view.size / 8, view.size),
  };

  function onKeys(target, keys) {
    target.addEventListener("keydown", (event) => {
      if (!keys[event.key] || event.ctrlKey || event.altKey || event.metaKey) return;
      event.preventDefault();
      keys[event.key](event.shiftKey);
    });
  }

  /** Where an event is in a canvas, as shares of its width and height. */
  function within(canvas, event) {
    const frame = canvas.getBoundingClientRect(), share = (value) => Math.min(0.9999, Math.max(0, value));
    return [share((event.clientX - frame.left) / frame.width), share((event.clientY - frame.top) / frame.height)];
  }

  function listenToMap() {
    const map = $("map");
    let drag = null;
    const at = (event) => {
      const [across, down] = within(map, event);
      return [Math.floor(view.x + across * view.size), Math.floor(view.y + down * view.size)].map((t) => Math.min(T - 1, t));
    };
    map.addEventListener("pointerdown", (event) => { drag = { x: event.clientX, y: event.clientY, from: { ...view }, moved: false }; });
    map.addEventListener("pointermove", (event) => {
      const [key, query] = at(event);
      $("map-place").textContent = key > query ? "" : `query ${whole(query + 1)} ${named(query)}, key ${whole(key + 1)} ${named(key)}`;
      if (!drag) return;
      const dx = event.clientX - drag.x, dy = event.clientY - drag.y;
      if (!drag.moved && Math.abs(dx) + Math.abs(dy) < 5) return;
      if (!drag.moved) map.setPointerCapture(event.pointerId);
      drag.moved = true;
      const scale = drag.from.size / map.clientWidth;
      look(drag.from.x - dx * scale, drag.from.y - dy * scale, view.size);
    });
    map.addEventListener("pointerup", (event) => {
      if (drag && !drag.moved) pick(at(event)[1]);
      drag = null;
    });
    map.addEventListener("pointercancel", () => { drag = null; });
    map.addEventListener("wheel", (event) => {
      if (document.activeElement !== map) return;
      event.preventDefault();
      zoom(event.deltaY < 0 ? 0.8 : 1.25, ...within(map, event));
    }, { passive: false });
    onKeys(map, mapKeys);
    $("zoom-in").addEventListener("click", () => zoom(0.5));
    $("zoom-out").addEventListener("click", () => zoom(2));
    $("zoom-all").addEventListener("click", () => look(0, 0, T));
    $("zoom-here").addEventListener("click", () => { const size = Math.min(T, 96); look(now.token + 1 - size, now.token - size / 2, size); });
  }

  function listenToHeat(id, columns, say, go) {
    const canvas = $(id), at = (event) => {
      const [across, down] = within(canvas, event);
      return [Math.floor(down * L), Math.floor(across * columns)];
    };
    canvas.addEventListener("pointermove", (event) => { $(`${id.split("-")[0]}-place`).textContent = say(...at(event)); });
    canvas.addEventListener("click", (event) => go(...at(event)));
  }

  function listen() {
    box.addEventListener("click", (event) => {
      const span = event.target.closest("#text span");
      if (span) pick(Number(span.id.slice(1)), now.layer, false);
    });
    onKeys(box, textKeys);
    box.addEventListener("scroll", () => draw("strip"), { passive: true });
    $("strip").addEventListener("click", (event) => {
      const [across] = within($("strip"), event);
      reveal(Math.floor(across * T), true);
    });
    $("layer").addEventListener("input", () => pick(now.token, Number($("layer").value), false));
    $("compare").addEventListener("change", () => { now.compare = $("compare").value; draw("token"); });
    $("back").addEventListener("click", () => pick(now.token - 1));
    $("on").addEventListener("click", () => pick(now.token + 1));
    listenToMap();
    const columns = layers[0].bins[0].length;
    const binned = (column) => Math.floor(((column + 0.5) / columns) * T);
    listenToHeat("kept-map", columns, (row, column) => {
      const value = layers[row].bins[0][column];
      return `layer ${layers[row].number}, around token ${whole(binned(column))}: ${value === null ? "every key is read" : `${percent(1 - value)} lost`}`;
    }, (row, column) => pick(binned(column), row));
    listenToHeat("agreement", L, (row, column) => {
      const value = page.agreement[row][column];
      return value === null ? "" : `of layer ${layers[row].number}’s keys layer ${layers[column].number} reads ${percent(value)}`;
    }, (row) => pick(now.token, row));
    const again = () => { drawQuality(); draw("token", "layer"); };
    new ResizeObserver(again).observe(document.body);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
  }

  writeText();
  writeTable();
  listen();
  drawQuality();

  pick(Math.min(T - 1, page.first), Math.floor(L / 2));
})();

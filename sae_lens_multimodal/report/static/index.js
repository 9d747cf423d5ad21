// The index: search, filters, sorting, grid and table; the address keeps what was chosen.
"use strict";

(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const features = data.features;
  const scoreNames = data.scores;
  const $ = (id) => document.getElementById(id);
  const PAGE = 60;
  const DASH = "–";

  // Numbers as the pages spell them.
  const percent = (value) => {
    if (value === null) return DASH;
    const p = 100 * value;
    if (p === 0 || p >= 9.95) return `${p.toFixed(0)} %`;
    return `${String(Number(p.toPrecision(2)))} %`;
  };
  const number = (value) => (value === null ? DASH : String(Number(value.toPrecision(3))));
  const score = (value) => (value === undefined || value === null ? DASH : value.toFixed(2).replace(/^(-?)0\./, "$1."));

  for (const feature of features) {
    feature.words = [feature.index, feature.label, feature.explanation, ...feature.tokens, ...feature.outputs]
      .join("\n").toLowerCase();
  }

  // ---- what was chosen, and the address that keeps it

  const initial = { q: "", modality: "", sort: data.sort, reverse: "", view: "", from: "0", to: "100" };
  for (const name of scoreNames) initial[`least:${name}`] = "0";
  const state = { ...initial };
  let shown = PAGE;

  const readHash = () => {
    const given = new URLSearchParams(location.hash.slice(1));
    for (const key of Object.keys(initial)) state[key] = given.get(key) ?? initial[key];
    if (!(state.sort in keys)) state.sort = initial.sort;
  };
  const writeHash = () => {
    const chosen = new URLSearchParams();
    for (const [key, value] of Object.entries(state)) if (value !== initial[key]) chosen.set(key, value);
    const hash = chosen.size ? `#${chosen}` : "";
    history.replaceState(null, "", hash || location.pathname + location.search);
    try { sessionStorage.setItem("index-hash", hash); } catch { /* refused to pages from disk by some browsers */ }
  };

  // ---- density sliders run over the logarithm of what there is

  const densities = features.map((feature) => feature.density).filter((value) => value > 0);
  const lowest = Math.log10(densities.reduce((a, b) => Math.min(a, b), 1));
  const highest = Math.log10(densities.reduce((a, b) => Math.max(a, b), 10 ** lowest));
  const densityAt = (position) => 10 ** (lowest + ((highest - lowest) * Number(position)) / 100);

  // ---- choosing and ordering

  const fits = (feature, words) => {
    if (state.modality && feature.modality !== state.modality) return false;
    if (state.from !== "0" && feature.density < densityAt(state.from) * 0.9999) return false;
    if (state.to !== "100" && feature.density > densityAt(state.to) * 1.0001) return false;
    for (const name of scoreNames) {
      const least = Number(state[`least:${name}`]);
      if (least > 0 && !((feature.scores[name]?.value ?? -1) >= least / 100)) return false;
    }
    return words.every((word) => feature.words.includes(word));
  };

  const keys = {
    index: (feature) => feature.index,
    density: (feature) => feature.density,
    image: (feature) => feature.share,
    max: (feature) => feature.max,
    label: (feature) => (feature.named ? feature.label.toLowerCase() : null),
  };
  for (const name of scoreNames) {
    keys[`score:${name}`] = (feature) => feature.scores[name]?.value ?? null;
    keys[`lift:${name}`] = (feature) => {
      const found = feature.scores[name];
      return found && found.value !== null && found.control !== null ? found.value - found.control : null;
    };
  }
  const rising = (sort) => sort === "index" || sort === "label";

  const chosen = () => {
    const words = state.q.toLowerCase().split(/\s+/).filter(Boolean);
    const key = keys[state.sort];
    const sign = (rising(state.sort) ? 1 : -1) * (state.reverse ? -1 : 1);
    return features.filter((feature) => fits(feature, words)).sort((a, b) => {
      const x = key(a), y = key(b);
      if (x === null || y === null) return (x === null) - (y === null) || a.index - b.index;
      return (x < y ? -sign : x > y ? sign : 0) || a.index - b.index;
    });
  };

  // ---- drawing the list

  const element = (tag, className, text) => {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const image = (url) => {
    const made = element("img");
    made.src = url;
    made.alt = "";
    made.loading = "lazy";
    made.decoding = "async";
    return made;
  };
  const snippet = ([before, token, after]) => {
    const made = element("span", "snippet");
    const left = element("span", "before");
    left.append(element("bdi", "", before));
    made.append(left, element("mark", "", token), element("span", "after", after));
    return made;
  };

  const card = (feature) => {
    const made = $("card-template").content.cloneNode(true);
    const find = (name) => made.querySelector(`.${name}`);
    made.querySelector("a").href = feature.url;
    const strip = find("strip");
    if (feature.thumbs.length) strip.append(...feature.thumbs.map(image));
    else if (feature.snippets.length) { strip.classList.add("words"); strip.append(...feature.snippets.map(snippet)); }
    else strip.classList.add("nothing");
    find("number").textContent = feature.index;
    const balance = find("balance");
    if (feature.share === null) balance.remove();
    else {
      balance.style.setProperty("--v", feature.share);
      balance.setAttribute("aria-label", `${percent(feature.share)} image, ${percent(1 - feature.share)} text`);
      balance.title = "from text (left) to image (right)";
    }
    find("label").textContent = feature.named ? feature.label : "not explained yet";
    find("label").classList.toggle("unnamed", !feature.named);
    const figures = find("figures");
    const figure = (name, value, control) => {
      const part = element("span", "", `${name} `);
      part.append(element("b", "", value));
      if (control !== undefined) part.append(` (${control})`);
      figures.append(part);
    };
    figure("density", percent(feature.density));
    for (const name of scoreNames) {
      const found = feature.scores[name];
      if (found) figure(name, score(found.value), found.control === null ? undefined : score(found.control));
    }
    return made;
  };

  const withControl = (found) => {
    const made = element("span", "", score(found?.value));
    if (found && found.control !== null) made.append(element("small", "", `(${score(found.control)})`));
    return made;
  };
  const columns = [
    { name: "", key: null, cell: (feature) => { const box = element("div"); box.append(...feature.thumbs.slice(0, 3).map(image)); return box; }, className: "thumb" },
    { name: "number", key: "index", cell: (feature) => String(feature.index), className: "numeric" },
    { name: "feature", key: "label", cell: (feature) => { const link = element("a", feature.named ? "" : "quiet", feature.named ? feature.label : `feature ${feature.index}`); link.href = feature.url; return link; }, className: "name" },
    { name: "image share", key: "image", cell: (feature) => percent(feature.share), className: "numeric" },
    { name: "density", key: "density", cell: (feature) => percent(feature.density), className: "numeric" },
    { name: "strongest", key: "max", cell: (feature) => number(feature.max), className: "numeric" },
    ...scoreNames.map((name) => ({ name, key: `score:${name}`, cell: (feature) => withControl(feature.scores[name]), className: "numeric" })),
  ];

  const tableHead = () => {
    $("table-head").replaceChildren(...columns.map((column) => {
      const head = element("th", column.className);
      head.scope = "col";
      if (column.key === null) return head;
      const button = element("button", "", column.name);
      button.type = "button";
      if (state.sort === column.key) {
        const up = rising(column.key) !== Boolean(state.reverse);
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        button.append(up ? " ↑" : " ↓");
      }
      button.addEventListener("click", () => {
        state.reverse = state.sort === column.key && !state.reverse ? "1" : "";
        state.sort = column.key;
        update();
      });
      head.append(button);
      return head;
    }));
  };
  const tableRow = (feature) => {
    const row = element("tr");
    row.append(...columns.map((column) => {
      const cell = element("td", column.className);
      cell.dataset.name = column.name;
      cell.append(column.cell(feature));
      return cell;
    }));
    return row;
  };

  let current = [];
  const draw = () => {
    const table = state.view === "table";
    const part = current.slice(0, shown);
    $("cards").hidden = table;
    $("table-view").hidden = !table || !current.length;
    $("cards").replaceChildren(...(table ? [] : part.map(card)));
    if (table) tableHead();
    $("rows").replaceChildren(...(table ? part.map(tableRow) : []));
    $("empty").hidden = current.length > 0;
    $("further").hidden = current.length <= shown;
    $("further").textContent = `Show ${Math.min(PAGE, current.length - shown)} more of ${current.length}`;
    $("tally").textContent = current.length === features.length
      ? `${features.length} features` : `${current.length} of ${features.length} features`;
  };

  // ---- the controls

  const showControls = () => {
    $("q").value = state.q;
    for (const name of ["modality", "view"]) {
      for (const input of document.querySelectorAll(`input[name=${name}]`)) input.checked = input.value === state[name];
    }
    $("sort").value = state.sort;
    $("direction").textContent = rising(state.sort) !== Boolean(state.reverse) ? "↑" : "↓";
    $("density-min").value = state.from;
    $("density-max").value = state.to;
    $("density-min-value").textContent = percent(densityAt(state.from));
    $("density-max-value").textContent = percent(densityAt(state.to));
    let filtered = state.from !== "0" || state.to !== "100";
    for (const input of document.querySelectorAll("input[data-score]")) {
      input.value = state[`least:${input.dataset.score}`];
      input.parentElement.querySelector("output").textContent = score(Number(input.value) / 100);
      filtered = filtered || input.value !== "0";
    }
    if (filtered) document.querySelector(".more").open = true;
    $("reset").hidden = !(filtered || state.q || state.modality);
  };

  const update = () => {
    shown = PAGE;
    current = chosen();
    showControls();
    writeHash();
    draw();
    map.draw();
  };
  const clear = () => {
    const kept = { sort: state.sort, reverse: state.reverse, view: state.view };
    Object.assign(state, initial, kept);
    update();
  };

  $("controls").addEventListener("submit", (event) => event.preventDefault());
  $("q").addEventListener("input", () => { state.q = $("q").value; update(); });
  for (const input of document.querySelectorAll("input[name=modality], input[name=view]")) {
    input.addEventListener("change", () => { state[input.name] = input.value; update(); });
  }
  $("sort").addEventListener("change", () => { state.sort = $("sort").value; state.reverse = ""; update(); });
  $("direction").addEventListener("click", () => { state.reverse = state.reverse ? "" : "1"; update(); });
  $("density-min").addEventListener("input", () => { state.from = String(Math.min($("density-min").value, state.to)); update(); });
  $("density-max").addEventListener("input", () => { state.to = String(Math.max($("density-max").value, state.from)); update(); });
  for (const input of document.querySelectorAll("input[data-score]")) {
    input.addEventListener("input", () => { state[`least:${input.dataset.score}`] = input.value; update(); });
  }
  $("reset").addEventListener("click", clear);
  $("reset-empty").addEventListener("click", clear);
  $("further").addEventListener("click", () => { shown += PAGE; draw(); });
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && !event.target.matches("input, select")) { event.preventDefault(); $("q").focus(); }
  });
  window.addEventListener("hashchange", () => { readHash(); update(); });

  // ---- the map: density on image tokens against density on text tokens, both logarithmic

  const map = (() => {
    const canvas = $("map"), tip = $("map-tip"), context = canvas.getContext("2d");
    const edge = { left: 0, right: 14, top: 10, bottom: 40 };
    const least = features.flatMap((feature) => [feature.image, feature.text]).filter((value) => value > 0)
      .reduce((a, b) => Math.min(a, b), 0.1);
    const floor = Math.floor(Math.log10(least));
    let size = { width: 0, height: 0 };
    let placed = [];
    let hovered = null;
    const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

    // Zero has no logarithm: it gets a lane of its own, half a decade below the lowest mark.
    const along = (value) => ((value > 0 ? Math.max(Math.log10(value), floor) : floor - 0.5) - floor + 0.5) / (0.5 - floor);
    const x = (value) => edge.left + along(value) * (size.width - edge.left - edge.right);
    const y = (value) => size.height - edge.bottom - along(value) * (size.height - edge.top - edge.bottom);

    const label = (value) => (value ? percent(value).replace(" ", "\u2009") : "never");
    const axes = () => {
      const marks = [0, ...Array.from({ length: 1 - floor }, (_, i) => 10 ** (floor + i))];
      context.font = `11px ${colour("font")}`;
      context.lineWidth = 1;
      edge.left = 14 + Math.max(...marks.map((value) => context.measureText(label(value)).width));
      const line = (x0, y0, x1, y1) => { context.beginPath(); context.moveTo(x0, y0); context.lineTo(x1, y1); context.stroke(); };
      context.strokeStyle = colour("line");
      context.fillStyle = colour("quiet");
      const every = Math.ceil(64 / (x(1) - x(0.1)));
      for (const value of marks) {
        line(x(value), edge.top, x(value), size.height - edge.bottom);
        line(edge.left, y(value), size.width - edge.right, y(value));
        context.textAlign = "right";
        context.fillText(label(value), edge.left - 8, y(value) + 4);
        if (value && (Math.round(Math.log10(value)) % every || x(value) - x(0) < 58)) continue;
        context.textAlign = value === 1 ? "right" : value ? "center" : "left";
        context.fillText(label(value), x(value) + (value === 1 ? 10 : value ? 0 : -8), size.height - edge.bottom + 15);
      }
      context.strokeStyle = colour("line-strong");
      context.setLineDash([2, 4]);
      line(x(10 ** floor), y(10 ** floor), x(1), y(1));
      context.setLineDash([]);
      context.textAlign = "right";
      context.fillStyle = colour("text");
      context.fillText("text tokens →", size.width - edge.right, size.height - 6);
      context.fillStyle = colour("image");
      context.textAlign = "left";
      context.fillText("↑ image tokens", x(0) + 6, edge.top + 10);
    };
    const drawAll = () => {
      const ratio = window.devicePixelRatio || 1;
      size = { width: canvas.clientWidth, height: canvas.clientHeight };
      canvas.width = Math.round(size.width * ratio);
      canvas.height = Math.round(size.height * ratio);
      context.setTransform(ratio, 0, 0, ratio, 0, 0);
      context.clearRect(0, 0, size.width, size.height);
      axes();
      const inside = new Set(current);
      const tint = { image: colour("image"), text: colour("text"), both: colour("both") };
      const radius = features.length > 2000 ? 2 : features.length > 300 ? 3 : 4;
      placed = features.map((feature) => ({ feature, x: x(feature.text), y: y(feature.image), inside: inside.has(feature) }));
      for (const dot of [...placed].sort((a, b) => a.inside - b.inside)) {
        context.globalAlpha = dot.inside ? 0.75 : 0.12;
        context.fillStyle = tint[dot.feature.modality] ?? colour("quiet");
        context.beginPath();
        context.arc(dot.x, dot.y, radius, 0, 2 * Math.PI);
        context.fill();
      }
      context.globalAlpha = 1;
      if (hovered) {
        context.strokeStyle = colour("ink");
        context.lineWidth = 1.5;
        context.beginPath();
        context.arc(hovered.x, hovered.y, radius + 3, 0, 2 * Math.PI);
        context.stroke();
      }
    };
    const nearest = (event) => {
      const box = canvas.getBoundingClientRect();
      const px = event.clientX - box.left, py = event.clientY - box.top;
      let best = null, distance = 14 * 14;
      for (const dot of placed) {
        const d = (dot.x - px) ** 2 + (dot.y - py) ** 2;
        if (dot.inside && d < distance) { best = dot; distance = d; }
      }
      return best;
    };
    const point = (event) => {
      const found = nearest(event);
      if (found?.feature === hovered?.feature) return;
      hovered = found;
      tip.hidden = !found;
      canvas.style.cursor = found ? "pointer" : "";
      if (found) {
        const { feature } = found;
        tip.textContent = `${feature.index} · ${feature.named ? feature.label : "not explained yet"}`;
        tip.href = feature.url;
        tip.style.left = `${Math.max(0, Math.min(found.x + 12, size.width - tip.offsetWidth))}px`;
        tip.style.top = `${Math.max(0, found.y - tip.offsetHeight - 10)}px`;
      }
      drawAll();
    };
    // A finger first shows what a dot is, in a link that it can then tap; a mouse hovers and clicks.
    const byTouch = (event) => event.pointerType === "touch";
    canvas.addEventListener("pointermove", point);
    canvas.addEventListener("pointerdown", (event) => { tip.classList.toggle("touch", byTouch(event)); point(event); });
    canvas.addEventListener("pointerleave", (event) => {
      if (byTouch(event)) return;
      hovered = null;
      tip.hidden = true;
      drawAll();
    });
    canvas.addEventListener("click", (event) => {
      const found = byTouch(event) ? null : nearest(event);
      if (found) location.href = found.feature.url;
    });
    new ResizeObserver(drawAll).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
    return { draw: drawAll };
  })();

  readHash();
  update();
})();

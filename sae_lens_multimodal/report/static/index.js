// The index: search, filters, sorting, grid and table; the address keeps what was chosen.
"use strict";

(() => {
  const { percent, number, score, element, remember, recall, load, on } = report;
  const head = report.head;
  const scoreNames = head.scores;
  const total = head.index.length;
  const $ = (id) => document.getElementById(id);
  const PAGE = 60;
  const all = Array.from({ length: total }, (_, at) => at);
  const url = (at) => `features/${head.index[at]}.html`;
  const name = (at) => head.label[at] || "not explained yet";
  const value = (key, at) => head.numbers[key][0][at];
  const control = (key, at) => head.numbers[key][1][at];

  // ---- what is not needed at once comes in parts: close views, stretches of text, and the words that are searched

  const words = all.map((at) => `${head.index[at]}\n${head.label[at]}`.toLowerCase());
  const details = new Array(total).fill(null);
  const parts = new Map();
  const partOf = (at) => Math.floor(at / head.part);
  const loadPart = (part) => {
    if (!parts.has(part)) {
      parts.set(part, load(`data/part-${part}.js`, `part-${part}`).then((rows) => {
        rows.forEach((row, k) => {
          const at = part * head.part + k;
          details[at] = row;
          words[at] += `\n${row.words.toLowerCase()}`;
        });
        loaded += 1;
      }));
    }
    return parts.get(part);
  };
  let loaded = 0;
  const loadRest = async () => {
    for (let part = 0; part < head.parts; part++) {
      await loadPart(part);
      if (state.q) schedule();
      else await new Promise((resolve) => (window.requestIdleCallback ?? setTimeout)(resolve));
    }
    $("cards").dataset.complete = "yes";
    schedule();
  };

  // ---- what was chosen, and the address that keeps it

  const initial = { q: "", modality: "", sort: head.sort, reverse: "", view: "", from: "0", to: "100" };
  for (const key of scoreNames) initial[`least:${key}`] = "0";
  const state = { ...initial };
  let shown = 0;

  const readHash = () => {
    const given = new URLSearchParams(location.hash.slice(1));
    for (const key of Object.keys(initial)) state[key] = given.get(key) ?? initial[key];
    if (!Object.hasOwn(keys, state.sort)) state.sort = initial.sort;
  };
  const writeHash = () => {
    const chosen = new URLSearchParams();
    for (const [key, value] of Object.entries(state)) if (value !== initial[key]) chosen.set(key, value);
    const hash = chosen.size ? `#${chosen}` : "";
    if (hash !== location.hash) history.replaceState(null, "", hash || location.pathname + location.search);
    remember("index-hash", hash);
  };

  // ---- density sliders run over the logarithm of what there is

  const densities = head.density.filter((found) => found > 0);
  const lowest = Math.log10(densities.reduce((a, b) => Math.min(a, b), 1));
  const highest = Math.log10(densities.reduce((a, b) => Math.max(a, b), 10 ** lowest));
  const densityAt = (position) => 10 ** (lowest + ((highest - lowest) * Number(position)) / 100);

  // ---- choosing and ordering

  const fits = (at, sought) => {
    if (state.modality && head.modality[at] !== state.modality) return false;
    if (state.from !== "0" && head.density[at] < densityAt(state.from) * 0.9999) return false;
    if (state.to !== "100" && head.density[at] > densityAt(state.to) * 1.0001) return false;
    for (const key of scoreNames) {
      const least = Number(state[`least:${key}`]);
      if (least > 0 && !((value(key, at) ?? -1) >= least / 100)) return false;
    }
    return sought.every((word) => words[at].includes(word));
  };

  const keys = {
    index: (at) => head.index[at],
    density: (at) => head.density[at],
    image: (at) => head.share[at],
    max: (at) => head.max[at],
    label: (at) => head.label[at].toLowerCase() || null,
  };
  for (const key of Object.keys(head.numbers)) {
    keys[`value:${key}`] = (at) => value(key, at);
    keys[`lift:${key}`] = (at) => (value(key, at) === null || control(key, at) === null ? null : value(key, at) - control(key, at));
  }
  const rising = (sort) => sort === "index" || sort === "label";

  // The order is kept while only the filters change.
  let ordered = { by: null, list: all };
  const inOrder = () => {
    const by = `${state.sort} ${state.reverse}`;
    if (ordered.by !== by) {
      const sign = (rising(state.sort) ? 1 : -1) * (state.reverse ? -1 : 1);
      const key = all.map(keys[state.sort]);
      ordered = { by, list: [...all].sort((a, b) => {
        const x = key[a], y = key[b];
        if (x === null || y === null) return (x === null) - (y === null) || a - b;
        return (x < y ? -sign : x > y ? sign : 0) || a - b;
      }) };
    }
    return ordered.list;
  };
  const chosen = () => {
    const sought = state.q.toLowerCase().split(/\s+/).filter(Boolean);
    return inOrder().filter((at) => fits(at, sought));
  };

  // ---- drawing the list

  const image = (address) => {
    const made = element("img");
    made.src = address;
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
  const whenThere = (at, fill) => {
    if (details[at]) fill(details[at]);
    else loadPart(partOf(at)).then(() => fill(details[at]));
  };

  const card = (at) => {
    const made = $("card-template").content.cloneNode(true);
    const find = (part) => made.querySelector(`.${part}`);
    made.querySelector("a").href = url(at);
    const strip = find("strip");
    whenThere(at, ({ thumbs, snippets }) => {
      if (thumbs.length) strip.append(...thumbs.map(image));
      else if (snippets.length) { strip.classList.add("words"); strip.append(...snippets.map(snippet)); }
      else strip.classList.add("nothing");
    });
    find("number").textContent = head.index[at];
    const balance = find("balance"), share = head.share[at];
    if (share === null) balance.remove();
    else {
      balance.style.setProperty("--v", share);
      balance.setAttribute("aria-label", `${percent(share)} image, ${percent(1 - share)} text`);
      balance.title = "from text (left) to image (right)";
    }
    find("label").textContent = name(at);
    find("label").classList.toggle("unnamed", !head.label[at]);
    const figures = find("figures");
    const figure = (title, reading, beside) => {
      const part = element("span", "", `${title} `);
      part.append(element("b", "", reading));
      if (beside !== null) part.append(` (${beside})`);
      figures.append(part);
    };
    figure("density", percent(head.density[at]), null);
    for (const key of scoreNames) {
      if (value(key, at) !== null) figure(key, score(value(key, at)), control(key, at) === null ? null : score(control(key, at)));
    }
    return made;
  };

  const withControl = (key, spell) => (at) => {
    const made = element("span", "", spell(value(key, at)));
    if (control(key, at) !== null) made.append(element("small", "", `(${spell(control(key, at))})`));
    return made;
  };
  const thumbs = (at) => {
    const box = element("div");
    whenThere(at, (found) => box.append(...found.thumbs.slice(0, 3).map(image)));
    return box;
  };
  const link = (at) => {
    const made = element("a", head.label[at] ? "" : "quiet", head.label[at] || `feature ${head.index[at]}`);
    made.href = url(at);
    return made;
  };
  const columns = [
    { name: "pictures", key: null, cell: thumbs, className: "thumb" },
    { name: "number", key: "index", cell: (at) => String(head.index[at]), className: "numeric" },
    { name: "feature", key: "label", cell: link, className: "name" },
    { name: "image share", key: "image", cell: (at) => percent(head.share[at]), className: "numeric" },
    { name: "density", key: "density", cell: (at) => percent(head.density[at]), className: "numeric" },
    { name: "strongest", key: "max", cell: (at) => number(head.max[at]), className: "numeric" },
    ...scoreNames.map((key) => ({ name: key, key: `value:${key}`, cell: withControl(key, score), className: "numeric" })),
    ...head.measures.map((key) => ({ name: key, key: `value:${key}`, cell: withControl(key, number), className: "numeric" })),
  ];

  const tableHead = () => {
    $("table-head").replaceChildren(...columns.map((column) => {
      const made = element("th", column.className);
      made.scope = "col";
      if (column.key === null) { made.append(element("span", "hidden", column.name)); return made; }
      const button = element("button", "", column.name);
      button.type = "button";
      if (state.sort === column.key) {
        const up = rising(column.key) !== Boolean(state.reverse);
        made.setAttribute("aria-sort", up ? "ascending" : "descending");
        button.append(element("span", "arrow", up ? " ↑" : " ↓"));
      }
      button.addEventListener("click", () => {
        state.reverse = state.sort === column.key && !state.reverse ? "1" : "";
        state.sort = column.key;
        update();
        [...$("table-head").querySelectorAll("button")].find((one) => one.textContent.startsWith(column.name)).focus();
      });
      made.append(button);
      return made;
    }));
  };
  const tableRow = (at) => {
    const row = element("tr");
    row.append(...columns.map((column) => {
      const cell = element("td", column.className);
      cell.dataset.name = column.name;
      cell.append(column.cell(at));
      return cell;
    }));
    return row;
  };

  let current = [];
  const more = (count = PAGE) => {
    const next = current.slice(shown, shown + count);
    if (state.view === "table") $("rows").append(...next.map(tableRow));
    else $("cards").append(...next.map(card));
    shown += next.length;
    $("further").hidden = shown >= current.length;
    $("further").textContent = `Show ${Math.min(PAGE, current.length - shown)} more of ${current.length}`;
  };
  const draw = (count) => {
    const table = state.view === "table";
    $("cards").hidden = table;
    $("table-view").hidden = !table || !current.length;
    $("cards").replaceChildren();
    $("rows").replaceChildren();
    if (table) tableHead();
    shown = 0;
    more(count);
    $("empty").hidden = current.length > 0 || (state.q && loaded < head.parts);
    tally();
  };
  const tally = () => {
    const found = current.length === total ? `${total} features` : `${current.length} of ${total} features`;
    $("tally").textContent = state.q && loaded < head.parts ? `${found}, still searching` : found;
  };

  // ---- the controls

  const showControls = () => {
    if ($("q").value !== state.q) $("q").value = state.q;
    for (const group of ["modality", "view"]) {
      for (const input of document.querySelectorAll(`input[name=${group}]`)) input.checked = input.value === state[group];
    }
    $("sort").value = state.sort;
    const up = rising(state.sort) !== Boolean(state.reverse);
    $("direction").textContent = up ? "↑" : "↓";
    $("direction").setAttribute("aria-label", `${up ? "Ascending" : "Descending"}: reverse the order`);
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

  const update = (count = PAGE) => {
    current = chosen();
    showControls();
    writeHash();
    draw(count);
    map.later();
  };
  // Several changes before the next frame are one.
  let due = 0;
  const schedule = () => {
    if (!due) due = requestAnimationFrame(() => { due = 0; if (state.q || loaded === head.parts) refresh(); });
  };
  const refresh = () => {
    const found = chosen();
    if (found.length === current.length && found.every((at, k) => at === current[k])) { tally(); $("empty").hidden = current.length > 0; return; }
    update(Math.max(PAGE, shown));
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
  $("reset").addEventListener("click", () => { clear(); $("q").focus(); });
  $("reset-empty").addEventListener("click", () => { clear(); $("q").focus(); });
  $("further").addEventListener("click", () => {
    const first = shown;
    more();
    links()[first]?.focus();
  });
  // Watched anew each time, or it would say nothing as long as the button stays in reach.
  const reach = new IntersectionObserver((entries) => {
    if (!entries.some((entry) => entry.isIntersecting) || document.activeElement === $("further")) return;
    more();
    reach.unobserve($("further"));
    reach.observe($("further"));
  }, { rootMargin: "600px" });
  reach.observe($("further"));
  window.addEventListener("hashchange", () => { readHash(); update(); });

  // ---- keys: the list without a mouse

  const links = () => [...document.querySelectorAll(state.view === "table" ? "#rows a" : "#cards a")];
  const step = (by) => {
    const list = links(), at = list.indexOf(document.activeElement);
    const next = list[at < 0 ? (by > 0 ? 0 : list.length - 1) : Math.min(Math.max(at + by, 0), list.length - 1)];
    if (next) { next.focus(); next.scrollIntoView({ block: "nearest" }); }
  };
  on("/", () => $("q").focus());
  on("j", () => step(1));
  on("k", () => step(-1));
  on("g", () => { state.view = state.view ? "" : "table"; update(); });
  on("x", () => clear());

  // ---- back from a feature's page: to the same place

  window.addEventListener("pagehide", () => remember("index-place", JSON.stringify({ hash: location.hash, shown, y: scrollY })));
  const place = () => {
    const returning = recall("returning") || performance.getEntriesByType("navigation")[0]?.type === "back_forward";
    remember("returning", "");
    const found = JSON.parse(recall("index-place") ?? "null");
    return returning && found && found.hash === location.hash ? found : null;
  };

  // ---- the map: density on image tokens against density on text tokens, both logarithmic

  const map = (() => {
    const canvas = $("map"), tip = $("map-tip"), context = canvas.getContext("2d");
    const still = document.createElement("canvas");
    const edge = { left: 0, right: 14, top: 10, bottom: 40 };
    const least = [...head.image, ...head.text].reduce((a, b) => (b > 0 ? Math.min(a, b) : a), 0.1);
    const floor = Math.floor(Math.log10(least));
    let size = { width: 0, height: 0 };
    let placed = [];
    let hovered = null;
    let waiting = 0;
    const colour = (kind) => getComputedStyle(document.documentElement).getPropertyValue(`--${kind}`).trim();
    const radius = total > 2000 ? 2 : total > 300 ? 3 : 4;

    // Zero has no logarithm: it gets a lane of its own, half a decade below the lowest mark.
    const along = (share) => ((share > 0 ? Math.max(Math.log10(share), floor) : floor - 0.5) - floor + 0.5) / (0.5 - floor);
    const x = (share) => edge.left + along(share) * (size.width - edge.left - edge.right);
    const y = (share) => size.height - edge.bottom - along(share) * (size.height - edge.top - edge.bottom);

    const label = (share) => (share ? percent(share).replace(" ", "\u2009") : "never");
    const axes = (pen) => {
      const marks = [0, ...Array.from({ length: 1 - floor }, (_, i) => 10 ** (floor + i))];
      pen.font = `11px ${colour("font")}`;
      pen.lineWidth = 1;
      edge.left = 14 + Math.max(...marks.map((share) => pen.measureText(label(share)).width));
      const line = (x0, y0, x1, y1) => { pen.beginPath(); pen.moveTo(x0, y0); pen.lineTo(x1, y1); pen.stroke(); };
      pen.strokeStyle = colour("line");
      pen.fillStyle = colour("quiet");
      const every = Math.ceil(64 / (x(1) - x(0.1)));
      for (const share of marks) {
        line(x(share), edge.top, x(share), size.height - edge.bottom);
        line(edge.left, y(share), size.width - edge.right, y(share));
        pen.textAlign = "right";
        pen.fillText(label(share), edge.left - 8, y(share) + 4);
        if (share && (Math.round(Math.log10(share)) % every || x(share) - x(0) < 58)) continue;
        pen.textAlign = share === 1 ? "right" : share ? "center" : "left";
        pen.fillText(label(share), x(share) + (share === 1 ? 10 : share ? 0 : -8), size.height - edge.bottom + 15);
      }
      pen.strokeStyle = colour("line-strong");
      pen.setLineDash([2, 4]);
      line(x(10 ** floor), y(10 ** floor), x(1), y(1));
      pen.setLineDash([]);
      pen.textAlign = "right";
      pen.fillStyle = colour("text");
      pen.fillText("text tokens →", size.width - edge.right, size.height - 6);
      pen.fillStyle = colour("image");
      pen.textAlign = "left";
      pen.fillText("↑ image tokens", x(0) + 6, edge.top + 10);
    };
    const dot = (pen, { x: px, y: py }) => {
      if (radius < 3) { pen.fillRect(px - radius, py - radius, 2 * radius, 2 * radius); return; }
      pen.beginPath();
      pen.arc(px, py, radius, 0, 2 * Math.PI);
      pen.fill();
    };
    // All that does not move lies ready on a canvas of its own; a ring is drawn over a copy of it.
    const drawAll = () => {
      waiting = 0;
      const ratio = window.devicePixelRatio || 1;
      size = { width: canvas.clientWidth, height: canvas.clientHeight };
      canvas.width = still.width = Math.round(size.width * ratio);
      canvas.height = still.height = Math.round(size.height * ratio);
      if (!canvas.width || !canvas.height) return;
      const pen = still.getContext("2d");
      pen.setTransform(ratio, 0, 0, ratio, 0, 0);
      axes(pen);
      const inside = new Uint8Array(total);
      for (const at of current) inside[at] = 1;
      const tint = { image: colour("image"), text: colour("text"), both: colour("both"), none: colour("quiet") };
      placed = all.map((at) => ({ at, x: x(head.text[at]), y: y(head.image[at]), inside: inside[at] === 1 }));
      for (const lit of [false, true]) {
        pen.globalAlpha = lit ? 0.75 : 0.12;
        for (const kind of Object.keys(tint)) {
          pen.fillStyle = tint[kind];
          for (const one of placed) if (one.inside === lit && (head.modality[one.at] ?? "none") === kind) dot(pen, one);
        }
      }
      ring();
    };
    const ring = () => {
      context.setTransform(1, 0, 0, 1, 0, 0);
      context.clearRect(0, 0, canvas.width, canvas.height);
      context.drawImage(still, 0, 0);
      if (!hovered) return;
      const ratio = window.devicePixelRatio || 1;
      context.setTransform(ratio, 0, 0, ratio, 0, 0);
      context.strokeStyle = colour("ink");
      context.lineWidth = 1.5;
      context.beginPath();
      context.arc(hovered.x, hovered.y, radius + 3, 0, 2 * Math.PI);
      context.stroke();
    };
    // The list comes first: the map is drawn once typing rests.
    const later = () => {
      clearTimeout(waiting);
      waiting = setTimeout(drawAll, total > 2000 ? 120 : 0);
    };
    const nearest = (event) => {
      const box = canvas.getBoundingClientRect();
      const px = event.clientX - box.left, py = event.clientY - box.top;
      let best = null, distance = 14 * 14;
      for (const one of placed) {
        const d = (one.x - px) ** 2 + (one.y - py) ** 2;
        if (one.inside && d < distance) { best = one; distance = d; }
      }
      return best;
    };
    const point = (event) => {
      const found = nearest(event);
      if (found?.at === hovered?.at) return;
      hovered = found;
      tip.hidden = !found;
      canvas.style.cursor = found ? "pointer" : "";
      if (found) {
        tip.textContent = `${head.index[found.at]} · ${name(found.at)}`;
        tip.href = url(found.at);
        tip.style.left = `${Math.max(0, Math.min(found.x + 12, size.width - tip.offsetWidth))}px`;
        tip.style.top = `${Math.max(0, found.y - tip.offsetHeight - 10)}px`;
      }
      ring();
    };
    // A finger first shows what a dot is, in a link that it can then tap; a mouse hovers and clicks.
    const byTouch = (event) => event.pointerType === "touch";
    canvas.addEventListener("pointermove", point);
    canvas.addEventListener("pointerdown", (event) => { tip.classList.toggle("touch", byTouch(event)); point(event); });
    canvas.addEventListener("pointerleave", (event) => {
      if (byTouch(event)) return;
      hovered = null;
      tip.hidden = true;
      ring();
    });
    canvas.addEventListener("click", (event) => {
      const found = byTouch(event) ? null : nearest(event);
      if (found) location.href = url(found.at);
    });
    new ResizeObserver(drawAll).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
    return { later };
  })();

  readHash();
  const earlier = place();
  update(Math.max(PAGE, earlier?.shown ?? 0));
  if (earlier) scrollTo(0, earlier.y);
  loadRest();
})();

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

  const map = featureMap({ head, url, name, current: () => current });

  readHash();
  const earlier = place();
  update(Math.max(PAGE, earlier?.shown ?? 0));
  if (earlier) scrollTo(0, earlier.y);
  loadRest();
})();

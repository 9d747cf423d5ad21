// The page that compares runs: every feature with both explanations and one number of both, sorted and filtered.
"use strict";

(() => {
  const { number, score, element, load, on } = report;
  const $ = (id) => document.getElementById(id);
  const PAGE = 60;
  const state = { run: 0, value: "", sort: "difference", reverse: false, q: "", only: "" };
  let data = null;
  let current = [];
  let shown = 0;

  const loads = new Map();
  const fetched = (run) => {
    if (!loads.has(run)) loads.set(run, load($("run").options[run].dataset.url, `compare-${run}`));
    return loads.get(run);
  };

  const numbers = (side, at) => (state.value ? data.numbers[state.value][side][at] : null);
  const difference = (at) => (numbers(0, at) === null || numbers(1, at) === null ? null : numbers(1, at) - numbers(0, at));
  const small = () => state.value && [0, 1].every((side) => data.numbers[state.value][side].every((found) => found === null || Math.abs(found) <= 1));
  const spell = (found) => (small() ? score(found) : number(found));
  const signed = (found) => (found === null ? "–" : `${found > 0 ? "+" : ""}${spell(found)}`);

  const keys = {
    index: (at) => data.index[at],
    first: (at) => numbers(0, at),
    second: (at) => numbers(1, at),
    difference,
    texts0: (at) => data.texts[0][at].toLowerCase() || null,
    texts1: (at) => data.texts[1][at].toLowerCase() || null,
  };
  const fits = (at, sought) => {
    const [one, other] = [data.texts[0][at], data.texts[1][at]];
    if (state.only === "different" && one === other) return false;
    if (state.only === "better" && !(difference(at) > 0)) return false;
    if (state.only === "worse" && !(difference(at) < 0)) return false;
    const words = `${data.index[at]}\n${one}\n${other}`.toLowerCase();
    return sought.every((word) => words.includes(word));
  };
  const chosen = () => {
    const sought = state.q.toLowerCase().split(/\s+/).filter(Boolean);
    const found = data.index.map((_, at) => at).filter((at) => fits(at, sought));
    const key = new Map(found.map((at) => [at, keys[state.sort](at)]));
    const falling = ["first", "second", "difference"].includes(state.sort);
    const sign = (falling ? -1 : 1) * (state.reverse ? -1 : 1);
    return found.sort((a, b) => {
      const x = key.get(a), y = key.get(b);
      if (x === null || y === null) return (x === null) - (y === null) || a - b;
      return (x < y ? -sign : x > y ? sign : 0) || a - b;
    });
  };

  const heads = () => [
    ["index", "feature", "numeric"], ["texts0", data.names[0], "text-cell"], ["texts1", data.names[1], "text-cell"],
    ...(state.value ? [["first", data.names[0], "numeric"], ["second", data.names[1], "numeric"], ["difference", "difference", "numeric"]] : []),
  ];
  const drawHead = () => {
    $("compare-head").replaceChildren(...heads().map(([key, title, className]) => {
      const head = element("th", className);
      head.scope = "col";
      const button = element("button", "", title);
      button.type = "button";
      if (key === "first" || key === "second") button.setAttribute("aria-label", `${title}: ${state.value}`);
      if (state.sort === key) {
        const falling = ["first", "second", "difference"].includes(key);
        const up = falling === state.reverse;
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        button.append(element("span", "arrow", up ? " ↑" : " ↓"));
      }
      button.addEventListener("click", () => {
        state.reverse = state.sort === key && !state.reverse;
        state.sort = key;
        draw();
        $("compare-head").querySelectorAll("button")[heads().findIndex(([name]) => name === key)].focus();
      });
      head.append(button);
      return head;
    }));
  };
  const cell = (className, title, content) => {
    const made = element("td", className);
    made.dataset.name = title;
    made.append(content);
    return made;
  };
  const row = (at) => {
    const made = element("tr"), link = element("a", "", String(data.index[at]));
    link.href = `features/${data.index[at]}.html`;
    made.append(cell("numeric", "feature", link));
    for (const side of [0, 1]) {
      const said = data.texts[side][at];
      made.append(cell(`text-cell${said ? "" : " quiet"}`, data.names[side], said || "not explained"));
    }
    if (state.value) {
      for (const side of [0, 1]) made.append(cell("numeric", `${data.names[side]}, ${state.value}`, spell(numbers(side, at))));
      const found = difference(at);
      made.append(cell(`numeric ${found > 0 ? "better" : found < 0 ? "worse" : ""}`, "difference", signed(found)));
    }
    return made;
  };
  const more = () => {
    const next = current.slice(shown, shown + PAGE);
    $("compare-rows").append(...next.map(row));
    shown += next.length;
    $("further").hidden = shown >= current.length;
    $("further").textContent = `Show ${Math.min(PAGE, current.length - shown)} more of ${current.length}`;
  };
  const draw = () => {
    current = chosen();
    shown = 0;
    drawHead();
    $("compare-rows").replaceChildren();
    more();
    $("tally").textContent = `${current.length} of ${data.index.length} features`;
    $("empty").hidden = current.length > 0;
  };
  const choose = async (run) => {
    state.run = run;
    data = await fetched(run);
    const names = Object.keys(data.numbers);
    $("value").replaceChildren(...names.map((name) => { const made = element("option", "", name); made.value = name; return made; }));
    if (!names.includes(state.value)) state.value = names[0] ?? "";
    $("value").value = state.value;
    $("value").disabled = !names.length;
    if (!state.value && ["first", "second", "difference"].includes(state.sort)) state.sort = "index";
    draw();
  };

  $("compare-controls").addEventListener("submit", (event) => event.preventDefault());
  $("run").addEventListener("change", () => choose($("run").selectedIndex));
  $("value").addEventListener("change", () => { state.value = $("value").value; draw(); });
  $("only").addEventListener("change", () => { state.only = $("only").value; draw(); });
  $("q").addEventListener("input", () => { state.q = $("q").value; draw(); });
  $("further").addEventListener("click", () => {
    const first = shown;
    more();
    $("compare-rows").querySelectorAll("a")[first]?.focus();
  });
  // Watched anew each time, or it would say nothing as long as the button stays in reach.
  const reach = new IntersectionObserver((entries) => {
    if (!data || !entries.some((entry) => entry.isIntersecting) || document.activeElement === $("further")) return;
    more();
    reach.unobserve($("further"));
    reach.observe($("further"));
  }, { rootMargin: "600px" });
  reach.observe($("further"));

  const step = (by) => {
    const list = [...$("compare-rows").querySelectorAll("a")], at = list.indexOf(document.activeElement);
    const next = list[at < 0 ? 0 : Math.min(Math.max(at + by, 0), list.length - 1)];
    if (next) { next.focus(); next.scrollIntoView({ block: "nearest" }); }
  };
  on("/", () => $("q").focus());
  on("j", () => step(1));
  on("k", () => step(-1));
  on("u", () => document.querySelector("[data-back]").click());
  choose(0);
})();

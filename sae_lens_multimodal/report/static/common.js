// What several pages share: numbers as the report spells them, elements, memory, keys, and data that lies in scripts.
"use strict";

const report = (() => {
  const DASH = "–";
  const percent = (value) => {
    if (value === null) return DASH;
    const p = 100 * value;
    if (p === 0 || p >= 9.95) return `${p.toFixed(0)} %`;
    return `${String(Number(p.toPrecision(2)))} %`;
  };
  const number = (value) => (value === null ? DASH : String(Number(value.toPrecision(3))).replace("-", "−"));
  const score = (value) =>
    (value === undefined || value === null ? DASH : value.toFixed(2).replace(/^(-?)0\./, "$1.").replace("-", "−"));

  const element = (tag, className, text) => {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  };

  // A browser may refuse storage to pages opened from disk; what is chosen then lasts for one page only.
  const remember = (name, value) => { try { sessionStorage.setItem(name, value); } catch { /* see above */ } };
  const recall = (name) => { try { return sessionStorage.getItem(name); } catch { return null; } };

  // Data lies in scripts that call one of these: a page opened from disk may not read files.
  const arrived = new Map();
  const take = (key, value) => { const waiting = arrived.get(key); if (waiting) waiting(value); else arrived.set(key, () => value); };
  const load = (url, key) => new Promise((resolve, reject) => {
    arrived.set(key, resolve);
    const script = element("script");
    script.src = url;
    script.onerror = () => reject(new Error(`${url} is missing`));
    document.head.append(script);
  });

  // Single keys, for whoever wants them: they can be turned off in the list that “?” opens.
  const keys = {};
  const dialog = document.getElementById("keys");
  const allowed = document.getElementById("keys-allowed");
  const on = (key, act) => { keys[key] = act; };
  if (dialog) {
    if (recall("keys") === "off") allowed.checked = false;
    allowed.addEventListener("change", () => remember("keys", allowed.checked ? "on" : "off"));
    for (const opener of document.querySelectorAll("[data-keys]")) opener.addEventListener("click", () => dialog.showModal());
    dialog.querySelector("button").addEventListener("click", () => dialog.close());
    dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
    on("?", () => dialog.showModal());
  }
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !keys[event.key] || (allowed && !allowed.checked)) return;
    if (event.target.matches("input:not([type=radio]):not([type=range]):not([type=checkbox]), select, textarea")) return;
    if (event.key.startsWith("Arrow") && event.target.matches("input")) return;
    if (dialog && dialog.open) return;
    if (keys[event.key](event) !== false) event.preventDefault();
  });

  return { DASH, percent, number, score, element, remember, recall, take, load, on };
})();

window.reportIndex = (head) => { report.head = head; };
window.reportPart = (part, rows) => report.take(`part-${part}`, rows);
window.reportCompare = (run, data) => report.take(`compare-${run}`, data);

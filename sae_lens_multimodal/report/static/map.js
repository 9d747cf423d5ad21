// The map of the index: density on image tokens against density on text tokens, both logarithmic.
"use strict";

// Takes the index's data, the address and name of each feature, and which features the filters leave.
const featureMap = ({ head, url, name, current }) => {
  const { percent } = report;
  const total = head.index.length;
  const all = Array.from({ length: total }, (_, at) => at);
  const canvas = document.getElementById("map"), tip = document.getElementById("map-tip");
  const context = canvas.getContext("2d");
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
    for (const at of current()) inside[at] = 1;
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
};

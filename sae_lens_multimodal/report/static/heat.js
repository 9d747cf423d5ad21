// Heat maps: patches drawn over a picture, of the view of the whole picture, of its tiles, or of both.
"use strict";

const heat = (() => {
  const settings = document.getElementById("heat-settings");
  if (!settings) return { draw: () => {}, drawAll: () => {} };
  const ramp = settings.dataset.ramp.split(" ").map((step) => step.split(",").map(Number));
  const [weak, strong] = settings.dataset.alpha.split(" ").map(Number);
  const veil = settings.dataset.veil.split(",").map(Number);
  const DIGITS = 2, NUMBERS = 5, FULL = 1000;

  const rgba = (red, green, blue, alpha) => `rgba(${red},${green},${blue},${(alpha / 255).toFixed(4)})`;
  const colour = (level) => {
    const place = (level / FULL) * (ramp.length - 1);
    const low = Math.min(Math.floor(place), ramp.length - 2), part = place - low;
    const mixed = ramp[low].map((value, channel) => Math.round(value + (ramp[low + 1][channel] - value) * part));
    return rgba(...mixed, weak + ((strong - weak) * level) / FULL);
  };
  const unpack = (text) => {
    const found = [];
    for (let at = 0; at < text.length; at += DIGITS * NUMBERS) {
      const patch = [];
      for (let k = 0; k < NUMBERS; k++) patch.push(parseInt(text.slice(at + DIGITS * k, at + DIGITS * (k + 1)), 36));
      found.push(patch);
    }
    return found;
  };

  // The strongest patches come last and replace what they cover, so that each place shows the strongest one.
  const draw = (canvas, view) => {
    const { base, tiles } = canvas.dataset;
    const shown = [...(view === "tiles" ? [] : unpack(base)), ...(view === "base" ? [] : unpack(tiles))];
    shown.sort((a, b) => a[4] - b[4]);
    const { width, height } = canvas, context = canvas.getContext("2d");
    context.clearRect(0, 0, width, height);
    context.fillStyle = rgba(...veil);
    context.fillRect(0, 0, width, height);
    for (const [x0, y0, x1, y1, level] of shown) {
      const left = Math.round((x0 * width) / FULL), top = Math.round((y0 * height) / FULL);
      const right = Math.round((x1 * width) / FULL), bottom = Math.round((y1 * height) / FULL);
      context.clearRect(left, top, right - left, bottom - top);
      context.fillStyle = colour(level);
      context.fillRect(left, top, right - left, bottom - top);
    }
    canvas.dataset.drawn = view;
  };

  // A page may have many pictures: each is drawn when it comes near to what is seen.
  let current = "both";
  const near = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting && target.dataset.drawn !== current) draw(target, current);
    }
  }, { rootMargin: "400px" });
  const drawAll = (view) => {
    current = view;
    for (const canvas of document.querySelectorAll("canvas.heat")) { near.unobserve(canvas); near.observe(canvas); }
  };
  return { draw: (canvas) => draw(canvas, current), drawAll };
})();

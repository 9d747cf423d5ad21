// A feature's page: the heat map on and off, its views and opacity, enlarged pictures, keys for the neighbours.
"use strict";

(() => {
  const { remember, recall, on } = report;
  const root = document.documentElement;
  const toggle = document.getElementById("heat-toggle");
  const opacity = document.getElementById("heat-opacity");
  const lightbox = document.getElementById("lightbox");
  const views = [...document.querySelectorAll("input[name=heat-view]")];

  const showHeat = (shown) => {
    root.classList.toggle("heat-off", !shown);
    if (toggle) toggle.setAttribute("aria-pressed", String(shown));
    remember("heat", shown ? "on" : "off");
  };
  const setOpacity = (percent) => {
    root.style.setProperty("--heat-opacity", String(Number(percent) / 100));
    remember("opacity", percent);
  };
  const setView = (view) => {
    for (const input of views) input.checked = input.value === view;
    remember("heat-view", view);
    heat.drawAll(view);
    for (const canvas of lightbox.querySelectorAll("canvas")) heat.draw(canvas);
  };
  const chosenView = () => views.find((input) => input.checked)?.value ?? "both";

  if (toggle) {
    toggle.addEventListener("click", () => showHeat(root.classList.contains("heat-off")));
    opacity.addEventListener("input", () => { setOpacity(opacity.value); showHeat(true); });
    if (recall("opacity")) { opacity.value = recall("opacity"); setOpacity(opacity.value); }
    if (recall("heat") === "off") showHeat(false);
    on("h", () => showHeat(root.classList.contains("heat-off")));
  }
  for (const input of views) input.addEventListener("change", () => { setView(input.value); showHeat(true); });
  if (views.length) {
    on("v", () => { setView(views[(views.findIndex((input) => input.checked) + 1) % views.length].value); showHeat(true); });
    if (views.some((input) => input.value === recall("heat-view"))) setView(recall("heat-view"));
  }
  heat.drawAll(chosenView());

  for (const stage of document.querySelectorAll("button.stage")) {
    stage.addEventListener("click", () => {
      const frame = lightbox.querySelector(".frame");
      frame.replaceChildren(...[...stage.querySelectorAll("img, canvas")].map((layer) => layer.cloneNode()));
      frame.style.setProperty("--ratio", stage.style.getPropertyValue("--ratio"));
      for (const canvas of frame.querySelectorAll("canvas")) heat.draw(canvas);
      lightbox.showModal();
    });
  }
  document.getElementById("close").addEventListener("click", () => lightbox.close());
  lightbox.addEventListener("click", (event) => { if (event.target === lightbox) lightbox.close(); });

  const back = document.querySelector("[data-back]");
  if (back) {
    if (recall("index-hash")) back.href += recall("index-hash");
    back.addEventListener("click", () => remember("returning", "1"));
  }
  const follow = (selector) => {
    const link = lightbox.open ? null : document.querySelector(selector);
    if (!link) return false;
    link.click();
    return true;
  };
  on("ArrowLeft", () => follow("a[rel=prev]"));
  on("ArrowRight", () => follow("a[rel=next]"));
  on("u", () => follow("[data-back]"));
})();

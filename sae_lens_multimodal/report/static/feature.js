// A feature's page: the heat map on and off, its opacity, enlarged pictures, keys for the neighbours.
"use strict";

(() => {
  const root = document.documentElement;
  const toggle = document.getElementById("heat-toggle");
  const opacity = document.getElementById("heat-opacity");
  const lightbox = document.getElementById("lightbox");

  // A browser may refuse storage to pages opened from disk; the settings then last for one page only.
  const remember = (name, value) => { try { sessionStorage.setItem(name, value); } catch { /* see above */ } };
  const recall = (name) => { try { return sessionStorage.getItem(name); } catch { return null; } };

  const showHeat = (on) => {
    root.classList.toggle("heat-off", !on);
    if (toggle) toggle.setAttribute("aria-pressed", String(on));
    remember("heat", on ? "on" : "off");
  };
  const setOpacity = (percent) => {
    root.style.setProperty("--heat-opacity", String(Number(percent) / 100));
    remember("opacity", percent);
  };

  if (toggle) {
    toggle.addEventListener("click", () => showHeat(root.classList.contains("heat-off")));
    opacity.addEventListener("input", () => { setOpacity(opacity.value); showHeat(true); });
    if (recall("opacity")) { opacity.value = recall("opacity"); setOpacity(opacity.value); }
    if (recall("heat") === "off") showHeat(false);
  }

  for (const stage of document.querySelectorAll("button.stage")) {
    stage.addEventListener("click", () => {
      const frame = lightbox.querySelector(".frame");
      frame.replaceChildren(...[...stage.querySelectorAll("img")].map((image) => image.cloneNode()));
      frame.style.setProperty("--ratio", stage.style.getPropertyValue("--ratio"));
      lightbox.showModal();
    });
  }
  document.getElementById("close").addEventListener("click", () => lightbox.close());
  lightbox.addEventListener("click", (event) => { if (event.target === lightbox) lightbox.close(); });

  const back = document.querySelector("[data-back]");
  if (back && recall("index-hash")) back.href += recall("index-hash");

  const follow = (selector) => { const link = document.querySelector(selector); if (link) link.click(); };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select, textarea")) return;
    if (event.key === "h" && toggle) showHeat(root.classList.contains("heat-off"));
    if (lightbox.open) return;
    if (event.key === "ArrowLeft") follow("a[rel=prev]");
    if (event.key === "ArrowRight") follow("a[rel=next]");
  });
})();

"use strict";
// The charts' buttons have a title and take the focus, but do not say to a screen reader what they are.
function named(root) {
  for (const el of root.querySelectorAll("*")) {
    if (el.shadowRoot) named(el.shadowRoot);
    if (el.tabIndex !== 0 || !el.getRootNode().host) continue;
    el.role = el.title ? "button" : "img";
    el.ariaLabel = el.title || "chart; the tables have its numbers";
  }
}
function nameWhenDrawn() {
  if (globalThis.Bokeh?.documents.length && Bokeh.documents.every((drawn) => drawn.is_idle)) {
    document.querySelectorAll(".chart").forEach(named);
    restore();
    reloadLater();
    document.body.dataset.drawn = "true";
  } else {
    setTimeout(nameWhenDrawn, 50);
  }
}
// While a run goes, the page loads itself again. The state of the history outlives that: where the reader was, what was
// folded, which steps were zoomed to, and whether the page may do it again.
const kept = history.state ?? {};
const every = Number(document.documentElement.dataset.reload ?? 0);
function steps() {
  const charts = [...(globalThis.Bokeh?.index.roots ?? [])];
  return charts.map((view) => view.model.x_range).find((range) => range?.reset_start !== undefined);
}
function keep() {
  const range = steps();
  const zoomed = range && (range.start !== range.reset_start || range.end !== range.reset_end);
  const focused = document.activeElement;
  history.replaceState({
    scroll: scrollY,
    folds: [...document.querySelectorAll("details")].map((fold) => [fold.id, fold.open]),
    lists: [...document.querySelectorAll(".scroll")].map((list) => [list.id, list.scrollTop, list.scrollLeft]),
    steps: zoomed ? [range.start, range.end] : null,
    focus: focused?.id || focused?.closest("details")?.id || null,
    pressed: document.getElementById("reload")?.ariaPressed ?? null,
  }, "");
}
function restore() {
  if (!every || kept.scroll === undefined) return;
  for (const [id, open] of kept.folds) document.getElementById(id)?.toggleAttribute("open", open);
  for (const [id, top, left] of kept.lists) document.getElementById(id)?.scrollTo(left, top);
  if (kept.steps) [steps().start, steps().end] = kept.steps;
  const focused = document.getElementById(kept.focus);
  (focused?.localName === "details" ? focused.querySelector("summary") : focused)?.focus({ preventScroll: true });
  scrollTo({ top: kept.scroll, behavior: "instant" });
}
if (every) {
  history.scrollRestoration = "manual";
  const button = document.getElementById("reload");
  button.ariaPressed = kept.pressed ?? "true";
  button.addEventListener("click", () => { button.ariaPressed = String(button.ariaPressed !== "true"); });
}
// Once all is drawn: a slow machine would else never see a chart.
function reloadLater() {
  if (!every) return;
  setInterval(() => {
    if (document.getElementById("reload").ariaPressed !== "true") return;
    keep();
    location.reload();
  }, 1000 * every);
}
(async () => {
  const packed = document.getElementById("packed").textContent.trim();
  if (packed === "") return reloadLater();
  const bytes = (await fetch("data:application/gzip;base64," + packed)).body;
  const script = document.createElement("script");
  script.textContent = await new Response(bytes.pipeThrough(new DecompressionStream("gzip"))).text();
  document.head.append(script);
  nameWhenDrawn();
})().catch((error) => {
  document.getElementById("no-charts").hidden = false;
  reloadLater();
  throw error;
});

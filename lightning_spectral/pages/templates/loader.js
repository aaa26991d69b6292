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
    document.body.dataset.drawn = "true";
  } else {
    setTimeout(nameWhenDrawn, 50);
  }
}
(async () => {
  const packed = document.getElementById("packed").textContent.trim();
  if (packed === "") return;
  const bytes = (await fetch("data:application/gzip;base64," + packed)).body;
  const script = document.createElement("script");
  script.textContent = await new Response(bytes.pipeThrough(new DecompressionStream("gzip"))).text();
  document.head.append(script);
  nameWhenDrawn();
})().catch((error) => {
  document.getElementById("no-charts").hidden = false;
  throw error;
});

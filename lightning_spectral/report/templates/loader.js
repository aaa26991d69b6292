"use strict";
(async () => {
  const packed = document.getElementById("packed").textContent.trim();
  if (packed === "") return;
  const bytes = (await fetch("data:application/gzip;base64," + packed)).body;
  const script = document.createElement("script");
  script.textContent = await new Response(bytes.pipeThrough(new DecompressionStream("gzip"))).text();
  document.head.append(script);
})().catch((error) => {
  document.getElementById("no-charts").hidden = false;
  throw error;
});

(() => {
  let zoom = 1;
  // Names that would be cut off are left out; the bar's title has them.
  const fit = () => {
    for (const name of document.querySelectorAll(".plot .name")) {
      name.style.display = "";
      const room = name.parentNode.querySelector("rect").getBoundingClientRect().width;
      if (name.getBoundingClientRect().width + 6 > room) name.style.display = "none";
    }
  };
  const apply = (factor, anchor) => {
    const before = zoom;
    zoom = Math.min(64, Math.max(1, zoom * factor));
    for (const place of document.querySelectorAll(".scroll")) {
      const at = anchor === undefined ? place.clientWidth / 2 : anchor;
      const left = place.scrollLeft;
      place.firstElementChild.style.width = 100 * zoom + "%";
      place.scrollLeft = (left + at) * zoom / before - at;
    }
    fit();
  };
  addEventListener("resize", fit);
  fit();
  document.addEventListener("click", (event) => {
    const factor = event.target.dataset && event.target.dataset.zoom;
    if (factor) apply(factor === "0" ? 1 / zoom : Number(factor));
  });
  document.addEventListener("wheel", (event) => {
    const place = event.target.closest && event.target.closest(".scroll");
    if (!place || !(event.ctrlKey || event.altKey)) return;
    event.preventDefault();
    apply(event.deltaY < 0 ? 1.25 : 0.8, event.clientX - place.getBoundingClientRect().left);
  }, { passive: false });
  document.addEventListener("scroll", (event) => {
    if (!event.target.classList || !event.target.classList.contains("scroll")) return;
    for (const place of document.querySelectorAll(".scroll"))
      if (place !== event.target && Math.abs(place.scrollLeft - event.target.scrollLeft) > 1)
        place.scrollLeft = event.target.scrollLeft;
  }, true);
  const every = Number(document.body.dataset.refresh || 0);
  const refresh = async () => {
    try {
      const answer = await fetch(location.href, { cache: "no-store" });
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      const open = new Set([...document.querySelectorAll("details[open]")].map((d) => d.id));
      document.querySelector("main").replaceWith(page.querySelector("main"));
      for (const d of document.querySelectorAll("details")) if (open.has(d.id)) d.open = true;
      const kept = zoom; zoom = 1; apply(kept);
      if (!page.body.dataset.refresh) return;
    } catch (error) { /* the server has ended: what is shown stays */ }
    setTimeout(refresh, every);
  };
  if (every) setTimeout(refresh, every);
})();

// Shows the values under the pointer; the charts are there without it.
for (const svg of document.querySelectorAll("svg.chart")) {
  const [x0, x1, left, right] = svg.dataset.x.split(",").map(Number);
  const lines = JSON.parse(svg.dataset.points);
  const unit = svg.dataset.unit;
  const card = svg.parentElement;
  let tip, cross;
  const nearest = (xs, x) => {
    let low = 0, high = xs.length - 1;
    while (high - low > 1) { const mid = (low + high) >> 1; if (xs[mid] < x) low = mid; else high = mid; }
    return Math.abs(xs[low] - x) <= Math.abs(xs[high] - x) ? low : high;
  };
  const leave = () => { tip?.remove(); cross?.remove(); tip = cross = undefined; };
  const move = (event) => {
    const box = svg.getBoundingClientRect();
    const scale = box.width / svg.viewBox.baseVal.width;
    const at = (event.clientX - box.left) / scale;
    const x = x0 + (at - left) / (right - left) * (x1 - x0);
    const found = lines.filter(([, xs]) => xs.length).map(([name, xs, ys]) => { const i = nearest(xs, x); return [name, xs[i], ys[i]]; });
    if (!found.length) return;
    const best = found.reduce((a, b) => Math.abs(a[1] - x) <= Math.abs(b[1] - x) ? a : b)[1];
    const place = left + (best - x0) / (x1 - x0) * (right - left);
    if (!tip) {
      tip = document.createElement("div"); tip.className = "tip"; card.append(tip);
      cross = document.createElementNS("http://www.w3.org/2000/svg", "path"); cross.setAttribute("class", "cross"); svg.append(cross);
    }
    cross.setAttribute("d", `M${place} 14V240`);
    const near = found.filter(([, px]) => Math.abs(px - best) <= (x1 - x0) / 100);
    const head = unit === "step" ? `step ${best}` : `${best.toFixed(2)} ${unit}`;
    tip.replaceChildren(...[head, ...near.map(([name, , y]) => `${name}: ${y}`)].map((text) => {
      const row = document.createElement("div"); row.textContent = text; return row;
    }));
    const middle = svg.offsetLeft || box.left - card.getBoundingClientRect().left;
    const where = middle + place * scale;
    tip.style.top = `${box.top - card.getBoundingClientRect().top + 14}px`;
    tip.style.left = where > box.width / 2 ? `${where - tip.offsetWidth - 10}px` : `${where + 10}px`;
  };
  svg.addEventListener("pointermove", move);
  svg.addEventListener("pointerleave", leave);
}

// ---- samples ----

const INFERNO = [
  [0, 0, 4],
  [31, 12, 72],
  [85, 15, 109],
  [136, 34, 106],
  [186, 54, 85],
  [227, 89, 51],
  [249, 140, 10],
  [249, 201, 50],
  [252, 255, 164],
];
const HEAT = Uint8Array.from({ length: 256 * 3 }, (_, i) => {
  const at = (Math.floor(i / 3) / 255) * (INFERNO.length - 1);
  const [low, high] = [INFERNO[Math.floor(at)], INFERNO[Math.ceil(at)]];
  return low[i % 3] + (high[i % 3] - low[i % 3]) * (at % 1);
});
const SHOWN = 12; // cards shown at first
const chosen = () => rates.length - 1 - Number($("threshold").value); // the threshold rises to the right
const state = () => Number($("state").value);

/** Pixel threshold of a sample after the last step (1) or the step that learned its object (0). */
function pixelThreshold({ object, pixel_thresholds }, stage) {
  return ($("decided").checked ? pixel_thresholds[stage] : page.thresholds[object][stage][chosen()]) ?? null;
}

/** A chip with the decision about a sample after the last step; null without decisions. */
function verdict({ anomalous, alarm }) {
  if (!results.decisions?.length) return null;
  const text = alarm ? (anomalous ? "found" : "false alarm") : anomalous ? "missed" : "passed";
  return h("span", { class: `chip ${alarm === anomalous ? "" : "wrong"}` }, text);
}

/** Values of a map at every pixel, in units of the score. */
function upsampled({ pixels, side, low, high }, [height, width]) {
  const values = Uint8Array.from(atob(pixels), (byte) => byte.charCodeAt(0));
  const all = new Float32Array(height * width);
  const near = (i, size) => {
    const at = Math.min(Math.max(((i + 0.5) * side) / size - 0.5, 0), side - 1);
    return [Math.floor(at), Math.min(Math.floor(at) + 1, side - 1), at % 1];
  };
  const across = Array.from({ length: width }, (_, x) => near(x, width));
  for (let y = 0; y < height; y++) {
    const [up, down, v] = near(y, height);
    across.forEach(([left, right, u], x) => {
      const above = values[up * side + left] * (1 - u) + values[up * side + right] * u;
      const below = values[down * side + left] * (1 - u) + values[down * side + right] * u;
      all[y * width + x] = low + ((above * (1 - v) + below * v) / 255) * (high - low);
    });
  }
  return all;
}

function makeCard(sample) {
  const [height, width] = sample.size;
  const canvas = () => h("canvas", { width, height });
  const [mask, map] = [canvas(), canvas()];
  const image = (source, alt) => h("img", { src: source, alt, loading: "lazy" });
  const truth = () =>
    s("svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" }, s("path", { d: sample.truth }));
  const panel = (name, ...layers) =>
    h("figure", {}, h("div", { class: "picture" }, ...layers), h("figcaption", {}, name));
  const label = sample.anomalous ? "anomalous" : "good";
  const coverage = h("dd");
  const element = h(
    "article",
    { class: "card" },
    h(
      "header",
      {},
      h("h3", {}, sample.object),
      h("span", { class: `chip ${label}` }, sample.defect),
      h("span", { class: "chip" }, sample.pick),
      verdict(sample),
      h(
        "button",
        {
          type: "button",
          "aria-label": `Enlarge ${sample.object} ${sample.id}`,
          "aria-pressed": "false",
          onclick: (event) => {
            event.currentTarget.setAttribute("aria-pressed", String(element.classList.toggle("wide")));
          },
        },
        "⤢",
      ),
    ),
    h(
      "div",
      { class: "panels" },
      panel("RGB", image(sample.rgb, `${sample.object}, ${sample.defect}`)),
      sample.relief ? panel("relief of depth", image(sample.relief, `depth of ${sample.object}, ${sample.defect}`)) : null,
      panel(sample.truth ? "ground truth and mask" : "mask", image(sample.rgb, ""), mask, truth()),
      panel("anomaly map", map, truth()),
    ),
    h(
      "dl",
      { class: "quiet" },
      h("dt", {}, "image"),
      h("dd", {}, `${sample.id} · rank ${sample.rank.join(" of ")} of its kind`),
      h("dt", {}, "score"),
      h(
        "dd",
        {},
        ...names.flatMap((name, i) => [
          i ? " · " : "",
          h("b", { style: `color: var(--color); ${colour(name)}`, title: name }, sample.scores[name].toPrecision(4)),
        ]),
      ),
      h("dt", {}, "mask"),
      coverage,
    ),
  );

  let truthPixels = null;
  const values = [];
  const card = { sample, element, label, dirty: true, near: false };
  card.draw = () => {
    card.dirty = false;
    const stage = state();
    values[stage] ??= upsampled(sample.maps[stage], sample.size);
    const threshold = pixelThreshold(sample, stage);
    const low = Math.min(...sample.maps.map((quantised) => quantised.low));
    const high = Math.max(...sample.maps.map((quantised) => quantised.high));
    const over = values[stage].map((value) => isDefined(threshold) && value > threshold);
    const [masked, heat] = [new ImageData(width, height), new ImageData(width, height)];
    values[stage].forEach((value, i) => {
      const level = Math.round((255 * (value - low)) / (high - low || 1));
      heat.data.set(HEAT.subarray(3 * level, 3 * level + 3), 4 * i);
      heat.data[4 * i + 3] = 255;
      if (!over[i]) return;
      const inside = over[i - 1] && over[i + 1] && over[i - width] && over[i + width];
      masked.data.set([255, 176, 0, inside ? 85 : 255], 4 * i);
    });
    mask.getContext("2d").putImageData(masked, 0, 0);
    map.getContext("2d").putImageData(heat, 0, 0);
    if (!truthPixels) {
      const context = new OffscreenCanvas(width, height).getContext("2d");
      context.fill(new Path2D(sample.truth), "evenodd");
      truthPixels = context
        .getImageData(0, 0, width, height)
        .data.filter((_, i) => i % 4 === 3)
        .map((alpha) => alpha > 127);
    }
    let [defect, both, all] = [0, 0, 0];
    over.forEach((marked, i) => {
      defect += truthPixels[i];
      all += marked;
      both += marked && truthPixels[i];
    });
    const normal = `${percent((all - both) / (width * height - defect))} of normal pixels`;
    coverage.textContent = defect ? `${percent(both / defect)} of the defect, ${normal}` : normal;
    if (!isDefined(threshold)) coverage.textContent = "no threshold";
  };
  return card;
}

function samples() {
  const cards = page.samples.map(makeCard);
  const options = (values) => [
    h("option", { value: "" }, "all"),
    ...[...new Set(values)].map((value) => h("option", {}, value)),
  ];
  $("by-object").append(...options(page.samples.map(({ object }) => object)));
  $("by-kind").append(
    ...options(
      page.samples.map(({ defect }) => defect).sort((a, b) => (b === "good") - (a === "good") || a.localeCompare(b)),
    ),
  );
  $("threshold").max = rates.length - 1;
  $("threshold").value = rates.length - 1 - rates.findIndex((rate) => rate >= 0.01);
  $("state-label").hidden = steps === 1;

  let waiting = false;
  const refresh = () => {
    if (waiting) return; // draws visible cards only, once per frame
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      for (const card of cards) if (card.near && card.dirty) card.draw();
    });
  };
  const watcher = new IntersectionObserver(
    (entries) => {
      for (const { target, isIntersecting } of entries)
        cards.find(({ element }) => element === target).near = isIntersecting;
      refresh();
    },
    { rootMargin: "300px" },
  );
  for (const { element } of cards) watcher.observe(element);

  const redraw = () => {
    for (const card of cards) card.dirty = true;
    const overlap = (name) => mean(objects.map((object) => page.curves[object]?.[name].overlap[chosen()]));
    const overlaps = names.flatMap((name) => [" ", h("b", { style: colour(name), title: name }, show(overlap(name)))]);
    if ($("decided").checked) $("threshold-text").textContent = "calibrated on good images, per object";
    else
      $("threshold-text").replaceChildren(
        `${percent(rates[chosen()])} of normal pixels marked; share of defects found:`,
        ...overlaps,
      );
    $("threshold").setAttribute("aria-valuetext", $("threshold-text").textContent);
    for (const marker of document.querySelectorAll(".marker")) {
      marker.move(chosen());
      marker.style.visibility = $("decided").checked ? "hidden" : "visible"; // calibrated thresholds differ by object
    }
    refresh();
  };
  const score = ({ sample }) => sample.scores[runMethod];
  const orders = {
    object: () => 0,
    kind: (a, b) => (b.label === "good") - (a.label === "good") || a.sample.defect.localeCompare(b.sample.defect),
    worst: (a, b) => b.sample.rank[0] / b.sample.rank[1] - a.sample.rank[0] / a.sample.rank[1],
    high: (a, b) => score(b) - score(a),
    low: (a, b) => score(a) - score(b),
  };
  let limit = SHOWN;
  const arrange = () => {
    const filters = [
      ["by-object", ({ sample }) => sample.object],
      ["by-label", ({ label }) => label],
      ["by-kind", ({ sample }) => sample.defect],
      ["by-pick", ({ sample }) => sample.pick],
    ];
    const sorted = [...cards].sort(orders[$("sort").value]);
    const matching = sorted.filter((card) => filters.every(([id, get]) => !$(id).value || $(id).value === get(card)));
    const shown = new Set(matching.slice(0, limit));
    for (const card of cards) card.element.hidden = !shown.has(card);
    $("cards").append(...sorted.map(({ element }) => element));
    const leftOut = page.left_out ? ` (${page.left_out} more would make this file too large)` : "";
    $("count").textContent = `${shown.size} of ${cards.length} pictures${leftOut}`;
    $("more").hidden = matching.length <= limit;
    $("more").textContent = `Show all ${matching.length}`;
  };
  const showAll = () => {
    limit = Infinity;
    arrange();
  };
  $("more").addEventListener("click", showAll);
  for (const id of ["by-object", "by-label", "by-kind", "by-pick", "sort"]) $(id).addEventListener("change", arrange);
  $("state").addEventListener("change", redraw);
  $("threshold").addEventListener("input", () => {
    $("decided").checked = false;
    redraw();
  });
  $("decided").addEventListener("change", redraw);
  $("decided").checked = !!results.decisions?.length;
  $("decided-label").hidden = !$("decided").checked;
  $("controls").addEventListener("submit", (event) => event.preventDefault());
  addEventListener("beforeprint", () => {
    showAll();
    for (const card of cards) if (!card.element.hidden) card.draw();
    for (const details of document.querySelectorAll("details")) details.open = true;
  });
  arrange();
  redraw();
}

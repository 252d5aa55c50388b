// ---- elements; text is always inserted as text ----

function make(namespace, tag, attributes, children) {
  const element = document.createElementNS(namespace, tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}
const h = (tag, attributes = {}, ...children) => make("http://www.w3.org/1999/xhtml", tag, attributes, children);
const s = (tag, attributes = {}, ...children) => make("http://www.w3.org/2000/svg", tag, attributes, children);

const $ = (id) => document.getElementById(id);

const isDefined = (value) => value !== null && value !== undefined;
const show = (value, digits = 3) => (isDefined(value) ? value.toFixed(digits).replace(/^-(0\.?0*)$/, "$1") : "–");
const showInterval = ([low, high]) => (isDefined(low) && isDefined(high) ? `[${show(low, 2)}, ${show(high, 2)}]` : "");
const percent = (share) => `${Number((100 * share).toPrecision(2))} %`;
const mean = (values) => {
  const defined = values.filter(isDefined);
  return defined.length ? defined.reduce((sum, value) => sum + value, 0) / defined.length : null;
};

// ---- charts ----

function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const size = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const first = Math.ceil(low / size - 1e-6);
  return Array.from({ length: Math.floor(high / size + 1e-6) - first + 1 }, (_, i) => (first + i) * size);
}

/** Draws lines [{name, points, style, kind, label}] into a box, and redraws them when its width changes. */
function chart(box, { lines: allLines, x, y, height, label, extras = [], end = 12 }) {
  box.classList.add("chart");
  const readout = h("output");
  const lines = allLines.filter(({ points }) => points.length);
  const draw = () => {
    const width = Math.max(box.clientWidth, 140);
    const boxHeight = typeof height === "function" ? height(width) : height;
    const frame = { left: 38, right: width - end, top: 22, bottom: boxHeight - 32 };
    const along = ({ from, to, log }, start, stop) => {
      const scale = log ? Math.log10 : (value) => value;
      return (value) => start + ((scale(value) - scale(from)) / (scale(to) - scale(from) || 1)) * (stop - start);
    };
    const toX = along(x, frame.left, frame.right);
    const toY = along(y, frame.bottom, frame.top);
    const svg = s("svg", { viewBox: `0 0 ${width} ${boxHeight}`, role: "img", "aria-label": label });
    for (const value of y.ticks ?? ticks(y.from, y.to, 4)) {
      svg.append(
        s("line", { class: "grid", x1: frame.left, x2: frame.right, y1: toY(value), y2: toY(value) }),
        s("text", { x: frame.left - 6, y: toY(value) + 4, "text-anchor": "end" }, String(Number(value.toPrecision(3)))),
      );
    }
    for (const value of x.ticks ?? ticks(x.from, x.to, width < 260 ? 3 : 5)) {
      svg.append(
        s(
          "text",
          { x: toX(value), y: frame.bottom + 15, "text-anchor": "middle" },
          String(Number(value.toPrecision(3))),
        ),
      );
    }
    svg.append(
      s("text", { x: (frame.left + frame.right) / 2, y: boxHeight - 2, "text-anchor": "middle" }, x.name),
      s("text", { x: frame.left, y: 10 }, y.name),
    );
    for (const extra of extras) svg.append(extra(toX, toY, frame));
    const drawn = lines.map(({ points, style, kind = "" }) => {
      const place = points.map(([a, b]) => [toX(a), toY(b)]);
      const shape =
        place.length > 1
          ? s("polyline", { class: `line ${kind}`, style, points: place.map((point) => point.join()).join(" ") })
          : s("circle", { r: 4, cx: place[0][0], cy: place[0][1], style });
      svg.append(shape);
      return { place, shape };
    });
    const labels = lines
      .filter((line) => line.label)
      .map((line) => ({ ...line, at: toY(line.points.at(-1)[1]) }))
      .sort((a, b) => a.at - b.at);
    labels.forEach((entry, i) => {
      entry.at = Math.max(entry.at, i ? labels[i - 1].at + 13 : 0);
    });
    const overflow = labels.length ? Math.max(0, labels.at(-1).at - frame.bottom) : 0;
    for (const entry of labels) {
      svg.append(
        s("text", { class: "label", x: frame.right + 8, y: entry.at + 4 - overflow, style: entry.style }, entry.label),
      );
    }
    svg.addEventListener("pointermove", (event) => {
      const area = svg.getBoundingClientRect();
      const [a, b] = [event.clientX - area.left, event.clientY - area.top];
      let [nearest, line, index] = [40, null, 0];
      drawn.forEach(({ place }, i) =>
        place.forEach(([px, py], j) => {
          const distance = Math.hypot(px - a, py - b);
          if (distance < nearest) [nearest, line, index] = [distance, i, j];
        }),
      );
      drawn.forEach(({ shape }, i) => shape.classList.toggle("lit", i === line));
      readout.textContent =
        line === null
          ? ""
          : `${lines[line].name}: ${lines[line].points[index].map((value) => Number(value.toPrecision(3))).join(", ")}`;
    });
    svg.addEventListener("pointerleave", () => {
      readout.textContent = "";
    });
    box.replaceChildren(svg, readout);
  };
  let width = 0;
  new ResizeObserver(() => {
    if (box.clientWidth === width) return;
    width = box.clientWidth;
    draw();
  }).observe(box);
}

// ---- matrix of a metric, summary of forgetting ----

function forgetting(metric) {
  const all = names.flatMap((name) => methods[name].matrix[metric].flat()).filter(isDefined);
  const lowest = Math.min(0.5, ...all);
  const cell = (value, kind, title) => {
    const depth = isDefined(value) ? (value - lowest) / (1 - lowest) : 0;
    return h("td", { class: kind, title, style: `--v: ${depth}` }, show(value));
  };
  const rows = (name) =>
    methods[name].matrix[metric].map((_, step) => {
      const values = row(name, metric, step);
      return h(
        "tr",
        { style: `--heat: var(--color); ${colour(name)}` },
        h("th", { scope: "row" }, `step ${step}`),
        ...columns.map(([first, object], i) =>
          first > step
            ? h("td", { class: "unseen", title: `${object} is learned in step ${first}` })
            : cell(values[i], first === step ? "first" : "", `${name}, ${object}, after step ${step}`),
        ),
        cell(mean(values), "mean", `${name}, mean after step ${step}`),
      );
    });
  $("matrix").replaceChildren(
    h(
      "thead",
      {},
      h(
        "tr",
        {},
        h("th", { scope: "col" }, "after"),
        ...[...objects, "mean"].map((name) => h("th", { scope: "col" }, h("span", {}, name))),
      ),
    ),
    ...names.map((name) =>
      h(
        "tbody",
        {},
        h(
          "tr",
          {},
          h("th", { class: "name", scope: "rowgroup", colspan: columns.length + 2, style: colour(name) }, name),
        ),
        ...rows(name),
      ),
    ),
  );

  const figures = Object.keys(page.figures);
  $("summary").replaceChildren(
    h(
      "thead",
      {},
      h("tr", {}, h("th", {}, metrics[metric]), ...figures.map((figure) => h("th", { scope: "col" }, figure))),
    ),
    h(
      "tbody",
      {},
      ...names.map((name) =>
        h(
          "tr",
          { style: colour(name) },
          h("th", { scope: "row" }, name),
          ...figures.map((figure) => h("td", {}, show(methods[name].summary[metric][figure]))),
        ),
      ),
    ),
  );

  const path = (name, i) =>
    methods[name].matrix[metric]
      .map((_, step) => [step, row(name, metric, step)[i]])
      .filter(([, value]) => isDefined(value));
  const means = (name) =>
    methods[name].matrix[metric]
      .map((_, step) => [step, mean(row(name, metric, step))])
      .filter(([, value]) => isDefined(value));
  const lines = [
    ...objects.map((name, i) => ({
      name,
      label: name,
      points: path(runMethod, i),
      kind: "thin",
      style: `--color: oklch(0.62 0.13 ${Math.round((360 * i) / objects.length)})`,
    })),
    ...baselines.map((name) => ({ name: `mean of ${name}`, points: means(name), style: colour(name) + dashed(name) })),
    { name: `mean of ${runMethod}`, points: means(runMethod), kind: "bold", style: colour(runMethod) },
  ];
  const low = Math.floor(Math.min(...lines.flatMap(({ points }) => points.map(([, value]) => value)), 0.99) * 10) / 10;
  const box = h("div");
  $("forgetting-chart").replaceChildren(box);
  chart(box, {
    lines,
    height: Math.max(300, 60 + 14 * objects.length),
    end: 128,
    label: `${metrics[metric]} of every object after every step; the table above holds the same numbers`,
    x: { from: 0, to: Math.max(steps - 1, 1), name: "step", ticks: Array.from({ length: steps }, (_, i) => i) },
    y: { from: low, to: 1, name: metrics[metric] },
  });
}

// ---- tables of text ----

function plainTable(table, [headers, ...rows]) {
  table.append(
    h("thead", {}, h("tr", {}, ...headers.map((name) => h("th", { scope: "col" }, name)))),
    h(
      "tbody",
      {},
      ...rows.map(([first, ...cells]) =>
        h("tr", {}, h("th", { scope: "row" }, first), ...cells.map((cell) => h("td", {}, cell))),
      ),
    ),
  );
}

// ---- tables that sort ----

function sortable(table, headers, rows) {
  const body = h("tbody");
  const heads = headers.map((name, i) =>
    h(
      "th",
      { scope: "col" },
      h(
        "button",
        {
          type: "button",
          onclick: () => {
            const up = heads[i].getAttribute("aria-sort") === (i ? "descending" : "ascending") ? -1 : 1;
            const direction = i ? -up : up; // numbers start with the highest
            for (const head of heads) head.removeAttribute("aria-sort");
            heads[i].setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
            const order = [...rows].sort(({ keys: { [i]: a } }, { keys: { [i]: b } }) =>
              !isDefined(a) || !isDefined(b)
                ? isDefined(b) - isDefined(a)
                : direction * (typeof a === "string" ? a.localeCompare(b) : a - b),
            );
            body.append(...order.map(({ element }) => element));
          },
        },
        name,
      ),
    ),
  );
  body.append(...rows.map(({ element }) => element));
  table.append(h("thead", {}, h("tr", {}, ...heads)), body);
}

function objectTable() {
  const shown = Object.keys(metrics).filter((metric) => metric !== "aupro_exact");
  const cell = (values, ends) => {
    const [ours, ...theirs] = values;
    const intervals = ends.map(showInterval);
    const wins = isDefined(ours) && theirs.every((value) => !isDefined(value) || ours > value);
    return h(
      "td",
      {},
      h("span", { class: wins && baselines.length ? "wins" : null, style: colour(runMethod) }, show(ours)),
      h("small", {}, intervals[0]),
      ...baselines.map((name, i) =>
        h("small", { style: colour(name), title: name }, h("b", {}, show(theirs[i])), ` ${intervals[i + 1]}`),
      ),
    );
  };
  const rows = columns.map(([step, name, column], i) => {
    const values = shown.map((metric) => names.map((method) => row(method, metric, steps - 1)[i]));
    const cells = shown.map((metric, j) =>
      cell(values[j], names.map((method) => methods[method].intervals[metric].objects[column])),
    );
    return {
      keys: [name, step, ...values.map(([ours]) => ours)],
      element: h("tr", {}, h("th", { scope: "row" }, name), h("td", {}, page.learned[name]), ...cells),
    };
  });
  sortable($("object-table"), ["object", "step", ...shown.map((metric) => metrics[metric])], rows);
  if (!shown.length) return;
  $("objects-note").replaceChildren(
    "Every cell: ",
    h("b", { style: colour(runMethod) }, runMethod),
    ...baselines.flatMap((name) => [", ", h("b", { style: `color: var(--color); ${colour(name)}` }, name)]),
    baselines.length ? "; ✓ where the method is better than every baseline." : ".",
    " [low, high]: 95 % bootstrap interval over test images, not over training seeds.",
  );
  $("object-table").append(
    h(
      "tfoot",
      {},
      h(
        "tr",
        {},
        h("th", { scope: "row" }, "mean"),
        h("td"),
        ...shown.map((metric) =>
          cell(
            names.map((name) => methods[name].summary[metric].final),
            names.map((name) => methods[name].intervals[metric].mean),
          ),
        ),
      ),
    ),
  );
}

/** Shares of images taken as unknown, for an evaluation with objects that were never learned. */
function neverLearned(share) {
  const flagged = Object.entries(results.unknown?.objects ?? {});
  if (!flagged.length) return "";
  const shares = flagged.map(([name, value]) => `${name} ${share(value)}`).join(", ");
  return (
    ` Taken as unknown: of objects never learned ${shares};` +
    ` of learned objects ${share(results.unknown.taken_as_unknown)}.`
  );
}

/** Thresholds from calibration images, and error rates of the decisions on test images. */
function decisions() {
  const last = results.decisions?.at(-1);
  if (!last) return;
  const rateNames = {
    false_alarms: "false alarms",
    misses: "misses",
    precision: "precision",
    recall: "recall",
    f1: "F1",
    taken_as_unknown: "unknown",
    recognised: "recognised",
  };
  const measured = (key) => objects.some((name) => isDefined(last.objects[name]?.test?.[key]));
  const shownRates = Object.keys(rateNames).filter(measured);
  const share = (value) => (isDefined(value) ? `${(100 * value).toFixed(1)} %` : "–");
  const limit = ({ threshold, interval, images }) =>
    h(
      "td",
      { title: `95 % interval ${interval.map((end) => end.toPrecision(4)).join(" to ")}, from ${images} images` },
      threshold.toPrecision(4),
    );
  const rows = objects
    .filter((name) => last.objects[name])
    .map((name) => {
      const { image, pixel, test = {} } = last.objects[name];
      const shares = shownRates.map((key) => test[key]);
      return {
        keys: [name, ...shares, image.false_alarm_bound, image.threshold, pixel.threshold, image.images],
        element: h(
          "tr",
          {},
          h("th", { scope: "row" }, name),
          ...shares.map((value) => h("td", {}, share(value))),
          h("td", {}, isDefined(image.false_alarm_bound) ? share(image.false_alarm_bound) : image.chosen ? "chosen" : "none"),
          limit(image),
          limit(pixel),
          h("td", {}, String(image.images)),
        ),
      };
    });
  const rateHeaders = shownRates.map((key) => rateNames[key]);
  const thresholdHeaders = ["false-alarm bound", "image threshold", "pixel threshold", "calibration images"];
  $("decisions-note").textContent =
    "After the last step, at thresholds set by good calibration images for a false-alarm rate of" +
    ` ${share(1 - last.quantile)}. False alarm: a good image whose score exceeds the threshold; expected at a rate of at most the bound,` +
    " which more calibration images lower; none where thresholds come from training images." +
    " Miss: an anomalous image whose score does not. Precision: share of alarms that are right; recall: share of" +
    " anomalous images found; F1: their harmonic mean. Recognised: taken for the right object." +
    neverLearned(share);
  sortable($("decision-table"), ["object", ...rateHeaders, ...thresholdHeaders], rows);
  $("decisions").hidden = false;
  if (!shownRates.length) return;
  const means = shownRates.map((_, i) => h("td", {}, share(mean(rows.map(({ keys }) => keys[i + 1])))));
  const footer = h("tr", {}, h("th", { scope: "row" }, "mean"), ...means, h("td", { colspan: thresholdHeaders.length }));
  $("decision-table").append(h("tfoot", {}, footer));
}

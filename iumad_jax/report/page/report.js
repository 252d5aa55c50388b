const page = JSON.parse(document.getElementById("data").textContent);
const { results, methods, metrics, columns, rates } = page;
const names = Object.keys(methods); // the run's method, then its baselines
const runMethod = names[0]; // the method of the run's config
const baselines = names.slice(1);
const objects = columns.map(([, name]) => name);
const steps = results.matrix.i_auroc.length;
const colour = (method) => `--color: var(--method-${names.indexOf(method) % 4});`;
const DASHES = ["", "--dash: dashed; --stroke-dash: 7 4;", "--dash: dotted; --stroke-dash: 2 4;", "--dash: dashed; --stroke-dash: 12 3 2 3;"];
const dashed = (method) => DASHES[names.indexOf(method) % 4];
const row = (method, metric, step) => columns.map(([, , column]) => methods[method].matrix[metric][step][column]);

// ---- overview ----

function overview() {
  const { config, versions, seconds } = results;
  $("title").textContent = document.title;
  const minutes = Math.floor(seconds / 60);
  const time = minutes ? `${minutes} min ${Math.round(seconds % 60)} s` : `${seconds.toFixed(1)} s`;
  const count = (number, name) => `${number} ${name}${number === 1 ? "" : "s"}`;
  $("subtitle").textContent =
    `${count(objects.length, "object")} in ${count(steps, "step")} · seed ${config.seed} · ${time}`;
  const list = new Intl.ListFormat("en", { style: "long" }).format(baselines);
  const baselineNote = `${list}: training-free ${baselines.length > 1 ? "baselines" : "baseline"}.`;
  $("key").hidden = $("ranking").hidden = !Object.keys(metrics).length;
  $("key").textContent =
    "Means over objects after the last step; 1 is perfect. I-AUROC: anomalous above good images (0.5 is chance)." +
    " P-AUROC: the same for pixels. AUPRO: mean share of a defect found, for up to 30 % of normal pixels marked." +
    " [low, high]: 95 % bootstrap interval over test images." +
    ` object: normal pixels of the object alone.${baselines.length ? ` ${baselineNote}` : ""}`;
  for (const metric of ["i_auroc", "aupro", "p_auroc_object", "aupro_object"].filter((key) => metrics[key])) {
    const figures = methods[runMethod].summary[metric];
    $("tiles").append(
      h(
        "div",
        { class: "tile" },
        h("h3", {}, metrics[metric]),
        h("strong", {}, show(figures.final)),
        h("span", { class: "quiet" }, showInterval(methods[runMethod].intervals[metric].mean)),
        h(
          "div",
          { class: "bars" },
          ...names.flatMap((name) => {
            const { final } = methods[name].summary[metric];
            const bar = h("i", { "aria-hidden": "true", style: `${colour(name)} --v: ${final ?? 0}` });
            return [h("span", {}, name), bar, h("span", {}, show(final))];
          }),
        ),
        h("p", { class: "quiet" }, isDefined(figures.fm)
          ? `forgetting (fm) ${show(figures.fm)} · right after learning (new) ${show(figures.new)}`
          : "a single step: nothing to forget"),
      ),
    );
  }
  $("remarks").append(...page.remarks.map((remark) => h("li", {}, remark)));
  for (const legend of document.querySelectorAll(".legend.methods")) {
    legend.append(...names.map((name) => h("span", { style: colour(name) + dashed(name) }, name)));
  }
  const facts = { Experiment: null, Versions: versions, Stored: {} };
  for (const [name, method] of [[runMethod, results], ...Object.entries(results.baselines ?? {})]) {
    if (isDefined(method.bytes)) facts.Stored[name] = `${(method.bytes / 1e6).toFixed(1)} MB`;
  }
  facts.Experiment = {
    method: runMethod,
    dataset: config.dataset.name,
    modality: config.modality,
    protocol: results.protocol,
    "objects by step": results.steps
      .slice(0, steps)
      .map((step) => step.join(", "))
      .join(" | "),
    seconds: seconds.toFixed(1),
  };
  for (const [title, values] of Object.entries(facts)) {
    if (!Object.keys(values).length) continue;
    $("facts").append(
      h(
        "div",
        {},
        h("h3", {}, title),
        h(
          "dl",
          { class: "quiet" },
          ...Object.entries(values).flatMap(([key, value]) => [h("dt", {}, key), h("dd", {}, String(value))]),
        ),
      ),
    );
  }
  const flat = (tree, prefix = "") =>
    Object.entries(tree).flatMap(([key, value]) =>
      isDefined(value) && typeof value === "object" ? flat(value, `${prefix}${key}.`) : [[prefix + key, value]],
    );
  $("config").append(
    h(
      "tbody",
      {},
      ...flat(config).map(([key, value]) =>
        h("tr", {}, h("th", { scope: "row" }, key), h("td", {}, JSON.stringify(value))),
      ),
    ),
  );
}

// ---- curves ----

function curves() {
  for (const [, object, column] of columns) {
    const byMethod = page.curves[object];
    if (!byMethod) continue; // an object without test images
    const last = (metric, name) => show(methods[name].matrix[metric][steps - 1][column]);
    const line = (name, points) => ({
      name,
      points,
      style: colour(name) + dashed(name),
      kind: name === runMethod ? "bold" : "",
    });
    const side = (title, metric, options) => {
      const box = h("div");
      const empty = options.lines.every(({ points }) => !points.length);
      const values = names.map((name) => h("b", { style: colour(name), title: name }, last(metric, name)));
      const element = h(
        "figure",
        {},
        h("figcaption", {}, title, h("span", {}, ...values)),
        empty ? h("p", { class: "quiet" }, "undefined") : box,
      );
      return {
        element,
        start: () =>
          empty || chart(box, { height: (width) => width, label: `${title} curves of ${object}`, ...options }),
      };
    };
    const order = [...baselines, runMethod];
    const roc = side("I-AUROC", "i_auroc", {
      lines: order.map((name) =>
        line(
          name,
          byMethod[name].roc[0].map((x, i) => [x, byMethod[name].roc[1][i]]),
        ),
      ),
      x: { from: 0, to: 1, name: "false alarms" },
      y: { from: 0, to: 1, name: "anomalous images found" },
      extras: [(x, y) => s("line", { class: "chance", x1: x(0), y1: y(0), x2: x(1), y2: y(1) })],
    });
    const pro = side("AUPRO", "aupro", {
      lines: order.map((name) =>
        line(
          name,
          byMethod[name].overlap.flatMap((y, i) => (isDefined(y) ? [[rates[i], y]] : [])),
        ),
      ),
      x: { from: 0, to: rates.at(-1), name: "normal pixels marked" },
      y: { from: 0, to: 1, name: "share of defects found" },
      extras: [
        (x, y, frame) => {
          const mark = s("line", { class: "marker", y1: frame.top, y2: frame.bottom });
          mark.move = (index) => {
            for (const end of ["x1", "x2"]) mark.setAttribute(end, x(rates[index]));
          };
          mark.move(chosen());
          return mark;
        },
      ],
    });
    $("curve-grid").append(
      h("article", { class: "multiple" }, h("h3", {}, object), h("div", { class: "pair" }, roc.element, pro.element)),
    );
    roc.start();
    pro.start();
  }
}

// ---- training ----

function training() {
  const events = page.losses;
  const others = ["event", "step", "epoch", "gradient_norm", "update_norm"];
  const terms = [...new Set(events.flatMap(Object.keys))].filter((key) => !others.includes(key));
  terms.sort((a, b) => (b === "loss") - (a === "loss"));
  $("training-note").textContent = events.length
    ? "Mean losses of every epoch, step by step."
    : "This method is not trained by gradients.";
  if (!events.length) {
    for (const element of $("training").querySelectorAll("figure, details")) element.hidden = true;
    return;
  }
  const hue = (term) => Math.round((360 * terms.indexOf(term)) / terms.length);
  const style = (term) => `--color: ${term === "loss" ? "var(--ink)" : `oklch(0.62 0.14 ${hue(term)})`}`;
  const trained = [...new Set(events.map(({ step }) => step))];
  const lines = terms.flatMap((name) =>
    trained.map((step) => ({
      name,
      style: style(name),
      kind: name === "loss" ? "bold" : "",
      points: events.flatMap((event, i) => (event.step === step && event[name] > 0 ? [[i + 1, event[name]]] : [])),
    })),
  );
  const values = lines.flatMap(({ points }) => points.map(([, value]) => value));
  const powers = [Math.floor(Math.log10(Math.min(...values))), Math.ceil(Math.log10(Math.max(...values)))];
  const starts = events.flatMap(({ step }, i) => (i && step !== events[i - 1].step ? [i + 0.5] : []));
  chart($("loss-chart"), {
    lines,
    height: 280,
    label: "Losses over epochs; the table below holds the same numbers",
    x: { from: 1, to: Math.max(events.length, 2), name: "epochs of all steps" },
    y: {
      from: 10 ** powers[0],
      to: 10 ** powers[1],
      log: true,
      name: "loss",
      ticks: Array.from({ length: powers[1] - powers[0] + 1 }, (_, i) => 10 ** (powers[0] + i)),
    },
    extras: starts.map(
      (at, i) => (x, y, frame) =>
        s(
          "g",
          {},
          s("line", { class: "chance", x1: x(at), x2: x(at), y1: frame.top, y2: frame.bottom }),
          s("text", { x: x(at) + 4, y: frame.top + 8 }, `step ${trained[i + 1]}`),
        ),
    ),
  });
  const drawn = terms.filter((name) => events.some((event) => event[name] > 0)); // zero losses have no line
  $("loss-legend").append(...drawn.map((name) => h("span", { style: style(name) }, name)));
  $("losses").append(
    h("thead", {}, h("tr", {}, ...["step", "epoch", ...terms].map((name) => h("th", { scope: "col" }, name)))),
    h(
      "tbody",
      {},
      ...events.map((event) =>
        h(
          "tr",
          {},
          h("td", { class: "text" }, String(event.step)),
          h("td", {}, String(event.epoch)),
          ...terms.map((name) => h("td", {}, show(event[name], 5))),
        ),
      ),
    ),
  );
}

// ---- the page ----

function theme() {
  const choices = { auto: "◐ auto", light: "☀ light", dark: "☾ dark" };
  const order = Object.keys(choices);
  let current = "auto";
  const set = (name) => {
    current = name;
    document.documentElement.dataset.theme = name;
    $("theme").textContent = choices[name];
    $("theme").setAttribute("aria-label", `Colours: ${name}`);
  };
  $("theme").addEventListener("click", () => set(order[(order.indexOf(current) + 1) % order.length]));
  set(current);
}

const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));

/** Hides a section without content. */
function needs(section, content) {
  $(section).hidden = links.get(section).hidden = !content.length;
}

theme();
overview();
samples();
objectTable();
plainTable($("kind-table"), page.kinds);
plainTable($("history-table"), page.history);
decisions();
curves();
training();
needs("kinds", page.kinds.slice(1));
needs("history", page.history.slice(1));
needs("forgetting", Object.keys(metrics));
needs("curves", Object.keys(page.curves));
needs("samples", page.samples);
$("metric").append(...Object.entries(metrics).map(([key, label]) => h("option", { value: key }, label)));
$("metric").addEventListener("change", () => forgetting($("metric").value));
$("figures").append(
  ...Object.entries(page.figures).flatMap(([name, meaning]) => [h("dt", {}, name), h("dd", {}, meaning)]),
);
if ($("metric").value) forgetting($("metric").value);
const spy = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) links.get(target.id).classList.toggle("here", isIntersecting);
  },
  { rootMargin: "-30% 0px -69% 0px" },
);
for (const section of document.querySelectorAll("main > section")) spy.observe(section);

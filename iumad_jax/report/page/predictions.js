/** The page of predictions.html: cards of images by score, filtered by decision and object. */
function predictions() {
  const { workdir, step, count, images, damaged } = JSON.parse($("data").textContent);
  const atOnce = 60; // cards shown at first, and more with each click
  const orders = {
    high: (a, b) => b.relative_score - a.relative_score,
    low: (a, b) => a.relative_score - b.relative_score,
    name: (a, b) => a.image.localeCompare(b.image),
  };
  let shown = atOnce;

  const card = (image) =>
    h(
      "article",
      { class: "card" },
      h(
        "header",
        {},
        h("span", { class: `chip ${image.decision}` }, image.decision),
        h("span", { class: "chip" }, image.object),
        h("strong", {}, show(image.relative_score)),
      ),
      h(
        "a",
        { href: image.heatmap ? image.heatmap.split("/").map(encodeURIComponent).join("/") : null },
        h("img", { src: `data:image/jpeg;base64,${image.thumbnail}`, alt: `Heatmap of ${image.image}`, loading: "lazy" }),
      ),
      h("h3", {}, image.image),
      h("p", { class: "quiet" }, `score ${image.score.toPrecision(4)}, threshold ${image.threshold.toPrecision(4)}`),
    );

  const update = () => {
    const [decision, object] = [$("by-decision").value, $("by-object").value];
    const chosenImages = images
      .filter((image) => (!decision || image.decision === decision) && (!object || image.object === object))
      .toSorted(orders[$("sort").value]);
    $("cards").replaceChildren(...chosenImages.slice(0, shown).map(card));
    $("count").textContent = `${chosenImages.length} of ${images.length} images`;
    $("more").hidden = chosenImages.length <= shown;
    $("more").textContent = `Show ${Math.min(atOnce, chosenImages.length - shown)} more`;
  };
  const choices = (id, key) => {
    const values = [...new Set(images.map((image) => image[key]))].toSorted();
    $(id).append(h("option", { value: "" }, "all"), ...values.map((value) => h("option", { value }, value)));
  };
  choices("by-decision", "decision");
  choices("by-object", "object");
  for (const id of ["by-decision", "by-object", "sort"]) {
    $(id).addEventListener("change", () => {
      shown = atOnce;
      update();
    });
  }
  $("more").addEventListener("click", () => {
    shown += atOnce;
    update();
  });
  const part = images.length < count ? `; of ${count} images, the ${images.length} of the highest scores` : "";
  $("subtitle").textContent = `Model of ${workdir}, step ${step}${part}`;
  $("damaged").hidden = !damaged.length;
  $("reasons").append(...damaged.map(({ reason }) => h("li", {}, reason)));
  update();
}

if ($("predictions")) predictions();

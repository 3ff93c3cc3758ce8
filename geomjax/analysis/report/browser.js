// Shows the entries of a browser that hold the text and bear the label asked for.
for (const box of document.querySelectorAll(".browser")) {
  const find = box.querySelector("input");
  const pick = box.querySelector("select");
  const count = box.querySelector("output");
  const entries = [...box.querySelectorAll("details")];
  const texts = entries.map((entry) => entry.textContent.toLowerCase());
  const labels = entries.map((entry) => entry.dataset.labels.split(" "));
  const show = () => {
    const wanted = find.value.toLowerCase();
    let shown = 0;
    entries.forEach((entry, i) => {
      const fits = !pick.value || labels[i].includes(pick.value);
      entry.hidden = !(fits && texts[i].includes(wanted));
      shown += entry.hidden ? 0 : 1;
    });
    count.value = `${shown} of ${entries.length}`;
  };
  find.addEventListener("input", show);
  pick.addEventListener("change", show);
  show();
}

// Every chart is in the page without this; it adds the choice of which to see.
const form = document.querySelector(".filters");
if (form) {
  const panels = [...document.querySelectorAll(".trends > figure")];
  const shown = form.querySelector("output");
  const chosen = (name) => form.elements[name]?.value ?? "";
  const fits = (panel, name) => chosen(name) === "" || panel.dataset[name] === chosen(name);
  const apply = () => {
    const metric = chosen("metric");
    let count = 0;
    for (const panel of panels) {
      const known = metric === "" || (metric === "*main" ? panel.dataset.main === "1" : panel.dataset.metric === metric);
      const changed = !form.elements.changed.checked || panel.dataset.changed === "1";
      const fit = known && changed && ["entry", "model", "target", "host"].every((name) => fits(panel, name));
      panel.hidden = !fit;
      count += fit;
    }
    shown.textContent = `${count} of ${panels.length} charts`;
  };
  form.hidden = false;
  form.addEventListener("change", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  apply();
}

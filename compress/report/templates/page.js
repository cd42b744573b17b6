"use strict";
// The page is complete without this: it adds sorting to tables and quicker tooltips to charts.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const rising = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", rising ? "ascending" : "descending");
      const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const compare = (a, b) => {
        const [x, y] = [key(a), key(b)];
        if (x === "" || y === "") return (x === "") - (y === "");
        const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
        return rising ? order : -order;
      };
      table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
    });
  });
}

const tip = document.createElement("div");
tip.id = "tip";
tip.hidden = true;
document.body.append(tip);
for (const mark of document.querySelectorAll(".chart g[tabindex]")) {
  const title = mark.querySelector(":scope > title");
  const words = title.textContent;
  mark.setAttribute("aria-label", words);
  const show = () => {
    title.textContent = "";
    tip.textContent = words;
    tip.hidden = false;
    const anchor = (mark.querySelector(".mark") ?? mark).getBoundingClientRect();
    const box = tip.getBoundingClientRect();
    const left = Math.min(Math.max(8, anchor.left + anchor.width / 2 - box.width / 2), innerWidth - box.width - 8);
    tip.style.left = left + "px";
    tip.style.top = (anchor.top > box.height + 16 ? anchor.top - box.height - 8 : anchor.bottom + 8) + "px";
  };
  const hide = () => {
    title.textContent = words;
    tip.hidden = true;
  };
  mark.addEventListener("pointerenter", show);
  mark.addEventListener("focus", show);
  mark.addEventListener("pointerleave", hide);
  mark.addEventListener("blur", hide);
}

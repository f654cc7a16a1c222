// Tables sort by a click or a key on their headings; without scripts they just stay in order.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = (row) => row.cells[column].dataset.value;
      const compare = (a, b) =>
        a === "" || b === "" ? (a === "") - (b === "")
        : (down ? -1 : 1) * a.localeCompare(b, "en", { numeric: true });
      const numeric = (a, b) =>
        a === "" || b === "" || isNaN(a) || isNaN(b) ? compare(a, b) : (down ? b - a : a - b);
      body.append(...[...body.rows].sort((a, b) => numeric(value(a), value(b))));
    });
  });
}

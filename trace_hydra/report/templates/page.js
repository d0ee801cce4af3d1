"use strict";
// Without script every table and answer is there too; this adds sorting, filters, and open details in print.
(() => {
  const number = cell => cell.dataset.value === undefined ? null : Number(cell.dataset.value);
  const compare = (one, other) => {
    const a = number(one), b = number(other);
    if (a !== null && b !== null) return a - b;
    if (a === null && b === null) return one.textContent.localeCompare(other.textContent, "en", { numeric: true });
    return a === null ? 1 : -1;
  };

  function sort(table, place, button) {
    const heads = [...table.tHead.rows[0].cells], head = heads[place];
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of heads) if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const body = table.tBodies[0];
    const missing = row => row.cells[place].querySelector(".none") !== null;
    const rows = [...body.rows].sort((one, other) => {
      if (missing(one) !== missing(other)) return missing(one) ? 1 : -1;  // what is not known stays last
      const order = compare(one.cells[place], other.cells[place]);
      return down ? -order : order;
    });
    body.append(...rows);
  }

  function sortable(table) {
    [...table.tHead.rows[0].cells].forEach((head, place) => {
      const label = head.querySelector(".label"), button = document.createElement("button");
      button.type = "button";
      button.append(...label.childNodes);
      label.replaceChildren(button);
      head.setAttribute("aria-sort", "none");
      button.addEventListener("click", () => sort(table, place, button));
    });
  }

  function filters(table) {
    const heads = [...table.tHead.rows[0].cells], rows = [...table.tBodies[0].rows];
    if (rows.length < (heads.some(head => "filter" in head.dataset) ? 6 : 25)) return;
    const bar = document.createElement("div"), said = document.createElement("p"), tests = [];
    bar.className = "filters";
    said.className = "note";
    said.setAttribute("role", "status");
    const add = (text, control) => {
      const label = document.createElement("label");
      label.append(text, control);
      bar.append(label);
      control.addEventListener("input", show);
    };
    const search = document.createElement("input");
    search.type = "search";
    add("Search", search);
    tests.push(row => row.textContent.toLowerCase().includes(search.value.trim().toLowerCase()));
    heads.forEach((head, place) => {
      if (!("filter" in head.dataset)) return;
      const values = [...new Set(rows.map(row => row.cells[place].textContent))].sort();
      if (values.length < 2) return;
      const select = document.createElement("select");
      select.append(new Option("all", "*"), ...values.map(value => new Option(value || "(none)", "=" + value)));
      add(head.querySelector(".label").textContent, select);
      tests.push(row => select.value === "*" || "=" + row.cells[place].textContent === select.value);
    });
    function show() {
      let seen = 0;
      for (const row of rows) {
        row.hidden = !tests.every(test => test(row));
        seen += !row.hidden;
      }
      said.textContent = `${seen} of ${rows.length} rows`;
    }
    const region = table.closest(".scroll");
    region.before(bar, said);
    show();
  }

  for (const table of document.querySelectorAll("table[data-sortable]")) {
    filters(table);
    sortable(table);
  }
  const closed = [];
  addEventListener("beforeprint", () => {
    for (const one of document.querySelectorAll("details:not([open]):not(.all)")) {
      one.open = true;
      closed.push(one);
    }
  });
  addEventListener("afterprint", () => {
    while (closed.length) closed.pop().open = false;
  });
})();

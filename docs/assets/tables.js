// Tables inside <div class="sortable">: click a column's head to sort, type to filter rows.
"use strict";

function cellText(row, column) {
  return row.cells[column].textContent.trim();
}

// Numbers by value, text by the alphabet; empty cells last, whatever the direction.
function compare(a, b, direction) {
  if (a === "" || b === "") return (a === "") - (b === "");
  const [x, y] = [Number(a), Number(b)];
  const order = Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, undefined, { numeric: true }) : x - y;
  return direction * order;
}

function sortBy(table, head) {
  const column = head.cellIndex;
  const rows = [...table.tBodies[0].rows];
  const numbers = rows.some((row) => cellText(row, column) !== "" && !Number.isNaN(Number(cellText(row, column))));
  const first = numbers ? "descending" : "ascending"; // the best figure on top
  const other = { ascending: "descending", descending: "ascending" };
  const next = head.ariaSort ? other[head.ariaSort] : first;
  for (const cell of table.tHead.rows[0].cells) cell.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", next);
  const direction = next === "ascending" ? 1 : -1;
  rows.sort((a, b) => compare(cellText(a, column), cellText(b, column), direction));
  table.tBodies[0].append(...rows);
}

// A row stays if it contains every word that was typed.
function filterRows(table, text, count) {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  const rows = [...table.tBodies[0].rows];
  for (const row of rows) {
    const content = row.textContent.toLowerCase();
    row.hidden = !words.every((word) => content.includes(word));
  }
  count.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} rows`;
}

function prepare(block) {
  const table = block.querySelector("table");
  for (const head of table.tHead.rows[0].cells) {
    head.dataset.column = head.cellIndex;
    head.tabIndex = 0;
    head.addEventListener("click", () => sortBy(table, head));
    head.addEventListener("keydown", (event) => event.key === "Enter" && sortBy(table, head));
  }
  if (table.tBodies[0].rows.length > 5) addFilter(block, table);
}

function addFilter(block, table) {
  const filter = document.createElement("input");
  filter.type = "search";
  filter.className = "table-filter";
  filter.placeholder = "Filter rows";
  filter.setAttribute("aria-label", "Filter rows");
  const count = document.createElement("span");
  count.className = "table-count";
  filter.addEventListener("input", () => filterRows(table, filter.value, count));
  block.prepend(filter, count);
  filterRows(table, "", count);
}

document.addEventListener("DOMContentLoaded", () => document.querySelectorAll(".sortable").forEach(prepare));

"use strict";
const rows = [...document.querySelectorAll("li[data-word]")];
const words = [...document.querySelectorAll("input[name=word]")];
const text = document.getElementById("text");
function filter() {
  const word = words.find((choice) => choice.checked).value, wanted = text.value.trim().toLowerCase();
  let count = 0;
  for (const row of rows) {
    row.hidden = (word && row.dataset.word !== word) || !row.textContent.toLowerCase().includes(wanted);
    count += !row.hidden;
  }
  for (const group of document.querySelectorAll("section[data-group]")) {
    group.hidden = !group.querySelector("li:not([hidden])");
  }
  document.getElementById("count").textContent = count === rows.length ? "" : `${count} of ${rows.length} clips shown`;
}
for (const choice of words) choice.onchange = filter;
text.oninput = filter;
document.getElementById("filter").hidden = false;
filter();

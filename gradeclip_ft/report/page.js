"use strict";
(() => {
  const root = document.getElementById("cases");
  const cases = [...root.querySelectorAll(".case")];
  const state = { case: 1, phrase: 1, method: 1 };

  const within = (value, most) => Math.min(Math.max(Math.trunc(value) || 1, 1), most);
  const count = (name) => new Set(
    [...cases[state.case - 1].querySelectorAll(".cell")].map((cell) => cell.dataset[name])).size;

  // The state is kept inside its limits, shown, and written behind the address's #.
  function choose(change, remember = true) {
    Object.assign(state, change);
    state.case = within(state.case, cases.length);
    state.phrase = within(state.phrase, count("phrase"));
    state.method = within(state.method, count("method"));
    cases.forEach((item, index) => item.classList.toggle("shown", index + 1 === state.case));
    show(cases[state.case - 1]);
    for (const [name, value] of [["case", state.case], [`phrase-${state.case}`, state.phrase], [`method-${state.case}`, state.method]]) {
      const radio = root.querySelector(`input[name="${name}"][value="${value}"]`);
      if (radio) radio.checked = true;
    }
    if (remember) history.replaceState(null, "", "#" + new URLSearchParams(state));
  }

  function show(item) {
    for (const cell of item.querySelectorAll(".cell")) {
      const now = Number(cell.dataset.phrase) === state.phrase && Number(cell.dataset.method) === state.method;
      cell.classList.toggle("now", now);
      cell.setAttribute("aria-pressed", now);
      if (!now) continue;
      item.querySelector(".frame").replaceChildren(cell.querySelector(".tile").cloneNode(true));
      item.querySelector(".stage .now").textContent = cell.dataset.name;
    }
    read(item, null);
  }

  // Value of the patch below the pointer, and its place on the colour bar.
  function read(item, event) {
    const heat = item.querySelector(".stage .heat"), needle = item.querySelector(".needle");
    let text = "";
    if (event && heat) {
      const [rows, columns] = heat.dataset.grid.split(" ").map(Number);
      const box = heat.getBoundingClientRect();
      const place = (share, number) => within(Math.floor(share * number) + 1, number) - 1;
      const row = place((event.clientY - box.top) / box.height, rows);
      const column = place((event.clientX - box.left) / box.width, columns);
      const value = Number(heat.dataset.values.split(" ")[row * columns + column]) / 100;
      text = `${value.toFixed(2)} here`;
      needle.style.left = `${100 * value}%`;
    }
    needle.style.display = text ? "block" : "none";
    item.querySelector(".reading").textContent = text;
  }

  function fade(percent) {
    root.style.setProperty("--opacity", percent / 100);
    for (const slider of root.querySelectorAll(".opacity")) slider.value = percent;
    for (const output of root.querySelectorAll(".percent")) output.textContent = `${percent} %`;
  }

  function box(shown) {
    root.classList.toggle("no-boxes", !shown);
    for (const input of root.querySelectorAll(".show-boxes")) input.checked = shown;
  }

  root.addEventListener("change", (event) => {
    const kind = event.target.name.split("-")[0];
    if (kind === "case") choose({ case: Number(event.target.value), phrase: 1 });
    else if (kind === "phrase" || kind === "method") choose({ [kind]: Number(event.target.value) });
    else if (event.target.classList.contains("show-boxes")) box(event.target.checked);
  });
  root.addEventListener("input", (event) => {
    if (event.target.classList.contains("opacity")) fade(event.target.value);
  });
  root.addEventListener("click", (event) => {
    const cell = event.target.closest(".cell");
    if (!cell) return;
    choose({ phrase: Number(cell.dataset.phrase), method: Number(cell.dataset.method) });
    cell.closest(".case").querySelector(".stage").scrollIntoView({ block: "nearest" });
  });
  for (const item of cases) {
    const stage = item.querySelector(".frame");
    for (const kind of ["pointermove", "pointerdown"]) stage.addEventListener(kind, (event) => read(item, event));
    stage.addEventListener("pointerleave", () => read(item, null));
  }
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const key = event.key.toLowerCase();
    const turn = (value, most, by) => ((value - 1 + by + most) % most) + 1;
    if (/^[1-9]$/.test(key)) choose({ phrase: Number(key) });
    else if (key === "m") choose({ method: turn(state.method, count("method"), 1) });
    else if (key === "n") choose({ case: turn(state.case, cases.length, 1), phrase: 1 });
    else if (key === "p") choose({ case: turn(state.case, cases.length, -1), phrase: 1 });
    else if (key === "b") box(root.classList.contains("no-boxes"));
  });

  const fromAddress = () => choose(Object.fromEntries(
    [...new URLSearchParams(location.hash.slice(1))].filter(([name]) => name in state)), false);
  state.method = Number(root.dataset.first);
  window.addEventListener("hashchange", fromAddress);
  fromAddress();
})();

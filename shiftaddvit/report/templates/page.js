"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];

  // Theme: the system's until somebody chooses; the choice is kept where the browser allows it.
  const root = document.documentElement, theme = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const remembered = () => { try { return localStorage.getItem("shiftaddvit-theme"); } catch { return null; } };
  const remember = value => { try { localStorage.setItem("shiftaddvit-theme", value); } catch { return; } };
  const isDark = () => root.dataset.theme ? root.dataset.theme === "dark" : system.matches;
  const label = () => { theme.textContent = isDark() ? "Light" : "Dark"; theme.setAttribute("aria-label", `Switch to ${isDark() ? "light" : "dark"} colours`); };
  if (["light", "dark"].includes(remembered())) root.dataset.theme = remembered();
  theme.hidden = false;
  label();
  system.addEventListener("change", label);
  theme.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; remember(root.dataset.theme); label(); });

  // Sorting: numbers first, cells without one always last.
  for (const button of all("button.sort")) {
    button.addEventListener("click", () => {
      const head = button.closest("th"), table = button.closest("table"), column = head.cellIndex, body = table.tBodies[0];
      const before = head.getAttribute("aria-sort"), first = button.dataset.better === "higher" ? "descending" : "ascending";
      const order = before === null ? first : before === "ascending" ? "descending" : "ascending";
      all("th", table).forEach(th => th.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1, numeric = head.classList.contains("number");
      const key = row => numeric ? (row.cells[column].dataset.value === undefined ? null : Number(row.cells[column].dataset.value)) : row.cells[column].textContent || null;
      const rows = [...body.rows].map(row => [key(row), row]);
      rows.sort(([a], [b]) => a === null || b === null ? (a === null) - (b === null) : sign * (numeric ? a - b : a.localeCompare(b)));
      body.append(...rows.map(([, row]) => row));
    });
  }
  const own = document.getElementById("own-only");
  if (document.querySelector("#ablation tr.has-own")) own.closest("label").hidden = false;
  own.addEventListener("change", () => document.body.classList.toggle("own-only", own.checked));

  // What a number or a mark says when it is pointed at or reached by keyboard.
  const tip = document.getElementById("tip");
  const show = (target, x, y) => {
    tip.textContent = target.dataset.tip;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    place(Math.max(6, Math.min(x + 12, innerWidth - box.width - 6)), y + 18 + box.height > innerHeight ? y - box.height - 10 : y + 18);
  };
  const place = (left, top) => { tip.style.left = `${left}px`; tip.style.top = `${top}px`; };
  const hide = () => { tip.hidden = true; };
  document.addEventListener("pointermove", event => {
    const target = event.target.closest("[data-tip]");
    if (target) show(target, event.clientX, event.clientY); else hide();
  });
  document.addEventListener("focusin", event => {
    const target = event.target.closest("[data-tip]");
    if (!target) return hide();
    const box = target.getBoundingClientRect();
    show(target, box.left + box.width / 2, box.bottom - 12);
  });
  document.addEventListener("keydown", event => { if (event.key === "Escape") hide(); });

  for (const button of all("button.copy")) {
    const area = button.closest("div").querySelector("textarea");
    button.hidden = false;
    button.addEventListener("click", async () => {
      area.select();
      try { await navigator.clipboard.writeText(area.value); button.textContent = "Copied"; } catch { button.textContent = "Selected: press Ctrl+C"; }
    });
  }

  // Token maps: runs of tokens along a row are one rectangle.
  const cells = (layer, digits, kind) => {
    const [rows, columns] = layer.grid;
    let path = "";
    for (let row = 0; row < rows; row++) {
      for (let column = 0; column < columns; column++) {
        const start = column;
        while (column < columns && layer.experts[digits[layer.prefix + row * columns + column]] === kind) column++;
        if (column > start) path += `M${start} ${row}h${column - start}v1h-${column - start}z`;
      }
    }
    return path;
  };
  const redraw = (svg, layer, digits) => {
    const [rows, columns] = layer.grid, use = svg.querySelector("use");
    svg.setAttribute("viewBox", `0 0 ${columns} ${rows}`);
    use.setAttribute("width", columns);
    use.setAttribute("height", rows);
    svg.querySelector(".to-mult").setAttribute("d", cells(layer, digits, "mult"));
    svg.querySelector(".to-shift").setAttribute("d", cells(layer, digits, "shift"));
    const across = [...Array(rows - 1).keys()].map(row => `M0 ${row + 1}h${columns}`), down = [...Array(columns - 1).keys()].map(column => `M${column + 1} 0v${rows}`);
    svg.querySelector(".lines").setAttribute("d", Math.max(rows, columns) > 28 ? "" : across.join("") + down.join(""));
  };
  const percent = (layer, digits) => Math.round(100 * [...digits].filter(digit => layer.experts[digit] === "shift").length / digits.length);
  const data = JSON.parse(document.getElementById("dispatch-data").textContent);
  for (const box of all(".dispatch")) {
    const found = data[Number(box.dataset.dispatch)], maps = all(".token-map", box), pick = box.querySelector(".pick");
    let picture = 0;
    const select = index => {
      const layer = found.layers[index];
      if (!layer.grid) return;
      pick.value = index;
      pick.setAttribute("aria-valuetext", layer.label);
      all(".choice", box).forEach(button => button.setAttribute("aria-pressed", String(Number(button.dataset.layer) === index)));
      all(".contact figure", box).forEach(figure => figure.classList.toggle("chosen", Number(figure.dataset.layer) === index));
      box.querySelector(".layer-name").textContent = layer.label;
      box.querySelector(".layer-module").textContent = layer.name;
      maps.forEach((figure, number) => {
        const digits = found.pictures[number][index], svg = figure.querySelector("svg"), name = figure.querySelector("b").textContent;
        if (!svg) return;
        redraw(svg, layer, digits);
        svg.setAttribute("aria-label", `${name}: ${percent(layer, digits)} % of its tokens on the shift expert`);
        figure.querySelector(".on-shift").textContent = `${percent(layer, digits)} % shift`;
      });
    };
    const open = number => {
      picture = number;
      maps.forEach((figure, index) => figure.classList.toggle("chosen", index === number));
      box.querySelector(".sheet-name").textContent = maps[number].querySelector("b").textContent;
      all(".contact figure", box).forEach(figure => {
        const index = Number(figure.dataset.layer), svg = figure.querySelector("svg");
        svg.querySelector("use").setAttribute("href", `#pic-${box.dataset.dispatch}-${number}`);
        redraw(svg, found.layers[index], found.pictures[number][index]);
      });
    };
    all(".choice", box).forEach(button => button.addEventListener("click", () => select(Number(button.dataset.layer))));
    pick.addEventListener("input", () => select(Number(pick.value)));
    box.querySelector(".veil").addEventListener("input", event => { box.className = box.className.replace(/ ?veil\d+/, "") + ` veil${event.target.value}`; });
    all("input[type=radio]", box).forEach(input => input.addEventListener("change", () => {
      box.classList.remove("show-mult", "show-shift");
      if (input.value !== "both") box.classList.add(`show-${input.value}`);
    }));
    maps.forEach((figure, number) => figure.querySelector(".whole").addEventListener("click", () => open(number)));
    box.querySelector(".controls").hidden = false;
    all(".hint", box).forEach(hint => { hint.hidden = false; });
    select(Number(box.dataset.layer));
    if (maps.length) open(picture);
  }

  // On paper everything is open.
  addEventListener("beforeprint", () => all("details:not(.take):not(.values):not(.source):not(.layered):not(.more):not(.aside)").forEach(details => { details.dataset.was = details.open; details.open = true; }));
  addEventListener("afterprint", () => all("details[data-was]").forEach(details => { details.open = details.dataset.was === "true"; }));
})();

// Sliders and switches. Without this script the page is whole, too.
"use strict";
const make = (tag, attributes = {}, ...inside) => {
  const e = Object.assign(document.createElement(tag), attributes);
  e.append(...inside);
  return e;
};
const still = matchMedia("(prefers-reduced-motion: reduce)");
let names = 0;

function slider(text, labels, start, show) {  // a range with its value in words
  const range = make("input", {type: "range", min: 0, max: labels.length - 1, id: `range-${++names}`});
  const said = make("output", {htmlFor: range.id});
  const set = i => {
    range.value = i;
    said.textContent = labels[i];
    range.setAttribute("aria-valuetext", labels[i]);
    show(i);
  };
  range.addEventListener("input", () => set(+range.value));
  set(start);
  const box = make("div", {className: "slider"},
                   make("label", {htmlFor: range.id}, text), range, said);
  return {box, set, get: () => +range.value};
}

function player(control, count, milliseconds) {  // a button that moves a slider to its end
  let timer = 0;
  const button = make("button", {type: "button"}, "Play");
  const stop = () => { clearInterval(timer); timer = 0; button.textContent = "Play"; };
  button.addEventListener("click", () => {
    if (timer) return stop();
    if (still.matches) return control.set(count() - 1);  // no motion: the end at once
    if (control.get() >= count() - 1) control.set(0);
    button.textContent = "Stop";
    timer = setInterval(() => {
      if (control.get() >= count() - 1) return stop();
      control.set(control.get() + 1);
    }, milliseconds);
  });
  return {button, stop};
}

// Frames: each picture of a figure shows one column of its sheet.
for (const figure of document.querySelectorAll("figure[data-frames]")) {
  const labels = JSON.parse(figure.dataset.frames), frames = figure.querySelectorAll(".frame");
  const control = slider(figure.dataset.label, labels, +figure.dataset.start, i => {
    for (const frame of frames) {
      const [, y, width, height] = frame.getAttribute("viewBox").split(" ");
      frame.setAttribute("viewBox", `${i * width} ${y} ${width} ${height}`);
    }
  });
  control.box.append(player(control, () => labels.length, 250).button);
  figure.querySelector(":scope > figcaption").before(control.box);
}

// A switch puts the wrong picture in the place of the right one.
for (const seen of document.querySelectorAll(".seen")) {
  const [right, wrong] = [".right", ".wrong"].map(kind => seen.querySelector(`figure${kind} use`));
  if (!right || !wrong) continue;
  const first = right.getAttribute("href"), caption = right.closest("figure").lastElementChild;
  const button = make("button", {type: "button", className: "switch"}, "Show the wrong one on the left");
  button.setAttribute("aria-pressed", "false");
  button.addEventListener("click", () => {
    const on = button.getAttribute("aria-pressed") === "false";
    button.setAttribute("aria-pressed", on);
    right.setAttribute("href", on ? wrong.getAttribute("href") : first);
    caption.textContent = on ? "wrong" : "right";
  });
  wrong.closest("figure").after(button);
}

// A filter for the symptoms: rows that lack one of the words are hidden.
const symptoms = document.querySelector(".symptoms"), said = make("output", {htmlFor: "filter"});
const filter = make("input", {type: "search", id: "filter", placeholder: "grey, blurry, noise remains, NaN"});
filter.addEventListener("input", () => {
  const words = filter.value.toLowerCase().match(/[^\s,;]+/g) ?? [], rows = [...symptoms.tBodies[0].rows];
  for (const row of rows) row.hidden = !words.every(word => row.textContent.toLowerCase().includes(word));
  said.textContent = words.length ? `${rows.filter(row => !row.hidden).length} of ${rows.length}` : "";
});
symptoms.closest(".wide").before(make("div", {className: "slider"}, make("label", {htmlFor: "filter"}, "Only rows with"), filter, said));

// Symbols within longer formulas: the same line, and the same link, as for those that stand alone.
const known = JSON.parse(document.getElementById("symbols").dataset.symbols);
const tip = make("div", {className: "tip", role: "tooltip", hidden: true});
document.body.append(tip);
const symbol = e => {
  for (let p = e.closest?.("msub, msup, msubsup, mover, mi"); p; p = p.parentElement?.closest("msub, msup, msubsup, mover")) {
    const text = p.textContent, base = p.firstElementChild?.textContent ?? text;
    const found = known[text] ?? known[base + "_"];
    if (found && !p.closest("a, summary, label")) return found;
  }
};
document.addEventListener("pointerover", event => {
  const found = symbol(event.target);
  tip.hidden = !found;
  if (!found) return;
  tip.textContent = found[1];
  const at = event.target.getBoundingClientRect();
  tip.style.top = `${at.bottom + scrollY + 6}px`;
  tip.style.left = `${Math.max(8, Math.min(at.left, innerWidth - tip.offsetWidth - 16))}px`;
});
document.addEventListener("click", event => {
  const found = symbol(event.target);
  if (found) location.hash = found[0];
});

document.getElementById("contents").addEventListener("click", event => {  // a link closes the contents
  if (event.target.closest("a") && event.currentTarget.matches(":popover-open")) event.currentTarget.hidePopover();
});

// What scrolls by itself can be reached from the keyboard.
const reach = () => {
  for (const e of document.querySelectorAll(".formula > span:first-child"))
    e.scrollWidth > e.clientWidth ? e.tabIndex = 0 : e.removeAttribute("tabindex");
};
addEventListener("resize", reach);
document.fonts.ready.then(() => {
  symptoms.style.display = "none";  // Firefox leaves accents where the font before had them
  symptoms.offsetHeight;
  symptoms.style.display = "";
  reach();
});

"use strict";
(() => {
  const STEP = 10;
  const data = JSON.parse(document.getElementById("responses-data").textContent);
  const list = document.getElementById("items");

  // Everything on paper: details are opened for it, and closed again afterwards.
  let opened = [];
  const open = () => {
    opened.push(...document.querySelectorAll("details:not([open])"));
    for (const one of opened) one.open = true;
  };
  const close = () => {
    for (const one of opened) one.open = false;
    opened = [];
  };
  addEventListener("beforeprint", open);
  addEventListener("afterprint", close);
  matchMedia("print").addEventListener("change", (event) => (event.matches ? open() : close()));
  if (matchMedia("(max-width: 68rem)").matches) document.querySelector("nav details").open = false;
  if (!list) return;

  const search = document.getElementById("search");
  const task = document.getElementById("task");
  const differ = document.getElementById("differ");
  const status = document.getElementById("found");
  const more = document.getElementById("more");
  const hidden = new Set();
  const SVG = "http://www.w3.org/2000/svg";

  const items = data.tasks.flatMap((one) =>
    one.items.map((item) => {
      const grades = item.responses.map((r) => r.grade).filter((grade) => grade !== undefined);
      const texts = [item.id, ...item.prompt.map((part) => part[1]), ...item.responses.map((r) => r.text[0])];
      return {
        ...item,
        task: one.name,
        low: Math.min(...grades),
        high: Math.max(...grades),
        haystack: texts.join("\n").toLowerCase(),
      };
    }),
  );
  let found = [];
  let shown = 0;

  // Texts of models go into text nodes and nowhere else, so nothing in them is markup.
  const make = (tag, className, ...inside) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    element.append(...inside);
    return element;
  };
  const marked = (text, words) => {
    const lower = text.toLowerCase();
    if (!words.length || lower.length !== text.length) return [text];
    const parts = [];
    let from = 0;
    for (;;) {
      let at = -1;
      let size = 0;
      for (const word of words) {
        const place = lower.indexOf(word, from);
        if (place >= 0 && (at < 0 || place < at)) [at, size] = [place, word.length];
      }
      if (at < 0) break;
      parts.push(text.slice(from, at), make("mark", "", text.slice(at, at + size)));
      from = at + size;
    }
    return [...parts, text.slice(from)];
  };
  const said = ([text, cut], words, name) => {
    const box = make("div", "said", ...marked(text, words));
    box.dir = "auto";
    box.tabIndex = 0;
    box.setAttribute("role", "group");
    box.setAttribute("aria-label", name);
    if (cut) box.append(make("p", "cut", `${cut.toLocaleString("en")} more characters are in the artifact`));
    return box;
  };
  const folded = (summary, ...inside) => make("details", "", make("summary", "", summary), ...inside);
  const dot = (index) => {
    const svg = document.createElementNS(SVG, "svg");
    svg.setAttribute("viewBox", "0 0 10 10");
    svg.setAttribute("width", "10");
    svg.setAttribute("height", "10");
    svg.setAttribute("aria-hidden", "true");
    const path = document.createElementNS(SVG, "path");
    path.setAttribute("d", "M0 0h10v10h-10z");
    path.setAttribute("class", index === null ? "f-muted" : `f-${index % 8}`);
    svg.append(path);
    return svg;
  };
  const number = (value) => String(Math.round(value * 1000) / 1000);

  const response = (one, words) => {
    const model = data.models[one.model];
    const about = [
      one.tokens === undefined ? "" : `${one.tokens} tokens`,
      one.finish && one.finish !== "stop" ? `ended by ${one.finish}` : "",
    ];
    const header = make("header", "", make("span", "model", dot(model.index), model.label));
    if (one.grade !== undefined) header.append(make("span", "grade", "grade ", make("b", "", number(one.grade))));
    const box = make("section", "response", header, said(one.text, words, `Response of ${model.label}`));
    const line = about.filter(Boolean).join(" · ");
    if (line) box.append(make("p", "role", line));
    if (one.judge) {
      const parts = one.judge.flatMap(([part, ...text]) => [make("p", "role", part), said(text, [], `Judge, ${part}`)]);
      box.append(folded("Judge", ...parts));
    }
    if (one.extra) box.append(folded("Grading", said(one.extra, [], "What the grader says")));
    return box;
  };
  const card = (item, words) => {
    const header = make("header", "", make("strong", "", item.task), make("code", "", ...marked(item.id, words)));
    if (item.high > item.low) {
      header.append(make("span", "muted", `grades from ${number(item.low)} to ${number(item.high)}`));
    }
    const prompt = make("div", item.prompt.length ? "prompt" : "");
    for (const [role, text, cut] of item.prompt) {
      prompt.append(make("p", "role", role), said([text, cut], words, `Prompt, ${role}`));
    }
    return make(
      "article", "item", header, prompt, make("div", "side", ...item.responses.filter((one) => !hidden.has(one.model)).map((one) => response(one, words))),
    );
  };

  const grow = () => {
    const words = wanted();
    const next = found.slice(shown, shown + STEP);
    list.append(...next.map((item) => card(item, words)));
    shown += next.length;
    more.hidden = shown >= found.length;
    more.textContent = `Show ${Math.min(STEP, found.length - shown)} more`;
    const embedded = items.filter((item) => !task.value || item.task === task.value).length;
    status.textContent = `${found.length} of ${embedded} items match; ${shown} of them shown.`;
  };
  const wanted = () => search.value.toLowerCase().split(/\s+/).filter(Boolean);
  const update = () => {
    const words = wanted();
    found = items.filter(
      (item) =>
        (!task.value || item.task === task.value) &&
        (!differ.checked || item.high > item.low) &&
        words.every((word) => item.haystack.includes(word)),
    );
    shown = 0;
    list.replaceChildren();
    grow();
  };

  let timer = 0;
  search.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(update, 120);
  });
  task.addEventListener("change", update);
  differ.addEventListener("change", update);
  more.addEventListener("click", grow);
  data.models.forEach((model, place) => {
    const box = make("input", "");
    box.type = "checkbox";
    box.checked = true;
    box.addEventListener("change", () => {
      if (box.checked) hidden.delete(place);
      else hidden.add(place);
      update();
    });
    document.getElementById("models").append(make("li", "", make("label", "check", box, dot(model.index), model.label)));
  });
  document.querySelector(".controls").hidden = false;
  update();
})();

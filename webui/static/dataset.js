// The page of data sets: a grid of pictures, an editor of captions, filters and checks. Texts of files only ever become
// text nodes and attributes set by name, never HTML.
window.loraDiffusionDataset = (element, server) => {
  "use strict";

  const root = element.querySelector("#dataset");
  if (!root || root.dataset.started) return;
  root.dataset.started = "yes";
  const words = JSON.parse(root.dataset.words);
  const t = (key, values = {}) =>
    (words[`dataset.${key}`] ?? key).replace(/\{(\w+)\}/g, (whole, name) => (name in values ? String(values[name]) : whole));
  const SAVE_DELAY_MS = 450, SAVE_AGAIN_MS = 3000, FIRST_CELLS = 120, PIECE_BYTES = 4_000_000, QUICK = "lora-diffusion.quick-tags";

  // ---- Small tools ----

  function h(tag, properties = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (value === false || value === null || value === undefined) continue;
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (name === "style") for (const [key, text] of Object.entries(value)) node.style.setProperty(key, text);
      else if (name in node && !name.includes("-") && !["list", "form", "type"].includes(name)) node[name] = value;
      else node.setAttribute(name, value === true ? "" : value);
    }
    node.append(...nodes(children));
    return node;
  }
  const nodes = (children) => children.flat(3).filter((child) => child !== null && child !== undefined && child !== false);
  const fill = (node, ...children) => node.replaceChildren(...nodes(children));
  const button = (text, onclick, properties = {}) => h("button", { type: "button", className: "quiet", onclick, ...properties }, text);
  const pictureUrl = (path, width, version = "") => `/picture/dataset/${path.split("/").map(encodeURIComponent).join("/")}?w=${width}${version ? `&v=${version}` : ""}`;
  const splitTags = (caption) => (caption ?? "").split(",").map((tag) => tag.trim()).filter(Boolean);
  const percent = (share) => `${Math.round(share * 100)} %`;
  const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
  const isTyping = (event) => event.target.closest?.("input, textarea, select, dialog");

  // isLost: no answer came. Gradio's script gives nothing then, and throws nothing.
  async function ask(what, values = {}) {
    const lost = { error: t("failed"), isLost: true };
    try { return (await server.ask({ do: what, set: set.id, ...values })) ?? lost; }
    catch { return lost; }
  }

  // ---- What is known ----

  const set = { id: "", pictures: [], shown: [], selected: new Set(), cursor: -1, anchor: -1, tokens: {}, sizes: {}, crops: {}, reasons: {}, unreadable: new Set(), levels: {}, look: {} };
  const filter = { text: "", wanted: [], unwanted: [], check: "", by: "" };
  const crop = { resolution: 0, step: 0, isDrawn: false };
  let cells = [], ui = {}, generation = 0, captioning = null;

  function writeAddress() {
    const query = new URLSearchParams();
    if (set.id) query.set("set", set.id);
    if (filter.text) query.set("q", filter.text);
    for (const tag of filter.wanted) query.append("tag", tag);
    for (const tag of filter.unwanted) query.append("not", tag);
    if (filter.check) query.set("check", filter.check);
    if (set.by && filter.by !== set.by) query.set("by", filter.by);
    if (crop.isDrawn) query.set("crop", "1");
    if (set.pictures[set.cursor]) query.set("picture", set.pictures[set.cursor].name);
    history.replaceState(history.state, "", location.pathname + (query.size ? `?${query}` : ""));  // "?…" alone starts at <base>
  }

  function readAddress() {
    const query = new URLSearchParams(location.search);
    Object.assign(filter, { text: query.get("q") ?? "", wanted: query.getAll("tag"), unwanted: query.getAll("not"), check: query.get("check") ?? "", by: query.get("by") ?? "" });
    crop.isDrawn = query.has("crop");
    return { id: query.get("set") ?? "", picture: query.get("picture") };
  }

  // ---- Choosing and uploading ----

  async function showChooser(problem = "") {
    generation += 1;
    Object.assign(set, { id: "", pictures: [], cursor: -1 });
    writeAddress();
    const found = await ask("all");
    const cards = (Array.isArray(found) ? found : []).map((one) =>
      h("button", { type: "button", className: "set-card", "data-set": one.id, onclick: () => openSet(one.id) },
        h("span", { className: "four" }, one.thumbs.map((path) => h("img", { src: pictureUrl(path, 160), alt: "", loading: "lazy" }))),
        h("strong", {}, one.id),
        h("small", {}, `${one.images} ${t("pictures")} · ${one.captioned} ${t("captioned")}`)));
    fill(root, 
      h("div", { className: "title" }, h("h1", {}, t("choose"))),
      h("p", { className: "hint" }, t("choose.about")),
      problem || found.error ? h("p", { className: "said bad", role: "alert" }, problem || found.error) : null,
      cards.length ? h("div", { className: "sets", id: "dataset-sets" }, cards)
        : found.error ? null : h("p", { className: "empty card" }, h("strong", {}, t("none")), t("none.about")),
      uploadCard());
  }

  function uploadCard() {
    const name = h("input", { type: "text", id: "dataset-upload-name", maxLength: 80, placeholder: "my pictures", autocomplete: "off", "aria-label": t("upload.name") });
    const files = h("input", { type: "file", id: "dataset-upload-files", multiple: true, accept: "image/*,.txt,.caption", "aria-label": t("upload.pick") });
    const state = h("p", { className: "hint", role: "status" }), refused = h("ul", { className: "refused" });
    const go = button(t("upload.start"), upload, { className: "go", id: "dataset-upload-start" });
    const drop = h("label", { className: "drop" }, h("span", {}, t("upload.pick")), files);
    drop.addEventListener("dragover", (event) => event.preventDefault());
    drop.addEventListener("drop", (event) => { event.preventDefault(); files.files = event.dataTransfer.files; files.dispatchEvent(new Event("change")); });
    let made = "", done = 0;
    files.addEventListener("change", () => { done = 0; drop.firstChild.textContent = files.files.length ? t("upload.progress", { done: 0, total: files.files.length }) : t("upload.pick"); });

    async function upload() {
      if (!files.files.length) return files.click();
      go.disabled = files.disabled = true;
      const problem = await send();
      go.disabled = files.disabled = false;
      state.className = problem ? "said bad" : "hint";
      if (problem) state.textContent = problem;
      else go.replaceWith(button(t("upload.done"), () => openSet(made), { className: "go", id: "dataset-upload-open" }));
    }

    // Goes on where it was when no answer came.
    async function send() {
      if (!made) {
        const answer = await ask("make", { name: name.value });
        if (answer.error) return answer.error;
        made = answer.set;
        name.disabled = true;
      }
      const total = files.files.length;
      if (!done) refused.replaceChildren();
      while (done < total) {
        const { error, isLost } = await sendFile(made, files.files[done]);
        if (isLost) return `${error} ${t("upload.stopped", { done, total })}`;
        if (error) refused.append(h("li", {}, error));
        done += 1;
        state.className = "hint";
        state.textContent = t("upload.progress", { done, total });
      }
      return "";
    }
    return h("section", { className: "card upload" }, h("h2", {}, t("upload")), h("p", { className: "hint" }, t("upload.about")),
      h("div", { className: "upload-row" }, name, drop, go), state, refused);
  }

  async function sendFile(id, file) {
    let offset = 0;
    do {
      const bytes = new Uint8Array(await file.slice(offset, offset + PIECE_BYTES).arrayBuffer());
      let text = "";
      for (let at = 0; at < bytes.length; at += 32_768) text += String.fromCharCode(...bytes.subarray(at, at + 32_768));
      const last = offset + bytes.length >= file.size;
      const answer = await ask("upload", { set: id, name: file.name, piece: btoa(text), offset, last });
      if (answer.error) return answer;
      offset += bytes.length;
    } while (offset < file.size);
    return {};
  }

  // ---- One data set ----

  async function openSet(id, picture = null) {
    const mine = ++generation;
    set.id = id;
    const answer = await ask("open");
    if (mine !== generation) return;
    if (answer.error) return showChooser(answer.error);
    Object.assign(set, { id: answer.set, pictures: answer.pictures, by: answer.by, tokens: answer.tokens, levels: answer.levels, leftOut: answer.leftOut, orphans: answer.orphans, selected: new Set(), sizes: {}, crops: {}, reasons: {}, unreadable: new Set(), look: {}, cursor: -1, anchor: -1 });
    filter.by ||= answer.by;
    drawFrame();
    const isFiltered = filter.text || filter.wanted.length || filter.unwanted.length || filter.check;
    set.shown = set.pictures.map((_, number) => number);
    cells = [];
    if (!isFiltered) drawGrid();
    drawLevels();
    const at = picture ? set.pictures.findIndex((row) => row.name === picture) : -1;
    if (at >= 0) moveTo(at, { quietly: true });
    else drawEditor();
    writeAddress();
    await refreshView();
    await shownPictures();
    watchLook(mine);
  }

  // Looking at every picture takes the whole machine; those on the screen come first.
  async function shownPictures() {
    const until = performance.now() + 3000;
    const isComing = (image) => !image.complete && image.getBoundingClientRect().top < innerHeight;
    while (performance.now() < until && [...ui.grid.querySelectorAll("img")].slice(0, FIRST_CELLS).some(isComing)) await pause(50);
  }

  async function watchLook(mine) {
    let hadSizes = false;
    for (;;) {
      const look = await ask("look");
      if (mine !== generation || (look.error && !look.isLost)) return;
      if (!look.isLost) set.look = look;
      drawProgress();
      if (look.isDone || (look.hasSizes && !hadSizes)) { hadSizes = true; await refreshView(); }
      if (look.isDone) return;
      await pause(900);
    }
  }

  const askForView = () => ask("view", { filter, resolution: crop.resolution, step: crop.step, base: window.loraDiffusion?.chosenBase() ?? "" });

  let viewNumber = 0;
  async function refreshView() {
    const mine = ++viewNumber, of = generation;
    const answer = await askForView();
    if (mine !== viewNumber || of !== generation) return;
    if (answer.error) return say(answer.error, true);
    const before = set.shown.join();
    Object.assign(set, { shown: answer.shown, terms: answer.terms, checks: answer.checks, reasons: answer.reasons, unreadable: new Set(answer.unreadable), buckets: answer.buckets, lost: answer.lost, crops: answer.crops, sizes: answer.sizes });
    Object.assign(set, { resolution: answer.resolution, step: answer.step, base: answer.base });
    for (const number of set.selected) if (!set.shown.includes(number)) set.selected.delete(number);
    if (before !== set.shown.join() || !cells.length) drawGrid();
    else for (const cell of cells) if (cell) dress(cell);
    drawFilters();
    drawCount();
    drawCropOf(set.cursor);
    writeAddress();
  }

  function drawFrame() {
    ui = {
      count: h("span", { className: "count", id: "dataset-count", role: "status" }),
      said: h("div", { id: "dataset-said" }),
      grid: h("div", { className: "pictures", id: "dataset-grid", tabIndex: 0, role: "listbox", "aria-multiselectable": "true", "aria-label": t("pictures") }),
      checks: h("div", { id: "dataset-checks" }), terms: h("div", { id: "dataset-terms" }), buckets: h("div", { id: "dataset-buckets" }),
      active: h("div", { className: "active-filters", id: "dataset-active" }),
      editor: h("aside", { className: "card editor", id: "dataset-editor" }),
      undo: button(t("undo"), () => turn("undo"), { id: "dataset-undo" }), redo: button(t("redo"), () => turn("redo"), { id: "dataset-redo" }),
      search: h("input", { type: "search", id: "dataset-search", value: filter.text, placeholder: t("search"), "aria-label": t("search"), autocomplete: "off", spellcheck: false }),
    };
    const mine = generation;
    captioning = window.loraDiffusionCaptioning({ h, t, ask, button, fill, pictureUrl, pause, dialog, say, isOpen: () => mine === generation && root.isConnected, changed: captionsChanged });
    let delay = 0;
    ui.search.addEventListener("input", () => { clearTimeout(delay); delay = setTimeout(() => { filter.text = ui.search.value; refreshView(); }, 200); });
    ui.grid.addEventListener("click", clickCell);
    fill(root, 
      h("div", { className: "title set-title" }, h("h1", {}, set.id),
        h("div", { className: "set-actions" },
          h("a", { className: "go", id: "dataset-train", href: `${root.dataset.train}?dataset=${encodeURIComponent(set.id)}` }, t("train")),
          ui.undo, ui.redo, button(t("bulk"), openBulk, { className: "quiet strong", id: "dataset-bulk" }),
          button(t("other"), async () => { await flush(); Object.assign(filter, { text: "", wanted: [], unwanted: [], check: "", by: "" }); showChooser(); }, { id: "dataset-other" }))),
      ui.said, captioning.section,
      h("div", { className: "workbench" },
        h("details", { className: "card side", open: matchMedia("(min-width: 1001px)").matches }, h("summary", {}, t("filters")), ui.checks, ui.terms, ui.buckets),
        h("div", { className: "middle" },
          h("div", { className: "bar" }, ui.search, ui.count,
            button(t("select_all"), () => { const all = set.selected.size === set.shown.length; set.selected = new Set(all ? [] : set.shown); drawSelection(); }, { id: "dataset-select-all" })),
          ui.active, ui.grid),
        ui.editor));
  }

  function drawCount() {
    const chosen = set.selected.size > 1 ? ` · ${t("selected", { n: set.selected.size })}` : "";
    ui.count.textContent = t("count", { shown: set.shown.length, total: set.pictures.length }) + chosen;
    const all = root.querySelector("#dataset-select-all");
    all.textContent = set.shown.length && set.selected.size === set.shown.length ? t("select_none") : t("select_all");
  }

  function say(text, isBad = false) {
    ui.said?.replaceChildren(...(text ? [h("p", { className: `said ${isBad ? "bad" : "good"}`, role: "status" }, text)] : []));
  }

  // ---- The grid ----

  function makeCell(number) {
    const row = set.pictures[number];
    const cell = h("div", { className: "cell", role: "option", "data-n": number, "data-name": row.name, title: row.name },
      h("span", { className: "frame" }), h("i", { className: "tick", "aria-hidden": "true" }), h("p", {}));
    cells[number] = cell;
    return dress(cell);
  }

  function dress(cell) {
    const number = Number(cell.dataset.n), row = set.pictures[number], frame = cell.firstChild;
    if (set.unreadable.has(number)) { if (!frame.classList.contains("none")) { frame.replaceChildren(t("unreadable")); frame.classList.add("none"); } }
    else if (!frame.firstChild) {
      const image = h("img", { loading: "lazy", decoding: "async", alt: "", src: pictureUrl(row.url, 240, row.version) });
      image.addEventListener("error", () => { frame.replaceChildren(t("unreadable")); frame.classList.add("none"); });
      frame.append(h("span", { className: "fit" }, image));
    }
    drawCrop(frame.querySelector(".fit"), number);
    const text = cell.lastChild, reason = set.reasons[number];
    text.textContent = reason || row.problem || row.caption || t("no_caption");
    text.className = reason || row.problem ? "why-here" : row.caption ? "" : "missing";
    cell.classList.toggle("selected", set.selected.has(number) && set.selected.size > 1);
    cell.classList.toggle("current", number === set.cursor);
    cell.setAttribute("aria-selected", String(set.selected.has(number)));
    return cell;
  }

  function drawCrop(fit, number) {
    if (!fit) return;
    const size = set.sizes[number], cut = set.crops[number], isOn = Boolean(crop.isDrawn && size && cut);
    fit.classList.toggle("whole", isOn);
    fit.querySelector(".cut")?.remove();
    fit.style.cssText = isOn ? `aspect-ratio:${size[0]}/${size[1]};${size[0] >= size[1] ? "width:100%" : "height:100%"}` : "";
    if (isOn) fit.append(h("span", { className: "cut", style: { left: `${cut[0] * 100}%`, top: `${cut[1] * 100}%`, width: `${cut[2] * 100}%`, height: `${cut[3] * 100}%` } }, cut[4] > 0.005 ? h("b", {}, `−${percent(cut[4])}`) : null));
  }

  let drawing = 0;
  function drawGrid() {
    const mine = ++drawing;
    const first = set.shown.slice(0, FIRST_CELLS), rest = set.shown.slice(FIRST_CELLS);
    const draw = (number) => (cells[number] ? dress(cells[number]) : makeCell(number));
    if (!set.shown.length) ui.grid.replaceChildren(h("p", { className: "empty" }, h("strong", {}, t("empty")), t("empty.about")));
    else ui.grid.replaceChildren(...first.map(draw));
    const more = () => {
      if (mine !== drawing || !rest.length) return;
      ui.grid.append(...rest.splice(0, 250).map(draw));
      setTimeout(more, 16);
    };
    setTimeout(more, 16);
    drawCount();
  }

  function drawSelection() {
    for (const cell of cells) if (cell) {
      const number = Number(cell.dataset.n);
      cell.classList.toggle("selected", set.selected.has(number) && set.selected.size > 1);
      cell.classList.toggle("current", number === set.cursor);
      cell.setAttribute("aria-selected", String(set.selected.has(number)));
    }
    drawCount();
  }

  function clickCell(event) {
    const cell = event.target.closest(".cell");
    if (!cell) return;
    const number = Number(cell.dataset.n);
    if (event.shiftKey && set.anchor >= 0) {
      const [low, high] = [set.shown.indexOf(set.anchor), set.shown.indexOf(number)].sort((a, b) => a - b);
      set.selected = new Set(set.shown.slice(Math.max(low, 0), high + 1));
      drawSelection();
    } else if (event.ctrlKey || event.metaKey || event.target.closest(".tick")) {
      if (set.selected.has(number)) set.selected.delete(number); else set.selected.add(number);
      set.anchor = number;
      drawSelection();
    } else moveTo(number);
  }

  function moveTo(number, { quietly = false } = {}) {
    flush();
    set.cursor = set.anchor = number;
    set.selected = new Set([number]);
    drawSelection();
    drawEditor();
    cells[number]?.scrollIntoView({ block: "nearest" });
    if (!quietly) writeAddress();
  }

  function step(by) {
    const at = set.shown.indexOf(set.cursor);
    const next = set.shown[at < 0 ? 0 : Math.min(Math.max(at + by, 0), set.shown.length - 1)];
    if (next !== undefined && next !== set.cursor) moveTo(next);
  }

  const columns = () => getComputedStyle(ui.grid).gridTemplateColumns.split(" ").length;

  function onKey(event) {
    if (!set.id || !root.isConnected) return;
    if (isTyping(event) || event.altKey) return;
    const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns(), ArrowDown: columns() }[event.key];
    if (event.ctrlKey || event.metaKey) {
      if (event.key.toLowerCase() === "z") { event.preventDefault(); turn(event.shiftKey ? "redo" : "undo"); }
      else if (event.key.toLowerCase() === "a") { event.preventDefault(); set.selected = new Set(set.shown); drawSelection(); }
      return;
    }
    if (by) { event.preventDefault(); step(by); }
    else if (event.key === "Enter" && set.cursor >= 0 && !event.target.closest("button, a, summary")) { event.preventDefault(); ui.text?.focus(); }
    else if (event.key === "Escape") { set.selected.clear(); set.cursor = -1; drawSelection(); drawEditor(); writeAddress(); }
    else if (event.key === "/") { event.preventDefault(); ui.search.focus(); }
    else if (/^[1-9]$/.test(event.key) && set.cursor >= 0) toggleTag(quickTags()[Number(event.key) - 1]);
  }
  document.addEventListener("keydown", onKey);

  // ---- The editor ----

  // What was written stays here until the server has it, whichever picture or data set is shown meanwhile.
  // before: the caption that it takes the place of. sent: when. problem: why it was not saved. isRefused: the file holds
  // something else by now, so that it is saved only after another change.
  const unsaved = new Map();
  let timer = 0, saving = Promise.resolve(), wasLost = false;
  const keyOf = (row) => `${set.id}\n${row.name}`;
  const isBeingSaved = (one) => performance.now() - one.sent < 1000;
  addEventListener("beforeunload", (event) => { if (![...unsaved.values()].every(isBeingSaved)) { flush(); event.preventDefault(); } });

  const quickTags = () => { try { return JSON.parse(localStorage.getItem(QUICK) ?? "{}")[set.id] ?? []; } catch { return []; } };

  function drawEditor() {
    const row = set.pictures[set.cursor], kept = row && unsaved.get(keyOf(row));
    ui.text = null;
    ui.editor.classList.toggle("open", Boolean(row));
    if (!row) return fill(ui.editor, h("p", { className: "empty" }, t("editor.pick")));
    const text = h("textarea", { id: "dataset-caption", rows: 5, value: kept?.text ?? row.caption ?? "", placeholder: t("editor.placeholder"), "aria-label": t("editor.caption"), maxLength: 20000, disabled: Boolean(row.problem) });
    ui.text = text;
    text.addEventListener("input", () => { note(); drawChips(); clearTimeout(timer); timer = setTimeout(flush, SAVE_DELAY_MS); });
    text.addEventListener("blur", flush);
    text.addEventListener("keydown", (event) => {
      if (event.isComposing) return;
      if (event.key === "Enter") { event.preventDefault(); step(1); ui.text?.focus(); }
      else if (event.key === "Escape") { text.blur(); ui.grid.focus({ preventScroll: true }); }
    });
    ui.state = h("span", { className: "save-state", id: "dataset-state", role: "status" });
    drawState();
    ui.tokens = h("span", { className: "tokens", id: "dataset-tokens" });
    ui.chips = h("div", { className: "chips", id: "dataset-chips" });
    ui.quick = h("div", { className: "quick" });
    const large = set.unreadable.has(set.cursor) ? h("div", { className: "large none" }, t("unreadable"))
      : h("div", { className: "large" }, h("span", { className: "fit" }, h("img", { alt: "", src: pictureUrl(row.url, 640, row.version) })));
    ui.facts = h("p", { className: "hint facts-line" });
    fill(ui.editor, 
      h("div", { className: "editor-head" }, h("strong", { title: row.name }, row.name),
        button("←", () => step(-1), { "aria-label": t("previous"), title: t("previous"), className: "quiet icon" }),
        button("→", () => step(1), { "aria-label": t("next"), title: t("next"), className: "quiet icon", id: "dataset-next" }),
        button("×", () => { flush(); set.cursor = -1; set.selected.clear(); drawSelection(); drawEditor(); writeAddress(); }, { "aria-label": t("close"), title: t("close"), className: "quiet icon close" })),
      large, ui.facts, row.problem ? h("p", { className: "said bad" }, row.problem) : null,
      text, h("div", { className: "under" }, ui.tokens, ui.state), ui.chips, ui.quick, h("p", { className: "hint keys" }, t("editor.hint")));
    drawChips();
    drawQuick();
    drawTokens(row);
    drawCropOf(set.cursor);
  }

  function drawCropOf(number) {
    if (number !== set.cursor || !ui.facts) return;
    drawCrop(ui.editor.querySelector(".fit"), number);
    const size = set.sizes[number], cut = set.crops[number];
    ui.facts.textContent = size ? [`${size[0]}×${size[1]}${cut ? ` → ${cut[6]}` : ""}`, cut && cut[4] > 0.005 && t("cut", { n: percent(cut[4]) }), cut && cut[5] > 1 && t("enlarged", { n: cut[5].toFixed(1) })].filter(Boolean).join(" · ") : "";
  }

  function drawTokens(row) {
    ui.tokens.textContent = set.tokens.source ? t("tokens", { n: row.tokens, most: set.tokens.most }) : t("words", { n: row.tokens });
    ui.tokens.title = set.tokens.source ? t("tokens.by", { source: set.tokens.source }) : "";
    ui.tokens.classList.toggle("over", Boolean(set.tokens.source) && row.tokens > set.tokens.most);
  }

  function drawChips() {
    const tags = splitTags(ui.text.value);
    ui.chips.replaceChildren(...(tags.length < 2 ? [] : tags.map((tag, at) =>
      h("button", { type: "button", className: "chip", title: t("remove_tag", { tag }), "aria-label": t("remove_tag", { tag }), onclick: () => setText(tags.filter((_, other) => other !== at).join(", ")) }, h("span", {}, tag), " ×"))));
  }

  function drawQuick() {
    const tags = quickTags(), has = new Set(splitTags(ui.text.value));
    ui.quick.replaceChildren(h("span", { className: "label" }, t("quick"), " ", button(t("quick.edit"), editQuick, { className: "link", id: "dataset-quick-edit" })),
      ...(tags.length ? tags.map((tag, at) => button([h("kbd", {}, String(at + 1)), tag], () => toggleTag(tag), { className: `chip quick-tag ${has.has(tag) ? "on" : ""}` })) : [h("span", { className: "hint" }, t("quick.none"))]));
  }

  function editQuick() {
    const input = h("input", { type: "text", value: quickTags().join(", "), "aria-label": t("quick.ask"), placeholder: t("quick.ask"), id: "dataset-quick-tags" });
    const keep = () => {
      try { localStorage.setItem(QUICK, JSON.stringify({ ...JSON.parse(localStorage.getItem(QUICK) ?? "{}"), [set.id]: splitTags(input.value).slice(0, 9) })); } catch { /* private window */ }
      drawQuick();
    };
    input.addEventListener("change", keep);
    input.addEventListener("keydown", (event) => { if (event.key === "Enter") { event.preventDefault(); input.blur(); } });
    ui.quick.replaceChildren(input);
    input.focus();
  }

  function toggleTag(tag) {
    if (!tag || !ui.text || ui.text.disabled) return;
    const tags = splitTags(ui.text.value);
    setText((tags.includes(tag) ? tags.filter((other) => other !== tag) : [...tags, tag]).join(", "));
  }

  function setText(text) { ui.text.value = text; note(); flush(); drawChips(); drawQuick(); }
  function state(text, isBad = false) { if (ui.state) { ui.state.textContent = text; ui.state.classList.toggle("bad", isBad); } }
  function drawState() {
    const row = set.pictures[set.cursor], kept = row && unsaved.get(keyOf(row));
    if (kept) state(t(kept.problem ? "not_saved" : "saving"), Boolean(kept.problem));
  }

  function note() {
    const row = set.pictures[set.cursor], key = keyOf(row);
    unsaved.set(key, { before: row.caption, ...unsaved.get(key), set: set.id, name: row.name, text: ui.text.value, sent: -Infinity, problem: "", isRefused: false });
    drawState();
  }

  function flush() {
    clearTimeout(timer);
    if (unsaved.size) saving = saving.then(saveAll, saveAll);
    return saving;
  }

  async function saveAll() {
    for (const [key, one] of [...unsaved]) {
      if (one.isRefused || unsaved.get(key) !== one) continue;
      const { isLost } = await save(key, one);
      if (isLost) break;
    }
    if (![...unsaved.values()].some((one) => one.problem && !one.isRefused)) return;
    clearTimeout(timer);
    timer = setTimeout(flush, SAVE_AGAIN_MS);
  }

  async function save(key, one) {
    one.sent = performance.now();
    const answer = await ask("save", { set: one.set, name: one.name, before: one.before, text: one.text });
    const isHere = one.set === set.id && set.pictures.length > 0, row = answer.rows?.find((row) => row.name === one.name);
    const isShown = isHere && set.pictures[set.cursor]?.name === one.name, isLatest = unsaved.get(key) === one;
    if (isHere) for (const fresh of answer.rows ?? []) takeRow(fresh);
    if (answer.error) {
      Object.assign(one, { sent: -Infinity, problem: answer.error, isRefused: Boolean(answer.rows), before: row ? row.caption : one.before });
      if (answer.isLost) for (const other of unsaved.values()) other.problem ||= answer.error;
      drawState();
      say(`${one.name}: ${answer.error}${answer.isLost ? ` ${t("kept")}` : ""}${row?.caption ? ` “${row.caption}”` : ""}`, true);
      wasLost ||= Boolean(answer.isLost);
      return answer;
    }
    if (isLatest) unsaved.delete(key); else unsaved.get(key).before = row.caption;
    if (wasLost) say(t("saved"));
    wasLost = false;
    if (!isHere) return answer;
    set.levels = answer.levels;
    drawLevels();
    if (isShown && isLatest) { state(t("saved")); drawTokens(row); drawQuick(); }
    refreshTerms();
    return answer;
  }

  let termsTimer = 0;
  function refreshTerms() { clearTimeout(termsTimer); termsTimer = setTimeout(() => { if (!filter.text && !filter.wanted.length && !filter.unwanted.length && !filter.check) refreshView(); else refreshCounts(); }, 600); }
  async function refreshCounts() {  // the grid stays: a picture must not vanish while its caption is being written
    const of = generation, answer = await askForView();
    if (of !== generation || answer.error) return;
    Object.assign(set, { terms: answer.terms, checks: answer.checks });
    drawFilters();
  }

  function takeRow(fresh) {
    const number = set.pictures.findIndex((row) => row.name === fresh.name);
    if (number < 0) return;
    set.pictures[number] = fresh;
    if (cells[number]) dress(cells[number]);
  }

  async function captionsChanged(answer) {  // by somebody else than the editor
    await flush();
    const before = set.pictures[set.cursor]?.caption;
    for (const row of answer.rows) takeRow(row);
    set.levels = answer.levels;
    drawLevels();
    if (set.pictures[set.cursor]?.caption !== before) drawEditor();
    if (answer.rows.length) refreshTerms();
  }

  // ---- Undo ----

  function drawLevels() {
    const { undo, redo, what, again } = set.levels;
    ui.undo.disabled = !undo;
    ui.redo.disabled = !redo;
    ui.undo.title = undo ? `${t(`what.${what}`)} (${undo})` : "";
    ui.redo.title = redo ? `${t(`what.${again}`)} (${redo})` : "";
  }

  async function turn(way) {
    await flush();
    const answer = await ask(way);
    if (answer.error) return say(answer.error, true);
    for (const row of answer.rows) takeRow(row);
    set.levels = answer.levels;
    drawLevels();
    drawEditor();
    const left = answer.left.length ? ` ${t("left", { names: answer.left.slice(0, 5).join(", ") })}` : "";
    say(t(way === "undo" ? "undone" : "redone", { what: t(`what.${answer.what}`), n: answer.number }) + left, Boolean(left));
    captioning.refresh();
    refreshView();
  }

  // ---- Filters, checks, buckets ----

  function drawProgress() {
    const bar = ui.checks.querySelector(".looking");
    if (bar && !set.look.isDone) bar.textContent = t("looking", { done: set.look.done ?? 0, total: set.look.total ?? 0 });
  }

  function drawFilters() {
    const found = Object.entries(set.checks).filter(([, number]) => number > 0);
    const lists = [["orphans", set.orphans], ["leftout", set.leftOut]].filter(([, list]) => list.length);
    fill(ui.checks, h("h3", {}, t("checks")),
      set.look.isDone ? null : h("p", { className: "hint looking" }, t("looking", { done: set.look.done ?? 0, total: set.look.total ?? 0 })),
      found.length || lists.length || !set.look.isDone ? null : h("p", { className: "hint" }, t("all_good")),
      found.map(([key, number]) => h("button", { type: "button", className: "check-row", "data-check": key, "aria-pressed": String(filter.check === key), title: words[`dataset.about.${key}`] ?? "", onclick: () => { filter.check = filter.check === key ? "" : key; refreshView(); } },
        h("span", {}, t(`check.${key}`, { most: set.tokens.most })), h("b", {}, String(number)))),
      lists.map(([key, list]) => h("details", { className: "list-row" }, h("summary", {}, h("span", {}, t(`check.${key}`)), h("b", {}, String(list.length))),
        h("ul", {}, list.map(([name, reason]) => h("li", {}, h("strong", {}, name), ` ${reason}`))))),
      set.look.isDone ? button(t("mend"), openMend, { id: "dataset-mend", className: "quiet wide" }) : null);
    drawTerms();
    drawBuckets();
    drawActive();
  }

  function drawActive() {
    const drop = (text, onclick) => h("button", { type: "button", className: "chip on", onclick }, h("span", {}, text), " ×");
    const without = (list, tag) => list.filter((other) => other !== tag);
    ui.active.replaceChildren(
      ...(filter.check ? [drop(t(`check.${filter.check}`, { most: set.tokens.most }), () => { filter.check = ""; refreshView(); })] : []),
      ...filter.wanted.map((tag) => drop(tag, () => { filter.wanted = without(filter.wanted, tag); refreshView(); })),
      ...filter.unwanted.map((tag) => drop(`≠ ${tag}`, () => { filter.unwanted = without(filter.unwanted, tag); refreshView(); })));
    if (ui.active.firstChild || filter.text) ui.active.append(button(t("clear"), () => { Object.assign(filter, { text: "", wanted: [], unwanted: [], check: "" }); ui.search.value = ""; refreshView(); }, { id: "dataset-clear", className: "link" }));
  }

  let termsFind = "";
  function drawTerms() {
    const most = Math.max(1, ...set.terms.map(([, number]) => number));
    const tab = (by) => h("button", { type: "button", className: "tab", "aria-pressed": String(filter.by === by), onclick: () => { Object.assign(filter, { by, wanted: [], unwanted: [] }); refreshView(); } }, t(`terms.${by}`));
    const find = h("input", { type: "search", value: termsFind, placeholder: t("terms.find"), "aria-label": t("terms.find"), id: "dataset-terms-find" });
    const list = h("div", { className: "terms" });
    const fillList = () => list.replaceChildren(...set.terms.filter(([term]) => term.toLowerCase().includes(termsFind.toLowerCase())).map(([term, number]) =>
      h("button", { type: "button", className: "term", "data-term": term, "aria-pressed": String(filter.wanted.includes(term)), style: { "--share": String(number / most) }, onclick: (event) => chooseTerm(term, event.shiftKey) }, h("span", {}, term), h("b", {}, String(number)))));
    find.addEventListener("input", () => { termsFind = find.value; fillList(); });
    const scrolled = ui.terms.querySelector(".terms")?.scrollTop ?? 0, wasFinding = document.activeElement?.id === "dataset-terms-find";
    fillList();
    fill(ui.terms, h("div", { className: "tabs" }, tab("tags"), tab("words")), find, list, h("p", { className: "hint" }, t("terms.hint")));
    list.scrollTop = scrolled;
    if (wasFinding) find.focus();
  }

  function chooseTerm(term, isUnwanted) {
    const [to, from] = isUnwanted ? ["unwanted", "wanted"] : ["wanted", "unwanted"];
    filter[from] = filter[from].filter((other) => other !== term);
    filter[to] = filter[to].includes(term) ? filter[to].filter((other) => other !== term) : [...filter[to], term];
    refreshView();
  }

  function drawBuckets() {
    const most = Math.max(1, ...set.buckets.map(([, number]) => number));
    const choose = (values, value, id, label, onchange) => h("label", {}, label, h("select", { id, onchange }, values.map((one) => h("option", { value: one, selected: one === value }, String(one)))));
    const sides = [...new Set([64, 128, 256, 384, 512, 640, 768, 896, 1024, set.resolution])].sort((a, b) => a - b);
    fill(ui.buckets, h("h3", {}, t("buckets")),
      h("div", { className: "two" },
        choose(sides, set.resolution, "dataset-resolution", t("resolution"), (event) => { crop.resolution = Number(event.target.value); refreshView(); }),
        choose([...new Set([8, 16, 32, 64, set.step])].sort((a, b) => a - b), set.step, "dataset-step", t("step"), (event) => { crop.step = Number(event.target.value); refreshView(); })),
      h("p", { className: "hint", id: "dataset-step-about" }, set.base ? t("step.base", { base: set.base }) : t("step.about")),
      h("label", { className: "check" }, h("input", { type: "checkbox", id: "dataset-crop", checked: crop.isDrawn, onchange: (event) => { crop.isDrawn = event.target.checked; for (const cell of cells) if (cell) dress(cell); drawCropOf(set.cursor); writeAddress(); } }), t("show_crop")),
      h("div", { className: "bars" }, set.buckets.map(([name, number]) => h("div", { className: "term", style: { "--share": String(number / most) } }, h("span", {}, name), h("b", {}, String(number))))),
      set.buckets.length ? h("p", { className: "hint" }, t("lost", { lost: percent(set.lost) })) : null);
  }

  // ---- Many captions at once; a mended copy ----

  function dialog(id, ...children) {
    document.getElementById(id)?.remove();
    const box = h("dialog", { id, className: "sheet" }, ...children);
    box.addEventListener("close", () => box.remove());
    root.append(box);
    box.showModal();
    return box;
  }

  async function openBulk() {
    await flush();
    const isChosen = set.selected.size > 1;
    const names = (isChosen ? set.shown.filter((number) => set.selected.has(number)) : set.shown).map((number) => set.pictures[number].name);
    let previewed = null;
    const kinds = ["replace", "add", "remove", "prefix", "suffix", "sort", "dedupe", "set"];
    const kind = h("select", { id: "dataset-bulk-kind", onchange: fields }, kinds.map((one) => h("option", { value: one }, t(`what.${one}`))));
    const text = h("input", { type: "text", id: "dataset-bulk-text", maxLength: 2000, autocomplete: "off", spellcheck: false });
    const to = h("input", { type: "text", id: "dataset-bulk-to", maxLength: 2000, autocomplete: "off", spellcheck: false });
    const box = (id, key) => h("label", { className: "check" }, h("input", { type: "checkbox", id: `dataset-bulk-${id}` }), t(`bulk.${key}`));
    const regex = box("regex", "regex"), ignore = box("case", "case"), front = box("front", "front");
    const first = h("label", {}, h("span"), text), second = h("label", {}, t("bulk.to"), to);
    const said = h("p", { className: "hint", role: "status", id: "dataset-bulk-said" }), list = h("div", { className: "changes", id: "dataset-bulk-changes" });
    const apply = button("", applyEdit, { className: "go", id: "dataset-bulk-apply", hidden: true });
    const edit = () => ({ kind: kind.value, text: text.value, to: to.value, is_regex: regex.firstChild.checked, ignore_case: ignore.firstChild.checked, at_end: !front.firstChild.checked });
    function forget() { previewed = null; apply.hidden = true; list.replaceChildren(); said.textContent = ""; said.className = "hint"; }
    function fields() {
      const is = kind.value;
      first.hidden = is === "sort" || is === "dedupe";
      second.hidden = regex.hidden = ignore.hidden = is !== "replace";
      front.hidden = is !== "add";
      first.firstChild.textContent = t(is === "replace" ? "bulk.find" : is === "add" || is === "remove" ? "bulk.tag" : "bulk.text");
      forget();
    }
    async function preview() {
      const answer = await ask("preview", { names, edit: edit() });
      forget();
      if (answer.error) { said.className = "said bad"; said.textContent = answer.error; return; }
      previewed = { ...answer, edit: edit(), without: new Set() };
      said.textContent = answer.number ? t("bulk.number", { n: answer.number }) : t("bulk.nothing");
      list.replaceChildren(...answer.changes.map((change) => h("label", { className: "change" },
        h("input", { type: "checkbox", checked: true, onchange: (event) => { previewed.without[event.target.checked ? "delete" : "add"](change.name); count(); } }),
        h("span", {}, h("strong", {}, change.name), h("span", { className: "diff-text" }, change.pieces.map(([sign, piece]) => (sign === "=" ? piece : h(sign === "+" ? "ins" : "del", {}, piece))))))));
      count();
    }
    function count() { const n = previewed.number - previewed.without.size; apply.hidden = n === 0; apply.textContent = t("bulk.apply", { n }); }
    async function applyEdit() {
      apply.disabled = true;
      const answer = await ask("apply", { names, edit: previewed.edit, digest: previewed.digest, without: [...previewed.without] });
      apply.disabled = false;
      if (answer.error) { said.className = "said bad"; said.textContent = answer.error; return; }
      for (const row of answer.rows) takeRow(row);
      set.levels = answer.levels;
      drawLevels();
      drawEditor();
      say(t("bulk.applied", { n: previewed.number - previewed.without.size }));
      sheet.close();
      refreshView();
    }
    const form = h("form", { onsubmit: (event) => { event.preventDefault(); preview(); }, oninput: (event) => { if (event.target !== kind && !list.contains(event.target)) forget(); } },
      h("label", {}, t("bulk.what"), kind), first, second, h("div", { className: "options" }, regex, ignore, front),
      h("div", { className: "sheet-actions" }, h("button", { type: "submit", className: "quiet strong", id: "dataset-bulk-preview" }, t("bulk.preview")), apply, button(t("bulk.cancel"), () => sheet.close())));
    const sheet = dialog("dataset-bulk-sheet", h("h2", {}, t("bulk")), h("p", { className: "hint" }, t("bulk.scope", { n: names.length, which: t(isChosen ? "bulk.scope.selected" : "bulk.scope.shown") })), form, said, list);
    fields();
    text.focus();
  }

  function openMend() {
    const name = h("input", { type: "text", id: "dataset-mend-name", maxLength: 80, value: `${set.id.split("/").at(-1)}-mended` });
    const keys = ["without_twins", "without_near", "upright", "opaque"];
    const boxes = Object.fromEntries(keys.map((key) => [key, h("input", { type: "checkbox", checked: key !== "without_near" })]));
    const said = h("p", { className: "hint", role: "status" });
    const go = button(t("mend.start"), start, { className: "go", id: "dataset-mend-start" });
    async function start() {
      go.disabled = true;
      let now = await ask("mend", { name: name.value, options: Object.fromEntries(keys.map((key) => [key, boxes[key].checked])) });
      const isBegun = !now.error;
      while (isBegun && (now.isLost || !(now.error || now.isDone))) {
        said.textContent = now.error ?? t("mend.progress", now);
        await pause(500);
        now = await ask("mending");
      }
      go.disabled = false;
      if (now.error) { said.className = "said bad"; said.textContent = now.error; return; }
      said.className = "said good";
      said.textContent = t("mend.done", { copied: now.copied, redrawn: now.redrawn, left: now.leftOut });
      go.replaceWith(button(t("mend.open"), () => { sheet.close(); Object.assign(filter, { text: "", wanted: [], unwanted: [], check: "" }); openSet(now.set); }, { className: "go", id: "dataset-mend-open" }));
    }
    const sheet = dialog("dataset-mend-sheet", h("h2", {}, t("mend")), h("p", { className: "hint" }, t("mend.about")),
      h("label", {}, t("upload.name"), name), keys.map((key) => h("label", { className: "check" }, boxes[key], t(`mend.${key}`))), said,
      h("div", { className: "sheet-actions" }, go, button(t("bulk.cancel"), () => sheet.close())));
  }

  const start = readAddress();
  if (start.id) openSet(start.id, start.picture);
  else showChooser();
};

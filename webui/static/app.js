// What happens in the browser alone: reading the form, marking problems, looking closely at charts and pictures.
(() => {
  "use strict";

  const EDIT_DELAY_MS = 350, THEME = "lora-diffusion.theme", DRAFT = "lora-diffusion.draft";
  const DRAFT_BEFORE = "lora-diffusion.draft-before", DRAWING = "lora-diffusion.drawing", MIXING = "lora-diffusion.mixing", TAB = "lora-diffusion.tab";
  const one = (selector, root = document) => root.querySelector(selector);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const stored = (key) => { try { return localStorage.getItem(key); } catch { return null; } };
  const store = (key, value) => { try { localStorage.setItem(key, value); } catch { /* private window */ } };

  // What is typed: each tab has its own, and a new one opens with what was kept last in any.
  function recall(key) {
    const own = ownOfTab(key);
    if (own !== null) return own;
    const last = stored(key);
    if (last !== null) setOwnOfTab(key, last);
    return last;
  }
  function remember(key, value) {
    setOwnOfTab(key, value);
    store(key, value);
  }
  const ownOfTab = (key) => { try { return sessionStorage.getItem(key); } catch { return null; } };
  const setOwnOfTab = (key, value) => { try { sessionStorage.setItem(key, value); } catch { /* private window */ } };

  const named = (name) => new URLSearchParams(location.search).has(name);
  // What the address named is in the fields now: a reload shows what was made of it since.
  function forget(...names) {
    const address = new URL(location.href);
    for (const name of names) address.searchParams.delete(name);
    history.replaceState(history.state, "", address);
  }

  // ---- Theme: the system's, until someone chooses ----

  function applyTheme() {
    const chosen = stored(THEME);
    if (chosen && document.body.classList.contains("dark") !== (chosen === "dark"))
      document.body.classList.toggle("dark", chosen === "dark");
  }

  // ---- The form ----

  let send = null, drawn = "", extra = {}, timer = 0;

  const tables = () => all("#train-tables > [data-table]");
  function nameOf(input) {
    const table = input.closest("[data-table]");
    return table ? `dataset.${tables().indexOf(table)}.${input.dataset.field}` : input.dataset.field;
  }
  const valueOf = (input) => input.type === "checkbox" ? String(input.checked) : input.value;
  const inputs = () => all("#train-fields [data-field]");
  const isChanged = (field) => {
    const input = one("[data-field]", field), value = input && valueOf(input);
    return input && value !== field.dataset.default && !(value === "" && field.dataset.optional === "true");
  };

  function filled() {
    const values = {};
    for (const input of inputs()) values[nameOf(input)] = valueOf(input);
    const from = one('[data-do="preset"][aria-pressed="true"]')?.dataset.value ?? "";
    return { values, from, word: one("#train-word")?.value ?? "" };
  }

  function collect() {
    const sent = JSON.stringify({ ...filled(), ...extra });
    extra = {};
    return sent;
  }

  const keep = () => remember(DRAFT, JSON.stringify(filled()));

  function edited(delay) {
    clearTimeout(timer);
    timer = setTimeout(() => {
      timer = 0;
      keep();
      send?.("input");
    }, delay);
    refreshForm();
  }
  addEventListener("pagehide", () => { if (timer) keep(); });

  // The form that the page opens with; one that a copy takes the place of can be had back.
  function draft() {
    const kept = recall(DRAFT) ?? "";
    if (named("copy") && kept) remember(DRAFT_BEFORE, kept);
    return kept;
  }

  function opened() {
    if (named("copy") || named("dataset")) {
      keep();
      forget("copy", "dataset");
      refreshForm();
    }
    return collect();
  }

  // The base that the form names, for pages that show what depends on it.
  function chosenBase() {
    try { return JSON.parse(ownOfTab(DRAFT) ?? stored(DRAFT)).values["model.path"] ?? ""; }
    catch { return ""; }  // there is no draft yet
  }

  // Gradio hands over its trigger when it has mounted the form; what was typed before is read when the page has loaded.
  function form(trigger) { send = trigger; }

  document.addEventListener("input", (event) => {
    const input = event.target;
    if (!input.closest?.("#train-fields")) return;
    if (input.id === "train-search" || input.id === "train-changed") return refreshForm();
    if (!input.dataset.field) return;
    edited(input.tagName === "SELECT" || input.type === "checkbox" ? 0 : EDIT_DELAY_MS);
  });

  document.addEventListener("change", (event) => {
    if (event.target.dataset?.do !== "choose") return;
    const area = one("textarea", event.target.parentElement);
    area.hidden = event.target.value !== "";
    area.value = event.target.value;
    if (!area.hidden) area.focus();
    edited(0);
  });

  // Gradio changes attributes of what stands there; what was typed into a field would stay in it.
  function takeOver() {
    const now = one("#train-fields").dataset.drawn;
    if (drawn && drawn !== now) {
      for (const input of inputs()) {
        if (input.type === "checkbox") input.checked = input.defaultChecked;
        else if (input.tagName === "SELECT") input.value = ([...input.options].find((option) => option.defaultSelected) ?? input.options[0]).value;
        else input.value = input.defaultValue;
      }
      for (const chooser of all('[data-do="choose"]')) {
        const area = one("textarea", chooser.parentElement);
        chooser.value = [...chooser.options].some((option) => option.value === area.value) ? area.value : "";
        area.hidden = chooser.value !== "";
      }
      keep();
    }
    drawn = now;
  }

  function refreshForm() {
    const words = (one("#train-search")?.value ?? "").toLowerCase().split(/\s+/).filter(Boolean);
    const onlyChanged = one("#train-changed")?.checked ?? false;
    const isFiltered = words.length > 0 || onlyChanged;
    let shown = 0;
    for (const field of all("#train-fields .field[data-name]")) {
      const changed = isChanged(field);
      field.classList.toggle("changed", Boolean(changed));
      const fits = words.every((word) => field.dataset.search.includes(word)) && (!onlyChanged || changed);
      field.classList.toggle("out", isFiltered && !fits);
      shown += fits;
    }
    for (const group of all("#train-fields .group")) {
      const number = all(".field.changed", group).length, count = one(".count", group);
      count.hidden = number === 0;
      if (count.textContent !== String(number)) count.textContent = String(number);
      if (isFiltered) group.open = true;
      else if (group.dataset.filtered) group.open = false;
      if (isFiltered) group.dataset.filtered = "yes"; else delete group.dataset.filtered;
      group.classList.toggle("out", isFiltered && !one(".field:not(.out)", group));
    }
    const nothing = one("#train-no-match");
    if (nothing) nothing.hidden = !isFiltered || shown > 0;
    one("#train-fields")?.classList.toggle("filtered", isFiltered);
    const before = one("#train-before");
    if (before) before.hidden = recall(DRAFT_BEFORE) === null;
    const several = tables().length > 1;
    for (const table of tables()) table.classList.toggle("several", several);
  }

  function fieldOf(key) {
    const parts = key.split(".");
    if (parts[0] === "dataset" && parts.length > 2) {
      const table = tables()[Number(parts[1])];
      return table && one(`.field[data-name="${CSS.escape(parts[2])}"]`, table);
    }
    return one(`.field[data-name="${CSS.escape(parts.slice(0, 2).join("."))}"]`);
  }

  function markProblems() {
    const messages = new Map();
    for (const item of all("#train-problems [data-key]")) {
      const field = fieldOf(item.dataset.key);
      if (field) messages.set(field, item.textContent);
    }
    for (const field of all("#train-fields .field")) {
      const message = messages.get(field) ?? "", shown = one(".wrong", field);
      if (shown && shown.textContent !== message) shown.textContent = message;
      field.classList.toggle("bad", message !== "");
      const input = one("[data-field]", field);
      if (input && input.getAttribute("aria-invalid") !== String(message !== "")) input.setAttribute("aria-invalid", String(message !== ""));
    }
  }

  function placeGlances() {
    for (const found of all("#train-glances [data-path]")) {
      const table = tables()[Number(found.dataset.index)];
      if (!table) continue;
      if (one('[data-field="path"]', table).value !== found.dataset.path) {
        if (!timer) edited(EDIT_DELAY_MS);  // an answer to what stood there before came late
        continue;
      }
      const place = one("[data-glance]", table);
      if (place && place.dataset.shown !== found.innerHTML) {
        place.dataset.shown = found.innerHTML;
        place.replaceChildren(...found.cloneNode(true).childNodes);
      }
    }
  }

  function reveal(key) {
    const field = fieldOf(key);
    if (!field) return;
    for (let parent = field.parentElement; parent; parent = parent.parentElement)
      if (parent.tagName === "DETAILS") parent.open = true;
    field.scrollIntoView({ block: "center", behavior: "smooth" });
    one("[data-field]", field)?.focus({ preventScroll: true });
  }

  // A list that shows what it is for until something is chosen: typing replaces that text.
  document.addEventListener("focusin", (event) => {
    if (event.target.matches?.("#generate-add input, .filters .wrap input")) event.target.select();
  });

  // ---- Things that are clicked, wherever they are ----

  const actions = {
    theme() {
      store(THEME, document.body.classList.contains("dark") ? "light" : "dark");
      applyTheme();
    },
    language(link) {
      document.cookie = `language=${link.dataset.value}; path=/; max-age=31536000; SameSite=Strict`;
      link.search = location.search;
      return true;
    },
    preset(button) { extra = { preset: button.dataset.value }; send?.("select"); },
    goal(button) {
      for (const other of all('[data-do="goal"]')) other.setAttribute("aria-pressed", String(other === button));
      extra = { goal: button.dataset.value };
      send?.("select");
    },
    "add-table"() {
      one("#train-tables").append(one("#train-table-template").content.cloneNode(true));
      edited(0);
      one("[data-field]", tables().at(-1)).focus();
    },
    "remove-table"(button) {
      if (tables().length > 1) button.closest("[data-table]").remove();
      edited(0);
    },
    before() {
      const now = JSON.stringify(filled());
      remember(DRAFT, recall(DRAFT_BEFORE));
      remember(DRAFT_BEFORE, now);
      clearTimeout(timer);
      timer = 0;
      location.reload();
    },
    show(link) { reveal(link.closest("[data-key]").dataset.key); },
    async copy(button) {
      const text = one(`#${button.dataset.from}`).textContent;
      try { await navigator.clipboard.writeText(text); }
      catch {
        const range = document.createRange();
        range.selectNodeContents(one(`#${button.dataset.from}`));
        getSelection().removeAllRanges();
        getSelection().addRange(range);
        document.execCommand("copy");
      }
      button.classList.add("done");
      setTimeout(() => button.classList.remove("done"), 1200);
    },
    download(button) {
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([one(`#${button.dataset.from}`).textContent], { type: "application/toml" }));
      link.download = button.dataset.name;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    },
    enlarge(picture) { openPicture(picture); },
    close() { one("#lightbox")?.close(); },
  };

  document.addEventListener("click", (event) => {
    const target = event.target.closest?.("[data-do]");
    const action = target && actions[target.dataset.do];
    if (action && !action(target)) event.preventDefault();
  });

  // ---- Pictures: one large, two compared ----

  function openPicture(picture) {
    let box = one("#lightbox");
    if (!box) {
      box = document.createElement("dialog");
      box.id = "lightbox";
      box.innerHTML = '<button type="button" data-do="close" aria-label="×">×</button><img alt=""><p></p>';
      box.addEventListener("click", (event) => event.target === box && box.close());
      box.addEventListener("keydown", (event) => box.step(event.key === "ArrowRight" ? 1 : event.key === "ArrowLeft" ? -1 : 0));
      document.body.append(box);
    }
    const row = all('[data-do="enlarge"]', picture.closest("[data-row]") ?? picture.parentElement);
    let index = row.indexOf(picture);
    function step(by) {
      index = Math.min(Math.max(index + by, 0), row.length - 1);
      const image = one("img", box);
      image.src = row[index].dataset.large;
      image.alt = one("p", box).textContent = row[index].dataset.caption ?? "";
    }
    box.step = step;
    step(0);
    box.showModal();
  }

  const compared = {};
  function refreshComparison() {
    const box = one("#run-compare");
    if (!box) return;
    for (const select of all("select", box)) {
      if (compared[select.name] && one(`option[value="${CSS.escape(compared[select.name])}"]`, select)) select.value = compared[select.name];
    }
    const pictures = JSON.parse(box.dataset.pictures);
    const prompt = one('[name="prompt"]', box).value;
    for (const side of ["a", "b"]) {
      const image = one(`img.${side}`, box), url = pictures[prompt]?.[one(`[name="${side}"]`, box).value] ?? "";
      if (image.getAttribute("src") !== url) { if (url) image.src = url; else image.removeAttribute("src"); }
      image.hidden = !url;
    }
    box.style.setProperty("--cut", `${one('[type="range"]', box).value}%`);
  }
  document.addEventListener("input", (event) => {
    if (!event.target.closest?.("#run-compare")) return;
    if (event.target.name) compared[event.target.name] = event.target.value;
    refreshComparison();
  });

  // ---- Runs that are ticked: by what they are, not by where they stand in the table ----

  const ticked = new Set();
  document.addEventListener("change", (event) => {
    const id = event.target.dataset?.tick;
    if (id && event.target.checked) ticked.add(id); else if (id) ticked.delete(id);
  }, true);

  // ---- Charts: the values under the pointer ----

  document.addEventListener("pointermove", (event) => {
    const plot = event.target.closest?.(".plot");
    for (const other of all(".plot .cursor:not([hidden])")) if (!plot || !plot.contains(other)) other.hidden = true;
    if (!plot) return;
    const box = plot.getBoundingClientRect(), share = Math.min(Math.max((event.clientX - box.left) / box.width, 0), 1);
    const [low, high] = plot.dataset.range.split(" ").map(Number);
    const step = low + share * (high - low), cursor = one(".cursor", plot), lines = [];
    let nearest = step;
    if (plot.source !== plot.dataset.lines) plot.lines = JSON.parse(plot.source = plot.dataset.lines);
    for (const line of plot.lines) {
      let best = null;
      for (const point of line.points) if (!best || Math.abs(point[0] - step) < Math.abs(best[0] - step)) best = point;
      if (best) { lines.push([line.name, best[1], line.tone]); nearest = best[0]; }
    }
    cursor.hidden = false;
    cursor.style.left = `${((nearest - low) / ((high - low) || 1)) * 100}%`;
    const tip = one(".tip", cursor);
    tip.replaceChildren(...[["", nearest, ""], ...lines].map(([name, value, tone]) => {
      const row = document.createElement("span");
      row.textContent = name ? `${name} ${Number(value).toPrecision(4)}` : `${plot.dataset.step} ${value}`;
      if (tone) row.className = `tone-${tone}`;
      return row;
    }));
    tip.classList.toggle("left", share > 0.6);
  });

  // ---- The log stays at its end, unless someone reads further up ----

  let isAtEnd = true, seen = null;
  function followLog() {
    const log = one("#run-log-text");
    if (!log) return;
    if (log !== seen) log.addEventListener("scroll", () => { isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40; });
    if (isAtEnd) log.scrollTop = log.scrollHeight;
    seen = log;
  }

  // ---- The tab says what is going on, also from behind another window ----

  function nameTab() {
    const active = one("#strip .active"), page = one(".page h1")?.textContent ?? one(".top [aria-current]")?.textContent ?? "";
    const progress = active ? `${one("span", active).textContent.split(" ·")[0]} ${one("em", active).textContent} – ` : "";
    const title = `${progress}${page} – lora_diffusion`;
    if (document.title !== title) document.title = title;
    const language = location.pathname.startsWith("/de") ? "de" : "en";
    if (document.documentElement.lang !== language) document.documentElement.lang = language;
  }

  // ---- After every change of the page ----

  let due = false;
  function refresh() {
    due = false;
    applyTheme();
    for (const box of all("[data-tick]")) box.checked = ticked.has(box.dataset.tick);
    if (one("#train-fields")) { takeOver(); refreshForm(); markProblems(); placeGlances(); }
    refreshComparison();
    followLog();
    nameTab();
  }
  new MutationObserver(() => {
    if (!due) { due = true; requestAnimationFrame(refresh); }
  }).observe(document.documentElement, { childList: true, subtree: true, attributes: true, attributeFilter: ["class"] });

  // ---- The fields of a page, kept as Gradio has them ----

  function keeper(key, ...inAddress) {
    let isFilled = false;
    return {
      kept: () => recall(key) ?? "",
      keep(...values) { if (isFilled) remember(key, JSON.stringify(values)); return []; },
      // What was kept is in the fields, or what the address names: from now on changes are a person's.
      opened(...values) {
        isFilled = true;
        remember(key, JSON.stringify(values));
        forget(...inAddress);
        return [];
      },
    };
  }
  const drawing = keeper(DRAWING, "adapter"), mixing = keeper(MIXING);

  // What this tab orders is known by it, also after a reload. A browser that duplicates a tab gives it to both.
  const tab = ownOfTab(TAB) ?? [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  setOwnOfTab(TAB, tab);

  window.loraDiffusion = { chosenBase, collect, draft, drawing, form, mixing, opened, tab: () => tab, ticked: () => JSON.stringify([...ticked]) };
})();

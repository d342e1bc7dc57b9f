// The section "Auto-caption" of the page of data sets: starts a captioning, follows it, and shows what it proposes.
// page: what dataset.js lends: its tools, and what to do when captions have changed.
window.loraDiffusionCaptioning = (page) => {
  "use strict";

  const { h, t, ask, button, fill, pictureUrl, pause } = page;
  const OTHER = " other", BUSY_MS = 1200, IDLE_MS = 15_000;
  let state = { captioners: [], job: null, pending: 0 }, form = null, isRefreshing = false;

  const summary = h("span", { className: "caption-state", role: "status", id: "dataset-caption-state" });
  const body = h("div", { className: "caption-body" });
  const section = h("details", { className: "card captioning", id: "dataset-captioning" },
    h("summary", {}, h("strong", {}, t("caption")), summary), body);

  // ---- The form ----

  function makeForm() {
    const known = [...state.captioners.map((one) => [one.id, one.name]), [OTHER, t("caption.other")]];
    const chosen = h("select", { id: "dataset-caption-captioner", onchange: show }, known.map(([id, name]) => h("option", { value: id }, name)));
    const text = (id, placeholder = "") => h("input", { type: "text", id: `dataset-caption-${id}`, maxLength: 2000, placeholder, autocomplete: "off", spellcheck: false });
    const path = text("path", "models/blip"), prefix = text("prefix"), suffix = text("suffix"), prompt = text("prompt");
    const which = h("select", { id: "dataset-caption-which" }, ["missing", "all"].map((one) => h("option", { value: one }, t(`caption.${one}`))));
    const writes = h("input", { type: "checkbox", id: "dataset-caption-fill" });
    const pathLabel = h("label", {}, t("caption.path"), path);
    const said = h("p", { className: "said bad", role: "alert", hidden: true });
    const go = h("button", { type: "submit", className: "go", id: "dataset-caption-start" }, t("caption.start"));
    function show() { pathLabel.hidden = chosen.value !== OTHER; }
    async function start(event) {
      event.preventDefault();
      go.disabled = true;
      const captioner = chosen.value === OTHER ? path.value : chosen.value;
      const answer = await ask("caption", { options: { captioner, prefix: prefix.value, suffix: suffix.value, prompt: prompt.value, overwrite: which.value === "all", fill: writes.checked } });
      go.disabled = false;
      said.hidden = !answer.error;
      said.textContent = answer.error ?? "";
      if (!answer.error) draw(answer);
    }
    show();
    return h("form", { onsubmit: start },
      h("p", { className: "hint" }, t(state.captioners.length ? "caption.about" : "caption.none")),
      h("div", { className: "caption-fields" },
        state.captioners.length ? h("label", {}, t("caption.captioner"), chosen) : null, pathLabel,
        h("label", {}, t("caption.which"), which),
        h("label", {}, t("caption.prefix"), prefix), h("label", {}, t("caption.suffix"), suffix), h("label", {}, t("caption.prompt"), prompt)),
      h("label", { className: "check" }, writes, t("caption.fill")),
      h("p", { className: "hint" }, t("caption.fill.about")),
      said, h("div", { className: "sheet-actions" }, go));
  }

  // ---- How far it is ----

  function told(job) {
    if (job.status === "queued") return t("caption.queued", { n: job.position });
    if (job.status === "starting") return job.says || t("caption.starting");
    if (job.status === "running") return t("caption.running", job);
    if (job.status === "finished") return job.made || job.problems ? t("caption.finished", job) : t("caption.nothing");
    if (["failed", "interrupted"].includes(job.status)) return t("caption.ended");
    return t("caption.stopped", job);
  }

  function draw(now) {
    const isFormNew = !form || state.captioners.map((one) => one.id).join() !== now.captioners.map((one) => one.id).join();
    state = now;
    if (isFormNew && !body.contains(document.activeElement)) form = makeForm();
    const { job, pending } = state;
    const isOver = job && !job.isActive;
    const problems = job?.problems ? ` · ${t("caption.problems", { n: job.problems })}` : "";
    summary.textContent = job?.isActive ? told(job) : pending ? t("caption.waiting", { n: pending }) : "";
    summary.classList.toggle("has", Boolean(pending && !job?.isActive));
    const progress = job && h("div", { className: "caption-job", id: "dataset-caption-job", "data-status": job.status },
      h("p", { className: "hint" }, told(job) + (isOver ? problems : "")),
      job.isActive && job.status !== "queued" ? h("i", { className: "caption-bar", style: { "--share": String(job.total ? job.done / job.total : 0) } }) : null,
      isOver && job.error ? h("p", { className: "said bad" }, job.error) : null,
      job.isActive ? button(t("caption.stop"), async () => { const answer = await ask("caption_stop"); if (answer.error) page.say(answer.error, true); else draw(answer); }, { id: "dataset-caption-stop" }) : null);
    const review = pending ? button(t("caption.review", { n: pending }), openReview, { className: "quiet strong", id: "dataset-caption-review" }) : null;
    const head = h("div", { className: "caption-head" }, progress, review);
    if (body.firstChild?.className === "caption-head" && body.contains(form)) body.firstChild.replaceWith(head);
    else fill(body, head, form);
    form.hidden = Boolean(job?.isActive);
  }

  async function refresh() {
    if (isRefreshing) return;
    isRefreshing = true;
    const before = state.job, answer = await ask("captioning");
    isRefreshing = false;
    if (answer.error || !page.isOpen()) return;
    draw(answer);
    if (before?.isActive && !(answer.job?.isActive && answer.job.id === before.id)) await takeIn();
    if (answer.pending && before?.isActive && !answer.job?.isActive) section.open = true;
  }

  // What was written into the data set becomes a step that can be undone.
  async function takeIn() {
    const answer = await ask("take_in");
    if (answer.error || !page.isOpen()) return;
    page.changed(answer);
    if (answer.number) page.say(t("caption.written", { n: answer.number }));
  }

  async function watch() {
    await refresh();
    if (state.job) await takeIn();
    while (page.isOpen()) {
      await pause(state.job?.isActive ? BUSY_MS : IDLE_MS);
      if (page.isOpen()) await refresh();
    }
  }

  // ---- Proposals ----

  async function openReview() {
    const answer = await ask("proposals");
    if (answer.error) return page.say(answer.error, true);
    const rows = answer.proposals.map(makeRow);
    const all = button("", () => accept(rows.filter((row) => row.isOpen())), { className: "go", id: "dataset-review-accept-all" });
    const none = button(t("review.reject_all"), () => reject(rows.filter((row) => row.isOpen())), { id: "dataset-review-reject-all" });
    const said = h("p", { className: "hint", role: "status", id: "dataset-review-said" });
    const problems = answer.problems.length ? h("details", { className: "list-row" },
      h("summary", {}, t("review.problems", { n: answer.problems.length })),
      h("ul", {}, answer.problems.map(([name, reason]) => h("li", {}, h("strong", {}, name), ` ${reason}`)))) : null;
    function count() {
      const n = rows.filter((row) => row.isOpen()).length;
      all.textContent = t("review.accept_all", { n });
      all.hidden = none.hidden = n === 0;
      said.textContent = n ? "" : t("review.empty");
      said.className = "hint";
    }
    function refuse(error) { said.textContent = error; said.className = "said bad"; }
    async function accept(chosen) {
      if (!chosen.length) return;
      const done = await ask("accept", { chosen: chosen.map((row) => ({ name: row.name, before: row.before, text: row.text() })) });
      if (done.error) return refuse(done.error);
      for (const row of chosen) row.decide(done.left.includes(row.name) ? "left" : "accepted");
      page.changed(done);
      count();
    }
    async function reject(chosen, back = false) {
      if (!chosen.length) return;
      const done = await ask("reject", { names: chosen.map((row) => row.name), back });
      if (done.error) return refuse(done.error);
      for (const row of chosen) row.decide(back ? "" : "rejected");
      count();
    }
    function makeRow(one) {
      let decision = "";
      const text = h("textarea", { rows: 3, value: one.proposed, maxLength: 20_000, "aria-label": t("review.new") });
      const side = h("div", { className: "review-side" });
      const row = {
        name: one.name, before: one.caption, text: () => text.value, isOpen: () => decision === "",
        decide: (now) => { decision = now; drawSide(); },
        node: h("div", { className: "review-row", "data-name": one.name },
          h("img", { src: pictureUrl(one.url, 240, one.version), alt: "", loading: "lazy" }),
          h("div", { className: "review-texts" }, h("strong", {}, one.name),
            h("p", { className: "old" }, h("b", {}, t("review.now")), h("span", { className: one.caption ? "" : "missing" }, one.caption || t("no_caption"))), text),
          side),
      };
      function drawSide() {
        row.node.classList.toggle("decided", decision !== "");
        text.disabled = decision !== "";
        if (decision === "") fill(side, button(t("review.accept"), () => accept([row]), { className: "quiet strong accept" }), button(t("review.reject"), () => reject([row]), { className: "quiet reject" }));
        else fill(side, h("span", { className: `verdict ${decision}` }, t(`review.${decision}`)), decision === "rejected" ? button(t("review.back"), () => reject([row], true), { className: "link" }) : null);
      }
      drawSide();
      return row;
    }
    const sheet = page.dialog("dataset-review-sheet",
      h("div", { className: "review-head" }, h("h2", {}, t("review")), h("p", { className: "hint" }, t("review.about")),
        answer.total > rows.length ? h("p", { className: "hint" }, t("review.more", { shown: rows.length, total: answer.total })) : null,
        h("div", { className: "sheet-actions" }, all, none, button(t("close"), () => sheet.close(), { id: "dataset-review-close" }))),
      said, problems, h("div", { className: "reviews" }, rows.map((row) => row.node)));
    sheet.classList.add("review");
    sheet.addEventListener("close", refresh);
    count();
  }

  watch();
  return { section, refresh };
};

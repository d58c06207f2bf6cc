// The search page: one question at a time, its pictures page by page, and an address that brings it back.
const FIRST = 24, NEXT = 72; // pictures of the first answer, and of every further one
const TITLE = /^(title|name|product.?(name|title)|item.?name|标题|(商品|产品|宝贝)?(标题|名称|名)|品名)$/i, PRICE = /^((sale|list|unit)?[ _-]?price|(?!.*评价).*价格?)([ _]*[(（].*[)）])?$/i, LINK = /^https?:\/\//i;
const served = path => new URL(path, location.href).href; // an address that carries a name and a password opens the page; but nothing may be fetched from such a one
const $ = id => document.getElementById(id);
const keep = { get: k => { try { return localStorage.getItem(k); } catch { return null; } }, set: (k, v) => { try { localStorage.setItem(k, v); } catch { /* private window */ } } };
let language = keep.get("language") || (/^zh/i.test(navigator.language) ? "zh" : "en");
let t = WORDS[language], info = null, picture = null, like = null, answer = null, fault = null, asking = 0, wait = null;
let note = null; // { say, button, then }: what happened to the words, and the way back
let loading = false, open = -1; // more is on its way; the picture that is enlarged

// ---- pictures of one's own, kept in this browser so that an address finds them again
const shelf = {
  most: 20,
  async run(mode, work) {
    const db = await new Promise((yes, no) => {
      const request = indexedDB.open("cnclip-ft pictures", 1);
      request.onupgradeneeded = () => request.result.createObjectStore("pictures");
      request.onsuccess = () => yes(request.result); request.onerror = () => no(request.error);
    });
    try {
      return await new Promise((yes, no) => { const request = work(db.transaction("pictures", mode).objectStore("pictures")); request.onsuccess = () => yes(request.result); request.onerror = () => no(request.error); });
    } finally { db.close(); }
  },
  async put(id, file) {
    try {
      await this.run("readwrite", s => s.put(file, id));
      const ids = await this.run("readonly", s => s.getAllKeys());
      for (const old of ids.slice(0, -this.most)) await this.run("readwrite", s => s.delete(old));
    } catch { /* private window, or full: the address will say that the picture is elsewhere */ }
  },
  async get(id) { try { return await this.run("readonly", s => s.get(id)) || null; } catch { return null; } },
  name: () => Date.now().toString(36).padStart(9, "0") + Math.random().toString(36).slice(2, 8), // in the order of time
};

// ---- what is asked
function setPicture(file, id = null) {
  if (picture) URL.revokeObjectURL(picture.url);
  picture = file ? { file, url: URL.createObjectURL(file), id: id || shelf.name() } : null;
  if (file && !id) shelf.put(picture.id, file);
  like = null;
}

function givePicture(file) {
  const words = $("text").value.trim();
  setPicture(file);
  note = words ? { say: () => t.keptWords(words), button: () => t.dropWords, then: () => { $("text").value = ""; note = null; ask(); } } : null;
  ask();
}

function moreLike(hit) {
  const words = $("text").value.trim(), not = $("not").value.trim();
  setPicture(null); like = { number: hit.number, id: hit.id }; $("text").value = ""; $("not").value = "";
  const aside = [words, not].filter(Boolean).join(language === "zh" ? "”、“" : "”, “");
  note = aside ? { say: () => t.setAside(aside), button: () => t.putBack, then: () => { $("text").value = words; $("not").value = not; note = null; ask(); } } : null;
  scrollTo({ top: 0 });
  ask().then(() => document.querySelector(".card")?.focus({ preventScroll: true }));
}

const byPicture = () => Boolean(picture || like);
/** As a condition names a column (data_tools/columns.py): in quotation marks where it could be read otherwise. */
const named = column => /[=<>"]|^\s|\s$/.test(column) ? `"${column.replaceAll('"', '""')}"` : column;
const where = () => [...document.querySelectorAll("#facets select")].filter(s => s.value).map(s => `${s.dataset.column}=${s.value}`);
const atLeast = () => $("only").checked && !byPicture() ? +$("limit").value : null; // null: all

function address() {
  const parts = { q: $("text").value.trim(), not: $("not").value.trim() };
  if (where().length) parts.where = JSON.stringify(where());
  if (like) Object.assign(parts, { like: like.number, id: like.id });
  if (picture) parts.picture = picture.id;
  if (byPicture() && parts.q && $("share").value !== $("share").defaultValue) parts.share = $("share").value;
  return "#" + new URLSearchParams(Object.entries(parts).filter(([, value]) => value !== ""));
}

async function fetchResults(skip, top) {
  const text = $("text").value.trim(), not = $("not").value.trim(), share = +$("share").value, least = atLeast();
  let response;
  if (picture) {
    if (info && picture.file.size > info.max_upload_bytes) throw { code: "too-large" };
    const form = new FormData();
    form.append("image", picture.file, "picture");
    for (const [name, value] of Object.entries({ text, not, image_share: share, top, skip })) form.append(name, value);
    for (const condition of where()) form.append("where", condition);
    response = await fetch(served("api/search/image"), { method: "POST", body: form });
  } else {
    const body = { text: text || null, not: not || null, like: like && like.number, image_share: share, top, skip, where: where(), ...(least === null ? {} : { at_least: least }) };
    response = await fetch(served("api/search"), { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
  }
  const content = await response.json();
  if (!response.ok) throw content;
  return content;
}

function faultOf(problem) {
  const code = problem.code || "offline";
  return { code, detail: ["too-large", "no-picture", "offline", "password"].includes(code) ? "" : problem.detail || "" };
}

/** Ask what the fields say. `remember`: as a new place of the browser's history; `bones`: show that all will be new. */
async function ask(remember = true, bones = true) {
  clearTimeout(wait);
  const mine = ++asking, began = performance.now();
  loading = false;
  if (!$("text").value.trim() && !byPicture()) { answer = fault = null; chip(); return draw(); }
  if (remember) history.pushState(null, "", address());
  fault = null; chip();
  if (bones) { answer = null; draw(true); } else $("grid").setAttribute("aria-busy", true);
  try {
    const content = await fetchResults(0, FIRST);
    if (mine !== asking) return;
    answer = { results: content.results, matches: content.matches, ended: content.results.length < FIRST, ms: Math.round(performance.now() - began) };
  } catch (problem) {
    if (mine !== asking) return;
    answer = null; fault = faultOf(problem);
  }
  draw();
}

async function more() {
  if (loading || !answer || !goesOn()) return;
  const mine = asking, had = answer.results.length;
  loading = true; $("more").disabled = true;
  try {
    const content = await fetchResults(had, NEXT);
    if (mine !== asking) return;
    answer.results.push(...content.results);
    answer.ended = content.results.length < NEXT;
    $("grid").append(...answer.results.slice(had).map(cell));
  } catch (problem) {
    if (mine !== asking) return;
    fault = faultOf(problem);
  } finally {
    if (mine === asking) { loading = false; $("more").disabled = false; tell(); }
  }
}

const goesOn = () => Boolean(answer) && !answer.ended && (answer.matches === null || answer.results.length < answer.matches);

// ---- what is shown
function speak() {
  t = WORDS[language];
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  document.title = t.title;
  for (const e of document.querySelectorAll("[data-t]")) e.textContent = t[e.dataset.t];
  for (const e of document.querySelectorAll("[data-l]")) e.setAttribute("aria-label", t[e.dataset.l]);
  for (const e of document.querySelectorAll("[data-p]")) e.placeholder = t[e.dataset.p];
  $("language").textContent = t.other; $("language").lang = language === "zh" ? "en" : "zh-CN"; $("language").setAttribute("aria-label", t.otherLabel);
  document.body.dataset.drop = t.drop;
  if (info) {
    $("about").textContent = t.about(info.name, info.images.toLocaleString(), info.exact);
    $("measured").hidden = info.threshold === null;
    if (info.threshold !== null) { $("measured").textContent = t.measured(info.threshold.toFixed(3)); $("measured").setAttribute("aria-label", `${t.measuredLabel} (${t.measured(info.threshold.toFixed(3))})`); }
    for (const option of document.querySelectorAll("#facets option[value='']")) option.textContent = t.any;
  }
  chip(); draw();
}

function facets() {
  $("facets").replaceChildren(...info.facets.map(facet => {
    const select = make("select"), all = make("option", "", t.any);
    all.value = ""; select.dataset.column = named(facet.column);
    select.append(all, ...facet.choices.map(choice => { const o = make("option", "", `${choice.value} (${choice.images.toLocaleString()})`); o.value = choice.value; return o; }));
    select.onchange = () => ask();
    return make("label", "", make("span", "", facet.column), select);
  }));
}

function chip() {
  const on = byPicture();
  $("chip").hidden = !on;
  $("shareRow").hidden = !(on && $("text").value.trim());
  if (on) {
    const source = picture ? picture.url : served(`api/images/${like.number}`);
    if ($("chipImage").getAttribute("src") !== source) $("chipImage").src = source;
    $("chipName").textContent = picture ? t.yours : t.likeThis(like.id);
  }
  $("threshold").hidden = on; $("off").hidden = !on || !info || info.threshold === null;
  $("note").hidden = !note;
  if (note) { $("note").firstChild.textContent = note.say(); $("noteDo").hidden = !note.button; if (note.button) $("noteDo").textContent = note.button(); }
  $("shareOut").textContent = `${Math.round($("share").value * 100)} %`;
  $("limitOut").textContent = (+$("limit").value).toFixed(3);
  const set = where().length + Boolean($("not").value.trim()) + (atLeast() !== null);
  $("set").textContent = set ? t.set(set) : "";
}

function tell() {
  $("error").hidden = !fault;
  if (fault) $("error").textContent = `${t.errors[fault.code] || t.errors["bad-request"]}${language === "en" ? ` ${fault.detail}` : ""}`; // the server speaks English
  $("more").hidden = !goesOn();
  if (!answer) return $("status").textContent = "";
  const n = answer.results.length.toLocaleString(), all = info ? info.images.toLocaleString() : "", limited = atLeast() !== null || where().length > 0;
  if (answer.matches === null) $("status").textContent = t.some(n, answer.ms);
  else $("status").textContent = limited ? t.found(n, answer.matches.toLocaleString(), all, answer.ms) : t.best(n, answer.matches.toLocaleString(), answer.ms);
  if (atLeast() !== null && $("not").value.trim()) $("status").textContent += t.mixed;
}

function draw(busy = false) {
  const grid = $("grid"), shown = answer ? answer.results : [];
  grid.setAttribute("aria-busy", busy);
  tell();
  if (busy) $("status").textContent = t.busyNow;
  const empty = !busy && !fault && !shown.length;
  $("blank").hidden = !empty;
  if (empty) {
    $("blank").firstChild.textContent = answer ? t.noneHead : t.startHead;
    $("blank").lastChild.textContent = !answer ? t.start : atLeast() === null && where().length ? t.noneKept : t.none;
  }
  if (busy) return grid.replaceChildren(...Array.from({ length: 12 }, () => { const bone = make("li", "bone"); bone.setAttribute("aria-hidden", "true"); return bone; }));
  grid.replaceChildren(...shown.map(cell));
}

function make(tag, name, ...inside) { const e = document.createElement(tag); if (name) e.className = name; e.append(...inside); return e; }

function cell(hit, at) {
  const score = hit.score.toFixed(3), image = make("img"), frame = make("span", "frame", image), fill = make("i"), best = Math.max(answer.results[0].score, 1e-6);
  image.alt = ""; image.loading = "lazy"; image.src = served(`api/images/${hit.number}`);
  fill.style.width = `${Math.max(2, 100 * Math.max(0, hit.score) / best)}%`;
  const card = make("button", "card", frame), { title, price, link, rest } = sorted(hit.columns);
  if (title) card.append(make("span", "title", title));
  card.append(make("span", "facts", make("span", "name", make("bdi", "", hit.id)), make("span", "score", score)), make("span", "bar", fill));
  if (price || rest.length) card.append(make("span", "kept", ...(price ? [make("b", "", price), rest.length ? " · " : ""] : []), rest.join(" · ")));
  card.type = "button"; card.title = `${hit.id} · ${t.like}`; card.setAttribute("aria-label", t.card(title ? `${title} (${hit.id})` : hit.id, score));
  card.onclick = () => moreLike(hit);
  const zoom = make("button", "zoom", "⤢"), place = answer.results.indexOf(hit);
  zoom.type = "button"; zoom.setAttribute("aria-label", t.enlarge(hit.id)); zoom.title = t.enlarge(hit.id);
  zoom.onclick = () => enlarge(place);
  image.onerror = () => { frame.replaceChildren(make("span", "gone", t.gone)); zoom.remove(); };
  const weak = !byPicture() && hit.score < +$("limit").value, all = make("li", weak ? "cell weak" : "cell", card, zoom);
  if (link) { const way = anchor(link, `${t.link} ↗`); way.className = "link"; way.setAttribute("aria-label", `${t.link}: ${link}`); all.append(way); }
  return all;
}

/** Title (else the caption), price and link among what is kept of a picture, and the other short values. */
function sorted({ caption, ...columns }) {
  const all = Object.entries(columns).map(([name, value]) => [name, String(value)]), of = test => (all.find(test) || [])[1];
  const title = of(([name]) => TITLE.test(name)) || caption, price = of(([name]) => PRICE.test(name)), link = of(([, value]) => LINK.test(value));
  return { title, price, link, rest: all.filter(([name, value]) => ![title, price].includes(value) && !LINK.test(value)).map(([, value]) => value) };
}

function anchor(link, text) { const a = make("a", "", text); a.href = link; a.target = "_blank"; a.rel = "noopener noreferrer"; return a; }

// ---- one picture, large
async function enlarge(at) {
  if (at >= answer.results.length) await more();
  const hit = answer.results[at];
  if (!hit) return;
  open = at;
  const source = served(`api/images/${hit.number}?size=large`), name = hit.id.split("/").pop().replace(/\.[^.]*$/, "");
  $("largeImage").src = source; $("largeImage").alt = sorted(hit.columns).title || hit.id; $("largeName").textContent = hit.id;
  $("largePlace").textContent = t.place((at + 1).toLocaleString(), answer.matches === null ? null : answer.matches.toLocaleString(), hit.score.toFixed(4));
  $("largeKept").replaceChildren(...Object.entries(hit.columns).flatMap(([column, value]) => [make("dt", "", column === "caption" ? t.caption : column), make("dd", "", LINK.test(value) ? anchor(value, value) : String(value))]));
  $("largeKept").hidden = !Object.keys(hit.columns).length;
  $("largeSave").href = source; $("largeSave").download = `${name}.jpg`;
  $("before").disabled = at === 0; $("after").disabled = at + 1 >= answer.results.length && !goesOn();
  $("said").textContent = "";
  $("heatOn").hidden = !info || !info.heat || Boolean(picture); // a picture of one's own is not kept by the server
  if (!$("large").open) $("large").showModal();
  heat();
}

// ---- where in it the question is met
const HOT = [[13, 8, 135], [126, 3, 168], [204, 71, 120], [248, 149, 64], [240, 249, 33]]; // plasma
let map = null, mapped = 0;

/** The map of the picture that is enlarged, where it is wanted. */
async function heat() {
  const wanted = keep.get("heat") === "on" && !$("heatOn").hidden, hit = answer.results[open], mine = ++mapped;
  $("heatOn").setAttribute("aria-pressed", wanted);
  map = null; lay();
  if (!wanted) return;
  const text = $("text").value.trim(), not = $("not").value.trim();
  const body = { text: text || null, not: not || null, like: like && like.number, image_share: +$("share").value };
  try {
    const response = await fetch(served(`api/images/${hit.number}/heat`), { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
    const content = await response.json();
    if (!response.ok) throw content;
    if (mine !== mapped || !$("large").open) return;
    map = content; $("said").textContent = t.heatIs(map.score.toFixed(3)); lay();
  } catch {
    if (mine === mapped) $("said").textContent = t.heatNot;
  }
}

/** Lay the map over its part of the picture, as large as that is shown now. */
function lay() {
  const canvas = $("heat"), image = $("largeImage");
  canvas.hidden = !map || !image.naturalWidth;
  if (canvas.hidden) return;
  const rows = map.values.length, columns = map.values[0].length, cells = make("canvas"), [x, y, width, height] = map.part;
  cells.width = columns; cells.height = rows;
  const pen = cells.getContext("2d"), data = pen.createImageData(columns, rows);
  map.values.flat().forEach((value, at) => {
    const place = value * (HOT.length - 1), low = Math.min(Math.floor(place), HOT.length - 2);
    data.data.set([0, 1, 2].map(c => HOT[low][c] + (place - low) * (HOT[low + 1][c] - HOT[low][c])), 4 * at);
    data.data[4 * at + 3] = 255;
  });
  pen.putImageData(data, 0, 0);
  const scale = Math.min(image.clientWidth / image.naturalWidth, image.clientHeight / image.naturalHeight), wide = image.naturalWidth * scale, tall = image.naturalHeight * scale;
  canvas.style.left = `${image.offsetLeft + (image.clientWidth - wide) / 2 + x * wide}px`; canvas.style.top = `${image.offsetTop + (image.clientHeight - tall) / 2 + y * tall}px`;
  canvas.style.width = `${width * wide}px`; canvas.style.height = `${height * tall}px`;
  canvas.width = Math.max(1, Math.round(width * wide)); canvas.height = Math.max(1, Math.round(height * tall));
  const over = canvas.getContext("2d");
  over.imageSmoothingEnabled = true; over.imageSmoothingQuality = "high"; over.drawImage(cells, 0, 0, canvas.width, canvas.height);
}

/** The path on the server where it tells (this machine alone asks it), else what is below the indexed folder. */
function copyPath() {
  const hit = answer.results[open], path = info && info.folder ? `${info.folder}/${hit.id}` : hit.id;
  const done = () => { $("said").textContent = t.copied(path); };
  const byHand = () => { const box = make("textarea"); box.value = path; $("said").replaceChildren(box); box.select(); document.execCommand("copy"); done(); }; // http, not localhost
  navigator.clipboard ? navigator.clipboard.writeText(path).then(done, byHand) : byHand();
}

// ---- hands
const later = () => { clearTimeout(wait); wait = setTimeout(() => { history.replaceState(null, "", address()); ask(false, false); }, 250); };
$("form").onsubmit = event => { event.preventDefault(); note = null; ask(); };
$("text").oninput = chip; $("not").oninput = chip;
$("share").oninput = () => { chip(); later(); };
$("limit").oninput = () => { $("only").checked = true; chip(); later(); };
$("only").onchange = () => { chip(); later(); };
$("measured").onclick = () => { $("limit").value = info.threshold; $("only").checked = true; chip(); later(); };
$("pick").onclick = () => $("file").click();
$("file").onchange = () => { if ($("file").files[0]) givePicture($("file").files[0]); $("file").value = ""; };
$("chipOff").onclick = () => { setPicture(null); note = null; ask(); $("text").focus(); };
$("noteDo").onclick = () => note.then();
$("more").onclick = more;
$("before").onclick = () => enlarge(open - 1);
$("after").onclick = () => enlarge(open + 1);
$("largeLike").onclick = () => { const hit = answer.results[open]; $("large").close(); moreLike(hit); };
$("largeCopy").onclick = copyPath;
$("heatOn").onclick = () => { keep.set("heat", keep.get("heat") === "on" ? "off" : "on"); $("said").textContent = ""; heat(); };
$("largeImage").onload = lay; addEventListener("resize", lay);
$("largeOff").onclick = () => $("large").close();
$("large").onclick = event => { if (event.target === $("large")) $("large").close(); };
$("large").onclose = () => document.querySelectorAll(".zoom")[open]?.focus({ preventScroll: true });
$("language").onclick = () => { language = language === "zh" ? "en" : "zh"; keep.set("language", language); speak(); };
new IntersectionObserver(seen => { if (seen.some(s => s.isIntersecting) && !fault) more(); }, { rootMargin: "600px" }).observe($("more"));

let inside = 0;
addEventListener("dragenter", event => { event.preventDefault(); inside++; document.body.classList.add("drop"); });
addEventListener("dragover", event => event.preventDefault());
addEventListener("dragleave", () => { if (--inside <= 0) { inside = 0; document.body.classList.remove("drop"); } });
addEventListener("drop", event => {
  event.preventDefault(); inside = 0; document.body.classList.remove("drop");
  if (event.dataTransfer.files[0]) givePicture(event.dataTransfer.files[0]);
});
addEventListener("paste", event => { const file = [...event.clipboardData.files].find(f => f.type.startsWith("image/")); if (file) givePicture(file); });
addEventListener("keydown", event => {
  if ($("large").open) {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (by && !$(by > 0 ? "after" : "before").disabled) { event.preventDefault(); enlarge(open + by); }
    return;
  }
  const cards = [...document.querySelectorAll(".card")], at = cards.indexOf(document.activeElement), typing = /^(INPUT|SELECT)$/.test(document.activeElement.tagName);
  if (event.key === "/" && !typing) { event.preventDefault(); $("text").focus(); $("text").select(); return; }
  if (at < 0) { if (event.key === "ArrowDown" && document.activeElement === $("text") && cards[0]) { event.preventDefault(); cards[0].focus(); } return; }
  const top = e => Math.round(e.getBoundingClientRect().top), across = cards.filter(e => top(e) === top(cards[0])).length;
  const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: across, ArrowUp: -across }[event.key];
  if (step === undefined) return;
  event.preventDefault();
  if (at + step < 0) $("text").focus(); else cards[Math.min(cards.length - 1, at + step)].focus();
});

const narrow = matchMedia("(max-width: 620px)"), fold = () => { $("tools").open = !narrow.matches; };
narrow.addEventListener("change", fold); fold();

// ---- the address
async function fromAddress() {
  const asked = new URLSearchParams(location.hash.slice(1)), id = asked.get("picture");
  let wanted = [];
  try { wanted = JSON.parse(asked.get("where") || "[]"); } catch { /* an address cut short */ }
  $("text").value = asked.get("q") || ""; $("not").value = asked.get("not") || "";
  for (const select of document.querySelectorAll("#facets select")) {
    const own = wanted.find(c => String(c).startsWith(select.dataset.column + "="));
    select.value = own ? own.slice(select.dataset.column.length + 1) : "";
  }
  $("share").value = asked.get("share") || $("share").defaultValue;
  const file = id ? await shelf.get(id) : null;
  setPicture(file, id);
  note = id && !file ? { say: () => t.elsewhere } : null;
  if (/^\d+$/.test(asked.get("like") || "")) like = { number: +asked.get("like"), id: asked.get("id") || asked.get("like") };
  ask(false);
}
addEventListener("popstate", fromAddress);
speak(); $("text").focus({ preventScroll: true });
fetch(served("api/index")).then(async response => {
  const content = await response.json();
  if (!response.ok) throw content;
  info = content;
  $("text").maxLength = $("not").maxLength = info.max_text;
  if (info.threshold !== null) $("limit").value = info.threshold;
  facets(); speak(); fromAddress();
}).catch(problem => { fault = faultOf(problem); draw(); });

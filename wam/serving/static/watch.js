"use strict";
/* The page of `wam serve`: asks /live again and again, keeps what it is told within bounds, and draws it.
   Everything that a client chose (names, instructions, messages) goes into the page as text, never as markup. */

const KEEP = { plans: 300, bars: 48, acts: 8, log: 100, surprise: 120, blocks: 2 };
const STAGES = ["decode", "queue", "text", "encode", "first_frame", "commit", "prefill", "denoise", "post"];
const PICTURE = /^data:image\/jpeg;base64,[A-Za-z0-9+/=]+$/;
const $ = (id) => document.getElementById(id);

const page = {
  watcher: Array.from(crypto.getRandomValues(new Uint8Array(9)), (b) => b.toString(16).padStart(2, "0")).join(""),
  key: null, // in memory alone
  run: "", cursor: 0, paused: false, chosen: null, followed: true, asking: null, failures: 0,
  state: null, plans: [], log: [], missed: 0, skew: 0, robots: new Map(),
};

/* ---------------------------------------------------------------------------------------------- elements */

function el(name, given = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(given)) {
    if (value === true) node.setAttribute(key, "");
    else if (value !== null && value !== false) node.setAttribute(key, value);
  }
  node.append(...children.filter((c) => c !== null && c !== undefined));
  return node;
}

function svg(name, given = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(given)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function put(node, ...children) { node.replaceChildren(...children.filter((c) => c !== null && c !== undefined)); }

function text(node, words) { if (node.textContent !== words) node.textContent = words; }

function show(image, address) { if (PICTURE.test(address) && image.src !== address) image.src = address; }

const short = (x, digits = 3) => (x === null || x === undefined ? "\u2013" : Math.abs(x) >= 1000 ? Math.round(x).toLocaleString("en") : String(Number(x.toPrecision(digits))));
const clock = (seconds) => new Date(seconds * 1000).toLocaleTimeString([], { hour12: false });

function named(key) {
  if (key.startsWith("session ")) return key.slice(8);
  return key.startsWith("connection ") ? "without a name, " + key.slice(11, 17) : key;
}

function quantile(sorted, q) {
  if (!sorted.length) return null;
  const at = (sorted.length - 1) * q, low = Math.floor(at), high = Math.ceil(at);
  return sorted[low] + (sorted[high] - sorted[low]) * (at - low);
}

/* ---------------------------------------------------------------------------------------------- asking */

function status(state, words) {
  const node = $("status");
  if (node.dataset.state !== state) node.dataset.state = state;
  text(node, words);
}

const sleep = (ms) => new Promise((done) => setTimeout(done, ms));

async function ask() {
  const question = new URLSearchParams({ watcher: page.watcher, robot: page.chosen || "", after: page.cursor, run: page.run });
  const headers = { "X-Wam-Live": "1" };
  if (page.key !== null) headers.Authorization = "Api-Key " + page.key;
  page.asking = new AbortController();
  const late = setTimeout(() => page.asking && page.asking.abort(), 15000);
  try {
    return await fetch("live?" + question, { headers, signal: page.asking.signal, credentials: "omit", redirect: "error", cache: "no-store" });
  } finally { clearTimeout(late); }
}

const idle = () => page.paused || document.hidden || !$("login").hidden;

async function watch() {
  for (;;) {
    if (idle()) { await sleep(100); continue; }
    try {
      const reply = await ask();
      if (reply.status === 401) { login(page.key === null ? "" : "That is not the key."); continue; }
      if (!reply.ok) { status("lost", (await reply.text()).slice(0, 120) || "refused (" + reply.status + ")"); await sleep(2000); continue; }
      const told = await reply.json();
      page.failures = 0;
      if (!page.paused) { take(told); status("live", "live"); }
    } catch (error) {
      if (idle() || (error.name === "AbortError" && page.asking === null)) continue;
      page.failures += 1;
      status("lost", "the server does not answer; asking again");
      await sleep(Math.min(5000, 300 * 2 ** Math.min(page.failures, 5)));
    }
  }
}

function again() { const asking = page.asking; page.asking = null; if (asking) asking.abort(); }

function login(words) {
  page.key = null;
  $("all").hidden = true;
  $("login").hidden = false;
  text($("wrong"), words);
  status("begin", "a key is needed");
  $("key").focus();
}

/* ---------------------------------------------------------------------------------------------- being told */

function robot(key) {
  if (!page.robots.has(key)) {
    page.robots.set(key, { acts: [], done: [], blocks: [], surprise: [], seen: null, picture: null });
    while (page.robots.size > 40) page.robots.delete(page.robots.keys().next().value);
  }
  return page.robots.get(key);
}

function push(list, item, most) { list.push(item); if (list.length > most) list.splice(0, list.length - most); }

function note(event, what, words, bad) { // what a robot does again goes to the top, and is counted
  const who = named(event.robot), same = page.log.findIndex((l, i) => i < 12 && l.who === who && l.what === what);
  const times = same < 0 ? 1 : page.log.splice(same, 1)[0].times + 1;
  page.log.unshift({ time: event.time, who, what, words, bad, times });
  page.log.length = Math.min(page.log.length, KEEP.log);
}

const HEAR = {
  plan(e) {
    push(page.plans, e, KEEP.plans);
    for (const [reason, count] of Object.entries(e.interventions)) note(e, "gate: " + reason, count + " action" + (count > 1 ? "s" : ""), false);
    if (e.cut) note(e, "cut: " + e.cut.reason, e.cut.message, true);
  },
  actions(e) { push(robot(e.robot).acts, e, KEEP.acts); },
  seen(e) {
    const r = robot(e.robot);
    if (e.before === null) { r.done = []; r.blocks = []; r.acts = []; }
    else e.executed.forEach((values, i) => push(r.done, { step: e.step - e.executed.length + i, values }, 400));
    r.seen = { step: e.step, time: e.time };
    if (e.picture) r.picture = e.picture;
  },
  imagined(e) { push(robot(e.robot).blocks, { ...e, came: e.pictures.map(() => null) }, KEEP.blocks); },
  came(e) {
    const block = robot(e.robot).blocks.find((b) => b.plan === e.plan);
    if (block) block.came[e.index] = e.picture;
  },
  surprise(e) {
    push(robot(e.robot).surprise, e, KEEP.surprise);
    if (e.surprised) note(e, "surprise", e.why, true);
  },
  refused(e) { note(e, e.code, e.message, true); },
  ended(e) { note(e, e.why === "reset" ? "begins anew" : "ended: " + e.why, e.outcome || "", false); page.robots.delete(e.robot); },
};

function take(told) {
  if (told.run !== page.run) { page.robots.clear(); page.plans = []; page.run = told.run; }
  page.cursor = told.cursor;
  page.missed += told.missed;
  page.state = told;
  page.skew = told.time - Date.now() / 1000;
  for (const event of told.events) if (Object.hasOwn(HEAR, event.type)) HEAR[event.type](event);
  const keys = told.robots.map((r) => r.key);
  if (!keys.includes(page.chosen) || (page.followed && !page.chosen)) choose(keys[0] || null, true);
  $("all").hidden = false;
  draw();
}

function choose(key, followed = false) {
  if (key === page.chosen) return;
  page.chosen = key;
  page.followed = followed;
  if (!followed) again();
  if (page.state) draw();
}

/* ---------------------------------------------------------------------------------------------- drawing */

let due = false;
function draw() {
  if (due) return;
  due = true;
  requestAnimationFrame(() => {
    due = false;
    if (!page.state) return;
    drawAbout(); drawTiles(); drawRobots(); drawEyes(); drawActions(); drawBars(); drawStages(); drawCounts(); drawLog();
  });
}

function drawAbout() {
  const s = page.state.server, about = Object.entries(s.about).map(([k, v]) => k.replaceAll("_", " ") + " " + v).join(", ");
  text($("about"), [s.server, s.embodiment, "mode " + s.mode, about, short(s.control_hz) + " Hz, " + s.block_actions + " actions a block"].filter(Boolean).join(" \u00b7 "));
  text($("lost"), [
    page.missed ? page.missed + " events went by faster than this page asked." : "",
    page.state.dropped ? page.state.dropped + " events were dropped for want of room." : "",
    page.state.unseen ? page.state.unseen + " imagined blocks were not shown, because the model was at work." : "",
  ].filter(Boolean).join(" "));
}

function drawTiles() {
  const c = page.state.counts, totals = page.plans.map((p) => p.total).sort((a, b) => a - b);
  const now = page.state.time, recent = page.plans.filter((p) => now - p.time < 10);
  const sum = (counts) => Object.values(counts).reduce((a, b) => a + b, 0);
  const errors = sum(c.errors), batch = recent.length ? recent.reduce((a, p) => a + p.batch, 0) / recent.length : null;
  const tiles = [
    ["robots", c.sessions, c.connections + " connected"],
    ["plans a second", short(recent.length / 10, 2), "last 10 s"],
    ["latency p50", short(quantile(totals, 0.5)), "ms"],
    ["latency p95", short(quantile(totals, 0.95)), "ms"],
    ["waiting", c.waiting, "in the queue"],
    ["batch", batch === null ? "\u2013" : batch.toFixed(1), "robots"],
    ["too late", c.missed, "plans", c.missed > 0],
    ["refused", errors, "since start", errors > 0],
    ["gate", sum(c.gate), "actions"],
  ];
  put($("tiles"), ...tiles.map(([name, value, unit, bad]) => el("dl", { class: bad ? "tile bad" : "tile" }, el("dt", {}, name), el("dd", {}, String(value), " ", el("small", {}, unit)))));
}

function drawRobots() {
  const list = $("robots"), robots = page.state.robots, known = new Map([...list.children].map((li) => [li.dataset.key, li]));
  $("none").hidden = robots.length > 0;
  const sorted = [...robots].sort((a, b) => (a.key < b.key ? -1 : 1)); // in a place of its own, not jumping with every plan
  for (const [i, r] of sorted.entries()) {
    let item = known.get(r.key);
    if (!item) {
      const button = el("button", { type: "button" }, el("b"), el("span"), el("span"));
      button.addEventListener("click", () => choose(r.key));
      item = el("li", {}, button);
      item.dataset.key = r.key;
    }
    known.delete(r.key);
    if (list.children[i] !== item) list.insertBefore(item, list.children[i] || null);
    const button = item.firstChild, [name, prompt, more] = button.children;
    button.setAttribute("aria-current", String(r.key === page.chosen));
    text(name, named(r.key));
    text(prompt, r.prompt || "no instruction yet");
    text(more, r.stopped ? "stopped by the gate: " + r.stopped : r.plans + " plans, step " + (r.step === null ? "\u2013" : r.step) + (r.idle_s > 2 ? ", idle " + Math.round(r.idle_s) + " s" : ""));
    more.className = r.stopped ? "stopped" : "";
  }
  for (const gone of known.values()) gone.remove();
}

function drawEyes() {
  const r = page.robots.get(page.chosen), image = $("camera"), cameras = page.state.server.cameras;
  image.hidden = !(r && r.picture);
  $("blind").hidden = !image.hidden;
  if (!image.hidden) show(image, r.picture);
  const step = r && r.seen ? "step " + r.seen.step + ", " + (r.seen.step / page.state.server.control_hz).toFixed(1) + " s" : "";
  text($("camera-c"), [cameras.join(", "), "as the policy sees it", step].filter(Boolean).join(" \u00b7 "));
  image.alt = "the newest frame of " + cameras.join(", ");
  const known = page.state.robots.find((k) => k.key === page.chosen);
  text($("whose"), known ? named(known.key) + (known.prompt ? ": \u201c" + known.prompt + "\u201d" : "") : "");
  drawPairs(r);
  drawSurprise(r);
}

function drawPairs(r) {
  const blocks = r ? r.blocks : [], nodes = [...$("pairs").children];
  blocks.forEach((block, i) => {
    let node = nodes[i];
    if (!node || node.dataset.plan !== block.plan) {
      const fresh = pair(block);
      if (node) node.replaceWith(fresh); else $("pairs").append(fresh);
      node = fresh;
    }
    const came = [...node.querySelectorAll("[data-came]")];
    came.forEach((slot, j) => {
      if (block.came[j] && slot.tagName !== "IMG") slot.replaceWith(cameIn(block.came[j], j));
    });
    text(node.querySelector(".cap"), "plan at step " + block.at + ", " + block.source.replace("/", ", ") + " solver steps" + (block.came.every(Boolean) ? "" : block.came.some(Boolean) ? ": coming" : ": still to come"));
  });
  for (const extra of nodes.slice(blocks.length)) extra.remove();
  const mode = page.plans.length ? page.plans[page.plans.length - 1].mode : page.state.server.mode;
  text($("dream-note"), blocks.length ? "" : r && r.acts.length ? "No imagined pictures: plans in mode \u201c" + mode + "\u201d imagine none (wam serve --watch-imagined imagines them for this page), or the model never rests." : "Nothing was planned for this robot since this page looks at it.");
}

function cameIn(address, j) {
  const image = el("img", { class: "real", alt: "what came, picture " + (j + 1) });
  image.dataset.came = "";
  show(image, address);
  return image;
}

function pair(block) {
  const hz = page.state.server.control_hz, parts = [el("div", { class: "cap" })];
  const node = el("div", { class: "pair", role: "group", "aria-label": "imagined and came" });
  node.dataset.plan = block.plan;
  const slots = (make) => block.pictures.map((address, j) => make(address, j));
  parts.push(el("div", { class: "side corner" }), ...slots((_, j) => el("div", { class: "time" }, "+" + ((block.steps[j] - block.at) / hz).toFixed(2) + " s")));
  parts.push(el("div", { class: "side" }, "imagined"), ...slots((address, j) => {
    const image = el("img", { class: "dreamt", alt: "imagined, picture " + (j + 1) });
    image.addEventListener("load", () => node.style.setProperty("--ratio", image.naturalWidth + " / " + image.naturalHeight), { once: true });
    show(image, address);
    return image;
  }));
  parts.push(el("div", { class: "side" }, "came"), ...slots((_, j) => {
    const wait = el("div", { class: "wait" }, "to come");
    wait.dataset.came = "";
    return wait;
  }));
  node.append(...parts);
  return node;
}

function line(points, x, y) {
  let d = "", pen = false;
  for (const [px, py] of points) {
    if (py === null || py === undefined) { pen = false; continue; }
    d += (pen ? "L" : "M") + x(px).toFixed(1) + " " + y(py).toFixed(1);
    pen = true;
  }
  return d;
}

function drawSurprise(r) {
  const values = r ? r.surprise : [], node = $("surprise");
  if (!page.state.server.checked) return put(node, el("p", { class: "note" }, "Surprise is not known: this checkpoint was not calibrated (wam calibrate)."));
  if (!values.length) return put(node, el("p", { class: "note" }, "Surprise is told when a whole imagined block has come."));
  const most = Math.max(1.5, ...values.map((v) => v.value)), last = values[values.length - 1], W = 400, H = 70;
  const x = (i) => 4 + (W - 8) * (values.length > 1 ? i / (values.length - 1) : 0.5), y = (v) => H - 4 - (H - 10) * v / most;
  const marks = values.map((v, i) => svg("path", { class: v.surprised ? "marks alarm" : "marks", d: v.surprised ? `M${x(i) - 4} ${y(v.value) + 4}h8l-4 -8z` : `M${x(i) - 2} ${y(v.value) - 2}h4v4h-4z` }));
  put(node,
    el("h3", {}, "Surprise: " + last.value.toFixed(2)),
    svg("svg", { viewBox: `0 0 ${W} ${H}`, preserveAspectRatio: "none", role: "img", "aria-label": "surprise of the last " + values.length + " blocks, now " + last.value.toFixed(2) },
      svg("path", { class: "limit", d: `M0 ${y(1)}H${W}` }), svg("path", { class: "sent", d: line(values.map((v, i) => [i, v.value]), x, y) }), ...marks),
    el("p", { class: "note" }, last.why + ". Dashed: 95 of 100 held-out frames are below; triangles: above the threshold."));
}

/* ------------------------------------------------------------------------------------------ actions */

function legendLine(kind, words) { return el("span", {}, svg("svg", { viewBox: "0 0 28 10", "aria-hidden": "true" }, svg("path", { class: kind, d: "M0 5H28" })), words); }

function drawActions() {
  if (!$("acts-l").childElementCount) put($("acts-l"), legendLine("made", "planned by the model"), legendLine("sent", "sent, after the gate"), legendLine("done", "executed"), legendLine("now", "now"));
  const r = page.robots.get(page.chosen), names = page.state.server.names, box = $("actions");
  if (!r || (!r.acts.length && !r.done.length)) return put(box, el("p", { class: "note" }, "Nothing was planned for this robot since this page looks at it."));
  const horizon = page.state.server.block_actions, now = r.seen ? r.seen.step : r.acts[r.acts.length - 1].step;
  const from = now - 3 * horizon, to = Math.max(now + horizon, ...r.acts.map((p) => p.step + p.made.length));
  const at = Math.min(now, to);
  names.forEach((name, d) => {
    const figure = box.children[d] && box.children[d].tagName === "FIGURE" ? box.children[d] : null;
    const fresh = chart(name, d, r, from, to, at);
    if (figure) figure.replaceWith(fresh); else if (box.children[d]) box.children[d].replaceWith(fresh); else box.append(fresh);
  });
  while (box.children.length > names.length) box.lastChild.remove();
}

function chart(name, d, r, from, to, now) {
  const W = 200, H = 84, plans = r.acts.filter((p) => p.step + p.made.length > from);
  const done = r.done.filter((p) => p.step >= from).map((p) => [p.step, p.values[d]]);
  const made = plans.map((p) => p.made.map((row, i) => [p.step + i, row[d]])), sent = plans.map((p) => p.passed.map((row, i) => [p.step + i, row[d]]));
  const values = [done, ...made, ...sent].flat().filter(([step, v]) => step >= from && v !== null).map(([, v]) => v);
  let low = Math.min(...values), high = Math.max(...values);
  if (!(high - low > 1e-6)) { low -= 0.5; high += 0.5; }
  const x = (step) => W * (step - from) / Math.max(1, to - from), y = (v) => H - 5 - (H - 10) * (v - low) / (high - low);
  const old = (i) => (i < plans.length - 1 ? " old" : "");
  const inside = (points) => points.filter(([step]) => step >= from);
  const paths = [
    svg("path", { class: "now", d: `M${x(now)} 0V${H}` }),
    ...sent.map((points, i) => svg("path", { class: "sent" + old(i), d: line(inside(points), x, y) })),
    svg("path", { class: "done", d: line(done, x, y) }),
    ...made.map((points, i) => svg("path", { class: "made" + old(i), d: line(inside(points), x, y) })),
  ];
  const drawn = svg("svg", { viewBox: `0 0 ${W} ${H}`, preserveAspectRatio: "none", role: "img", "aria-label": `${name}: from ${short(low)} to ${short(high)}` }, ...paths);
  return el("figure", { class: "chart" }, el("figcaption", {}, el("b", {}, name), el("span", {}, short(low) + " \u2026 " + short(high))), drawn);
}

/* ------------------------------------------------------------------------------------------ time */

const ORDER = ["queue", "denoise", "encode", "prefill", "decode", "commit", "other"]; // as they are coloured
function parts(plan) {
  const out = Object.fromEntries(ORDER.map((name) => [name, 0]));
  for (const [name, spent] of Object.entries(plan.stages)) out[ORDER.includes(name) ? name : "other"] += spent;
  out.other += Math.max(0, plan.total - Object.values(out).reduce((a, b) => a + b, 0));
  return out;
}

function drawBars() {
  const plans = page.plans.slice(-KEEP.bars), W = 600, H = 120;
  if (!plans.length) return put($("bars"), el("p", { class: "note" }, "no plan yet"));
  const sorted = plans.map((p) => p.total).sort((a, b) => a - b), most = Math.max(1, sorted[sorted.length - 1]), wide = W / KEEP.bars, bars = [];
  plans.forEach((plan, i) => {
    let up = 0;
    Object.entries(parts(plan)).forEach(([, spent], k) => {
      const tall = (H - 6) * spent / most;
      if (tall > 0.05) bars.push(svg("rect", { class: "c" + k, x: ((KEEP.bars - plans.length + i) * wide).toFixed(1), y: (H - up - tall).toFixed(2), width: (wide - 1.5).toFixed(1), height: tall.toFixed(2) }));
      up += tall;
    });
  });
  put($("bars"),
    svg("svg", { viewBox: `0 0 ${W} ${H}`, preserveAspectRatio: "none", role: "img", "aria-label": `the newest ${plans.length} plans, by stage; the longest took ${short(most)} milliseconds` }, ...bars),
    el("p", { class: "key" }, ...ORDER.map((name, k) => el("span", {}, el("i", { class: "c" + k }), name)), el("span", {}, "full height: " + short(most) + " ms; newest on the right")));
}

function gauge(share, kind) {
  const bar = el("span", { class: "gauge " + kind });
  bar.style.width = Math.max(0, Math.min(100, 100 * share)).toFixed(1) + "%";
  return bar;
}

function drawStages() {
  const names = STAGES.filter((s) => page.plans.some((p) => s in p.stages)), body = [], whole = page.plans.reduce((a, p) => a + p.total, 0);
  for (const name of [...names, "total"]) {
    const values = page.plans.map((p) => (name === "total" ? p.total : p.stages[name] || 0)).sort((a, b) => a - b);
    const sum = values.reduce((a, b) => a + b, 0), kind = name === "total" ? "c6" : "c" + Math.max(0, ORDER.includes(name) ? ORDER.indexOf(name) : ORDER.length - 1);
    const cells = [quantile(values, 0.5), quantile(values, 0.95), values.length ? values[values.length - 1] : null].map((v) => el("td", {}, short(v)));
    body.push(el("tr", {}, el("th", { scope: "row" }, name.replace("_", " ")), ...cells, el("td", { class: "meter" }, gauge(whole ? sum / whole : 0, kind))));
  }
  put($("stages").tBodies[0], ...body);
}

/* ------------------------------------------------------------------------------------------ counts */

function countTable(rows, caption) {
  const most = Math.max(1, ...rows.map(([, n]) => n));
  return el("table", {}, el("caption", {}, caption), el("tbody", {}, ...rows.map(([name, n, kind]) => el("tr", {}, el("th", { scope: "row" }, name), el("td", {}, short(n)), el("td", { class: "meter" }, gauge(n / most, kind))))));
}

function drawCounts() {
  const c = page.state.counts, batch = [];
  let below = 0, from = 1;
  for (const [edge, n] of Object.entries(c.batch).map(([e, n]) => [e === "+Inf" ? Infinity : Number(e), n]).sort((a, b) => a[0] - b[0])) {
    if (n > below) batch.push([edge === Infinity ? "over " + (from - 1) : edge === from ? String(edge) : from + " to " + edge, n - below, "c0"]);
    below = n;
    from = edge + 1;
  }
  put($("batches"), batch.length ? countTable(batch, "forward passes since the server started") : el("p", { class: "note" }, "none yet"));
  const rows = [
    ...Object.entries(c.errors).map(([name, n]) => ["refused: " + name.replaceAll("_", " "), n, "c5"]),
    ...Object.entries(c.gate).map(([name, n]) => ["gate: " + name, n, "c1"]),
    ...Object.entries(c.ended).map(([name, n]) => ["sessions ended: " + name, n, "c6"]),
  ];
  put($("counts"), rows.length ? countTable(rows, "requests and actions since the server started") : el("p", { class: "note" }, "nothing so far"));
}

function drawLog() {
  if (page.drawn === page.log[0]) return;
  page.drawn = page.log[0];
  put($("log"), ...page.log.map((l) => el("li", { class: l.bad ? "bad" : null }, el("time", {}, clock(l.time)), el("b", {}, l.what + (l.times > 1 ? " \u00d7" + l.times : "")), el("span", {}, l.who + (l.words ? ": " + l.words : "")))));
}

/* ---------------------------------------------------------------------------------------------- hands */

function pause() {
  page.paused = !page.paused;
  $("pause").setAttribute("aria-pressed", String(page.paused));
  text($("pause"), page.paused ? "Go on" : "Pause");
  if (page.paused) { again(); status("paused", "paused"); } else status("begin", "connecting");
}

const THEMES = ["system", "light", "dark"];
function theme() {
  const root = document.documentElement, next = THEMES[(THEMES.indexOf(root.dataset.theme || "system") + 1) % THEMES.length];
  if (next === "system") delete root.dataset.theme; else root.dataset.theme = next;
  text($("theme"), "Theme: " + next);
}

$("pause").addEventListener("click", pause);
$("theme").addEventListener("click", theme);
$("login").addEventListener("submit", (event) => {
  event.preventDefault();
  page.key = $("key").value.trim();
  $("key").value = "";
  $("login").hidden = true;
  status("begin", "connecting");
});
document.addEventListener("keydown", (event) => {
  const where = event.target;
  if (event.key === " " && !["BUTTON", "INPUT"].includes(where.tagName) && !event.ctrlKey && !event.metaKey && !event.altKey) { event.preventDefault(); pause(); }
  if (["ArrowDown", "ArrowUp"].includes(event.key) && where.closest && where.closest("#robots")) {
    const buttons = [...document.querySelectorAll("#robots button")], to = buttons[buttons.indexOf(where) + (event.key === "ArrowDown" ? 1 : -1)];
    event.preventDefault();
    if (to) { to.focus(); to.click(); }
  }
});
document.addEventListener("visibilitychange", () => { if (document.hidden) again(); });
watch();

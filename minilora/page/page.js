// Carries a state from the form to Python, and Python's HTML back into the page. All sums and all HTML are Python's:
// minilora/page, answered by `minilora page` ("served") or by Pyodide in worker.js ("static").

const $ = (/** @type {string} */ id) => /** @type {HTMLElement} */ (document.getElementById(id));
const form = /** @type {HTMLFormElement} */ ($("run"));
const controls = () => /** @type {HTMLInputElement[]} */ ([...form.elements].filter((e) => e.getAttribute("name")));
const start = read();
let turn = 0; // of the question that the page waits for
let large = 0; // bytes of a config.json too large to be read
let bill = {}; // what is downloaded
const MOST_IN_ADDRESS = 30000; // characters

// ---------------------------------------------------------------- whom to ask

/** @param {object} question @returns {Promise<any>} */
async function askServer(question) {
  try {
    const reply = await fetch("answer", {
      method: "POST", body: JSON.stringify(question), headers: { "Content-Type": "application/json" } });
    return reply.ok ? await reply.json() : { error: await reply.text() };
  } catch {
    return { error: "the Python behind this page is gone: start `minilora page` again" };
  }
}

function worker() {
  const python = new Worker("worker.js", { type: "module" }), waiting = new Map();
  let asked = 0;
  $("loading").hidden = false;
  python.onmessage = ({ data }) => {
    if (data.id) {
      waiting.get(data.id)(data.answer);
      waiting.delete(data.id);
    } else if (data.failed) {
      $("loading").hidden = true;
      refuse(data.failed);
    } else {
      $("loaded").setAttribute("value", data.bytes);
      $("loading-what").textContent = data.what;
      $("loading").hidden = data.ready;
    }
  };
  return (/** @type {object} */ question) => new Promise((done) => {
    waiting.set(++asked, done);
    python.postMessage({ id: asked, question });
  });
}

const send = document.body.dataset.answers === "served" ? askServer : worker();
let last = Promise.resolve();

/** One question at a time; one that nobody waits for any more is not asked. */
function ask(/** @type {object} */ question, /** @type {number} */ mine) {
  const reply = last.then(() => (mine === turn ? send(question) : null));
  last = reply.catch(() => null);
  return reply;
}

// ---------------------------------------------------------------- the state: form, address

function read() {
  const state = {};
  for (const e of controls())
    if (!e.disabled && e.value !== "" && (e.type !== "checkbox" || e.checked)) state[e.name] = e.value;
  return state;
}

/** @param {Record<string, string>} state */
function fill(state) {
  for (const e of controls()) {
    if (e.type === "checkbox") e.checked = state[e.name] === "yes";
    else {
      e.value = state[e.name] ?? "";
      if (e.value !== (state[e.name] ?? "")) { // no such choice: it is shown, and Python says what is wrong with it
        e.append(new Option(state[e.name]));
        e.value = state[e.name];
      }
    }
  }
  if (state.config) $("own").setAttribute("open", "");
  suit();
}

/** What goes with training alone, or with serving alone, waits while the other is asked; so does the model's name. */
function suit() {
  const other = form.elements["serve"].checked ? "training" : "serving";
  for (const e of form.querySelectorAll("[data-only]")) {
    const off = e.getAttribute("data-only") === other;
    if ("disabled" in e) e.disabled = off;
    else e.hidden = off;
  }
  form.elements["model"].disabled = Boolean(form.elements["config"].value || large);
}

function inAddress() {
  return Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
}

// ---------------------------------------------------------------- question and answer

async function answer() {
  const mine = ++turn, state = read();
  const asked = location.hash;
  document.body.setAttribute("aria-busy", "true");
  const reply = await ask({ state, size: large }, mine);
  if (mine !== turn) return;
  document.body.removeAttribute("aria-busy");
  document.querySelector("main")?.classList.toggle("old", Boolean(reply.error));
  if (reply.error) refuse(reply.error);
  else show(reply);
  $("answer").dataset.of = asked;
  if (reply.error) return;
  say(reply.said, mine);
  await new Promise((done) => setTimeout(done, 200)); // whoever still types is not kept waiting
  const open = [...document.querySelectorAll("details[data-part][open]")].map((e) => e.getAttribute("data-part"));
  for (const part of ["changes", "curve", ...open]) {
    let more;
    do {
      more = await ask({ state, part }, mine);
      if (mine !== turn) return;
      if (more.error) return refuse(more.error);
      place(more.html);
    } while (more.again);
  }
  $("answer").dataset.whole = asked;
}

function show(/** @type {any} */ reply) {
  $("error").hidden = true;
  place(reply.html);
  $("command").textContent = reply.command;
  document.title = `Does it fit? ${reply.title}`;
  bill = reply.json;
  for (const e of controls()) {
    const holds = reply.effective[e.name] ?? "";
    if (e.tagName === "SELECT" && e.name !== "card")
      /** @type {any} */ (e).options[0].textContent = holds ? `default: ${holds}` : "default";
    else if (e.dataset.kind === "number" || e.dataset.kind === "text") e.placeholder = e.name === "config" ? e.placeholder : holds;
  }
}

function refuse(/** @type {string} */ line) {
  document.body.removeAttribute("aria-busy");
  $("error").textContent = line;
  $("error").hidden = false;
}

function place(/** @type {Record<string, string>} */ html) {
  for (const [id, text] of Object.entries(html ?? {})) $(id).innerHTML = text;
}

/** Read aloud, once the questions have come to rest. */
function say(/** @type {string} */ line, /** @type {number} */ mine) {
  setTimeout(() => { if (mine === turn) $("said").textContent = line; }, 700);
}

// ---------------------------------------------------------------- what a person does

form.addEventListener("input", (event) => {
  if (/** @type {HTMLElement} */ (event.target).id === "file") return;
  large = 0;
  suit();
  remember();
  answer();
});
form.addEventListener("submit", (event) => event.preventDefault());

function remember() {
  const words = String(new URLSearchParams(read()));
  history.replaceState(null, "", words.length > MOST_IN_ADDRESS ? location.pathname : `#${words}`);
}

/** A file is read unless it cannot be a config.json: then Python says so of its size. */
async function take(/** @type {File | undefined} */ file) {
  if (!file) return;
  large = file.size > Number(document.body.dataset.largest) ? file.size : 0;
  if (!large) form.elements["config"].value = await file.text();
  $("own").setAttribute("open", "");
  suit();
  remember();
  answer();
}

$("file").addEventListener("change", (event) => take(/** @type {any} */ (event.target).files[0]));
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  take(event.dataTransfer?.files[0]);
});
$("clear").addEventListener("click", () => {
  form.elements["config"].value = "";
  /** @type {any} */ ($("file")).value = "";
  form.dispatchEvent(new Event("input", { bubbles: true }));
});

for (const details of document.querySelectorAll("details[data-part]"))
  details.addEventListener("toggle", () => { if (/** @type {any} */ (details).open) answer(); });

async function copy(/** @type {string} */ text, /** @type {HTMLElement} */ button) {
  const was = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "copied";
  } catch {
    getSelection()?.selectAllChildren($("command"));
    button.textContent = "selected: copy it";
  }
  setTimeout(() => (button.textContent = was), 1500);
}
$("copy").addEventListener("click", () => copy($("command").textContent ?? "", $("copy")));
$("share").addEventListener("click", () => {
  remember();
  if (location.hash) copy(location.href, $("share"));
  else refuse("this config.json is too long for an address: share the file and the command");
});
$("download").addEventListener("click", async () => {
  if (!Object.keys(bill).length) bill = (await ask({ state: read() }, turn)).json;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(bill, null, 2)], { type: "application/json" }));
  link.download = "bill.json";
  link.click();
  URL.revokeObjectURL(link.href);
});

addEventListener("hashchange", () => {
  fill(location.hash.length > 1 ? inAddress() : start);
  answer();
});
if (location.hash.length > 1) {
  fill(inAddress());
  answer();
} else suit();

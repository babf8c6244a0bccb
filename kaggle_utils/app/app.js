// The page of the app. File names reach the page as text only.
"use strict";

const $ = (id) => document.getElementById(id);
const clips = new Map();      // rows by key: uploads have a key of our own until the server names them
let tab = "", settings = {}, stages = [], shown = "", uploads = 0, said = {};

function connect() {
  const address = new URL("tab", location.href);
  address.protocol = "ws:";
  const socket = new WebSocket(address);
  socket.onmessage = (event) => {
    const message = JSON.parse(event.data);
    message.tab ? begin(message) : update(message);
  };
  socket.onclose = () => {
    tab = "";
    warn("The program has ended. Start it again and open the address that it prints.");
    for (const row of clips.values()) for (const button of row.querySelectorAll("button")) button.disabled = true;
  };
}

function begin(message) {
  ({ tab, stages } = message);
  settings = message;
  $("limits").textContent = `One or several files, each up to ${message.limit}. Or drop them anywhere on this page.`;
  for (const [key, label] of Object.entries(message.samples)) {
    const button = document.createElement("button");
    Object.assign(button, { type: "button", className: "button", textContent: label });
    button.onclick = () => { show(""); post(`samples/${key}?tab=${tab}`).catch((error) => warn(error.message)); };
    $("samples").append(button);
  }
}

function warn(text) {
  $("trouble").textContent = text;
  $("trouble").hidden = !text;
}

function say(text) {
  $("news").textContent = text;
}

async function post(address, method = "POST") {
  const answer = await fetch(address, { method });
  if (!answer.ok) throw new Error((await answer.json().catch(() => ({}))).trouble || "The program did not answer.");
  return answer.json();
}

// --- uploads -------------------------------------------------------------------------------------------------
function add(files) {
  warn("");
  show("");
  for (const file of files) upload(file);
}

function upload(file) {
  const key = `upload-${++uploads}`;
  const row = rowOf(key, file.name);
  if (file.size > settings.most_bytes) {
    fail(row, `This file has ${Math.round(file.size / 1e6)} MB; each file may have up to ${settings.limit}. `
      + "Cut out the part in question and try that.");
    row.querySelector(".remove").onclick = () => drop(key);
    return;
  }
  const request = new XMLHttpRequest();
  request.open("POST", `clips?${new URLSearchParams({ tab, name: file.name })}`);
  request.upload.onprogress = (event) => work(row, 100 * event.loaded / event.total, "Copying the file");
  request.onload = () => {
    if (request.status === 200) { drop(key); return; }
    let trouble = "";
    try { trouble = JSON.parse(request.responseText).trouble; } catch { /* not our answer */ }
    fail(row, trouble || "The file could not be copied.");
  };
  request.onerror = () => fail(row, "The file could not be read or copied.");
  row.querySelector(".remove").onclick = () => { request.abort(); drop(key); };
  request.send(file);
}

// --- rows ----------------------------------------------------------------------------------------------------
function rowOf(key, name) {
  if (!clips.has(key)) {
    const row = $("row").content.firstElementChild.cloneNode(true);
    row.querySelector(".name").textContent = name;
    row.querySelector(".remove").setAttribute("aria-label", `Remove ${name}`);
    row.querySelector(".show").setAttribute("aria-label", `Show the report on ${name}`);
    row.querySelector("progress").setAttribute("aria-label", `Progress of ${name}`);
    clips.set(key, row);
    $("clips").append(row);
  }
  layout();
  return clips.get(key);
}

function drop(key) {
  const held = clips.get(key)?.contains(document.activeElement);
  clips.get(key)?.remove();
  clips.delete(key);
  if (shown === key) show("");
  if (held) $("file").focus();
  layout();
}

function layout() {
  $("list").hidden = !clips.size;
  $("drop").classList.toggle("small", clips.size > 0);
}

function work(row, percent, text) {
  row.querySelector(".work").hidden = false;
  const bar = row.querySelector("progress");
  percent === null ? bar.removeAttribute("value") : bar.value = percent;
  row.querySelector(".step").textContent = text;
}

function fail(row, text) {
  row.querySelector(".work").hidden = true;
  const problem = row.querySelector(".problem");
  if (problem.textContent === text) return;
  problem.textContent = text;
  problem.hidden = false;
  say(`${row.querySelector(".name").textContent}: ${text}`);
}

// --- what the server says ------------------------------------------------------------------------------------
function update(message) {
  $("loading").hidden = message.ready || Boolean(message.trouble);
  if (message.trouble) warn(message.trouble);
  const known = new Set(message.clips.map((clip) => clip.id));
  for (const key of [...clips.keys()]) if (!key.startsWith("upload-") && !known.has(key)) drop(key);
  for (const clip of message.clips) if (clip.state !== "uploading") follow(clip);
}

function follow(clip) {
  const fresh = !clips.has(clip.id), row = rowOf(clip.id, clip.name);
  if (fresh) row.querySelector(".remove").onclick = () => { post(`clips/${clip.id}/report`, "DELETE").catch(() => {}); drop(clip.id); };
  if (clip.state === "failed") return fail(row, clip.trouble);
  if (clip.state === "done") return finish(row, clip);
  const left = `about ${time(clip.left_s)} left`;
  if (clip.state === "waiting") {
    const before = clip.place === 1 ? "1 clip" : `${clip.place} clips`;
    work(row, null, clip.place ? `Waiting: ${before} before this one, ${left}` : "Waiting");
    tell(clip, clip.place ? `Waiting, ${before} before this one` : "Waiting");
    return;
  }
  const place = stages.indexOf(clip.stage), number = place < 0 ? "" : `Step ${place + 1} of ${stages.length}: `;
  const whole = Math.max(clip.left_s, (row.dataset.whole ?? 0) - 0) || 1;
  row.dataset.whole = whole;
  work(row, Math.min(97, Math.max(3, 100 * (1 - clip.left_s / whole))), `${number}${clip.stage || "starting"}, ${left}`);
  tell(clip, `${number}${clip.stage || "starting"}`);
}

function tell(clip, text) {   // each stage once
  if (said[clip.id] === text) return;
  said[clip.id] = text;
  say(`${clip.name}. ${text}`);
}

function finish(row, clip) {
  if (row.dataset.done) return;
  row.dataset.done = "yes";
  row.querySelector(".work").hidden = true;
  const word = row.querySelector(".word");
  word.textContent = `${clip.sign} ${clip.word}${clip.probability ? `, ${clip.probability}` : ""}`;
  word.classList.add(clip.style);
  const button = row.querySelector(".show");
  button.hidden = false;
  button.onclick = () => { show(clip.id, clip.name); $("result").scrollIntoView(); };
  tell(clip, `${clip.word}. The report is ready.`);
  if (!shown) show(clip.id, clip.name);
}

function time(seconds) {
  if (seconds < 60) return `${Math.max(1, Math.round(seconds))} s`;
  return `${Math.round(seconds / 60)} min`;
}

// --- the report ----------------------------------------------------------------------------------------------
function show(key, name = "") {
  shown = key;
  $("result").hidden = !key;
  for (const [other, row] of clips) row.classList.toggle("shown", other === key);
  if (!key) { $("report").removeAttribute("src"); return; }
  $("resulttitle").textContent = `Report on ${name}`;
  $("report").title = `Report on ${name}`;
  $("report").src = `clips/${key}/report`;
  $("alone").href = `clips/${key}/report`;
  $("savepage").href = `clips/${key}/report?save=1`;
  $("savejson").href = `clips/${key}/verdict?save=1`;
}

function fit() {   // the report as high as its content: one scroll bar, not two
  const body = $("report").contentDocument?.documentElement;
  if (body && shown) $("report").style.height = `${body.scrollHeight}px`;
}

$("report").onload = fit;
let width = innerWidth;
addEventListener("resize", () => {
  if (width === innerWidth) return;
  width = innerWidth;
  $("report").style.height = "0";
  fit();
});
$("file").onchange = () => { add([...$("file").files]); $("file").value = ""; };
for (const kind of ["dragenter", "dragover"]) {
  addEventListener(kind, (event) => { event.preventDefault(); $("drop").classList.add("over"); });
}
addEventListener("dragleave", (event) => { if (!event.relatedTarget) $("drop").classList.remove("over"); });
addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  const folders = [...event.dataTransfer.items].some((item) => item.webkitGetAsEntry?.()?.isDirectory);
  if (folders) warn("A folder cannot be dropped here. Open it and drop its clips.");
  else add([...event.dataTransfer.files]);
});
connect();

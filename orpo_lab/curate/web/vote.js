"use strict";

// A vote is kept on this machine, under an id of its own, before it is sent. It is removed when the
// server has it. What is still kept after a reload, or a crash, is sent again: the server counts an
// id once. One vote is under way at a time; meanwhile no other key votes.

// Milliseconds between attempts to reach the server; the last one stays
const WAITS = [300, 600, 1200, 2500, 5000];
// An attempt without an answer ends after so many milliseconds
const TIMEOUT = 15000;
// So many milliseconds a new pair cannot be voted on: a key that is pressed twice has meant the last
const PAUSE = 250;
const KEYS = {
  1: "left", ArrowLeft: "left", 2: "right", ArrowRight: "right", t: "tie", b: "both_bad", s: "skip",
};

const { annotator, shelf } = document.body.dataset;
const note = document.getElementById("note");
const statusLine = document.getElementById("status");
const keys = document.getElementById("keys");
let shownAt = 0;
let hiddenFor = 0;
let hiddenAt = 0;

const pair = () => document.getElementById("pair");
const isBusy = () => document.body.dataset.busy === "true";
const sleep = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));
const voteShelf = `${shelf}/vote/`;
const noteShelf = () => `${shelf}/note/${pair().dataset.comparison}/${pair().dataset.round}`;

function say(text, isProblem = false) {
  statusLine.textContent = text;
  statusLine.classList.toggle("problem", isProblem);
}

// crypto.randomUUID is only there on this machine and behind TLS
function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

// Ask until the server has answered, whatever it says. Return the status and the text
async function ask(path, body) {
  const request = body === undefined ? {} : {
    method: "POST", body, keepalive: true, headers: { "Content-Type": "application/json" },
  };
  for (let attempt = 0; ; attempt += 1) {
    try {
      const answer = await fetch(path, { ...request, signal: AbortSignal.timeout(TIMEOUT) });
      const text = await answer.text();
      if (attempt > 0) say("");
      if (answer.status < 500) return { status: answer.status, text };
    } catch {
      // The server is away, or went away while it answered
    }
    say("The server does not answer. Your vote is kept here; this page tries again.", true);
    await sleep(WAITS[Math.min(attempt, WAITS.length - 1)]);
  }
}

// Send every vote that is kept here. Return whether the page may go on
async function deliver() {
  const kept = Object.keys(localStorage).filter((key) => key.startsWith(voteShelf));
  for (const key of kept) {
    const body = localStorage.getItem(key);
    if (body === null) continue; // Another tab has sent the vote
    const answer = await ask("/votes", body);
    if (!mayGoOn(answer)) return false;
    localStorage.removeItem(key);
    if (answer.status === 200) {
      if (JSON.parse(answer.text).counts) say("Saved.");
      else say("You had voted on that pair in another tab. The first vote stands.", true);
    } else {
      say(`The server did not take your vote (${answer.status}). The pair comes again.`, true);
    }
  }
  return true;
}

function mayGoOn(answer) {
  if (answer.status === 404 || answer.status === 421) {
    say("Your link is no longer valid. Ask for a new link; your vote is kept here until then.", true);
  } else if (answer.status === 409) {
    say(`Another person's link was opened in this browser. Open the link of ${annotator} again.`, true);
  } else {
    return true;
  }
  return false;
}

async function show() {
  const answer = await ask("/pair");
  if (!mayGoOn(answer)) return;
  const fresh = new DOMParser().parseFromString(answer.text, "text/html");
  const before = pair().dataset;
  const next = fresh.getElementById("pair");
  const isNew = before.comparison !== next.dataset.comparison || before.round !== next.dataset.round;
  pair().replaceWith(document.adoptNode(next));
  if (isNew) scrollTo(0, 0);
  await begin();
}

// Let the annotator vote on the pair that is shown
async function begin() {
  const { comparison, last } = pair().dataset;
  note.value = comparison ? localStorage.getItem(noteShelf()) ?? "" : "";
  note.disabled = !comparison;
  for (const box of document.querySelectorAll("#pair pre, #pair table")) box.tabIndex = 0;
  await sleep(PAUSE);
  for (const button of document.querySelectorAll("[data-choice]")) button.disabled = !comparison;
  document.getElementById("undo").disabled = !last;
  shownAt = performance.now();
  hiddenFor = 0;
  document.body.dataset.busy = "false";
}

function rest() {
  document.body.dataset.busy = "true";
}

async function vote(choice) {
  const { comparison, round } = pair().dataset;
  if (isBusy() || !comparison) return;
  const id = newId();
  const seconds = (performance.now() - shownAt - hiddenFor) / 1000;
  const sent = { id, annotator, comparison, round: Number(round), choice, note: note.value, seconds };
  try {
    localStorage.setItem(voteShelf + id, JSON.stringify(sent));
  } catch {
    say("Not saved: the storage of this browser is full. Make room, and vote again.", true);
    return;
  }
  rest();
  const noteKey = noteShelf();
  note.blur();
  if (await deliver()) {
    localStorage.removeItem(noteKey);
    await show();
  }
}

async function undo() {
  const { last } = pair().dataset;
  if (isBusy() || !last) return;
  rest();
  const answer = await ask("/undo", JSON.stringify({ annotator, vote: last }));
  if (!mayGoOn(answer)) return;
  say("Your last vote is taken back. Here is its pair again.");
  await show();
}

function onKey(event) {
  if (event.ctrlKey || event.altKey || event.metaKey || event.repeat || keys.open) return;
  if (event.target === note) {
    if (event.key === "Escape") note.blur();
    return;
  }
  // Arrows move what is scrolled; elsewhere they vote
  if (event.key.startsWith("Arrow") && event.target.matches("[tabindex='0']")) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (key in KEYS) vote(KEYS[key]);
  else if (key === "n" && !note.disabled) note.focus();
  else if (key === "u") undo();
  else if (key === "?") keys.showModal();
  else return;
  event.preventDefault();
}

function onVisibility() {
  if (document.hidden) hiddenAt = performance.now();
  else hiddenFor += performance.now() - hiddenAt;
}

// Another tab has sent a vote: this tab's pair may be done
function onOtherTab(event) {
  if (event.key?.startsWith(voteShelf) && event.newValue === null && !isBusy()) {
    rest();
    show();
  }
}

document.addEventListener("keydown", onKey);
document.addEventListener("visibilitychange", onVisibility);
addEventListener("storage", onOtherTab);
note.addEventListener("input", () => localStorage.setItem(noteShelf(), note.value));
document.getElementById("undo").addEventListener("click", undo);
document.getElementById("help").addEventListener("click", () => keys.showModal());
document.getElementById("close").addEventListener("click", () => keys.close());
for (const button of document.querySelectorAll("[data-choice]")) {
  button.addEventListener("click", () => vote(button.dataset.choice));
}

(async () => {
  say(""); // The page says that it is loading, in case that this script does not arrive
  const hadVotes = Object.keys(localStorage).some((key) => key.startsWith(voteShelf));
  if (!hadVotes) await begin();
  else if (await deliver()) await show();
})();

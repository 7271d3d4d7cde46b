"use strict";
const $ = (id) => document.getElementById(id);
const {top: count, maxUpload: most, images} = document.body.dataset;
let asked = 0;  // the number of the last question: answers to earlier ones are dropped

if (location.search) history.replaceState(null, "", location.pathname + location.hash);  // the token

async function request(path, options) {
  for (let tries = 0; ; tries++) {
    const response = await fetch(path, options);
    const found = await response.json().catch(() => ({}));
    if (response.status === 503 && tries < 5) {
      await new Promise((done) => setTimeout(done, 1000));
      continue;
    }
    if (!response.ok) throw new Error(found.error || `The server answered ${response.status}.`);
    return found;
  }
}

function write(element, name) {  // that may break after _ and /
  element.replaceChildren(...name.split(/(?<=[_/])/).flatMap((part) => [part, document.createElement("wbr")]));
}

function tile(image, measure) {
  const item = $("tile").content.cloneNode(true);
  item.querySelector("a").href = `#image=${image.index}`;
  item.querySelector("img").src = `thumbnails/${image.index}`;
  if (image.class) write(item.querySelector("b"), image.class);
  item.querySelector(".score").textContent = `${measure} ${image.score.toFixed(4)}`;
  write(item.querySelector(".path"), image.path);
  return item;
}

function show(view) {
  $("view-search").hidden = view !== "search";
  $("view-duplicates").hidden = view !== "duplicates";
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${view}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
}

function complain(error) {
  $("problem").textContent = error.message;
  $("problem").hidden = false;
  $("status").textContent = "";
}

// a question: a file, or the index of an image
async function ask(path, options, name, picture, link) {
  const number = ++asked, start = performance.now();
  show("search");
  $("query").hidden = $("found").hidden = false;
  $("some").hidden = true;
  $("query-picture").src = picture;
  write($("query-name"), name);
  if (link) $("query-link").href = link; else $("query-link").removeAttribute("href");
  $("problem").hidden = true;
  $("status").textContent = "Searching";
  $("answers").setAttribute("aria-busy", "true");
  try {
    const found = await request(`${path}?k=${count}`, options);
    if (number !== asked) return;
    if (found.query) write($("query-name"), found.query.path);
    $("query-picture").alt = `Query: ${found.query ? found.query.path : name}`;
    $("answers").replaceChildren(...found.hits.map((image) => tile(image, found.measure)));
    const seconds = ((performance.now() - start) / 1000).toFixed(2);
    $("status").textContent = `${found.hits.length} of ${found.images.toLocaleString("en")} images, in ${seconds} s. Choose one to search on with it.`;
    $("answers-title").focus({preventScroll: true});
    $("query").scrollIntoView({block: "nearest"});
  } catch (error) {
    if (number === asked) { $("answers").replaceChildren(); complain(error); }
  } finally {
    if (number === asked) $("answers").removeAttribute("aria-busy");
  }
}

let sent = null;  // the last file, and the address of its picture
function send(file) {
  if (!file) return;
  if (file.size > most * 1e6) { show("search"); complain(new Error(`${file.name} is larger than ${most} MB.`)); return; }
  if (sent) URL.revokeObjectURL(sent.url);
  sent = {file, url: URL.createObjectURL(file)};
  if (location.hash !== "#search") history.pushState(null, "", "#search");
  follow();
}

let groups = 0;  // that are shown
async function duplicates() {
  const said = $("duplicates-status");
  try {
    let found = await request(`duplicates?start=${groups}`);
    while ("progress" in found) {
      said.textContent = `Comparing images: ${Math.round(100 * found.progress)} %`;
      await new Promise((done) => setTimeout(done, 500));
      found = await request(`duplicates?start=${groups}`);
    }
    said.textContent = found.total ? `${found.total.toLocaleString("en")} ${found.total === 1 ? "group" : "groups"}` : "There are none.";
    for (const group of found.groups) {
      const title = document.createElement("h3"), list = document.createElement("ol");
      const more = group.size > group.images.length ? `, the first ${group.images.length} of them` : "";
      title.textContent = `Group ${++groups}: ${group.size.toLocaleString("en")} images${more}`;
      list.className = "tiles";
      list.append(...group.images.map((image) => tile(image, "cosine")));
      $("groups").append(title, list);
    }
    $("more").hidden = groups >= found.total;
  } catch (error) {
    said.textContent = error.message;
  }
}

function follow() {
  const image = /^#image=(\d+)$/.exec(location.hash);
  if (image) ask(`search/${image[1]}`, {}, "", `images/${image[1]}`, `images/${image[1]}`);
  else if (location.hash === "#duplicates") {
    show("duplicates");
    $("duplicates-title").focus({preventScroll: true});
    if (!groups) duplicates();
  } else if (sent) ask("search", {method: "POST", body: sent.file}, sent.file.name, sent.url, sent.url);
  else show("search");
}

for (let left = Math.min(6, images), start = Math.floor(Math.random() * images); left--; start += Math.ceil(images / 6)) {
  const item = $("tile").content.cloneNode(true), index = start % images;
  item.querySelector("a").href = `#image=${index}`;
  item.querySelector("img").src = `thumbnails/${index}`;
  item.querySelector("img").alt = `Image ${index} of the gallery`;
  item.querySelector(".label").remove();
  $("some-images").append(item);
}

for (const id of ["file", "camera"]) $(id).addEventListener("change", (event) => { send(event.target.files[0]); event.target.value = ""; });
addEventListener("paste", (event) => send([...event.clipboardData.files].find((file) => file.type.startsWith("image/"))));
addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("over"); });
addEventListener("dragleave", (event) => { if (!event.relatedTarget) document.body.classList.remove("over"); });
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("over");
  send(event.dataTransfer.files[0]);
});
addEventListener("hashchange", follow);
$("more").addEventListener("click", duplicates);
follow();

"use strict";
// tables sort by a click on a heading; rows of single seeds stay below their mean
for (const table of document.querySelectorAll("table.sort")) {
  const body = table.tBodies[0];
  table.querySelectorAll("thead th").forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    const key = block => {
      const text = block[0].cells[column].textContent.trim(), number = parseFloat(text.replace(/,/g, ""));
      return [Number.isNaN(number) ? null : number, text];
    };
    button.onclick = () => {
      const up = head.ariaSort === "descending" || (!head.ariaSort && column === 0);
      table.querySelectorAll("thead th").forEach(other => { other.ariaSort = null; });
      head.ariaSort = up ? "ascending" : "descending";
      const blocks = [];
      for (const row of body.rows) {
        if (row.classList.contains("member") && blocks.length) blocks.at(-1).push(row);
        else blocks.push([row]);
      }
      const sign = up ? 1 : -1;
      blocks.sort((one, other) => {
        const [a, first] = key(one), [b, second] = key(other);
        if (!first || !second) return !first - !second;
        return sign * (a === null || b === null ? first.localeCompare(second) : a - b);
      });
      body.append(...blocks.flat());
    };
  });
}

// a picture enlarges
const dialog = document.createElement("dialog");
dialog.append(document.createElement("img"), document.createElement("p"));
dialog.onclick = () => dialog.close();
document.body.append(dialog);
for (const picture of document.querySelectorAll(".pic:not(.none)")) {
  const use = picture.querySelector("use"), stored = use && document.querySelector(use.getAttribute("href"));
  const source = picture.src || (stored && stored.getAttribute("href"));
  if (!source) continue;
  const says = picture.alt || picture.getAttribute("aria-label");
  picture.tabIndex = 0;
  picture.setAttribute("role", "button");
  picture.setAttribute("aria-label", `${says}: enlarge`);
  picture.onclick = () => {
    dialog.firstChild.src = source;
    dialog.firstChild.alt = "";
    dialog.lastChild.textContent = says;
    dialog.showModal();
  };
  picture.onkeydown = event => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    picture.onclick();
  };
}

// the figures of the point that is nearest to the cursor
const tip = document.createElement("output");
tip.className = "tip";
tip.hidden = true;
document.body.append(tip);
for (const chart of document.querySelectorAll(".chart svg")) {
  const points = [...chart.querySelectorAll(".dot")].map(dot => {
    const title = dot.querySelector("title");
    title.remove();  // no second tooltip
    return [dot, title.textContent];
  });
  let near = null;
  const leave = () => { near?.classList.remove("near"); near = null; tip.hidden = true; };
  chart.onpointerleave = leave;
  chart.onpointermove = event => {
    let least = 28;
    let found = null;
    for (const [dot, text] of points) {
      const box = dot.getBoundingClientRect();
      const apart = Math.hypot(box.x + box.width / 2 - event.clientX, box.y + box.height / 2 - event.clientY);
      if (apart < least) { least = apart; found = [dot, text]; }
    }
    leave();
    if (!found) return;
    near = found[0];
    near.classList.add("near");
    tip.textContent = found[1];
    tip.hidden = false;
    tip.style.left = `${Math.max(8, Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${event.clientY + 18 + tip.offsetHeight > innerHeight ? event.clientY - tip.offsetHeight - 12 : event.clientY + 18}px`;
  };
}

// Elements are made here and nowhere else: from plain text, never from markup, so nothing that was written can run.

/** An element. `text` becomes its text, `class` and names with a dash become attributes, the rest its properties. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "text") element.textContent = value;
    else if (name === "class" || name === "role" || name.includes("-")) element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** A button that does something on this page. */
export function button(text, act, properties = {}) {
  const made = make("button", { type: "button", text, ...properties });
  made.addEventListener("click", act);
  return made;
}

/** Says something to those who do not see the page. The same words twice in a row are said twice. */
export function announce(text) {
  const region = document.querySelector("#announcer");
  region.textContent = region.textContent === text ? `${text}\u00a0` : text;
}

/** Keeps the end of the page in view while it grows, unless the reader has gone elsewhere. */
export function follow(grow) {
  const page = document.scrollingElement;
  const near = page.scrollHeight - page.scrollTop - page.clientHeight < 120;
  grow();
  if (near) page.scrollTop = page.scrollHeight;
}

/** Calls `draw` at most once a frame, however often it is asked for. A page that is not seen has no frames. */
export function onceAFrame(draw) {
  let asked = false;
  const drawn = () => {
    asked = false;
    draw();
  };
  return () => {
    if (asked) return;
    asked = true;
    if (document.hidden) setTimeout(drawn, 100);
    else requestAnimationFrame(drawn);
  };
}

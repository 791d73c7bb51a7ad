// A model's text as paragraphs, lists, headings and code. What is not one of these stays as it was written.

import { make } from "./elements.js";

const FENCE = /^\s*(`{3,}|~{3,})\s*([\w+#.-]*)\s*$/;
const HEADING = /^(#{1,6})\s+(.*)$/;
const ITEM = /^(\s*)([-*+]|\d{1,4}[.)])\s+(.*)$/;
const SPAN = /`+|\*\*|\*|\[\d{1,3}\]/g;
const DEEPEST = 3; // levels of lists

/**
 * Draws `text` into `place`. What was drawn before is kept where its text is the same, so a text can grow.
 * `cite(number)`: what a [number] becomes, null: nothing but itself. Give `fresh` where it has changed.
 */
export function drawProse(place, text, { cite = () => null, fresh = false } = {}) {
  const blocks = blocksOf(text);
  const keys = blocks.map((block) => JSON.stringify(block));
  const before = fresh ? [] : (place.drawnBlocks ?? []);
  let same = 0;
  while (same < keys.length && keys[same] === before[same]) same += 1;
  while (place.childNodes.length > same) place.lastChild.remove();
  place.append(...blocks.slice(same).map((block) => drawn(block, cite)));
  place.drawnBlocks = keys;
}

export function blocksOf(text) {
  const blocks = [];
  let open = null; // the block that the next line may belong to
  let fence = null;
  const begin = (block) => {
    blocks.push(block);
    return block;
  };
  for (const line of text.split(/\r?\n/)) {
    if (fence) {
      const end = FENCE.exec(line);
      if (end && end[1].startsWith(fence) && !end[2]) fence = null;
      else open.lines.push(line);
      if (!fence) open = null;
      continue;
    }
    const code = FENCE.exec(line);
    const heading = HEADING.exec(line);
    const item = ITEM.exec(line);
    if (code) {
      fence = code[1];
      open = begin({ kind: "code", language: code[2], lines: [] });
    } else if (!line.trim()) {
      open = null;
    } else if (heading) {
      begin({ kind: "heading", level: heading[1].length, text: heading[2] });
      open = null;
    } else if (item) {
      const ordered = /\d/.test(item[2]);
      const depth = Math.min(DEEPEST, Math.floor(item[1].replaceAll("\t", "  ").length / 2));
      if (open?.kind !== "list" || (depth === 0 && open.ordered !== ordered)) {
        open = begin({ kind: "list", ordered, start: parseInt(item[2], 10) || 1, items: [] });
      }
      open.items.push({ depth, ordered, text: item[3] });
    } else if (open?.kind === "list") {
      open.items.at(-1).text += `\n${line.trim()}`;
    } else if (open?.kind === "paragraph") {
      open.text += `\n${line}`;
    } else {
      open = begin({ kind: "paragraph", text: line });
    }
  }
  return blocks;
}

function drawn(block, cite) {
  if (block.kind === "code") {
    const label = block.language ? `Code, ${block.language}` : "Code";
    const code = make("code", { text: block.lines.join("\n") });
    return make("pre", { role: "region", "aria-label": label, tabIndex: 0, dir: "ltr" }, code);
  }
  if (block.kind === "list") return list(block, cite);
  const tag = block.kind === "heading" ? `h${Math.min(6, block.level + 3)}` : "p"; // below the page's own headings
  return make(tag, { dir: "auto" }, ...spansOf(block.text, cite));
}

function list(block, cite) {
  const begin = (ordered, start) => make(ordered ? "ol" : "ul", { dir: "auto", start: ordered ? start : null });
  const root = begin(block.ordered, block.start);
  const open = [root]; // the lists that the next item may go into, outer ones first
  for (const item of block.items) {
    const depth = Math.min(item.depth, open.length - 1 + (open.at(-1).lastElementChild ? 1 : 0));
    open.length = Math.min(open.length, depth + 1);
    if (depth === open.length) {
      const inner = begin(item.ordered, 1);
      open.at(-1).lastElementChild.append(inner);
      open.push(inner);
    }
    open.at(-1).append(make("li", {}, ...spansOf(item.text, cite)));
  }
  return root;
}

/** The nodes of a text with `code`, **strong**, *emphasis* and [1]. A mark without its second half is only itself. */
export function spansOf(text, cite) {
  const nodes = [];
  const never = new Set(); // marks that do not come again, so that a text full of them is read once
  let given = 0;
  let match;
  const marks = new RegExp(SPAN);
  while ((match = marks.exec(text))) {
    const mark = match[0];
    const begin = marks.lastIndex;
    let node = null;
    let end = begin;
    if (mark[0] === "[") {
      node = cite(Number(mark.slice(1, -1)));
    } else if (!never.has(mark) && opens(mark, text, match.index)) {
      const close = closing(mark, text, begin);
      if (close < 0) never.add(mark);
      else if (close > begin && (mark[0] === "`" || /\S/.test(text[close - 1]))) {
        const inside = text.slice(begin, close);
        node = mark[0] === "`" ? make("code", { dir: "ltr", text: inside }) : null;
        node ??= make(mark === "*" ? "em" : "strong", {}, ...spansOf(inside, cite));
        end = close + mark.length;
      }
    }
    if (node) {
      nodes.push(text.slice(given, match.index), node);
      given = end;
      marks.lastIndex = end;
    }
  }
  return [...nodes, text.slice(given)];
}

/** Whether a mark can begin something: 2 * 3 and a*b are none. */
function opens(mark, text, at) {
  if (mark[0] === "`") return true;
  const before = text[at - 1] ?? " ";
  return /\S/.test(text[at + mark.length] ?? " ") && !(mark === "*" && /[\p{L}\p{N}]/u.test(before));
}

function closing(mark, text, from) {
  let at = text.indexOf(mark, from);
  while (mark === "*" && at >= 0 && text[at + 1] === "*") at = text.indexOf(mark, at + 2);
  return at;
}

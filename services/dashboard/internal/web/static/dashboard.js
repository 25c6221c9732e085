// Everything works without this file. It spares page loads: the buttons inside the panel answer in place, the list is checked
// when one leaves the field, a save shows live where it is active, Esc closes the panel, and times are those of the reader.

const form = document.getElementById("edit");
let typed = form?.hasAttribute("data-unsaved") ? null : form?.elements.text?.value; // what is saved, or on its way

// Times, in the reader's zone.
function localize(root) {
  const format = new Intl.DateTimeFormat(document.documentElement.lang, {dateStyle: "medium", timeStyle: "short"});
  for (const time of root.querySelectorAll("time[datetime]")) {
    time.title = time.textContent;
    time.textContent = format.format(new Date(time.dateTime));
  }
}

// Takes the parts of an answer that carry data-part into the page, and the text of the field if the answer changes it. A choice
// that the page asks for stays.
function take(html, changes) {
  const answer = new DOMParser().parseFromString(html, "text/html");
  for (const part of answer.querySelectorAll("[data-part]")) {
    localize(part);
    const old = document.getElementById(part.id);
    if (part.id === "notice" && old?.querySelector("[name=action]")) continue;
    old?.replaceWith(document.adoptNode(part));
  }
  const field = answer.querySelector("[name=text]"), own = form.elements.text;
  if (own && field) {
    for (const name of ["aria-invalid", "aria-describedby"]) {
      if (field.hasAttribute(name)) own.setAttribute(name, field.getAttribute(name));
      else own.removeAttribute(name);
    }
    if (changes) own.value = field.value;
  }
}

let sent = false, latest = 0; // a slow answer does not undo a later one
async function ask(button, action) {
  const mine = ++latest;
  const data = new URLSearchParams(new FormData(form, button));
  if (action) data.set("action", action);
  const response = await fetch(button?.getAttribute("formaction") ?? form.getAttribute("action"),
    {method: "POST", body: data, headers: {"Panel-Only": "1"}, redirect: "error"});
  if (!response.ok) throw new Error(response.status);
  const html = await response.text();
  if (mine !== latest) return;
  const changes = button?.dataset.inline === "text";
  if (changes && form.elements.text.value !== data.get("text").replaceAll("\r\n", "\n")) return; // what was typed since stays: press again
  take(html, changes);
}

form?.addEventListener("submit", async event => {
  clearTimeout(checking); // the answer to the button says it, too
  const button = event.submitter;
  if (!button?.dataset.inline) {
    sent = true;
    typed = form.elements.text?.value;
    return;
  }
  event.preventDefault();
  try {
    await ask(button);
    document.querySelector(button.dataset.focus ?? "[name=text]")?.focus();
  } catch {
    button.removeAttribute("data-inline"); // as without this file; the server says what is wrong
    form.requestSubmit(button);
  }
});

// Not at once, and not while a finger is down: what appears would move a button away under the click that ended the typing.
let checking, pressed = false;
for (const kind of ["pointerdown", "pointerup", "pointercancel"]) addEventListener(kind, () => pressed = kind === "pointerdown", true);
function check() {
  if (pressed) checking = setTimeout(check, 50);
  else if (!sent && form.elements.text.value.trim() !== "") ask(null, "validate").catch(() => {}); // Save says it again
}
form?.elements.text?.addEventListener("change", () => checking = setTimeout(check, 250));

addEventListener("beforeunload", event => {
  if (form?.elements.text && form.elements.text.value !== typed) event.preventDefault();
});

addEventListener("keydown", event => {
  const close = document.getElementById("close");
  if (event.key === "Escape" && close && !event.defaultPrevented && !event.isComposing && event.target.type !== "search") close.click();
});

// Live until active everywhere, but not for ever.
async function follow(part) {
  for (let i = 0; part?.dataset.url && i < 240; i++) {
    await new Promise(done => setTimeout(done, Math.min(300 + 40 * i, 2000)));
    try {
      const response = await fetch(part.dataset.url, {headers: {"Panel-Only": "1"}, redirect: "error"});
      if (response.status === 401) return;
      if (!response.ok) continue;
      const next = new DOMParser().parseFromString(await response.text(), "text/html").getElementById("progress");
      if (!next) return;
      localize(next);
      if (next.textContent !== part.textContent) part.replaceChildren(...next.childNodes); // said once by the live region
      part.dataset.url = next.dataset.url ?? "";
    } catch { /* the network; the next one may do better */ }
  }
}

localize(document);
follow(document.getElementById("progress"));
document.querySelector("tr.current")?.scrollIntoView({block: "nearest"});

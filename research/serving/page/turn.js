// Parts of the page that both modes use: elements, an editor in place of a text, copying, and following what is written.

export function element(name, className = "", text = "") {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.textContent = text;
  return made;
}

export function button(text, className, action) {
  const made = element("button", className, text);
  made.type = "button";
  made.addEventListener("click", action);
  return made;
}

let cancel = () => {};

// Closes the editor, if one is open.
export function cancelEditing() {
  cancel();
}

// Shows a text box and two buttons in place of `shown`. Resolves to the new text, or to null if the editor is cancelled. There is one editor
// at a time: while it is open, the page hides the box to write in and the buttons under every text.
export function edited(shown, text, saveLabel) {
  return new Promise((resolve) => {
    const editor = element("div", "editor");
    const box = element("textarea");
    box.rows = 1;
    box.value = text;
    box.setAttribute("aria-label", "Edit the text");
    const end = (value) => {
      editor.remove();
      shown.hidden = false;
      document.body.classList.remove("editing");
      cancel = () => {};
      resolve(value);
    };
    cancel = () => end(null);
    document.body.classList.add("editing");
    const buttons = element("div", "row");
    buttons.append(button("Cancel", "quiet", () => end(null)), button(saveLabel, "primary", () => end(box.value)));
    box.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        end(null);
      } else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
        event.preventDefault();
        end(box.value);
      }
    });
    box.addEventListener("input", () => grow(box));
    editor.append(box, buttons);
    shown.hidden = true;
    shown.after(editor);
    grow(box);
    box.focus();
  });
}

export function grow(box) {
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight + 2}px`;
}

export async function copy(text, pressed) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {  // a page that came over http from another machine has no clipboard of its own
    const box = element("textarea");
    box.value = text;
    document.body.append(box);
    box.select();
    document.execCommand("copy");
    box.remove();
    pressed.focus();
  }
  pressed.textContent = "Copied";
  document.getElementById("said").textContent = "Copied";
  setTimeout(() => {
    pressed.textContent = "Copy";
    document.getElementById("said").textContent = "";
  }, 1500);
}

// Runs `change` and scrolls to the end afterwards, unless the reader has scrolled up.
export function following(change) {
  const page = document.scrollingElement;
  const atEnd = page.scrollHeight - page.scrollTop - page.clientHeight < 120;
  change();
  if (atEnd) page.scrollTop = page.scrollHeight;
}

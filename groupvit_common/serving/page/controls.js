// Parts of the page that stand alone: the theme, dropping and pasting, the question for a key, groups of buttons.

const $ = (id) => document.getElementById(id);

/** Fills a fieldset with radio buttons of [value, text], the first one checked. */
export function segments(box, name, choices, chosen) {
  const made = choices.map(([value, text], at) => {
    const label = document.createElement("label");
    const input = Object.assign(document.createElement("input"), { type: "radio", name, value, checked: at === 0 });
    input.addEventListener("change", () => chosen(value));
    label.append(input, Object.assign(document.createElement("span"), { textContent: text }));
    return label;
  });
  box.replaceChildren(box.querySelector("legend"), ...made);
}

/** Asks for the server's key: the key, or null if it is not given. */
export function askKey(wasWrong) {
  askKey.asked ??= new Promise((resolve) => {
    const dialog = $("key-dialog");
    $("key-title").textContent = wasWrong ? "That key is not the server's" : "API key";
    $("key").value = "";
    $("key-cancel").onclick = () => dialog.close("");
    dialog.onclose = () => {
      askKey.asked = null;
      resolve(dialog.returnValue === "ok" ? $("key").value : null);
    };
    dialog.returnValue = "";
    dialog.showModal();
  });
  return askKey.asked;
}

/** Calls `opened(files, how)` with what is "dropped" on the page or "pasted" into it. */
export function wireDropAndPaste(opened) {
  let depth = 0; // drag events come from every element on the way
  const over = (change) => document.body.classList.toggle("dropping", (depth = Math.max(0, depth + change)) > 0);
  // Text that is dragged into a field is the browser's; a link that is dropped would leave the page.
  const isOurs = ({ dataTransfer: { types } }) => types.includes("Files") || types.includes("text/uri-list");
  addEventListener("dragenter", (event) => isOurs(event) && over(1));
  addEventListener("dragleave", (event) => isOurs(event) && over(-1));
  addEventListener("dragover", (event) => isOurs(event) && event.preventDefault());
  addEventListener("drop", (event) => {
    if (!isOurs(event)) return;
    event.preventDefault();
    over(-depth);
    opened(event.dataTransfer.files, "dropped");
  });
  addEventListener("paste", (event) => {
    const { files } = event.clipboardData;
    if (files.length) {
      event.preventDefault();
      opened(files, "pasted");
    } else if (!event.target.closest?.("input")) opened([], "pasted");
  });
}

/** Lets the button choose between the system's theme, light and dark. */
export function wireTheme() {
  const root = document.documentElement;
  const themes = ["", "light", "dark"];
  const tell = () => {
    const name = { "": "Auto", light: "Light", dark: "Dark" }[root.dataset.theme || ""];
    $("theme-name").textContent = name;
    $("theme").setAttribute("aria-label", `Theme: ${name}`);
  };
  $("theme").addEventListener("click", () => {
    root.dataset.theme = themes[(themes.indexOf(root.dataset.theme || "") + 1) % themes.length];
    try {
      localStorage.setItem("groupvit-theme", root.dataset.theme);
    } catch {
      // Storage is blocked: it holds until the page is left.
    }
    tell();
  });
  tell();
}

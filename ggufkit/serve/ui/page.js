// What is quicker in the browser than by asking the server: keys, scrolling, copying, colours.

const scheme = matchMedia("(prefers-color-scheme: dark)");

function isDark() {
  const chosen = localStorage.getItem("ggufkit.dark");
  return chosen === null ? scheme.matches : chosen === "true";
}

function showColours() {
  window.setDark?.(isDark());
}

function toggleColours() {
  const dark = !document.body.classList.contains("body--dark");
  // What the system says anyway is not worth remembering, and is followed when it changes.
  if (dark === scheme.matches) localStorage.removeItem("ggufkit.dark");
  else localStorage.setItem("ggufkit.dark", dark);
  showColours();
}

scheme.addEventListener("change", showColours);
document.documentElement.classList.toggle("starts-dark", isDark());

async function copyText(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  // There is no clipboard for pages without a certificate, unless they are this machine's.
  const field = Object.assign(document.createElement("textarea"), { value: text });
  document.body.append(field);
  field.select();
  document.execCommand("copy");
  field.remove();
}

function sayCopied(button) {
  button.classList.add("copied");
  setTimeout(() => button.classList.remove("copied"), 1500);
}

document.addEventListener("click", (event) => {
  const button = event.target.closest(".copy-code");
  if (button) {
    copyText(button.closest(".code").querySelector("pre").textContent).then(() => sayCopied(button));
  }
  const link = event.target.closest(".answer a[href]");
  if (link) {
    event.preventDefault();
    window.open(link.href, "_blank", "noopener,noreferrer");
  }
});

document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || document.querySelector(".q-dialog, .q-menu")) return;
  document.querySelector("button.stop")?.click();
});

// The end of the conversation stays in view, unless somebody has scrolled away from it.
let following = true;

function follow() {
  if (following) scrollTo(0, document.documentElement.scrollHeight);
}

function followAgain() {
  following = true;
  follow();
}

let before = 0;
addEventListener("scroll", () => {
  const left = document.documentElement.scrollHeight - innerHeight - scrollY;
  // Answers grow below, and only people scroll up.
  if (left < 40) following = true;
  else if (scrollY < before) following = false;
  before = scrollY;
});

function begin() {
  showColours();
  new ResizeObserver(follow).observe(document.querySelector(".conversation"));
}

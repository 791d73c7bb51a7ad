// The dialog that asks for the server's API key.

/** The key that was typed, or null. `refused`: there was one already, and the server did not take it. */
export function askForKey(refused) {
  const dialog = document.querySelector("#key");
  const field = dialog.querySelector("input");
  dialog.querySelector("#key-refused").hidden = !refused;
  field.value = "";
  dialog.returnValue = "";
  dialog.querySelector("[name=cancel]").onclick = () => dialog.close("");
  dialog.showModal();
  return new Promise((done) => {
    dialog.addEventListener(
      "close",
      () => {
        const key = field.value.trim();
        field.value = "";
        done(dialog.returnValue === "use" && key ? key : null);
      },
      { once: true },
    );
  });
}

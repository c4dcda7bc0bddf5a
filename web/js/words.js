// The player's words in the page's language, from this pack's locales/*/main.json.

let known = {};

/** Learn them, once the page has told its language; what has no translation stays English. */
export async function learn(app, api) {
  const language = app.extensionManager?.setting?.get("Comfy.Locale") ?? "en";
  try {
    known = (await api.getCustomNodesI18n())[language]?.mutualForcing ?? {};
  } catch {
    known = {}; // an older page
  }
}

/** A sentence with its gaps {0}, {1} filled. */
export const said = (text, ...values) =>
  (known[text] ?? text).replace(/\{(\d)\}/g, (_, index) => values[index]);

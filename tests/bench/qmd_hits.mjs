// node qmd_hits.mjs QMD_FOLDER NOTES FIXTURE: print QMD's own full-text hits of a fixture's queries as JSON.
//
// QMD_FOLDER is where npm installed @tobilu/qmd. The index is made in a temporary folder and deleted.
import fs from "node:fs";
import os from "node:os";
import path from "node:path";
import { pathToFileURL } from "node:url";

const [folder, notes, fixture] = process.argv.slice(2).map((name) => path.resolve(name));
const qmd = path.join(folder, "node_modules/@tobilu/qmd/dist/index.js");
const { createStore } = await import(pathToFileURL(qmd).href);
const scratch = fs.mkdtempSync(path.join(os.tmpdir(), "qmd-hits-"));
try {
  const store = await createStore({
    dbPath: path.join(scratch, "index.sqlite"),
    config: { collections: { vault: { path: notes, pattern: "**/*.md" } } },
  });
  await store.update();
  const hits = {};
  for (const { id, query } of JSON.parse(fs.readFileSync(fixture, "utf8")).queries) {
    const found = await store.searchLex(query, { limit: 20, collection: "vault" });
    hits[id] = found.map((hit) => hit.displayPath ?? hit.filepath);
  }
  await store.close();
  console.log(JSON.stringify(hits));
} finally {
  fs.rmSync(scratch, { recursive: true, force: true });
}

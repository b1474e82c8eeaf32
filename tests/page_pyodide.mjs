// Answers each state of a file, one JSON object a line, with the page's bill, from Python in WebAssembly:
//   node page_pyodide.mjs FOLDER_OF_PYODIDE MINILORA_ZIP STATES
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const [folder, code, states] = process.argv.slice(2);
const { loadPyodide } = await import(pathToFileURL(`${folder}/pyodide.mjs`));
const python = await loadPyodide({ indexURL: folder });
python.unpackArchive(new Uint8Array(readFileSync(code)), "zip", { extractDir: "/minilora" });
python.runPython("import sys; sys.path.insert(0, '/minilora')");
const ask = python.pyimport("minilora.page.answer").ask_json;
for (const line of readFileSync(states, "utf8").split("\n").filter(Boolean)) {
  const { json, error } = JSON.parse(ask(JSON.stringify({ state: JSON.parse(line) })));
  console.log(JSON.stringify(json ?? { error }));
}

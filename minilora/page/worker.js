// Python in the browser: the package's own files in Pyodide, away from the page so that the page stays alive.

import { loadPyodide } from "./pyodide/pyodide.mjs";

let bytes = 0, waiting = 0; // bytes that have come; questions that have
const fetched = self.fetch;
/** fetch that tells how many bytes have come. */
self.fetch = async (...what) => {
  const reply = await fetched(...what);
  const counted = new TransformStream({
    transform(chunk, on) {
      bytes += chunk.byteLength;
      postMessage({ bytes, what: "Python is on its way" });
      on.enqueue(chunk);
    },
  });
  return new Response(reply.body?.pipeThrough(counted), {
    status: reply.status, statusText: reply.statusText, headers: reply.headers });
};

async function start() {
  const [python, code] = await Promise.all([
    loadPyodide({ indexURL: new URL("pyodide/", self.location.href).href }),
    self.fetch("minilora.zip").then((reply) => reply.arrayBuffer()),
  ]);
  postMessage({ bytes, what: "reading the calculator" });
  python.unpackArchive(code, "zip", { extractDir: "/minilora" });
  python.runPython("import sys; sys.path.insert(0, '/minilora')");
  const ask = python.pyimport("minilora.page.answer").ask_json;
  if (!waiting) ask(JSON.stringify({ state: { model: "gpt2" } })); // so that the first answer waits for no import
  postMessage({ bytes, what: "", ready: true });
  return ask;
}

const ready = start();
ready.catch((error) => postMessage({ failed: `Python could not be loaded: ${error}` }));
onmessage = async ({ data }) => {
  let answer;
  waiting++;
  try {
    answer = JSON.parse((await ready)(JSON.stringify(data.question)));
  } catch (error) { // nothing that Python foresaw, so its last line
    answer = { error: `Python failed: ${String(error).trim().split("\n").at(-1)}` };
  }
  postMessage({ id: data.id, answer });
};

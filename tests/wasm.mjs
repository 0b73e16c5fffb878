// Runs a Python program on MicroPython's WebAssembly build: node wasm.mjs MODULES PROGRAM ARGUMENT FOLDER...
// Each folder is there for the program under the same path. Its standard output is ours.
import fs from 'node:fs';
import path from 'node:path';
import { pathToFileURL } from 'node:url';

const [modules, program, argument, ...folders] = process.argv.slice(2);
const file = path.join(modules, '@micropython', 'micropython-webassembly-pyscript', 'micropython.mjs');
const { loadMicroPython } = await import(pathToFileURL(file).href);
const lines = [];
const python = await loadMicroPython({ heapsize: 64 << 20, stdout: (line) => lines.push(line) });

function copy(from) {
  python.FS.mkdirTree(from);
  for (const entry of fs.readdirSync(from, { withFileTypes: true })) {
    const name = path.join(from, entry.name);
    if (entry.isDirectory()) copy(name);
    else python.FS.writeFile(name, fs.readFileSync(name));
  }
}

folders.forEach(copy);
const listed = folders.map((folder) => JSON.stringify(folder)).join(', ');
python.runPython(`import sys\nsys.path = [${listed}] + sys.path\nsys.argv.clear()\nsys.argv.extend(['', ${JSON.stringify(argument)}])\n`);
try {
  python.runPython(fs.readFileSync(program, 'utf8'));
} catch (error) {
  // sys.exit() is an exception here.
  if (error.type !== 'SystemExit') throw error;
}
process.stdout.write(lines.join('\n') + '\n');

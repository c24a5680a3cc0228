// Tries everything once for each line it reads, between two of which the test rotates the keys.

import assert from "node:assert/strict";
import { createInterface } from "node:readline";
import { add, changeEmail, close, find } from "./shop.js";

const names = [];
for await (const name of createInterface({ input: process.stdin })) {
  await add(name, `${name}@first.example.org`);
  await changeEmail(`${name}@first.example.org`, `${name}@example.org`);
  assert.equal(await find(`${name}@first.example.org`), undefined);
  names.push(name);
  for (const name of names) {
    const email = `${name}@example.org`;
    assert.deepEqual({ ...(await find(email.toUpperCase())) }, { name, email });
  }
  console.log(names.length);
}
await close();

/**
 * Many TCP connections of one process, each sending numbers all the time to something that gives them back; run with plain
 * node in the outside client's network namespace.
 *
 *   load-peer.mjs SPEC     JSON: { interval, groups: [{ name, count, address, port } | { name, count, listen, on }] }
 *                          `listen`, a port of the address `on`: takes connections; the others are opened from here
 *
 * Prints one JSON value per line: { "listening": true }, { "open": N } once every connection has given a number back, and
 * the state of all connections on each line of standard input. When standard input ends no more is sent; what is on its
 * way is waited for, then the state is printed for the last time.
 */
import { connect, createServer } from 'node:net';
import { createInterface } from 'node:readline';

const { interval, groups } = JSON.parse(process.argv[2] ?? '');
/** How long a number may be on its way at the end: longer than TCP's own pauses after a silence of seconds. */
const LAST_ANSWER_MS = 30_000;

const say = (value) => process.stdout.write(`${JSON.stringify(value)}\n`);
const connections = [];
let ending = false;

/** Follows one connection. Times in ms of Date.now(). @returns when its first number has come back, or it broke */
function follow(group, socket) {
  const state = { group, sent: 0, back: 0, silence: 0, silenceAt: 0, problem: null };
  let heard = 0;
  let timer;
  const send = () => {
    state.sent += 1;
    socket.write(`${state.sent}\n`);
  };
  state.stop = () => {
    state.stopped = true;
    clearInterval(timer);
  };
  state.quiet = () => (heard === 0 ? 0 : Date.now() - heard);
  connections.push(state);
  socket.setNoDelay(true);
  return new Promise((resolve) => {
    const fail = (problem) => {
      clearInterval(timer);
      state.problem ??= problem;
      resolve();
    };
    let rest = '';
    socket.setEncoding('latin1').on('data', (text) => {
      const lines = (rest + text).split('\n');
      rest = lines.pop() ?? '';
      lines.forEach(hear);
    });
    const hear = (line) => {
      const now = Date.now();
      state.back += 1;
      if (Number(line) !== state.back) fail(`${line} came where ${state.back} was due`);
      if (state.back === 1) {
        // Further ones at random moments, not all at once.
        setTimeout(() => {
          if (!state.stopped) timer = setInterval(send, interval);
        }, Math.random() * interval);
        resolve();
      } else if (now - heard > state.silence) {
        state.silence = now - heard;
        state.silenceAt = heard;
      }
      heard = now;
    };
    socket.on('error', (error) => fail(error.message));
    socket.on('end', () => fail('closed by the other side'));
    send();
  });
}

/** `quiet`: for how long nothing has come back by now. */
const report = () => say({ connections: connections.map((state) => ({ ...state, quiet: state.quiet?.() ?? 0 })) });

/** One after the other: busybox takes few at a time, and with SYN cookies what is sent too early would be lost. */
async function open({ name, count, address, port }) {
  for (let n = 0; n < count; n += 1) {
    await new Promise((resolve) => {
      const socket = connect(port, address);
      const refused = (error) => {
        connections.push({ group: name, sent: 0, back: 0, silence: 0, silenceAt: 0, problem: error.message });
        resolve();
      };
      socket.once('error', refused);
      socket.once('connect', () => {
        socket.off('error', refused);
        resolve(follow(name, socket));
      });
    });
  }
}

for (const { name, listen, on } of groups.filter((group) => group.listen !== undefined)) {
  await new Promise((resolve) => createServer((socket) => follow(name, socket)).listen(listen, on, resolve));
}
say({ listening: true });
for (const group of groups.filter((each) => each.listen === undefined)) await open(group);

const wanted = groups.reduce((sum, group) => sum + group.count, 0);
const waiting = setInterval(() => {
  const open = connections.filter((state) => state.back > 0).length;
  const broken = connections.some((state) => state.problem !== null);
  if (open < wanted && !broken && !ending) return;
  clearInterval(waiting);
  for (const state of connections) Object.assign(state, { silence: 0, silenceAt: 0 });
  say({ open });
}, 50);

createInterface({ input: process.stdin })
  .on('line', report)
  .on('close', async () => {
    ending = true;
    for (const state of connections) state.stop?.();
    const end = Date.now() + LAST_ANSWER_MS;
    const late = () => connections.some((state) => state.problem === null && state.back < state.sent);
    while (late() && Date.now() < end) await new Promise((resolve) => setTimeout(resolve, 50));
    for (const state of connections) {
      if (state.back < state.sent) state.problem ??= `${state.sent - state.back} of ${state.sent} did not come back`;
    }
    report();
    process.exit(0);
  });

/**
 * A TCP peer that a test runs in another network namespace with plain node.
 *
 *   peer.mjs post ADDRESS PATH     sends standard input to http://ADDRESS/PATH, prints the answer's body;
 *                                  the first line of standard error is the address that the server saw
 *   peer.mjs listen ADDRESS PORT   prints "listening", then for each connection that was read to its end one line of
 *                                  JSON { from, bytes, sha256 }, after answering with the client's address
 *   peer.mjs hold ADDRESS PORT     opens one connection to an echo service and sends a number over it every 50 ms; prints
 *                                  each number that comes back, in order. SIGTERM: sends no more, waits for the rest
 */
import { createHash } from 'node:crypto';
import { request } from 'node:http';
import { connect, createServer } from 'node:net';
import { createInterface } from 'node:readline';

const [verb, address, where] = process.argv.slice(2);

function post() {
  const sent = request({ host: address, port: 80, path: where, method: 'POST', timeout: 20_000 }, (answer) => {
    process.stderr.write(`${answer.headers['x-peer'] ?? ''}\n`);
    answer.pipe(process.stdout);
    if (answer.statusCode !== 200) process.exitCode = 1;
  });
  sent.on('timeout', () => sent.destroy(new Error('no answer within 20 s')));
  sent.on('error', (error) => {
    process.stderr.write(`\n${error.message}\n`);
    process.exitCode = 1;
  });
  // A body of known length: the guest's httpd knows no chunks.
  const chunks = [];
  process.stdin.on('data', (chunk) => chunks.push(chunk));
  process.stdin.on('end', () => {
    const body = Buffer.concat(chunks);
    sent.setHeader('Content-Length', body.length);
    sent.end(body);
  });
}

function listen() {
  const server = createServer({ allowHalfOpen: true }, (socket) => {
    const hash = createHash('sha256');
    let bytes = 0;
    const from = socket.remoteAddress;
    socket.on('data', (chunk) => {
      hash.update(chunk);
      bytes += chunk.length;
    });
    socket.on('end', () => {
      socket.end(`${from}\n`);
      process.stdout.write(`${JSON.stringify({ from, bytes, sha256: hash.digest('hex') })}\n`);
    });
    socket.on('error', (error) => process.stderr.write(`${error.message}\n`));
  });
  server.listen(Number(where), address, () => process.stdout.write('listening\n'));
}

function hold() {
  const socket = connect(Number(where), address);
  let sent = 0;
  let timer;
  socket.setNoDelay(true);
  socket.on('connect', () => {
    timer = setInterval(() => {
      sent += 1;
      socket.write(`${sent}\n`);
    }, 50);
  });
  createInterface({ input: socket }).on('line', (line) => process.stdout.write(`${line}\n`));
  const end = (problem) => {
    process.stderr.write(`${problem}\n`);
    process.exit(1);
  };
  socket.on('error', (error) => end(error.message));
  socket.on('end', () => (timer === undefined ? process.exit(0) : end('the guest closed the connection')));
  process.on('SIGTERM', () => {
    clearInterval(timer);
    timer = undefined;
    process.stdout.write(`sent ${sent}\n`);
    socket.end();
  });
}

if (verb === 'post') post();
else if (verb === 'listen') listen();
else if (verb === 'hold') hold();
else process.exitCode = 2;

/** Reads lines off a stream, one at a time, bounded in length and time. */
import type { Readable } from 'node:stream';
import { KvmIbError } from '../core/errors.ts';

export interface LineReader {
  /**
   * The next line without its end; undefined at the end of the stream.
   * @throws KvmIbError `bad-input` when it is longer than the limit, or did not come in time
   */
  next(timeoutMs?: number): Promise<string | undefined>;
}

export function createLineReader(stream: Readable, limit: number): LineReader {
  let buffered = Buffer.alloc(0);
  let ended = false;
  let wake: (() => void) | undefined;
  const notify = (): void => {
    wake?.();
    wake = undefined;
  };
  stream.on('data', (chunk: Buffer) => {
    buffered = Buffer.concat([buffered, chunk]);
    if (buffered.length > limit) stream.pause();
    notify();
  });
  for (const event of ['end', 'error', 'close']) {
    stream.on(event, () => {
      ended = true;
      notify();
    });
  }
  const more = (timeoutMs: number | undefined): Promise<void> =>
    new Promise((resolve, reject) => {
      const timer =
        timeoutMs === undefined
          ? undefined
          : setTimeout(() => {
              wake = undefined;
              reject(new KvmIbError('bad-input', 'Cannot read a line', { why: `none came within ${timeoutMs} ms` }));
            }, timeoutMs);
      wake = () => {
        clearTimeout(timer);
        resolve();
      };
    });
  return {
    async next(timeoutMs) {
      for (;;) {
        const end = buffered.indexOf('\n');
        if (end > limit || (end < 0 && buffered.length > limit)) {
          throw new KvmIbError('bad-input', 'Cannot read a line', { why: `it is longer than ${limit} bytes` });
        }
        if (end >= 0) {
          const line = buffered.subarray(0, end).toString();
          buffered = buffered.subarray(end + 1);
          stream.resume();
          return line;
        }
        if (ended) return undefined;
        await more(timeoutMs);
      }
    },
  };
}

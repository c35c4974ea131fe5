/** Reads the YAML configuration and tells `core/config.ts` where each value stands in the file. */
import { closeSync, constants, fstatSync, openSync, readFileSync } from 'node:fs';
import { isNode, LineCounter, parseDocument } from 'yaml';
import type { Locate } from '../core/config.ts';
import { configError, parseConfig } from '../core/config.ts';
import { KvmIbError, printable } from '../core/errors.ts';
import type { Config } from '../core/mapping.ts';

const SIZE_LIMIT = 1024 * 1024;

/**
 * @throws KvmIbError `bad-config`: absent, not a plain file, too large, not YAML, or wrong in content
 * @throws KvmIbError `not-permitted` when it may not be read
 */
export function readConfig(file: string): Config {
  const text = readConfigText(file);
  const lines = new LineCounter();
  const document = parseDocument(text, { lineCounter: lines, prettyErrors: false, uniqueKeys: true });
  const broken = document.errors.map((error) => ({
    line: lines.linePos(error.pos[0]).line,
    field: 'YAML',
    value: error.code,
    why: printable(error.message),
    fix: 'correct the syntax',
  }));
  if (broken.length > 0) throw configError(file, broken);
  const locate: Locate = (path) => {
    for (let depth = path.length; depth > 0; depth--) {
      const node = document.getIn(path.slice(0, depth), true);
      if (isNode(node) && node.range) return lines.linePos(node.range[0]).line;
    }
    return 1;
  };
  let raw: unknown;
  try {
    raw = document.toJS({ maxAliasCount: 0 });
  } catch (cause) {
    const why = printable(cause instanceof Error ? cause.message : String(cause));
    throw configError(file, [
      { line: 1, field: 'YAML', value: 'alias', why, fix: 'write the values out: no anchors or aliases' },
    ]);
  }
  return parseConfig(raw, locate, file);
}

/** The file as it stands. @throws KvmIbError as `readConfig`, the content aside */
export function readConfigText(file: string): string {
  let fd: number;
  try {
    // O_NONBLOCK: a FIFO in the file's place must not hang us.
    fd = openSync(file, constants.O_RDONLY | constants.O_NONBLOCK);
  } catch (cause) {
    const code = (cause as NodeJS.ErrnoException).code;
    if (code === 'EACCES' || code === 'EPERM') {
      throw new KvmIbError('not-permitted', `Cannot read the configuration ${file}`, {
        why: 'permission denied',
        fix: `make it readable: chmod 0644 ${file}`,
        cause,
      });
    }
    throw new KvmIbError('bad-config', `Cannot read the configuration ${file}`, {
      why: code === 'ENOENT' ? 'the file is not there' : String((cause as Error).message),
      fix: 'write it (docs/install.md has an example), or bring one: kvm-ib install host --config FILE; then run `kvm-ib config check`',
      cause,
    });
  }
  try {
    const stat = fstatSync(fd);
    if (!stat.isFile() || stat.size > SIZE_LIMIT) {
      throw new KvmIbError('bad-config', `Cannot read the configuration ${file}`, {
        why: stat.isFile() ? `it is larger than ${SIZE_LIMIT} bytes` : 'it is not a plain file',
        fix: 'put a plain YAML file there',
      });
    }
    return readFileSync(fd, 'utf8');
  } finally {
    closeSync(fd);
  }
}

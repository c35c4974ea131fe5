/**
 * Reads `oned.conf` and `vmm_execrc` as OpenNebula does, and changes single words of them. Pure. Everything that is not
 * changed keeps its bytes, comments too: these files are the site's.
 */
import { KvmIbError, printable } from '../core/errors.ts';

/** Longer files are not read: the one of 7.4 has 70 kB. */
const LENGTH_LIMIT = 1024 * 1024;

/** A value with its place in the text, quotes not included. */
interface Value {
  readonly text: string;
  readonly start: number;
}

/** A section VM_MAD: one driver. */
export interface VmMad {
  readonly name: string;
  /** Upper case, as oned compares it: KVM, QEMU, XML. */
  readonly type: string;
  readonly arguments: string;
  /** The folder below `remotes/vmm` whose scripts it runs; undefined when ARGUMENTS names none. */
  readonly directory: string | undefined;
  /** Names in upper case: oned takes them in any. */
  readonly attributes: ReadonlyMap<string, Value>;
  readonly start: number;
  /** Behind its `]`. */
  readonly end: number;
}

/** Every section VM_MAD that is no comment, in order. What is not understood is passed over. */
export function vmMads(onedConf: string | null): readonly VmMad[] {
  const text = onedConf ?? '';
  if (text.length > LENGTH_LIMIT) return [];
  const found: VmMad[] = [];
  // As the scanner of OpenNebula: a comment, a word with what stands for its value, or a character of neither.
  const item = /#[^\n]*|([A-Za-z0-9_]+)[ \t]*=[ \t]*(\[|"(?:\\"|[^"])*"|[^=#\s,[\]"]*)|[\s\S]/g;
  for (let match = item.exec(text); match !== null; match = item.exec(text)) {
    if (match[2] !== '[') continue;
    const { attributes, end } = readVector(text, item.lastIndex);
    if (match[1]?.toUpperCase() === 'VM_MAD' && end !== undefined) {
      found.push(describeSection(attributes, match.index, end));
    }
    item.lastIndex = end ?? item.lastIndex;
  }
  return found;
}

/** The attributes between the brackets of a section; `end` is undefined when it is not closed. */
function readVector(
  text: string,
  from: number,
): { readonly attributes: ReadonlyMap<string, Value>; readonly end: number | undefined } {
  const attributes = new Map<string, Value>();
  const item = /#[^\n]*|([A-Za-z0-9_]+)[ \t]*=[ \t]*("(?:\\"|[^"])*"|[^=#\s,[\]"]*)|\]|\[|[^\][]/g;
  item.lastIndex = from;
  for (let match = item.exec(text); match !== null; match = item.exec(text)) {
    if (match[0] === ']') return { attributes, end: item.lastIndex };
    if (match[0] === '[') break;
    const [, key, value] = match;
    if (key === undefined || value === undefined) continue;
    const quote = value.startsWith('"') ? 1 : 0;
    const start = match.index + match[0].length - value.length + quote;
    attributes.set(key.toUpperCase(), { text: value.slice(quote, value.length - quote), start });
  }
  return { attributes, end: undefined };
}

function describeSection(attributes: ReadonlyMap<string, Value>, start: number, end: number): VmMad {
  const value = (key: string): string => (attributes.get(key)?.text ?? '').replace(/\s+/g, ' ').trim();
  return {
    name: value('NAME'),
    type: value('TYPE').toUpperCase(),
    arguments: value('ARGUMENTS'),
    directory: directoryIn(attributes.get('ARGUMENTS')?.text ?? '')?.text,
    attributes,
    start,
    end,
  };
}

/** Options of one_vmm_exec that take a value in the next word; those of -r, -t and -w may be missing. */
const WITH_VALUE = /^(?:-[ldsrtw]|--(?:local|delegate|shell|retries|threads|timeout|default-snapshots))$/;

/** The word of ARGUMENTS that names the folder: the first that is no option and belongs to none. */
function directoryIn(text: string): Value | undefined {
  let previous = '';
  for (const { 0: word, index } of text.matchAll(/\S+/g)) {
    if (!word.startsWith('-') && !WITH_VALUE.test(previous)) return { text: word, start: index };
    previous = word;
  }
  return undefined;
}

/** One change of a file, as lines that go and lines that come. */
export interface Edit {
  readonly what: string;
  readonly removed: readonly string[];
  readonly added: readonly string[];
}

export interface Edited {
  readonly text: string;
  readonly edits: readonly Edit[];
}

/** Another folder for the driver of this name; the other words of its ARGUMENTS stay. */
export function withDirectory(onedConf: string, name: string, directory: string): Edited {
  const section = vmMads(onedConf).find((one) => one.name === name);
  const value = section?.attributes.get('ARGUMENTS');
  const word = value === undefined ? undefined : directoryIn(value.text);
  if (section === undefined || value === undefined || word === undefined) {
    throw new KvmIbError('host-lacks', `Cannot give the driver ${printable(name, 40)} another folder`, {
      why: `oned.conf has ${section === undefined ? 'no section VM_MAD of that name' : 'no folder in its ARGUMENTS'}`,
      fix: 'choose another name with --driver-name, or put the section of OpenNebula back first',
    });
  }
  if (word.text === directory) return { text: onedConf, edits: [] };
  const start = value.start + word.start;
  const text = `${onedConf.slice(0, start)}${directory}${onedConf.slice(start + word.text.length)}`;
  // What was understood wrongly must not be written.
  const after = vmMads(text).find((one) => one.name === name);
  if (after?.directory !== directory) throw notUnderstood('the ARGUMENTS of', name);
  return {
    text,
    edits: [
      {
        what: `VM_MAD "${name}": folder ${word.text} -> ${directory}`,
        removed: [lineAt(onedConf, start)],
        added: [lineAt(text, start)],
      },
    ],
  };
}

function lineAt(text: string, at: number): string {
  const end = text.indexOf('\n', at);
  return text.slice(text.lastIndexOf('\n', at - 1) + 1, end === -1 ? text.length : end);
}

function notUnderstood(what: string, name: string): KvmIbError {
  return new KvmIbError('conflict', `Cannot change ${what} VM_MAD "${printable(name, 40)}" in oned.conf`, {
    why: 'the file is written in a way that kvm-ib does not understand for certain',
    fix: 'change it by hand, as `kvm-ib install front-end` without --driver-name prints it',
  });
}

/** Stands above a section that the command wrote, so that it can be told from one that was written by hand. */
const MARK = '# Written by `kvm-ib install front-end`; `kvm-ib uninstall front-end` takes it away.';

/** @param section as `vmMadSection` makes it */
export function withSection(onedConf: string, name: string, section: string): Edited {
  const before = onedConf === '' || onedConf.endsWith('\n') ? onedConf : `${onedConf}\n`;
  const text = `${before}\n${MARK}\n${section}`;
  const names = (conf: string): string =>
    vmMads(conf)
      .map((one) => one.name)
      .join('\n');
  if (names(text) !== [...vmMads(onedConf).map((one) => one.name), name].join('\n')) {
    throw notUnderstood('the section of', name);
  }
  return { text, edits: [{ what: `section VM_MAD "${name}" at the end`, removed: [], added: trimmedLines(section) }] };
}

function trimmedLines(text: string): readonly string[] {
  return text.replace(/\n$/, '').split('\n');
}

/** Takes a section away that `withSection` wrote, whatever was changed in it since; one without our mark stays. */
export function withoutSection(onedConf: string, name: string): Edited {
  const section = vmMads(onedConf).find((one) => one.name === name);
  const marked = section === undefined ? -1 : onedConf.lastIndexOf(`${MARK}\n`, section.start);
  if (section === undefined || marked === -1) return { text: onedConf, edits: [] };
  // Between the mark and the section only comments of ours.
  const between = onedConf.slice(marked + MARK.length + 1, section.start);
  if (!/^(?:[ \t]*#[^\n]*\n)*[ \t]*$/.test(between)) return { text: onedConf, edits: [] };
  const start = onedConf.endsWith('\n\n', marked) ? marked - 1 : marked;
  const end = onedConf.charAt(section.end) === '\n' ? section.end + 1 : section.end;
  const removed = onedConf.slice(start, end).trim().split('\n');
  return {
    text: onedConf.slice(0, start) + onedConf.slice(end),
    edits: [{ what: `section VM_MAD "${name}"`, removed, added: [] }],
  };
}

/** The one line of `vmm_execrc` that names what can snapshot a disk while the VM runs. */
interface LiveSnapshots {
  readonly words: readonly string[];
  /** Of the words, quotes not included. */
  readonly start: number;
  readonly end: number;
}

/** Undefined when there is no such line, more than one, or one that the shell reads otherwise than we do. */
export function liveSnapshots(vmmExecrc: string | null): LiveSnapshots | undefined {
  const text = vmmExecrc ?? '';
  if (text.length > LENGTH_LIMIT) return undefined;
  const [line, ...more] = [
    ...text.matchAll(/^([ \t]*LIVE_DISK_SNAPSHOTS=(["']))([A-Za-z0-9_. \t-]*)\2[ \t]*(?:#.*)?$/gm),
  ];
  if (line === undefined || more.length > 0 || text.match(/^[^#\n]*LIVE_DISK_SNAPSHOTS/gm)?.length !== 1)
    return undefined;
  const start = line.index + (line[1] ?? '').length;
  const value = line[3] ?? '';
  return { words: value.split(/\s+/).filter((word) => word !== ''), start, end: start + value.length };
}

/** `vmm_execrc` with these words more; unchanged when its line is not understood. */
export function withLiveSnapshots(vmmExecrc: string, words: readonly string[]): Edited {
  const line = liveSnapshots(vmmExecrc);
  const missing = words.filter((word) => line?.words.includes(word) === false);
  if (line === undefined || missing.length === 0) return { text: vmmExecrc, edits: [] };
  const text = [vmmExecrc.slice(0, line.end), ...missing.map((word) => ` ${word}`), vmmExecrc.slice(line.end)].join('');
  return snapshotEdit(vmmExecrc, text, line.start, `live disk snapshots: ${missing.join(' ')}`);
}

/** Takes the words of one driver out again. */
export function withoutLiveSnapshots(vmmExecrc: string, name: string): Edited {
  const line = liveSnapshots(vmmExecrc);
  const ours = line?.words.filter((word) => word.startsWith(`${name}-`)) ?? [];
  if (line === undefined || ours.length === 0) return { text: vmmExecrc, edits: [] };
  const value = vmmExecrc
    .slice(line.start, line.end)
    .replace(/[ \t]*\S+/g, (word) => (ours.includes(word.trim()) ? '' : word));
  const text = vmmExecrc.slice(0, line.start) + value + vmmExecrc.slice(line.end);
  return snapshotEdit(vmmExecrc, text, line.start, `no live disk snapshots of ${name}`);
}

function snapshotEdit(before: string, after: string, at: number, what: string): Edited {
  return { text: after, edits: [{ what, removed: [lineAt(before, at)], added: [lineAt(after, at)] }] };
}

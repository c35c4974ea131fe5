/**
 * What an installation changes, as a plan: pure. `install-host.ts` and `install-front-end.ts` say what should be there;
 * `host/installer.ts` looks, and does what the plan says.
 *
 * Programs of ours are replaced whenever they differ. A file that an administrator may edit (everything under /etc) is
 * replaced only while it is what kvm-ib put there: the record of the last installation holds its digest. The configuration
 * is written once and never again.
 */
import { KvmIbError } from '../core/errors.ts';

/** Where the bytes of a file come from: a path inside the package, or text. */
export type Source = { readonly package: string } | { readonly text: string };

/** Whose a file is: it decides what happens to one that is there and differs. */
export type Keeping = 'ours' | 'unless-ours' | 'always';

export type Item =
  /** `own`: everything in it is ours, and goes with it. */
  | { readonly kind: 'directory'; readonly path: string; readonly mode: number; readonly own: boolean }
  | { readonly kind: 'link'; readonly path: string; readonly target: string }
  | {
      readonly kind: 'file';
      readonly path: string;
      readonly mode: number;
      readonly source: Source;
      readonly keep: Keeping;
      /** Checked by this program before it is put in place. */
      readonly check?: 'visudo';
      /** The site's own file, as it was when the change was made: refused when it is another by now; owner and mode stay. */
      readonly edits?: string;
    };

export type FileItem = Extract<Item, { kind: 'file' }>;

/** What stands at a path. */
export type Seen =
  | { readonly kind: 'absent' }
  | { readonly kind: 'directory'; readonly mode: number }
  | { readonly kind: 'link'; readonly target: string }
  | { readonly kind: 'file'; readonly mode: number; readonly owner: string; readonly sha256: string }
  | { readonly kind: 'other' };

/** What is there, looked at before anything is decided. */
export interface Observation {
  readonly seen: (path: string) => Seen;
  /** Digest and size of what a file item would be. */
  readonly content: (item: FileItem) => { readonly sha256: string; readonly size: number };
  /** What a directory holds, as full paths; empty when it is none. */
  readonly children: (path: string) => readonly string[];
  /** The user that new files belong to, by path. */
  readonly owner: (path: string) => string;
  /** Digests of the files that the last installation wrote, by path. */
  readonly recorded: ReadonlyMap<string, string>;
}

/** `+` made, `~` brought up to date, `=` as it should be, `!` differs and is kept, `-` removed. */
export type Sign = '+' | '~' | '=' | '!' | '-';

export interface Operation {
  readonly sign: Sign;
  readonly path: string;
  readonly kind: 'file' | 'link' | 'directory';
  /** Null for what is removed without having been planned for. */
  readonly item: Item | null;
  readonly mode: number | null;
  readonly owner: string | null;
  /** Bytes of a file. */
  readonly size: number | null;
  /** What is special about it; empty when nothing is. */
  readonly why: string;
}

/** @throws KvmIbError `conflict` when something that is no file stands where a file belongs */
export function planInstall(items: readonly Item[], look: Observation): readonly Operation[] {
  return items.map((item) => {
    const seen = look.seen(item.path);
    const owner = look.owner(item.path);
    const make = (sign: Sign, why = ''): Operation => ({
      sign,
      path: item.path,
      kind: item.kind,
      item,
      mode: item.kind === 'link' ? null : item.mode,
      owner: item.kind === 'link' ? null : owner,
      size: item.kind === 'file' ? look.content(item).size : null,
      why,
    });
    if (item.kind === 'directory') {
      if (seen.kind === 'absent') return make('+');
      if (seen.kind === 'directory') return make('=');
      throw inTheWay(item.path, 'a directory');
    }
    if (item.kind === 'link') {
      if (seen.kind === 'absent') return make('+', `-> ${item.target}`);
      if (seen.kind === 'directory' || seen.kind === 'other') throw inTheWay(item.path, 'a symbolic link');
      if (seen.kind === 'link' && seen.target === item.target) return make('=');
      return make('~', `-> ${item.target}`);
    }
    if (seen.kind === 'absent') return make('+');
    if (seen.kind === 'directory' || seen.kind === 'other') throw inTheWay(item.path, 'a file');
    const wanted = look.content(item).sha256;
    if (item.keep === 'always') {
      // The example differs from every real one, and nobody asked for it.
      const asked = 'text' in item.source && (seen.kind === 'link' || seen.sha256 !== wanted);
      return asked ? make('!', 'kept: the configuration is never overwritten') : { ...make('='), size: null };
    }
    if (seen.kind === 'link') {
      return item.keep === 'ours' ? make('~', 'it was a symbolic link') : make('!', 'kept: it is a symbolic link');
    }
    if (seen.sha256 === wanted) {
      if (seen.mode !== item.mode) return make('~', `mode ${octal(seen.mode)} -> ${octal(item.mode)}`);
      return seen.owner === owner ? make('=') : make('~', `owner ${seen.owner} -> ${owner}`);
    }
    if (item.keep === 'unless-ours' && look.recorded.get(item.path) !== seen.sha256) {
      return make('!', 'kept: it was changed by hand; move it away and install again for the one of this version');
    }
    return make('~');
  });
}

function inTheWay(path: string, what: string): KvmIbError {
  return new KvmIbError('conflict', `Cannot install ${path}`, {
    why: `something that is not ${what} stands there`,
    fix: 'look at it, and move it away',
  });
}

export interface Removal {
  /** What this version would have installed. */
  readonly items: readonly Item[];
  /** Everything below our own directories, deepest first. */
  readonly inside: readonly string[];
  /** Directories that the installation made: removed when nothing else is left in them. */
  readonly madeDirectories: readonly string[];
  /** Paths that stay, with the reason. */
  readonly keep: ReadonlyMap<string, string>;
}

/**
 * Files first, then what is in our directories, then directories. What is not there is not mentioned, nor is a directory
 * that others use.
 */
export function planUninstall(removal: Removal, look: Observation): readonly Operation[] {
  const { items, inside, madeDirectories, keep } = removal;
  const files = items.flatMap((item) => (item.kind === 'directory' ? [] : [item.path]));
  const directories = items.flatMap((item) => (item.kind === 'directory' ? [item.path] : []));
  const deepestFirst = [...directories, ...madeDirectories].sort((a, b) => b.split('/').length - a.split('/').length);
  const wanted = new Map(items.map((item) => [item.path, item]));
  const operations: Operation[] = [];
  const gone = new Set<string>();
  for (const path of new Set([...files, ...look.recorded.keys(), ...inside, ...deepestFirst])) {
    const seen = look.seen(path);
    if (seen.kind === 'absent') continue;
    const kind: Operation['kind'] = seen.kind === 'directory' || seen.kind === 'link' ? seen.kind : 'file';
    const base = { path, kind, item: wanted.get(path) ?? null, mode: null, owner: null, size: null };
    const reason = keep.get(path);
    if (reason !== undefined) {
      operations.push({ ...base, sign: '!', why: `kept: ${reason}` });
      continue;
    }
    if (kind === 'directory' && look.children(path).some((child) => !gone.has(child))) continue;
    const recorded = look.recorded.get(path);
    const changed = seen.kind === 'file' && recorded !== undefined && recorded !== seen.sha256;
    operations.push({ ...base, sign: '-', why: changed ? 'it was changed by hand' : '' });
    gone.add(path);
  }
  return operations;
}

/** A program to run once the files are in place. */
export interface Step {
  readonly argv: readonly [string, ...string[]];
  readonly what: string;
}

/** Something to tell the operator: what else is to do, with the commands or texts for it. */
export interface Note {
  readonly title: string;
  readonly text: string;
}

export function isChange(operation: Operation): boolean {
  return operation.sign !== '=' && operation.sign !== '!';
}

/** Whether one of these paths, or something below them, is changed. */
export function touches(operations: readonly Operation[], paths: readonly string[]): boolean {
  return operations.some(
    (op) => isChange(op) && paths.some((path) => op.path === path || op.path.startsWith(`${path}/`)),
  );
}

export function octal(mode: number): string {
  return `0${mode.toString(8)}`;
}

/** The folders that a relative path lies in, outermost first. */
export function parents(path: string): readonly string[] {
  const parts = path.split('/').slice(0, -1);
  return parts.map((_, index) => parts.slice(0, index + 1).join('/'));
}

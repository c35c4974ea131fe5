/** Imports point one way: core <- nftables-json, opennebula, libvirt, iptables, nat, link <- import <- ops <- host <- driver, cli. */
import { readdirSync, readFileSync } from 'node:fs';
import { dirname, join, relative, resolve } from 'node:path';
import { describe, expect, test } from 'vitest';

const LIB = resolve(import.meta.dirname, '../../lib');

interface Rule {
  /** Folders of lib that may be imported, besides the folder itself. */
  readonly folders: readonly string[];
  /** Packages, and `node:` for Node's own modules. */
  readonly packages: readonly string[];
}

const RULES: Readonly<Record<string, Rule>> = {
  core: { folders: [], packages: ['valibot', 'fast-xml-parser'] },
  'nftables-json': { folders: [], packages: [] },
  opennebula: { folders: ['core'], packages: [] },
  libvirt: { folders: ['core'], packages: [] },
  link: { folders: ['core'], packages: [] },
  iptables: { folders: ['core'], packages: [] },
  import: { folders: ['core', 'iptables', 'link'], packages: ['valibot'] },
  nat: { folders: ['core', 'nftables-json'], packages: [] },
  ops: { folders: ['core', 'opennebula', 'libvirt', 'iptables', 'import', 'nat', 'link'], packages: [] },
  // host implements the ports that ops declares; it calls no operation.
  host: {
    folders: ['core', 'nftables-json', 'iptables', 'import', 'nat', 'link', 'ops'],
    packages: ['node:', 'koffi', 'netlink', 'yaml'],
  },
  driver: { folders: ['core', 'host', 'libvirt', 'opennebula', 'ops'], packages: ['node:', 'valibot'] },
  cli: { folders: ['core', 'host', 'import', 'libvirt', 'opennebula', 'ops'], packages: ['node:', 'commander'] },
};

interface Import {
  readonly from: string;
  readonly specifier: string;
  readonly typeOnly: boolean;
}

function sources(folder: string): string[] {
  return readdirSync(folder, { withFileTypes: true }).flatMap((entry) => {
    const path = join(folder, entry.name);
    if (entry.isDirectory()) return sources(path);
    return entry.name.endsWith('.ts') ? [path] : [];
  });
}

function importsOf(path: string): readonly Import[] {
  const text = readFileSync(path, 'utf8');
  const statements = text.matchAll(/^(?:import|export)\s+(type\s)?[^;]*?from\s+'([^']+)'/gms);
  const dynamic = text.matchAll(/\bimport\('([^']+)'\)/g);
  return [
    ...[...statements].map((m) => ({ from: path, specifier: m[2] ?? '', typeOnly: m[1] !== undefined })),
    ...[...dynamic].map((m) => ({ from: path, specifier: m[1] ?? '', typeOnly: false })),
  ];
}

describe.each(Object.entries(RULES))('lib/%s', (folder, rule) => {
  const imports = sources(join(LIB, folder)).flatMap(importsOf);

  test('imports only what lies below it', () => {
    const wrong = imports.filter(({ from, specifier }) => {
      if (!specifier.startsWith('.')) {
        return !rule.packages.some(
          (name) => specifier === name || specifier.startsWith(name.endsWith(':') ? name : `${name}/`),
        );
      }
      const target = relative(LIB, resolve(dirname(from), specifier)).split('/')[0] ?? '';
      return target !== folder && !rule.folders.includes(target);
    });
    expect(wrong.map(({ from, specifier }) => `${relative(LIB, from)} imports ${specifier}`)).toEqual([]);
  });
});

test('host takes only types from ops', () => {
  const wrong = sources(join(LIB, 'host'))
    .flatMap(importsOf)
    .filter(({ specifier, typeOnly }) => specifier.includes('/ops/') && !typeOnly);
  expect(wrong.map(({ from, specifier }) => `${relative(LIB, from)} imports ${specifier}`)).toEqual([]);
});

test('every folder of lib has a rule', () => {
  const folders = readdirSync(LIB, { withFileTypes: true }).flatMap((entry) =>
    entry.isDirectory() ? [entry.name] : [],
  );
  expect(folders.sort()).toEqual(Object.keys(RULES).sort());
});

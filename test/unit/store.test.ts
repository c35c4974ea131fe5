/** The state directory: what is written is read, the index leads to the owner, and nothing half-written is believed. */
import {
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  rmSync,
  symlinkSync,
  truncateSync,
  writeFileSync,
} from 'node:fs';
import { join } from 'node:path';
import { beforeEach, describe, expect, it } from 'vitest';
import type { Mapping, Owner } from '../../lib/core/mapping.ts';
import type { TableRecord } from '../../lib/core/served.ts';
import { networksText, servedNetworks } from '../../lib/core/served.ts';
import type { StateFile } from '../../lib/core/state.ts';
import { STATE_VERSION } from '../../lib/core/state.ts';
import { createStore } from '../../lib/host/store.ts';
import type { LinkRecord, Store } from '../../lib/ops/host.ts';
import { addressOf, CONFIG, guestOf, mapping, temporaryDirectory, vmOwner } from '../support/fake-host.ts';

let directory: string;
let store: Store;
beforeEach(() => {
  directory = temporaryDirectory();
  store = createStore(directory);
});

function file(owner: Owner, mappings: readonly Mapping[], previous: readonly Mapping[] = []): StateFile {
  const updated = '2026-01-01T00:00:00.000Z';
  return {
    version: STATE_VERSION,
    owner,
    phase: { name: 'active' },
    mappings,
    previous,
    leftovers: [],
    detachedAliases: [],
    updated,
  };
}

const RECORD: TableRecord = {
  networks: servedNetworks(CONFIG.networks, [mapping(2)]),
  hostAddresses: new Map([['ib', [addressOf(2)]]]),
  configured: networksText(CONFIG.networks),
};

const pathOf = (name: string) => join(directory, 'mappings', `${name}.json`);
const claims = () => readdirSync(join(directory, 'claims')).sort();

describe('the state directory', () => {
  it('that is not there reads as empty, and is not made by reading', () => {
    const absent = join(directory, 'absent');
    const nothing = createStore(absent);
    expect(nothing.read(vmOwner(2))).toBeUndefined();
    expect(nothing.all()).toEqual({ files: [], unreadable: [] });
    expect(nothing.holderOf(guestOf(2))).toBeUndefined();
    expect(nothing.readTable()).toBeUndefined();
    nothing.remove(vmOwner(2));
    nothing.removeAll();
    expect(existsSync(absent)).toBe(false);
  });

  it('gives back what was written, also to another process', () => {
    const written = file(vmOwner(2), [mapping(2)], [mapping(3)]);
    store.write(written);
    expect(createStore(directory).read(vmOwner(2))).toEqual(written);
    expect(createStore(directory).all().files).toEqual([written]);
  });

  it('holds no temporary file afterwards', () => {
    store.write(file(vmOwner(2), [mapping(2)]));
    store.write(file(vmOwner(2), [mapping(3)]));
    store.writeTable(RECORD);
    expect(readdirSync(directory).sort()).toEqual(['claims', 'mappings', 'table.json']);
    expect(readdirSync(join(directory, 'mappings'))).toEqual(['vm-2.json']);
    expect(claims()).toEqual([addressOf(3), guestOf(3)].sort());
  });

  it('keeps the record of the table, and takes a broken one for none', () => {
    store.writeTable(RECORD);
    expect(store.readTable()).toEqual(RECORD);
    for (const text of ['', '{', 'null', '[]', '{"hostAddresses":null}', '{"hostAddresses":{"ib":["192.168.10.2"]}}']) {
      writeFileSync(join(directory, 'table.json'), text);
      expect(store.readTable(), text).toBeUndefined();
    }
    store.writeTable(undefined);
    expect(existsSync(join(directory, 'table.json'))).toBe(false);
  });

  it('keeps the record of the links, and takes what is broken of it for none', () => {
    const record = { bootId: 'boot', index: 3, hardware: '80:00', carrierChanges: 2 };
    const records = new Map<string, LinkRecord>([
      ['ib0', record],
      ['ib1', { ...record, carrierChanges: null }],
    ]);
    expect(store.readLinks()).toEqual(new Map());
    store.writeLinks(records);
    expect(store.readLinks()).toEqual(records);
    const path = join(directory, 'links.json');
    for (const text of [
      '',
      '{',
      'null',
      '[]',
      '{"links":null}',
      '{"links":[1]}',
      '{"links":{"ib0":{"index":"3"}}}',
      '{"links":{"ib0":null}}',
    ]) {
      writeFileSync(path, text);
      expect(store.readLinks(), text).toEqual(new Map());
    }
  });

  it('is emptied but for what is not ours', () => {
    store.write(file(vmOwner(2), [mapping(2)]));
    store.writeLinks(new Map());
    store.writeTable(RECORD);
    writeFileSync(join(directory, 'lock'), '');
    store.removeAll();
    expect(readdirSync(directory)).toEqual(['lock']);
    store.write(file(vmOwner(2), [mapping(2)]));
    expect(store.all().files).toHaveLength(1);
  });
});

describe('the index of claims', () => {
  it('leads from guest and IB address to the file, of what was before as well', () => {
    const written = file(vmOwner(2), [mapping(2, { to: 5 })], [mapping(2)]);
    store.write(written);
    for (const address of [guestOf(2), addressOf(5), addressOf(2)]) expect(store.holderOf(address)).toEqual(written);
    expect(store.holderOf(addressOf(6))).toBeUndefined();
    store.write(file(vmOwner(2), [mapping(2, { to: 5 })]));
    expect(store.holderOf(addressOf(2))).toBeUndefined();
    expect(claims()).toEqual([addressOf(5), guestOf(2)].sort());
  });

  it('goes with the file', () => {
    store.write(file(vmOwner(2), [mapping(2)]));
    store.remove(vmOwner(2));
    expect(claims()).toEqual([]);
    store.remove(vmOwner(2));
  });

  it('goes over to who writes last, and does not go with the former owner', () => {
    const second = file(vmOwner(3), [mapping(2, { vm: 3 })]);
    store.write(file(vmOwner(2), [mapping(2)]));
    store.write(second);
    store.remove(vmOwner(2));
    expect(store.holderOf(guestOf(2))).toEqual(second);
  });

  it('that is stale means nothing', () => {
    store.write(file(vmOwner(2), [mapping(2)]));
    symlinkSync('vm-2', join(directory, 'claims', guestOf(3)));
    symlinkSync('vm-99', join(directory, 'claims', guestOf(4)));
    writeFileSync(join(directory, 'claims', guestOf(5)), 'no link');
    for (const n of [3, 4, 5]) expect(store.holderOf(guestOf(n))).toBeUndefined();
  });

  it('is made right from the files', () => {
    const one = file(vmOwner(2), [mapping(2)]);
    store.write(one);
    store.write(file(vmOwner(3), [mapping(3)]));
    rmSync(join(directory, 'claims', guestOf(2)));
    symlinkSync('vm-2', join(directory, 'claims', guestOf(7)));
    writeFileSync(join(directory, 'claims', 'rubbish'), '');
    for (const folder of ['claims', 'mappings', '.'])
      writeFileSync(join(directory, folder, '.0123456789ab'), 'cut off');
    store.repairClaims(store.all().files);
    expect(claims()).toEqual([guestOf(2), guestOf(3), addressOf(2), addressOf(3)].sort());
    expect(readdirSync(join(directory, 'mappings'))).toEqual(['vm-2.json', 'vm-3.json']);
    expect(readdirSync(directory)).not.toContain('.0123456789ab');
    expect(store.holderOf(guestOf(2))).toEqual(one);
  });

  it('stays as it was when the file cannot be written', () => {
    const first = file(vmOwner(2), [mapping(2)]);
    store.write(first);
    // A directory in the place of the file: not even root can rename over it.
    mkdirSync(join(pathOf('vm-3'), 'in the way'), { recursive: true });
    expect(() => store.write(file(vmOwner(3), [mapping(2, { vm: 3, to: 6 })]))).toThrow('Cannot use the state');
    expect(store.holderOf(guestOf(2))).toEqual(first);
    expect(claims()).toEqual([guestOf(2), addressOf(2)].sort());
    expect(readdirSync(join(directory, 'mappings')).sort()).toEqual(['vm-2.json', 'vm-3.json']);
  });
});

describe('a state file that cannot be read', () => {
  beforeEach(() => {
    store.write(file(vmOwner(2), [mapping(2)]));
    store.write(file(vmOwner(3), [mapping(3)]));
    truncateSync(pathOf('vm-2'), 40);
  });

  it('is an error to who asks for it, with its path and what to do', () => {
    expect(() => store.read(vmOwner(2))).toThrow(
      expect.objectContaining({
        code: 'failed',
        message: expect.stringContaining(pathOf('vm-2')),
        fix: expect.stringContaining('mv '),
      }),
    );
    expect(() => store.holderOf(guestOf(2))).toThrow('Cannot read the state file');
  });

  it('is named among the others, which are read', () => {
    const { files, unreadable } = store.all();
    expect(files.map((one) => one.owner)).toEqual([vmOwner(3)]);
    expect(unreadable).toEqual([{ path: pathOf('vm-2'), why: expect.stringContaining('not a state file') }]);
  });

  it('is also one whose name is not that of its owner', () => {
    writeFileSync(pathOf('vm-9'), readFileSync(pathOf('vm-3')));
    expect(store.all().unreadable.map(({ path }) => path)).toEqual([pathOf('vm-2'), pathOf('vm-9')]);
  });

  it('may be written over or removed', () => {
    store.write(file(vmOwner(2), [mapping(5, { vm: 2 })]));
    expect(store.all().unreadable).toEqual([]);
    truncateSync(pathOf('vm-2'), 0);
    store.remove(vmOwner(2));
    expect(existsSync(pathOf('vm-2'))).toBe(false);
  });
});

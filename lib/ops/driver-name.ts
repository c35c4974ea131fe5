/**
 * The name that OpenNebula knows the driver by, put into `oned.conf` and taken out again. Pure. `kvm-ib` is a section of
 * its own beside that of `kvm`; with `kvm` the section of OpenNebula stays and runs our folder.
 */
import { KvmIbError, printable } from '../core/errors.ts';
import type { Edit, Edited } from '../opennebula/oned-conf.ts';
import {
  vmMads,
  withDirectory,
  withLiveSnapshots,
  withoutLiveSnapshots,
  withoutSection,
  withSection,
} from '../opennebula/oned-conf.ts';
import type { FrontEndFiles, OneVersion } from '../opennebula/registration.ts';
import { DRIVER, isRegistered, missingLiveSnapshots, STOCK, vmMadSection } from '../opennebula/registration.ts';
import type { Operation } from './install.ts';

export const DRIVER_NAMES = [DRIVER, STOCK] as const;
export type DriverName = (typeof DRIVER_NAMES)[number];

/** @throws KvmIbError `usage` */
export function parseDriverName(text: string): DriverName {
  const name = DRIVER_NAMES.find((one) => one === text);
  if (name !== undefined) return name;
  throw new KvmIbError('usage', `Cannot use the driver name "${printable(text, 40)}"`, {
    why: 'kvm-ib writes sections of these names alone: kvm-ib, kvm',
    fix: 'give --driver-name kvm-ib or --driver-name kvm; docs/driver-name.md says what each loses',
  });
}

/** What both files become. */
export interface NamedFiles {
  readonly onedConf: Edited;
  /** Null where nothing is to do. */
  readonly vmmExecrc: Edited | null;
}

/**
 * @throws KvmIbError `host-lacks` when there is no oned.conf to write to; `conflict` when it cannot be done without
 *   taking something else away
 */
export function giveName(name: DriverName, version: OneVersion, files: FrontEndFiles): NamedFiles {
  const onedConf = required(files.onedConf);
  if (name === STOCK) {
    const folder = vmMads(onedConf).find((section) => section.name === STOCK)?.directory;
    if (folder !== undefined && folder !== STOCK && folder !== DRIVER) {
      throw new KvmIbError('conflict', `Cannot give the driver ${STOCK} the folder ${DRIVER}`, {
        why: `it runs the folder "${printable(folder, 40)}" now, and our scripts call those of "${STOCK}" instead`,
        fix: 'choose --driver-name kvm-ib, which leaves that section as it is',
      });
    }
    return { onedConf: withDirectory(onedConf, STOCK, DRIVER), vmmExecrc: null };
  }
  const registered = isRegistered(onedConf)
    ? withDirectory(onedConf, DRIVER, DRIVER)
    : withSection(onedConf, DRIVER, vmMadSection(version, files));
  const words = missingLiveSnapshots(version, files).missing;
  return {
    onedConf: registered,
    vmmExecrc: files.vmmExecrc === null ? null : withLiveSnapshots(files.vmmExecrc, words),
  };
}

/**
 * The way back: `kvm` runs the folder of OpenNebula again; a section `kvm-ib` that `giveName` wrote goes, with its words in
 * `vmm_execrc`. One that was written by hand stays.
 */
export function takeName(names: readonly DriverName[], files: FrontEndFiles): NamedFiles {
  let onedConf: Edited = { text: files.onedConf ?? '', edits: [] };
  let vmmExecrc: Edited | null = null;
  const stock = vmMads(onedConf.text).find((section) => section.name === STOCK);
  if (names.includes(STOCK) && stock?.directory === DRIVER) {
    onedConf = then(onedConf, withDirectory(onedConf.text, STOCK, STOCK));
  }
  if (names.includes(DRIVER)) {
    onedConf = then(onedConf, withoutSection(onedConf.text, DRIVER));
    if (!isRegistered(onedConf.text) && files.vmmExecrc !== null) {
      vmmExecrc = withoutLiveSnapshots(files.vmmExecrc, DRIVER);
    }
  }
  return { onedConf, vmmExecrc };
}

function then(before: Edited, next: Edited): Edited {
  return { text: next.text, edits: [...before.edits, ...next.edits] };
}

function required(onedConf: string | null): string {
  if (onedConf !== null) return onedConf;
  throw new KvmIbError('host-lacks', 'Cannot write the driver into oned.conf', {
    why: 'there is no plain file /etc/one/oned.conf',
    fix: 'run it on the front-end; or leave --driver-name out, and put what is printed where your oned.conf comes from',
  });
}

/** A file of the site with other words in it: owner and mode stay. Nothing when nothing is edited. */
export function planEdit(path: string, before: string | null, edited: Edited | null): readonly Operation[] {
  if (edited === null || before === null || edited.edits.length === 0) return [];
  if (before.includes('\ufffd')) {
    throw new KvmIbError('conflict', `Cannot change ${path}`, {
      why: 'it is not in UTF-8, so writing it again would change other lines too',
      fix: 'change it by hand, as `kvm-ib install front-end` without --driver-name prints it',
    });
  }
  return [
    {
      sign: '~',
      path,
      kind: 'file',
      item: { kind: 'file', path, mode: 0o640, source: { text: edited.text }, keep: 'ours', edits: before },
      mode: null,
      owner: null,
      size: null,
      why: edited.edits.map(({ what }) => what).join('; '),
    },
  ];
}

/** The edits line by line, as a diff shows them. */
export function editLines(edits: readonly Edit[]): readonly string[] {
  return edits.flatMap(({ removed, added }) => [
    ...removed.map((line) => `- ${line}`),
    ...added.map((line) => `+ ${line}`),
  ]);
}

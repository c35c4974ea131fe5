/**
 * The configuration: shape and meaning, checked all at once so that an operator sees every problem in one run.
 * Pure: `host/config-file.ts` reads the YAML and tells where each value stands.
 */
import * as v from 'valibot';
import type { Ipv4, LinkName, Range } from './address.ts';
import {
  ipv4FromNumber,
  ipv4ToNumber,
  printRange,
  rangeAt,
  rangeContains,
  rangeOffset,
  rangeSize,
  rangesOverlap,
  tryParseIpv4,
  tryParseLinkName,
  tryParseRange,
} from './address.ts';
import { KvmIbError, printable } from './errors.ts';
import type { Config, Mapping, Network, StaticMapping } from './mapping.ts';
import { aliasLabel } from './mapping.ts';

/** One thing wrong in the configuration. */
export interface ConfigProblem {
  /** Line in the file, from 1; 0 when the value is absent altogether. */
  readonly line: number;
  /** Field as a person would write it: `networks[0].guests`. */
  readonly field: string;
  /** The offending value, made printable. */
  readonly value: string;
  readonly why: string;
  readonly fix: string;
}

export type Path = readonly (string | number)[];
/** Line of the value at a path, or of its nearest parent that stands in the file. */
export type Locate = (path: Path) => number;

/** A prefix of /12: more than any site has guests, small enough that a typing slip is noticed. */
const MAX_RANGE = 2 ** 20;

const networkSchema = v.strictObject({
  name: v.string(),
  device: v.string(),
  bridge: v.string(),
  guests: v.string(),
  addresses: v.string(),
  isolate: v.optional(v.boolean(), true),
  probe: v.optional(v.boolean(), true),
});
const staticSchema = v.strictObject({ guest: v.string(), address: v.string() });
const configSchema = v.strictObject({
  networks: v.pipe(v.array(networkSchema), v.minLength(1)),
  static: v.optional(v.nullable(v.array(staticSchema)), []),
});

const REMEDY: Readonly<Record<string, string>> = {
  networks: 'list at least one network with name, device, bridge, guests and addresses',
  name: 'give the network a name of letters, digits, "_" or "-", at most 32',
  device: 'name the IPoIB link, for example ib0 or ib0.8001',
  bridge: 'name the host-only bridge of the guests, for example virbr1',
  guests: 'write a range such as 192.168.122.2-192.168.122.6 or a prefix such as 192.168.122.0/24',
  addresses: 'write a range such as 192.168.10.202-192.168.10.206, as large as guests',
  isolate: 'write true or false without quotes',
  probe: 'write true or false without quotes',
  static: 'write a list of { guest: …, address: … }',
  guest: 'write one guest address inside a network, for example 192.168.122.6',
  address: 'write one IB address inside the same network, for example 192.168.10.206',
};
const KNOWN = 'known keys: networks, static; of a network: name, device, bridge, guests, addresses, isolate, probe';

/**
 * Checks a configuration that was read from YAML.
 * @param raw the document as plain values
 * @param locate where a value stands in the file
 * @param file its name, for the message
 * @throws KvmIbError `bad-config` that lists every problem with line, field, value and remedy
 */
export function parseConfig(raw: unknown, locate: Locate, file: string): Config {
  const problems: ConfigProblem[] = [];
  const add = (path: Path, value: unknown, why: string, fix: string): void => {
    problems.push({ line: locate(path), field: fieldName(path), value: showValue(value), why, fix });
  };
  const shape = v.safeParse(configSchema, raw ?? {});
  if (!shape.success) {
    for (const issue of shape.issues) {
      const path = (issue.path ?? []).map((item) => item.key as string | number);
      const key = String(path.findLast((part) => typeof part === 'string') ?? 'networks');
      const unknown = issue.type === 'strict_object' && issue.expected === 'never';
      if (unknown) add(path, issue.path?.at(-1)?.value, 'the key is not known', KNOWN);
      else if (issue.input === undefined) add(path, undefined, 'it is missing', REMEDY[key] ?? KNOWN);
      else add(path, issue.input, `it is not ${issue.expected ?? 'valid'}`, REMEDY[key] ?? KNOWN);
    }
    throw configError(file, problems);
  }

  const networks: Network[] = [];
  shape.output.networks.forEach((entry, index) => {
    const at = (key: string): Path => ['networks', index, key];
    const bad = (key: string, value: string, why: string): void => add(at(key), value, why, REMEDY[key] ?? KNOWN);
    if (!/^[A-Za-z0-9_-]{1,32}$/.test(entry.name)) bad('name', entry.name, 'it is not a network name');
    const device = tryParseLinkName(entry.device);
    if (device === undefined)
      bad('device', entry.device, 'it is not a link name (1 to 15 letters, digits, ".", "_", "-")');
    const bridge = tryParseLinkName(entry.bridge);
    if (bridge === undefined)
      bad('bridge', entry.bridge, 'it is not a link name (1 to 15 letters, digits, ".", "_", "-")');
    const range = (key: 'guests' | 'addresses'): Range | undefined => {
      const parsed = tryParseRange(entry[key]);
      if (parsed === undefined) {
        bad(
          key,
          entry[key],
          'it is not a range of IPv4 addresses, first to last, nor a prefix with its host bits zero',
        );
        return undefined;
      }
      if (rangeSize(parsed) > MAX_RANGE) {
        bad(key, entry[key], `it has ${rangeSize(parsed)} addresses, more than ${MAX_RANGE}`);
        return undefined;
      }
      const special = specialUse(parsed);
      if (special !== undefined) bad(key, entry[key], special);
      return parsed;
    };
    const guests = range('guests');
    const addresses = range('addresses');
    if (guests && addresses && rangeSize(guests) !== rangeSize(addresses)) {
      const why = `it has ${rangeSize(addresses)} addresses, guests has ${rangeSize(guests)}`;
      add(
        at('addresses'),
        entry.addresses,
        why,
        'give both ranges the same size: the n-th guest address gets the n-th IB address',
      );
    }
    if (device && bridge && guests && addresses) {
      const { name, isolate, probe } = entry;
      networks.push({ name, device, bridge, guests, addresses, isolate, ...(probe ? {} : { probe }) });
      checkAgainstEarlier(networks, index, add);
    }
  });

  const statics: StaticMapping[] = [];
  (shape.output.static ?? []).forEach((entry, index) => {
    const at = (key: string): Path => ['static', index, key];
    const guest = tryParseIpv4(entry.guest);
    const address = tryParseIpv4(entry.address);
    if (guest === undefined) add(at('guest'), entry.guest, 'it is not an IPv4 address', REMEDY['guest'] ?? KNOWN);
    if (address === undefined)
      add(at('address'), entry.address, 'it is not an IPv4 address', REMEDY['address'] ?? KNOWN);
    if (guest === undefined || address === undefined) return;
    const network = networks.find((candidate) => rangeContains(candidate.guests, guest));
    if (network === undefined) {
      add(at('guest'), guest, 'no network has it among its guests', REMEDY['guest'] ?? KNOWN);
    } else if (!rangeContains(network.addresses, address)) {
      const why = `it lies outside ${printRange(network.addresses)} of network ${network.name}`;
      add(at('address'), address, why, REMEDY['address'] ?? KNOWN);
    }
    for (const [key, value] of Object.entries({ guest, address })) {
      if (statics.some((other) => other.guest === value || other.address === value)) {
        add(at(key), value, 'an earlier static mapping has it already', 'remove one of the two');
      }
    }
    statics.push({ guest, address });
  });
  if (problems.length > 0) throw configError(file, problems);
  return { networks, static: statics };
}

type AddProblem = (path: Path, value: unknown, why: string, fix: string) => void;

function checkAgainstEarlier(networks: readonly Network[], index: number, add: AddProblem): void {
  const network = networks.at(-1);
  if (network === undefined) return;
  const at = (key: string): Path => ['networks', index, key];
  if (rangesOverlap(network.guests, network.addresses)) {
    add(
      at('addresses'),
      printRange(network.addresses),
      'it overlaps guests of the same network',
      'use two ranges without a common address',
    );
  }
  if (String(network.device) === String(network.bridge)) {
    add(at('bridge'), network.bridge, 'it is the device as well', 'name the bridge of the guests, not the IPoIB link');
  }
  for (const other of networks.slice(0, -1)) {
    if (other.name === network.name)
      add(at('name'), network.name, 'an earlier network has this name', 'give each network its own name');
    for (const key of ['device', 'bridge'] as const) {
      if ([other.device, other.bridge].includes(network[key])) {
        add(
          at(key),
          network[key],
          `network ${other.name} has it already`,
          'a link and a bridge belong to one network each',
        );
      }
    }
    for (const key of ['guests', 'addresses'] as const) {
      for (const otherKey of ['guests', 'addresses'] as const) {
        if (rangesOverlap(network[key], other[otherKey])) {
          const why = `it overlaps ${otherKey} ${printRange(other[otherKey])} of network ${other.name}`;
          add(at(key), printRange(network[key]), why, 'give each network ranges of its own');
        }
      }
    }
  }
}

function specialUse(range: Range): string | undefined {
  for (const [first, last, what] of [
    ['0.0.0.0', '0.255.255.255', '"this network" (0.0.0.0/8)'],
    ['127.0.0.0', '127.255.255.255', 'loopback (127.0.0.0/8)'],
    ['224.0.0.0', '255.255.255.255', 'multicast or reserved (224.0.0.0 and above)'],
  ] as const) {
    if (rangesOverlap(range, { first: first as Ipv4, last: last as Ipv4 })) return `it contains ${what}`;
  }
  return undefined;
}

function fieldName(path: Path): string {
  const name = path.reduce<string>(
    (name, part) => (typeof part === 'number' ? `${name}[${part}]` : name === '' ? part : `${name}.${part}`),
    '',
  );
  return printable(name) || '(document)';
}

function showValue(value: unknown): string {
  if (value === undefined) return '(absent)';
  return printable(typeof value === 'string' ? value : (JSON.stringify(value) ?? String(value)), 80);
}

/** One `bad-config` error out of the problems found. */
export function configError(file: string, problems: readonly ConfigProblem[]): KvmIbError {
  const lines = problems.map((p) => `${file}:${p.line}: ${p.field}: ${p.value}: ${p.why}; ${p.fix}`);
  return new KvmIbError('bad-config', `Cannot use the configuration ${file}`, {
    why: lines.join('\n'),
    fix: 'correct the file, then run `kvm-ib config check`',
  });
}

export function networkOfGuest(config: Config, guest: Ipv4): Network | undefined {
  return config.networks.find((network) => rangeContains(network.guests, guest));
}

export function networkOfBridge(config: Config, bridge: string | null): Network | undefined {
  return config.networks.find((network) => network.bridge === bridge);
}

/** What is asked for one guest NIC, before the configuration has been held against it. */
export interface NicWish {
  readonly guest: Ipv4;
  /** The IB address that was leased or named; undefined: the one of the same place in the range. */
  readonly address?: Ipv4 | undefined;
  readonly mac: Mapping['mac'];
  readonly vm: number | null;
  readonly nic: number | null;
  /** The bridge it hangs on, when known: it must be the network's. */
  readonly bridge?: LinkName | undefined;
}

/**
 * The mapping of one guest NIC under this configuration. This is the only place where privilege meets a wish: whatever
 * was asked, the result lies inside the configured ranges, links and labels.
 * @throws KvmIbError `out-of-range` naming guest, range and remedy
 */
export function resolveMapping(config: Config, wish: NicWish): Mapping {
  const network = networkOfGuest(config, wish.guest);
  const who = wish.vm === null ? `guest ${wish.guest}` : `NIC ${wish.nic} of VM ${wish.vm}`;
  if (network === undefined || (wish.bridge !== undefined && network.bridge !== wish.bridge)) {
    const bridged = wish.bridge === undefined ? undefined : networkOfBridge(config, wish.bridge);
    throw new KvmIbError('out-of-range', `Cannot map ${who}`, {
      why: bridged
        ? `its guest address ${wish.guest} lies outside ${printRange(bridged.guests)} of network ${bridged.name}`
        : `no network of the configuration has the guest address ${wish.guest}`,
      fix: 'give the NIC an address inside `guests`, or widen `guests` and `addresses` in the configuration',
    });
  }
  const offset = rangeOffset(network.guests, wish.guest);
  const address = wish.address ?? rangeAt(network.addresses, offset ?? 0);
  if (!rangeContains(network.addresses, address)) {
    throw new KvmIbError('out-of-range', `Cannot map ${who}`, {
      why: `the IB address ${address} lies outside ${printRange(network.addresses)} of network ${network.name}`,
      fix: 'name an IB address inside `addresses`, or leave it out for the one of the same place in the range',
    });
  }
  return {
    network: network.name,
    device: network.device,
    bridge: network.bridge,
    guest: wish.guest,
    address,
    mac: wish.mac,
    vm: wish.vm,
    nic: wish.nic,
    label: aliasLabel(network, wish.guest, wish.vm, wish.nic),
    named: wish.address !== undefined,
  };
}

/** A bridge address for `network-xml`: the first address of the guests' /24 that no guest has; undefined when all are taken. */
export function bridgeAddress(network: Network): Ipv4 | undefined {
  const base = Math.floor(ipv4ToNumber(network.guests.first) / 256) * 256;
  for (let host = 1; host < 255; host++) {
    const candidate = ipv4FromNumber(base + host);
    if (!rangeContains(network.guests, candidate)) return candidate;
  }
  return undefined;
}

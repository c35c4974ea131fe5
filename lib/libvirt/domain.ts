/**
 * The libvirt domain XML that OpenNebula hands to `deploy`: reads the bridge interfaces and inserts `<mtu>` into ours.
 * The text is spliced, never written anew, so every other byte stays as it came. Read the bytes as latin1 and write them
 * back the same way: each byte is then one character, whatever the encoding. OpenNebula writes two `<devices>` sections
 * with a guest agent, and RAW data may add more.
 */
import { KvmIbError } from '../core/errors.ts';
import type { XmlElement } from '../core/xml.ts';
import { childrenNamed, parseXml } from '../core/xml.ts';

/** One `<interface type='bridge'>` with a bridge. */
export interface BridgeInterface {
  readonly bridge: string;
  /** As written; null where libvirt is to make one up. */
  readonly mac: string | null;
  /** Name of the tap. */
  readonly target: string | null;
  /** Size of an `<mtu>` that is there already, as written. */
  readonly mtu: string | null;
  /** Parameter IP of its `<filterref>`: OpenNebula writes it where the NIC has a filter. Null when there is none, or several. */
  readonly ip: string | null;
  /** Its place among all interfaces of the domain, from 0, whatever their type. */
  readonly place: number;
  /** Index in the text right behind `<source …/>`. */
  readonly behindSource: number;
}

export interface Domain {
  /** Text of `<name>`: `one-<vm id>`. */
  readonly name: string | null;
  /** In the order of the text, from all `<devices>` sections. */
  readonly interfaces: readonly BridgeInterface[];
  /** `opennebula_version` of the metadata, which oned writes since 5.8. */
  readonly openNebulaVersion: string | null;
}

/**
 * @param xml The domain XML, decoded as latin1.
 * @throws KvmIbError `bad-input` when it is not one well-formed `<domain>`.
 */
export function parseDomain(xml: string, what = 'the domain XML on standard input'): Domain {
  const root = parseXml(xml, { roots: ['domain'], what });
  const interfaces = childrenNamed(root, 'devices')
    .flatMap((devices) => childrenNamed(devices, 'interface'))
    .map(bridgeInterface)
    .filter((found) => found !== null);
  const version = childrenNamed(root, 'metadata')
    .flatMap((metadata) => childrenNamed(metadata, 'one:vm'))
    .flatMap((vm) => childrenNamed(vm, 'one:opennebula_version'))[0];
  return {
    name: childrenNamed(root, 'name')[0]?.text.trim() || null,
    interfaces,
    openNebulaVersion: version?.text.trim() || null,
  };
}

/** The interfaces on one bridge, to hold against the NICs of the VM XML. */
export function interfacesOnBridge(domain: Domain, bridge: string): readonly BridgeInterface[] {
  return domain.interfaces.filter((one) => one.bridge === bridge);
}

export interface SplicedMtu {
  readonly bridge: string;
  readonly mac: string | null;
  /** The size inserted, or the one found. */
  readonly mtu: string;
}

export interface Splice {
  readonly xml: string;
  readonly inserted: readonly SplicedMtu[];
  /** Interfaces that had an `<mtu>`: the administrator's RAW data, left alone. */
  readonly kept: readonly SplicedMtu[];
}

/** IPv4's least MTU (RFC 791) and the largest that libvirt takes for a network. */
const MTU_MIN = 68;
const MTU_MAX = 65_535;

/**
 * Inserts `<mtu size='N'/>` behind the `<source>` of each interface on the given bridges; libvirt's schema lets the
 * children of an interface come in any order. libvirt since 3.1.0 gives the tap that MTU and tells a virtio guest
 * (host_mtu). A second splice inserts nothing.
 *
 * @param xml The domain XML, decoded as latin1.
 * @param mtus Bridge → MTU in bytes.
 * @throws KvmIbError `bad-input` as `parseDomain` does, or for an MTU that cannot be one.
 */
export function spliceMtu(xml: string, mtus: ReadonlyMap<string, number>): Splice {
  for (const [bridge, mtu] of mtus) {
    if (!Number.isInteger(mtu) || mtu < MTU_MIN || mtu > MTU_MAX) {
      throw new KvmIbError('bad-input', `Cannot set the MTU of ${bridge} to ${mtu}`, {
        why: `an MTU is a whole number from ${MTU_MIN} to ${MTU_MAX}`,
        fix: 'look at the MTU of the IPoIB link: `ip link show`',
      });
    }
  }
  const inserted: SplicedMtu[] = [];
  const kept: SplicedMtu[] = [];
  const pieces: string[] = [];
  let copied = 0;
  for (const { bridge, mac, mtu: found, behindSource } of parseDomain(xml).interfaces) {
    const mtu = mtus.get(bridge);
    if (mtu === undefined) continue;
    if (found !== null) {
      kept.push({ bridge, mac, mtu: found });
      continue;
    }
    inserted.push({ bridge, mac, mtu: String(mtu) });
    pieces.push(xml.slice(copied, behindSource), `<mtu size='${mtu}'/>`);
    copied = behindSource;
  }
  pieces.push(xml.slice(copied));
  return { xml: pieces.join(''), inserted, kept };
}

/** libvirt reads the first of repeated children, so the same is done here. */
function bridgeInterface(element: XmlElement, place: number): BridgeInterface | null {
  if (element.attributes.get('type') !== 'bridge') return null;
  const source = childrenNamed(element, 'source')[0];
  const bridge = source?.attributes.get('bridge');
  if (source === undefined || bridge === undefined) return null;
  const attribute = (child: string, name: string) => childrenNamed(element, child)[0]?.attributes.get(name) ?? null;
  const mtu = childrenNamed(element, 'mtu')[0];
  const [ip, ...more] = childrenNamed(element, 'filterref')
    .flatMap((filter) => childrenNamed(filter, 'parameter'))
    .filter((parameter) => parameter.attributes.get('name') === 'IP');
  return {
    bridge,
    mac: attribute('mac', 'address'),
    target: attribute('target', 'dev'),
    mtu: mtu === undefined ? null : (mtu.attributes.get('size') ?? ''),
    ip: more.length > 0 ? null : (ip?.attributes.get('value') ?? null),
    place,
    behindSource: source.end,
  };
}

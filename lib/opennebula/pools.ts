/**
 * Reads what `onehost list --xml` and `onevnet list --xml` print, of 3.4 to 7.x. A pool of thousands may have more markup
 * than one document is allowed; so it is cut into its elements first, and each is read strictly and by itself.
 */
import { KvmIbError } from '../core/errors.ts';
import type { XmlElement } from '../core/xml.ts';
import { childrenNamed, parseXml } from '../core/xml.ts';

/** A zone of OpenNebula is meant for 2500 hosts, of some 10 kB each. */
const LENGTH_LIMIT = 128 * 1024 * 1024;
const COUNT_LIMIT = 20_000;

/** A host as OpenNebula knows it. Names are the site's and unchecked: pass them through `printable`. */
export interface OneHost {
  readonly id: number | null;
  readonly name: string;
  /** VM_MAD: the name of the driver, as `oned.conf` has it. */
  readonly driver: string;
  /** -1: in none, as up to 4.14 a host may be. */
  readonly clusterId: number;
  readonly cluster: string | null;
  /** STATE, a number. */
  readonly state: number | null;
  readonly runningVms: number;
  /** What the probe of kvm-ib put into its template; null where it has not reported. */
  readonly kvmIb: { readonly status: string; readonly version: string; readonly config: string } | null;
}

/** @throws KvmIbError `bad-input` when it is no pool of hosts, or one of them cannot be read */
export function parseHostPool(text: string): readonly OneHost[] {
  return elementsOf(text, 'HOST', 'the output of `onehost list --xml`').map((host) => {
    const number = (value: string | null): number | null =>
      value !== null && /^-?[0-9]{1,9}$/.test(value) ? Number(value) : null;
    const template = childrenNamed(host, 'TEMPLATE')[0];
    const status = textOf(template, 'KVM_IB_STATUS');
    const share = childrenNamed(host, 'HOST_SHARE')[0];
    return {
      id: number(textOf(host, 'ID')),
      name: textOf(host, 'NAME') ?? '',
      driver: textOf(host, 'VM_MAD') ?? '',
      clusterId: number(textOf(host, 'CLUSTER_ID')) ?? -1,
      cluster: textOf(host, 'CLUSTER'),
      state: number(textOf(host, 'STATE')),
      runningVms: number(textOf(share, 'RUNNING_VMS')) ?? 0,
      kvmIb:
        status === null
          ? null
          : {
              status,
              version: textOf(template, 'KVM_IB_VERSION') ?? '',
              config: textOf(template, 'KVM_IB_CONFIG') ?? '',
            },
    };
  });
}

/** A virtual network of OpenNebula, as far as its driver and bridge go. */
export interface OneNetwork {
  readonly id: number | null;
  readonly name: string;
  readonly bridge: string | null;
  /** VN_MAD: the driver of its NICs on a host. */
  readonly driver: string | null;
  /** CONF: options of that driver. */
  readonly conf: string | null;
  /** Addresses that VMs have of it, where it is a virtual network. */
  readonly usedLeases?: number;
}

/** @throws KvmIbError `bad-input` as `parseHostPool` */
export function parseNetworkPool(text: string): readonly OneNetwork[] {
  return elementsOf(text, 'VNET', 'the output of `onevnet list --xml`').map((network) => {
    const template = childrenNamed(network, 'TEMPLATE')[0];
    const id = textOf(network, 'ID');
    return {
      id: id !== null && /^[0-9]{1,9}$/.test(id) ? Number(id) : null,
      name: textOf(network, 'NAME') ?? '',
      bridge: textOf(network, 'BRIDGE') ?? textOf(template, 'BRIDGE'),
      driver: textOf(network, 'VN_MAD') ?? textOf(template, 'VN_MAD'),
      conf: textOf(template, 'CONF'),
      usedLeases: Number(/^[0-9]{1,9}$/.exec(textOf(network, 'USED_LEASES') ?? '')?.[0] ?? 0),
    };
  });
}

/** The NICs of a VM (`vm.xml`), with the driver that takes their bridge away again. @throws KvmIbError `bad-input` */
export function parseNicDrivers(vmXml: string): readonly OneNetwork[] {
  const vm = parseXml(vmXml, { roots: ['VM'], what: 'the VM data (vm.xml)' });
  return childrenNamed(vm, 'TEMPLATE')
    .flatMap((template) => childrenNamed(template, 'NIC'))
    .map((nic) => ({
      id: null,
      name: textOf(nic, 'NETWORK') ?? '',
      bridge: textOf(nic, 'BRIDGE'),
      driver: textOf(nic, 'VN_MAD'),
      conf: textOf(nic, 'CONF'),
    }));
}

/** The value of the first child of this name; null when it is absent or blank. */
function textOf(parent: XmlElement | undefined, name: string): string | null {
  const value = parent === undefined ? '' : (childrenNamed(parent, name)[0]?.text.trim() ?? '');
  return value === '' ? null : value;
}

/** The elements `<NAME>` of a `<NAME_POOL>`. With an empty one in the place of each, the rest must be a pool. */
function elementsOf(text: string, name: string, what: string): readonly XmlElement[] {
  const refuse = (why: string): KvmIbError =>
    new KvmIbError('bad-input', `Cannot read ${what}`, { why, fix: 'run the command yourself, as oneadmin, and look' });
  if (text.length > LENGTH_LIMIT) throw refuse(`it has ${text.length} characters; the limit is ${LENGTH_LIMIT}`);
  const elements: XmlElement[] = [];
  const rest: string[] = [];
  let kept = 0;
  let start: number | undefined;
  // What hides a tag is passed over whole; a search that finds no end comes to the end of the text, so time is linear.
  const mark = /<!\[CDATA\[|<!--|<\/?([A-Z_]+)[ \t\r\n]*\/?>/g;
  for (let match = mark.exec(text); match !== null; match = mark.exec(text)) {
    const [tag, word] = match;
    if (word === undefined) {
      const end = text.indexOf(tag === '<!--' ? '-->' : ']]>', mark.lastIndex);
      if (end === -1) throw refuse('it is cut off');
      mark.lastIndex = end + 3;
    } else if (word !== name || tag.endsWith('/>')) {
      // Another element, or an empty one that says nothing.
    } else if (!tag.startsWith('</')) {
      if (start !== undefined) throw refuse(`a <${name}> begins inside another`);
      start = match.index;
      rest.push(text.slice(kept, start), `<${name}/>`);
    } else {
      if (start === undefined) throw refuse(`</${name}> closes nothing`);
      kept = mark.lastIndex;
      if (elements.length >= COUNT_LIMIT) throw refuse(`it has more than ${COUNT_LIMIT} of <${name}>`);
      elements.push(parseXml(text.slice(start, kept), { roots: [name], what }));
      start = undefined;
    }
  }
  if (start !== undefined) throw refuse(`a <${name}> is not closed; the text ends after ${text.length} characters`);
  rest.push(text.slice(kept));
  const pool = parseXml(rest.join(''), { roots: [`${name}_POOL`], what });
  const places = pool.children.filter((child) => child.name === name).length;
  if (places < elements.length) throw refuse(`a <${name}> is not in the pool itself`);
  return elements;
}

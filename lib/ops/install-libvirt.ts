/** The libvirt networks of the guests' bridges: which to make at an installation, which to take away after it. Pure. */
import { bridgeAddress } from '../core/config.ts';
import type { Network } from '../core/mapping.ts';
import type { LibvirtNetwork } from '../libvirt/network.ts';
import { libvirtName, networkXml, rulesOfForwardMode } from '../libvirt/network.ts';
import type { Item, Note, Step } from './install.ts';

const VIRSH = ['/usr/bin/virsh', '--connect', 'qemu:///system'] as const;

export interface SeenNetwork extends LibvirtNetwork {
  readonly active: boolean;
  readonly autostart: boolean;
}

export interface LibvirtFacts {
  /** Networks that libvirt has; null when it does not answer, or is not asked. */
  readonly networks: readonly SeenNetwork[] | null;
  /** False: the operator makes them. */
  readonly wanted: boolean;
  /** MTU of each IPoIB link that is there. */
  readonly mtus: ReadonlyMap<string, number>;
  /** Links of this host. */
  readonly links: ReadonlySet<string>;
}

export interface LibvirtPlan {
  readonly items: readonly Item[];
  readonly steps: readonly Step[];
  readonly notes: readonly Note[];
  /** Networks that these steps define: for the record. */
  readonly made: readonly string[];
}

/** @param directory where the XML goes that libvirt is given */
export function planLibvirt(networks: readonly Network[], facts: LibvirtFacts, directory: string): LibvirtPlan {
  const items: Item[] = [];
  const steps: Step[] = [];
  const notes: Note[] = [];
  const made: string[] = [];
  const virsh = (what: string, ...args: readonly string[]): void =>
    void steps.push({ what, argv: [...VIRSH, ...args] });
  const note = (title: string, ...lines: readonly string[]): void => void notes.push({ title, text: lines.join('\n') });
  const start = (name: string, active: boolean, autostart: boolean): void => {
    if (!active) virsh(`libvirt makes the bridge of ${name}`, 'net-start', name);
    if (!autostart) virsh(`${name} starts with libvirt`, 'net-autostart', name);
  };
  for (const network of networks) {
    const name = libvirtName(network);
    const owner = facts.networks?.find(({ bridge }) => bridge === network.bridge);
    const namesake = facts.networks?.find((one) => one.name === name);
    const address = bridgeAddress(network);
    const mtu = facts.mtus.get(network.device);
    if (owner !== undefined) {
      const mode = owner.forward ?? 'isolated';
      if (rulesOfForwardMode(mode) === 'in-the-way') {
        note(
          `libvirt's network ${owner.name} has the bridge ${network.bridge}, with the wrong forward mode: ${mode}`,
          'libvirt adds rules for it that reject what goes between bridge and IPoIB link. It is left as it is. With no guest on it:',
          `  virsh net-destroy ${owner.name}`,
          `  virsh net-undefine ${owner.name}`,
          '  kvm-ib install host        # again: it then makes the right one',
        );
      } else if (owner.name === name && facts.wanted) start(name, owner.active, owner.autostart);
      else if (!owner.active) {
        note(
          `libvirt's network ${owner.name} has the bridge ${network.bridge} but is not started`,
          `  virsh net-start ${owner.name}`,
          `  virsh net-autostart ${owner.name}`,
        );
      }
    } else if (namesake !== undefined) {
      note(
        `libvirt's network ${name} has the bridge ${namesake.bridge ?? '(none)'}, not ${network.bridge} as the configuration says`,
        'It is left as it is. Correct the configuration; or, with no guest on it:',
        `  virsh net-destroy ${name}`,
        `  virsh net-undefine ${name}`,
        '  kvm-ib install host        # again: it then makes the right one',
      );
    } else if (facts.links.has(network.bridge)) {
      // Somebody else made the bridge: it serves as well.
    } else if (facts.networks !== null && facts.wanted && address !== undefined && mtu !== undefined) {
      const path = `${directory}/${name}.xml`;
      const text = networkXml(network, { mtu, bridgeAddress: address });
      items.push({ kind: 'file', path, mode: 0o644, source: { text }, keep: 'ours' });
      virsh(`libvirt gets the network of ${network.bridge}`, 'net-define', path);
      start(name, false, false);
      made.push(name);
    } else {
      const why = !facts.wanted
        ? 'you make it (--no-libvirt-network)'
        : facts.networks === null
          ? 'libvirt does not answer on this host'
          : address === undefined
            ? "the guests have all addresses of their /24, so choose the host's own elsewhere"
            : `the IPoIB link ${network.device} is not there, so the MTU is not known`;
      note(
        `The bridge ${network.bridge} of network ${network.name} is not there, and was not made: ${why}`,
        'Let libvirt make it, without rules of its own (forward mode open):',
        `  kvm-ib network-xml --network ${network.name}${address === undefined ? ' --bridge-address ADDRESS' : ''}${mtu === undefined ? ` --mtu MTU_OF_${network.device.toUpperCase()}` : ''} > net.xml`,
        '  virsh net-define net.xml',
        `  virsh net-start ${name}`,
        `  virsh net-autostart ${name}`,
      );
    }
  }
  return {
    items: items.length === 0 ? [] : [{ kind: 'directory', path: directory, mode: 0o755, own: true }, ...items],
    steps,
    notes,
    made,
  };
}

/**
 * Takes away the networks that an installation made, but none with a guest on its bridge.
 * @param recorded their names @param ports by bridge, what is attached to it
 */
export function planLibvirtRemoval(
  recorded: readonly string[],
  networks: readonly SeenNetwork[] | null,
  ports: (bridge: string) => readonly string[],
): { readonly steps: readonly Step[]; readonly notes: readonly Note[] } {
  const steps: Step[] = [];
  const notes: Note[] = [];
  for (const name of recorded) {
    const seen = networks?.find((network) => network.name === name);
    if (networks !== null && seen === undefined) continue;
    const guests = seen?.bridge == null ? [] : ports(seen.bridge);
    if (seen === undefined || guests.length > 0) {
      notes.push({
        title:
          seen === undefined
            ? `Left: the libvirt network ${name}, since libvirt does not answer`
            : `Left: the libvirt network ${name}, since guests are on ${seen.bridge}: ${guests.slice(0, 5).join(', ')}${guests.length > 5 ? ', …' : ''}`,
        text: `  virsh net-destroy ${name}\n  virsh net-undefine ${name}`,
      });
      continue;
    }
    if (seen.active) steps.push({ what: `the bridge of ${name} goes`, argv: [...VIRSH, 'net-destroy', name] });
    steps.push({ what: `libvirt forgets ${name}`, argv: [...VIRSH, 'net-undefine', name] });
  }
  return { steps, notes };
}

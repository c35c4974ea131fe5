/**
 * `/run/kvm-ib/status`: what the last reconcile found, in words that a shell reads without Node.
 *
 *   kvm-ib-status 1             the form of the file
 *   time 2026-01-01T00:00:00Z   for people
 *   uptime 4711                 seconds since boot, as /proc/uptime: how old it is, whatever the clock did since
 *   version 0.1.0
 *   state OK|DRIFT|FAILED       FAILED: reconcile could not look
 *   error CODE                  only then
 *   drift 0
 *   outdated 0                  mappings of an older configuration
 *   config 3f2a…                the first 16 digits of the SHA-256 of the configuration's meaning
 *   ruleset 1a2b3c4d
 *   vm 42 BASE64                one for each VM: the lines KEY="VALUE" that the probe hands on
 *   end                         what has no end is cut off
 *
 * The probes: drivers/im/kvm-probes.d. Their limits hold here: 500 VMs, 600 characters each.
 */
import { createHash, randomBytes } from 'node:crypto';
import { chmodSync, mkdirSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import type { Config } from '../core/mapping.ts';
import type { StatusReport, StatusSink, VmReport } from '../ops/publish.ts';

const VM_LIMIT = 500;
/** Characters of a VM's lines; in base64 four for each three. */
const TEXT_LIMIT = 450;

/** @param directory made when it is not there; undefined: nothing is written */
export function createStatusFile(directory: string | undefined, version: string): StatusSink | undefined {
  if (directory === undefined) return undefined;
  return {
    write(report) {
      const temporary = join(directory, `.status-${randomBytes(6).toString('hex')}`);
      try {
        mkdirSync(directory, { recursive: true, mode: 0o755 });
        writeFileSync(temporary, formatStatus(report, { version, uptime: uptimeSeconds() }), { flag: 'wx' });
        // Whatever the umask: the probes run as OpenNebula's user.
        chmodSync(temporary, 0o644);
        renameSync(temporary, join(directory, 'status'));
        return undefined;
      } catch (cause) {
        tryRemove(temporary);
        const why = cause instanceof Error ? cause.message : String(cause);
        return `OpenNebula's probes will call this host STALE: cannot write ${join(directory, 'status')}: ${why}`;
      }
    },
  };
}

export function formatStatus(
  report: StatusReport,
  { version, uptime }: { readonly version: string; readonly uptime: number },
): string {
  const state = report.drift === null ? 'FAILED' : report.drift === 0 ? 'OK' : 'DRIFT';
  return [
    'kvm-ib-status 1',
    `time ${report.time}`,
    `uptime ${uptime}`,
    `version ${version}`,
    `state ${state}`,
    ...(report.error === null ? [] : [`error ${report.error}`]),
    ...(report.drift === null ? [] : [`drift ${report.drift}`]),
    ...(report.outdated === null ? [] : [`outdated ${report.outdated}`]),
    `config ${configHash(report.config)}`,
    ...(report.ruleset === null ? [] : [`ruleset ${report.ruleset}`]),
    ...report.vms.slice(0, VM_LIMIT).map((vm) => `vm ${vm.vm} ${Buffer.from(vmLines(vm)).toString('base64')}`),
    'end',
    '',
  ].join('\n');
}

function vmLines({ state, drift, outdated, addresses, traffic }: VmReport): string {
  const lines = [
    `KVM_IB_STATE="${state.toUpperCase()}"`,
    `KVM_IB_DRIFT="${drift}"`,
    `KVM_IB_OUTDATED="${outdated}"`,
    ...(traffic === null
      ? []
      : [
          `KVM_IB_RX_PACKETS="${BigInt(traffic.received.packets)}"`,
          `KVM_IB_RX_BYTES="${BigInt(traffic.received.bytes)}"`,
          `KVM_IB_TX_PACKETS="${BigInt(traffic.sent.packets)}"`,
          `KVM_IB_TX_BYTES="${BigInt(traffic.sent.bytes)}"`,
        ]),
  ].join('\n');
  const withAddresses = (count: number): string =>
    `${lines}\nKVM_IB_ADDRESSES="${addresses.slice(0, count).join(' ')}"\n`;
  // As many as the probes take.
  let count = Math.min(addresses.length, 100);
  while (count > 0 && withAddresses(count).length > TEXT_LIMIT) count -= 1;
  return withAddresses(count);
}

/** Equal for configurations that mean the same: comments, order of keys and ways to write a range do not count. */
export function configHash(config: Config): string {
  const networks = config.networks.map(({ name, device, bridge, guests, addresses, isolate, probe }) => {
    const ranges = [guests.first, guests.last, addresses.first, addresses.last];
    return [name, device, bridge, ...ranges, isolate, ...(probe === false ? [{ probe }] : [])];
  });
  const text = JSON.stringify([networks, config.static.map(({ guest, address }) => [guest, address])]);
  return createHash('sha256').update(text).digest('hex').slice(0, 16);
}

function tryRemove(path: string): void {
  try {
    rmSync(path, { force: true });
  } catch {
    // Then it was never made.
  }
}

function uptimeSeconds(): number {
  return Math.floor(Number.parseFloat(readFileSync('/proc/uptime', 'latin1')));
}

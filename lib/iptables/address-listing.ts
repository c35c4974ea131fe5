/** Reads what `ip -4 address` prints (ip-address(8)), for rules that come from another host. */
import { tryParseIpv4 } from '../core/address.ts';
import type { Parsed, ScriptAddress } from './table.ts';

/** Whether a text begins as a listing does: `2: ib0: <BROADCAST,…> mtu 2044 …`. */
export function isAddressListing(text: string): boolean {
  return /^\d+: \S+: <[A-Z,_-]*> mtu \d+/m.test(text.slice(0, 65_536));
}

export function parseAddressListing(text: string): Parsed {
  const addresses: ScriptAddress[] = [];
  let device = '';
  for (const line of text.split('\n')) {
    device = /^\d+: ([^\s:@]{1,15})(?:@\S+)?: </.exec(line)?.[1] ?? device;
    const [, address = '', length = '', label = ''] = /^\s+inet ([0-9.]+)\/([0-9]{1,2}) .*?(\S+)\s*$/.exec(line) ?? [];
    if (tryParseIpv4(address) === undefined || Number(length) > 32 || label.length > 15) continue;
    addresses.push({ device, address, prefixLength: Number(length), label });
  }
  return { tables: new Map(), skipped: [], addresses };
}

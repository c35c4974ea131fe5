/** Commands that use every type of the library once, with what a person would type for each. */
import type { Command, Expression, Statement } from '../../lib/nftables-json/index.ts';

const IN = { family: 'ip', table: 'corpus' } as const;

const saddr: Expression = { payload: { protocol: 'ip', field: 'saddr' } };
const daddr: Expression = { payload: { protocol: 'ip', field: 'daddr' } };
const dport: Expression = { payload: { protocol: 'tcp', field: 'dport' } };
const iifname: Expression = { meta: { key: 'iifname' } };
const mark: Expression = { meta: { key: 'mark' } };
const equal = (left: Expression, right: Expression): Statement => ({ match: { op: '==', left, right } });

export const CORPUS_TABLE = { family: 'ip', name: 'corpus' } as const;

/** Objects: the command and its text. */
export const OBJECTS: readonly (readonly [Command, string])[] = [
  [{ add: { table: CORPUS_TABLE } }, 'add table ip corpus'],
  [{ create: { chain: { ...IN, name: 'leaf' } } }, 'create chain ip corpus leaf'],
  [{ add: { chain: { ...IN, name: 'plain' } } }, 'add chain ip corpus plain'],
  [
    { add: { chain: { ...IN, name: 'fwd_c', type: 'filter', hook: 'forward', prio: -5, policy: 'drop' } } },
    'add chain ip corpus fwd_c { type filter hook forward priority -5; policy drop; }',
  ],
  [
    { add: { chain: { ...IN, name: 'pre', type: 'nat', hook: 'prerouting', prio: -105 } } },
    'add chain ip corpus pre { type nat hook prerouting priority -105; }',
  ],
  [
    { add: { chain: { ...IN, name: 'post', type: 'nat', hook: 'postrouting', prio: 95, policy: 'accept' } } },
    'add chain ip corpus post { type nat hook postrouting priority 95; policy accept; }',
  ],
  [
    { add: { chain: { ...IN, name: 'raw_c', type: 'filter', hook: 'prerouting', prio: -300 } } },
    'add chain ip corpus raw_c { type filter hook prerouting priority -300; }',
  ],
  [
    { add: { map: { ...IN, name: 'pairs', type: 'ipv4_addr', map: 'ipv4_addr' } } },
    'add map ip corpus pairs { type ipv4_addr : ipv4_addr; }',
  ],
  [
    { add: { map: { ...IN, name: 'counted', type: 'ipv4_addr', map: 'ipv4_addr', stmt: [{ counter: null }] } } },
    'add map ip corpus counted { type ipv4_addr : ipv4_addr; counter; }',
  ],
  [
    { add: { map: { ...IN, name: 'paths', type: ['ifname', 'ipv4_addr'], map: 'verdict' } } },
    'add map ip corpus paths { type ifname . ipv4_addr : verdict; }',
  ],
  [
    { add: { set: { ...IN, name: 'macs', type: ['ipv4_addr', 'ether_addr'] } } },
    'add set ip corpus macs { type ipv4_addr . ether_addr; }',
  ],
  [
    {
      add: {
        set: {
          ...IN,
          name: 'nets',
          type: 'ipv4_addr',
          flags: ['interval'],
          elem: ['10.9.9.9', { prefix: { addr: '10.0.0.0', len: 24 } }, { range: ['10.1.0.1', '10.1.0.9'] }],
        },
      },
    },
    'add set ip corpus nets { type ipv4_addr; flags interval; elements = { 10.9.9.9, 10.0.0.0/24, 10.1.0.1-10.1.0.9 }; }',
  ],
  [
    { add: { set: { ...IN, name: 'young', type: 'ipv4_addr', flags: ['timeout'], timeout: 60, size: 100 } } },
    'add set ip corpus young { type ipv4_addr; flags timeout; timeout 60s; size 100; }',
  ],
  [
    { add: { set: { ...IN, name: 'ports', type: 'inet_service', elem: [22, 80] } } },
    'add set ip corpus ports { type inet_service; elements = { 22, 80 }; }',
  ],
  [{ add: { counter: { ...IN, name: 'total' } } }, 'add counter ip corpus total'],
  [
    { add: { counter: { ...IN, name: 'old_total', packets: 5, bytes: 600 } } },
    'add counter ip corpus old_total { packets 5 bytes 600; }',
  ],
  [
    { add: { element: { ...IN, name: 'pairs', elem: [['10.0.0.1', '10.0.1.1']] } } },
    'add element ip corpus pairs { 10.0.0.1 : 10.0.1.1 }',
  ],
  [
    {
      create: {
        element: { ...IN, name: 'pairs', elem: [[{ elem: { val: '10.0.0.2', comment: 'vm 5 nic 0' } }, '10.0.1.2']] },
      },
    },
    'create element ip corpus pairs { 10.0.0.2 comment "vm 5 nic 0" : 10.0.1.2 }',
  ],
  [
    {
      add: {
        element: {
          ...IN,
          name: 'macs',
          elem: [
            { concat: ['10.0.0.1', '02:00:00:00:00:01'] },
            { elem: { val: { concat: ['10.0.0.2', '02:00:00:00:00:02'] }, comment: 'second' } },
          ],
        },
      },
    },
    'add element ip corpus macs { 10.0.0.1 . 02:00:00:00:00:01, 10.0.0.2 . 02:00:00:00:00:02 comment "second" }',
  ],
  [
    {
      add: {
        element: {
          ...IN,
          name: 'paths',
          elem: [
            [{ concat: ['ib0', '10.0.0.1'] }, { jump: { target: 'leaf' } }],
            [{ concat: ['ib1', '10.0.0.1'] }, { drop: null }],
          ],
        },
      },
    },
    'add element ip corpus paths { ib0 . 10.0.0.1 : jump leaf, ib1 . 10.0.0.1 : drop }',
  ],
  [
    { add: { element: { ...IN, name: 'young', elem: [{ elem: { val: '10.0.0.1', timeout: 90 } }] } } },
    'add element ip corpus young { 10.0.0.1 timeout 90s }',
  ],
];

/** Rules: chain, statements, text behind the chain's name, comment. */
export const RULES: readonly (readonly [string, readonly Statement[], string, string?])[] = [
  [
    'fwd_c',
    [{ match: { op: 'in', left: { ct: { key: 'state' } }, right: ['established', 'related'] } }, { accept: null }],
    'ct state established,related accept',
  ],
  [
    'fwd_c',
    [{ match: { op: 'in', left: { ct: { key: 'status' } }, right: 'dnat' } }, { accept: null }],
    'ct status dnat accept',
  ],
  ['fwd_c', [equal({ ct: { key: 'state' } }, 'new'), { continue: null }], 'ct state == new continue'],
  [
    'fwd_c',
    [equal({ ct: { key: 'direction' } }, 'original'), equal({ ct: { key: 'ip daddr', dir: 'original' } }, '10.0.0.1')],
    'ct direction original ct original ip daddr 10.0.0.1',
  ],
  [
    'fwd_c',
    [
      equal(iifname, 'ib0'),
      equal({ meta: { key: 'oifname' } }, { set: ['virbr1', 'virbr2'] }),
      { counter: null },
      { drop: null },
    ],
    'iifname "ib0" oifname { "virbr1", "virbr2" } counter drop comment "no way through"',
    'no way through',
  ],
  [
    'fwd_c',
    [{ match: { op: '!=', left: iifname, right: { set: ['ib0', 'lo'] } } }, equal(daddr, '@pairs'), { drop: null }],
    'iifname != { "ib0", "lo" } ip daddr @pairs drop',
  ],
  [
    'fwd_c',
    [
      {
        match: {
          op: '!=',
          left: { concat: [saddr, { payload: { protocol: 'ether', field: 'saddr' } }] },
          right: '@macs',
        },
      },
      { drop: null },
    ],
    'ip saddr . ether saddr != @macs drop',
  ],
  [
    'fwd_c',
    [
      equal(saddr, { prefix: { addr: '10.0.0.0', len: 8 } }),
      { match: { op: '!=', left: daddr, right: { range: ['10.1.0.1', '10.1.0.5'] } } },
      { reject: { type: 'icmp', expr: 'admin-prohibited' } },
    ],
    'ip saddr 10.0.0.0/8 ip daddr != 10.1.0.1-10.1.0.5 reject with icmp type admin-prohibited',
  ],
  ['fwd_c', [equal(dport, 22), { reject: { type: 'tcp reset' } }], 'tcp dport 22 reject with tcp reset'],
  ['fwd_c', [{ reject: null }], 'reject'],
  [
    'fwd_c',
    [{ match: { op: '>', left: dport, right: 1024 } }, { match: { op: '<=', left: dport, right: 2048 } }],
    'tcp dport > 1024 tcp dport <= 2048',
  ],
  ['fwd_c', [equal({ '&': [{ ct: { key: 'mark' } }, 255] }, 1), { return: null }], 'ct mark & 255 == 1 return'],
  [
    'fwd_c',
    [
      {
        match: { op: '!=', left: { '&': [{ payload: { protocol: 'ip', field: 'frag-off' } }, 8191] }, right: 0 },
      },
      { drop: null },
    ],
    'ip frag-off & 8191 != 0 drop',
  ],
  [
    'fwd_c',
    [equal({ '&': [{ payload: { protocol: 'tcp', field: 'flags' } }, ['syn', 'ack']] }, 'syn')],
    'tcp flags & (syn | ack) == syn',
  ],
  ['fwd_c', [{ mangle: { key: mark, value: 5 } }], 'meta mark set 5'],
  [
    'fwd_c',
    [{ mangle: { key: mark, value: { '|': [{ '&': [mark, 255] }, 256] } } }],
    'meta mark set (meta mark & 255) | 256',
  ],
  ['fwd_c', [{ mangle: { key: mark, value: { '^': [mark, 3] } } }], 'meta mark set meta mark ^ 3'],
  ['fwd_c', [{ mangle: { key: mark, value: { '<<': [mark, 8] } } }], 'meta mark set meta mark << 8'],
  ['fwd_c', [{ mangle: { key: mark, value: { '>>': [mark, 8] } } }], 'meta mark set meta mark >> 8'],
  [
    'fwd_c',
    [equal({ fib: { result: 'type', flags: ['daddr'] } }, 'local'), { drop: null }],
    'fib daddr type local drop',
  ],
  [
    'fwd_c',
    [
      {
        vmap: {
          key: { ct: { key: 'state' } },
          data: {
            set: [
              ['invalid', { drop: null }],
              ['new', { jump: { target: 'leaf' } }],
            ],
          },
        },
      },
    ],
    'ct state vmap { invalid : drop, new : jump leaf }',
  ],
  ['fwd_c', [{ vmap: { key: { concat: [iifname, daddr] }, data: '@paths' } }], 'iifname . ip daddr vmap @paths'],
  ['fwd_c', [{ log: { prefix: 'no way: ', level: 'info' } }], 'log prefix "no way: " level info'],
  ['fwd_c', [{ log: { group: 3 } }], 'log group 3'],
  ['fwd_c', [{ log: null }], 'log'],
  [
    'fwd_c',
    [equal({ meta: { key: 'l4proto' } }, { set: ['tcp', 'udp'] }), { counter: 'total' }],
    'meta l4proto { tcp, udp } counter name "total"',
  ],
  [
    'fwd_c',
    [{ counter: { packets: 3, bytes: 180 } }, { jump: { target: 'leaf' } }],
    'counter packets 3 bytes 180 jump leaf',
  ],
  ['fwd_c', [equal({ meta: { key: 'iif' } }, 'lo'), { goto: { target: 'leaf' } }], 'iif "lo" goto leaf'],
  ['raw_c', [{ notrack: null }], 'notrack'],
  ['pre', [{ dnat: { addr: { map: { key: daddr, data: '@pairs' } } } }], 'dnat to ip daddr map @pairs'],
  ['pre', [equal(dport, 81), { dnat: { addr: '10.0.0.1', port: 80 } }], 'tcp dport 81 dnat to 10.0.0.1:80'],
  [
    'post',
    [{ snat: { addr: { map: { key: saddr, data: { set: [['10.0.0.1', '10.0.1.1']] } } } } }],
    'snat to ip saddr map { 10.0.0.1 : 10.0.1.1 }',
  ],
  ['post', [{ snat: { addr: '10.0.0.1', flags: ['random', 'persistent'] } }], 'snat to 10.0.0.1 random,persistent'],
  ['post', [{ snat: { addr: '10.0.0.1', flags: 'fully-random' } }], 'snat to 10.0.0.1 fully-random'],
  ['post', [{ masquerade: { flags: 'random' } }], 'masquerade random'],
  ['post', [{ masquerade: null }], 'masquerade'],
];

export const CORPUS: readonly (readonly [Command, string])[] = [
  ...OBJECTS,
  ...RULES.map(([chain, expr, text, comment]): readonly [Command, string] => [
    { add: { rule: { ...IN, chain, expr, ...(comment === undefined ? {} : { comment }) } } },
    `add rule ip corpus ${chain} ${text}`,
  ]),
];

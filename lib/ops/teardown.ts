/** teardown: takes all that is ours off this host, and nothing else. */
import { KvmIbError } from '../core/errors.ts';
import type { Change } from '../core/plan.ts';
import { plan } from '../core/plan.ts';
import { mappingsOf } from '../core/state.ts';
import { apply } from './apply.ts';
import type { Host } from './host.ts';
import { observeHost } from './observe.ts';
import { putBack, removing, unfinishedImport } from './sync.ts';

export interface TeardownResult {
  readonly changes: readonly Change[];
  /** Whether the table was there. */
  readonly table: boolean;
  readonly flushed: number;
  readonly warnings: readonly string[];
}

/**
 * Aliases, pairs and their conntrack entries first, then the table: a table deleted under live mappings may take the
 * last user of conntrack away, and with it the translation of every established flow.
 * @throws KvmIbError `conflict` while VMs are mapped, unless `force`
 */
export function teardown(
  host: Host,
  options: { readonly force?: boolean; readonly dryRun?: boolean },
): Promise<TeardownResult> {
  return host.withLock('teardown', async () => {
    const phase = host.store.importPhase();
    if (!options.force && phase !== undefined && phase !== 'applied' && phase !== 'rolled-back') {
      throw new KvmIbError('conflict', 'Cannot tear down this host', unfinishedImport(phase));
    }
    const { files, unreadable } = host.store.all();
    const vms = files.flatMap((file) => (file.owner.kind === 'vm' ? [file.owner.vm] : []));
    if (!options.force && vms.length > 0) {
      throw new KvmIbError('conflict', 'Cannot tear down this host', {
        why: `VMs are mapped: ${vms.slice(0, 10).join(', ')}${vms.length > 10 ? ', …' : ''}`,
        fix: 'shut them down or migrate them, or use --force and cut them off',
      });
    }
    if (!options.force && unreadable.length > 0) {
      throw new KvmIbError('conflict', 'Cannot tear down this host', {
        why: `a state file cannot be read, so what it mapped is not known: ${unreadable[0]?.path}`,
        fix: 'look at it, or use --force',
      });
    }
    const owned = files.flatMap(mappingsOf);
    const view = await observeHost(host, owned, unreadable.length > 0);
    const observed = { ...view.observed, bridges: [] };
    const changes = plan({ want: [], release: owned }, observed);
    const table = view.table.table;
    if (options.dryRun) return { changes, table, flushed: 0, warnings: [] };
    try {
      for (const file of files) host.store.write(removing(host, file));
      const applied = await apply(host, changes, async () => {
        await host.nat.remove();
        host.store.removeAll();
      });
      return { changes, table, flushed: applied.flushed, warnings: applied.warnings };
    } catch (error) {
      if (error instanceof KvmIbError && error.code === 'reversal-failed') throw error;
      throw putBack(
        host,
        files.map((file) => ({ owner: file.owner, file })),
        error,
      );
    }
  });
}

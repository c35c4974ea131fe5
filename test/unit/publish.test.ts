/** What reaches the probes when reconcile cannot look, waits in vain, or is only asked what it would do. */
import { expect, test } from 'vitest';
import { KvmIbError } from '../../lib/core/errors.ts';
import type { Host } from '../../lib/ops/host.ts';
import type { StatusReport } from '../../lib/ops/publish.ts';
import { reconcileAndPublish } from '../../lib/ops/publish.ts';

/** A host whose lock answers with this error: nothing else of it is reached. */
function failing(error: KvmIbError): Host {
  return {
    config: { networks: [], static: [] },
    withLock: () => Promise.reject(error),
    now: () => '2026-01-01T00:00:00.000Z',
  } as unknown as Host;
}

async function published(error: KvmIbError, dryRun = false): Promise<readonly StatusReport[]> {
  const reports: StatusReport[] = [];
  const sink = {
    write(report: StatusReport): undefined {
      reports.push(report);
    },
  };
  await expect(reconcileAndPublish(failing(error), sink, { dryRun })).rejects.toBe(error);
  return reports;
}

test('a reconcile that could not look says so, with the code of the error and no drift count', async () => {
  expect(await published(new KvmIbError('host-lacks', 'Cannot run nft'))).toEqual([
    {
      time: '2026-01-01T00:00:00.000Z',
      error: 'host-lacks',
      drift: null,
      outdated: null,
      config: { networks: [], static: [] },
      ruleset: null,
      vms: [],
    },
  ]);
});

test('one that did not get the lock leaves the word to the one that holds it', async () => {
  expect(await published(new KvmIbError('lock-not-obtained', 'Cannot lock'))).toEqual([]);
});

test('a dry run reports nothing', async () => {
  expect(await published(new KvmIbError('failed', 'Cannot'), true)).toEqual([]);
});

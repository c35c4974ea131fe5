/** Guards for tests that change a kernel: they run only in the namespace that scripts/in-netns.sh made. */
import { readlinkSync } from 'node:fs';

/** @throws when this process is not in a throw-away network namespace. Call it first in every test under test/kernel. */
export function requireOwnNetns(): void {
  const outer = process.env['KVM_IB_TEST_OUTER_NETNS'];
  if (process.env['KVM_IB_TEST_NETNS'] !== '1' || !outer || readlinkSync('/proc/self/ns/net') === outer) {
    throw new Error('Run kernel tests by `npm test` or `scripts/in-netns.sh npx vitest run --project kernel`');
  }
}

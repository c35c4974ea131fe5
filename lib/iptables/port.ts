/** What kvm-ib asks of iptables on a host. `host/iptables.ts` implements it. */
import type { Variant } from './table.ts';

export interface SavedRules {
  readonly variant: Variant;
  /** What iptables-save printed. */
  readonly text: string;
}

export interface Iptables {
  /**
   * The rules of each part of the kernel that has any.
   * @throws KvmIbError `host-lacks` when a part has rules and its program is missing, `failed` when it cannot be read whole
   */
  save(): Promise<{ readonly saved: readonly SavedRules[]; readonly warnings: readonly string[] }>;
  /**
   * Hands a text to iptables-restore --noflush. One table is one transaction.
   * @throws KvmIbError `failed` with its own words; nothing is changed then
   */
  restore(variant: Variant, text: string): Promise<void>;
}

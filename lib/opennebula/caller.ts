/**
 * Which OpenNebula calls, as far as it matters, by what arrives with the call. No argument names the version. Where one is
 * written (by oned in the domain XML, by the front-end at the root of the remotes) it counts; else the form of the call does.
 */

/** What a call shows of the OpenNebula that makes it. A sign that is absent is not known. */
export interface CallSigns {
  /** `opennebula_version` in the domain XML of a deploy; oned writes it there since 5.8. */
  readonly domainVersion?: string | null | undefined;
  /** VERSION at the root of the remotes, which the front-end copies to its hosts since 4.4. */
  readonly remotesVersion?: string | null | undefined;
  /** `one-<id>`, and a UUID since 5.12. Imported VMs have a UUID since 4.14, so only the first form tells something. */
  readonly deployId?: string | undefined;
  /** False: nothing came on standard input, as with all actions but deploy before 5.0. */
  readonly hasInput?: boolean;
  /** False: no vm.xml lies beside the deployment file, as before 6.0.0. */
  readonly hasVmXml?: boolean;
}

type Version = readonly [major: number, minor: number, patch: number];

/**
 * Whether it is a version that shows a user only what stands between marks (up to 6.0.2). Without a sign it is not: since 6.0.3
 * the marks would be part of the message.
 */
export function wantsErrorBlock(signs: CallSigns): boolean {
  return isBefore(signs, [6, 0, 3]);
}

/** Whether it is a version that says nothing of IB_IP and aliases at deploy (before 6.0.0). Without a sign it is not. */
export function isBeforeVmXml(signs: CallSigns): boolean {
  return isBefore(signs, [6, 0, 0]);
}

function isBefore(signs: CallSigns, bound: Version): boolean {
  const version = parseVersion(signs.domainVersion) ?? parseVersion(signs.remotesVersion);
  if (version !== undefined) return compare(version, bound) < 0;
  return signs.hasInput === false || signs.hasVmXml === false || /^one-[0-9]+$/.test(signs.deployId ?? '');
}

/** `6.0.0.2`, `7.2.0`: a fourth number is that of a hotfix. Undefined when it is no version. */
function parseVersion(text: string | null | undefined): Version | undefined {
  const parts = /^\s*(\d{1,3})\.(\d{1,3})(?:\.(\d{1,5}))?(?![\d])/.exec(text ?? '');
  return parts === null ? undefined : [Number(parts[1]), Number(parts[2]), Number(parts[3] ?? 0)];
}

function compare(a: Version, b: Version): number {
  return a[0] - b[0] || a[1] - b[1] || a[2] - b[2];
}

// `npm test`: the gate. From a fresh clone it installs what is missing, then runs format, lint, types, import directions and every
// test that the rights of this user allow. Without root it says what it left out; in CI (CI=true) nothing may be left out.
import { spawnSync } from 'node:child_process';
import { mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import {
  buildIfStale,
  environment,
  fail,
  installModules,
  installPackages,
  isRoot,
  PACKAGES,
  requireNode,
  root,
  run,
} from './setup.mjs';

requireNode();
const ci = process.env.CI === 'true';
const missing = installPackages(Object.values(PACKAGES).flat());
if (ci && !isRoot) fail('CI runs everything, so it must run as root');
if (ci && missing.length > 0) fail(`packages are missing: ${missing.join(' ')}`);
installModules();

const bin = (name) => join(root, 'node_modules/.bin', name);
console.log('format and lint');
run([bin('biome'), 'check', '--error-on-warnings', '.']);
console.log('types');
run([bin('tsc'), '-p', 'tsconfig.json']);
run([bin('tsc'), '-p', 'lib/tsconfig.pure.json']);
buildIfStale();

const reports = mkdtempSync(join(tmpdir(), 'kvm-ib-test-'));
let passed = 0;
let failed = 0;
let skipped = 0;

/** Minutes after which a run has hung. */
const TIME_LIMIT = 10;

function vitest(project, prefix = [], file = undefined) {
  console.log(`\n${file ?? `${project} tests`}`);
  const report = join(reports, 'report.json');
  rmSync(report, { force: true });
  const argv = [
    ...prefix,
    bin('vitest'),
    'run',
    '--project',
    project,
    '--reporter=default',
    '--reporter=json',
    `--outputFile.json=${report}`,
    ...(file === undefined ? [] : [file]),
  ];
  const result = spawnSync(argv[0], argv.slice(1), {
    stdio: 'inherit',
    cwd: root,
    env: environment,
    timeout: TIME_LIMIT * 60_000,
    killSignal: 'SIGKILL',
  });
  if (result.error) console.error(`error: ${file ?? project}: ${result.error.message}`);
  const counts = readCounts(report);
  passed += counts.passed;
  failed += counts.failed;
  skipped += counts.skipped;
  if (result.status !== 0 && counts.failed === 0) failed += 1;
}

function readCounts(report) {
  try {
    const { numPassedTests, numFailedTests, numPendingTests } = JSON.parse(readFileSync(report, 'utf8'));
    return { passed: numPassedTests, failed: numFailedTests, skipped: numPendingTests };
  } catch {
    return { passed: 0, failed: 1, skipped: 0 };
  }
}

vitest('unit');
const leftOut = [];
const inNetns = [join(root, 'scripts/in-netns.sh')];
if (isRoot && missing.length === 0) {
  // Each file in a namespace of its own: what one leaves in its kernel is not there for the next.
  for (const name of readdirSync(join(root, 'test/kernel')).filter((entry) => entry.endsWith('.test.ts'))) {
    vitest('kernel', inNetns, `test/kernel/${name}`);
  }
  // Before the namespace is entered: there is no network inside.
  run([process.execPath, 'scripts/vm-kernel.mjs']);
  vitest('vm', inNetns);
} else {
  leftOut.push('kernel tests (network namespaces)', 'vm tests (libvirt, QEMU)');
}
rmSync(reports, { recursive: true, force: true });
for (const what of leftOut) {
  console.log(`left out: ${what}: ${isRoot ? `missing: ${missing.join(' ')}` : 'needs root: sudo npm test'}`);
}
console.log(`\n${passed} passed, ${failed} failed, ${skipped} skipped`);
process.exit(failed === 0 ? 0 : 1);
